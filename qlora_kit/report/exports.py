"""The table that `export` prints."""

from collections.abc import Iterator, Sequence

from qlora_kit.core.console.lines import log
from qlora_kit.core.files import size_on_disk
from qlora_kit.core.units import human_bytes, human_seconds
from qlora_kit.core.verdict import Verdict
from qlora_kit.evaluation.exported import Exported
from qlora_kit.report.table import print_table

COLUMNS = ["artifact", "size", "loss", "change", "perplexity", "mean KL", "p99 KL", "same top", "written in", "verdict"]


def print_exported(title: str, done: Sequence[Exported]) -> None:
    """Print one line a file, with the verdict on it."""
    print_table(title, COLUMNS, [list(_cells(one)) for one in done])
    if any(one.verdict is Verdict.measured for one in done):
        log.info("measured: scored, and held against no bound; export.max_mean_kl sets one")


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
