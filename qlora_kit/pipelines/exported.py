"""How exports ended, and the table of them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora_kit.core.errors import FidelityError, RunError
from qlora_kit.core.files import size_on_disk
from qlora_kit.core.units import human_bytes, human_seconds
from qlora_kit.core.verdict import Verdict
from qlora_kit.evaluation.scores import Fidelity
from qlora_kit.report.table import print_table

COLUMNS = ["artifact", "size", "loss", "change", "perplexity", "mean KL", "p99 KL", "same top", "written in", "verdict"]


@dataclass(frozen=True)
class Exported:
    """How an export ended.

    Attributes:
        seconds: that writing it took.
        fidelity: None without held-out rows.
        verdict: None for a file that was not written.
        faults: why the file must not be served; none for a good one.
        error: why there is no file.
    """

    name: str
    folder: Path
    seconds: float
    fidelity: Fidelity | None = None
    verdict: Verdict | None = None
    faults: tuple[str, ...] = ()
    error: str = ""


def print_exported(title: str, done: Sequence[Exported]) -> None:
    """Print one line a file, with the verdict on it."""
    print_table(title, COLUMNS, [list(_cells(one)) for one in done])


def raise_what_went_wrong(done: Sequence[Exported]) -> None:
    """End as the worst of the exports did.

    Raises:
        RunError: one failed; the others are written.
        FidelityError: one is rejected.
    """
    failed = [export for export in done if export.error]
    rejected = [export for export in done if export.verdict is Verdict.rejected]
    if failed:
        raise RunError("\n".join(f"{export.name} was not written: {export.error}" for export in failed))
    if rejected:
        raise FidelityError(rejection({export.name: export.faults for export in rejected}))


def rejection(faults: Mapping[str, Sequence[str]]) -> str:
    """What an error says of rejected files, by name, with what brings a file closer."""
    lines = [f"{name} is rejected: {fault}" for name, found in faults.items() for fault in found]
    if any("mean KL" in line for line in lines):
        lines.append("more bits, smaller groups or more export.calibration_rows bring a file closer")
    return "\n".join(lines)


def _cells(one: Exported) -> Iterator[str]:
    fit = one.fidelity
    yield one.name
    yield "-" if one.error else human_bytes(size_on_disk(one.folder))
    if fit is None:
        yield from ["-"] * 6
    else:
        yield f"{fit.loss:.4f}"
        yield "-" if fit.loss_change is None else f"{fit.loss_change:+.4f}"
        yield f"{fit.perplexity:.3f}"
        yield f"{fit.mean_kl:.5f}"
        yield f"{fit.p99_kl:.4f}"
        yield f"{fit.same_top:.1%}"
    yield human_seconds(one.seconds)
    yield "FAILED" if one.verdict is None else one.verdict.shown
