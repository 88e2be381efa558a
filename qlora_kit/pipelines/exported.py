"""How exports ended, and the table of them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora_kit.core.console.lines import log
from qlora_kit.core.errors import FidelityError, RecipeError, RunError
from qlora_kit.core.files import size_on_disk
from qlora_kit.core.units import human_bytes, human_seconds
from qlora_kit.core.verdict import Verdict
from qlora_kit.evaluation.scores import Fidelity
from qlora_kit.export.manifest import MANIFEST, read_manifest
from qlora_kit.formats.registry import FORMATS
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
    if any(one.verdict is Verdict.measured for one in done):
        log.info("measured: scored, and held against no bound; export.max_mean_kl sets one")


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
        raise FidelityError(rejection({export.folder: export.faults for export in rejected}))


def rejection(faults: Mapping[Path, Sequence[str]]) -> str:
    """What an error says of rejected files, by folder, with what brings each closer."""
    lines = []
    for folder, found in faults.items():
        lines += [f"{folder.name} is rejected: {fault}" for fault in found]
        closer = _closer(folder) if any("mean KL" in fault for fault in found) else ()
        lines += [f"  closer is {'; or '.join(closer)}"] if closer else []
    return "\n".join(lines)


def _closer(folder: Path) -> tuple[str, ...]:
    """What comes closer than a file, in the words of its own format."""
    try:
        manifest = read_manifest(folder) if (folder / MANIFEST).is_file() else {}
    except RecipeError:  # its fault is told elsewhere
        manifest = {}
    written = FORMATS.get(str(manifest.get("format", "")))
    if written is None:
        return ()
    rows = ("more rows to calibrate on (export.calibration_rows)",) if written.is_calibrated else ()
    return (*written.remedies(dict(manifest.get("settings") or {})), *rows)


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
