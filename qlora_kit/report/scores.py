"""The table that `eval` prints."""

from collections.abc import Mapping, Sequence
from typing import Any

from qlora_kit.core.console.safe import SafeConsole
from qlora_kit.core.units import human_bytes
from qlora_kit.core.verdict import Verdict, recorded_verdict
from qlora_kit.report.table import print_table

_ORDER = (
    *("artifact", "size", "loss", "to adapter", "to base", "perplexity", "mean KL", "p99 KL", "same top"),
    *("exact match", "stops", "text perplexity", "tokens/s"),
)
NOTE = "note"  # the last column
_BETWEEN = 2  # blanks between two columns

Cells = dict[str, str]


def print_scores(title: str, rows: Sequence[Mapping[str, Any]], reference: str, words: str) -> None:
    """Print one line an artifact: size, fit, distance from the reference, task, stops, speed.

    With 95% intervals where the terminal is wide enough for them. Reads the rows of eval.json of any version.

    Args:
        reference: what the others are compared with, by its name in the table.
        words: what that is.
    """
    shown = [_cells(row, reference, with_intervals=True) for row in rows]
    is_wide = _width(shown) <= SafeConsole().width
    if not is_wide:
        shown = [_cells(row, reference, with_intervals=False) for row in rows]
    columns = _columns(shown)
    notes = ", with 95% intervals by row" if is_wide else ""
    heading = f"{title}: KL in nats against {words}{notes}"
    print_table(heading, columns, [[cells.get(column, "-") for column in columns] for cells in shown])


def _cells(row: Mapping[str, Any], reference: str, *, with_intervals: bool) -> Cells:
    """Column -> text of one line, columns without a value left out, so that one that no line has disappears."""
    if row.get("error"):
        return {"artifact": str(row["name"]), "size": human_bytes(row["size_bytes"]), NOTE: "FAILED"}
    fit = row["fidelity"]
    # Against itself a model is exact, however few the rows.
    exact = ("mean_kl", "same_top") if row["name"] == reference else ()

    def within(text: str, value: float, record: Mapping[str, Any], key: str) -> str:
        interval = None if key in exact else record.get(f"{key}_interval")
        return text + _interval(text, value, interval) if interval and with_intervals else text

    cells = {"artifact": str(row["name"]), "size": human_bytes(row["size_bytes"])}
    cells["loss"] = within(f"{fit['loss']:.4f}", fit["loss"], fit, "loss")
    if fit.get("loss_change") is not None and row["name"] != reference:
        change = fit["loss_change"]
        cells[f"to {reference}"] = within(f"{change:+.4f}", change, fit, "loss_change")
    cells["perplexity"] = f"{fit['perplexity']:.3f}"
    cells["mean KL"] = within(f"{fit['mean_kl']:.5f}", fit["mean_kl"], fit, "mean_kl")
    cells["p99 KL"] = f"{fit['p99_kl']:.4f}"
    cells["same top"] = within(f"{fit['same_top']:.1%}", fit["same_top"], fit, "same_top")
    for column, key in (("exact match", "exact_match"), ("stops", "stops")):
        if row.get(key) is not None:
            cells[column] = within(f"{row[key]:.1%}", row[key], row, key)
    if row.get("text_perplexity") is not None:
        value = row["text_perplexity"]
        cells["text perplexity"] = within(f"{value:.3f}", value, row, "text_perplexity")
    if row.get("answered"):
        cells["tokens/s"] = f"{row['tokens_per_second']:.0f}"
    cells.update(_of_the_harness(row))
    cells[NOTE] = _note(row, reference)
    return cells


def _interval(text: str, value: float, interval: Sequence[float]) -> str:
    """` ±half` where the value is in the middle, else ` low..high`, in the decimals of the value's own text."""
    low, high = interval
    number, percent = text.rstrip("%"), text.endswith("%")
    decimals, scale = len(number.partition(".")[2]), 100 if percent else 1
    half = (high - low) / 2
    if abs((low + high) / 2 - value) * scale < 0.5 * 10**-decimals:
        return f" ±{half * scale:.{decimals}f}"
    return f" {low * scale:.{decimals}f}..{high * scale:.{decimals}f}"


def _of_the_harness(row: Mapping[str, Any]) -> Cells:
    """The first metric of each task of lm-eval; eval.json has the others."""
    found = {}
    for task, metrics in row.get("lm_eval", {}).items():
        named = [(name.partition(",")[0], value) for name, value in metrics.items() if "_stderr" not in name]
        if named:
            found[f"{task} {named[0][0]}"] = f"{named[0][1]:.4f}"
    return found


def _note(row: Mapping[str, Any], reference: str) -> str:
    verdict = recorded_verdict(row)
    if verdict is Verdict.rejected:
        return verdict.shown
    change = row["fidelity"].get("loss_change_interval")
    return f"worse than the {reference}" if change and change[0] > 0 and row["name"] != "base" else ""


def _columns(shown: Sequence[Cells]) -> list[str]:
    """Those that some line has, lm-eval's tasks last before the notes."""
    present = dict.fromkeys(column for cells in shown for column in cells if column != NOTE)
    return [*(column for column in _ORDER if column in present), *(c for c in present if c not in _ORDER), NOTE]


def _width(shown: Sequence[Cells]) -> int:
    columns = _columns(shown)
    widest = [max([len(column), *(len(cells.get(column, "-")) for cells in shown)]) for column in columns]
    return sum(widest) + _BETWEEN * (len(columns) - 1)
