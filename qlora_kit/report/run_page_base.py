"""The parts of a page that a base that was never trained has in place of a run's: it has no training to show."""

import math
from collections.abc import Iterator, Sequence

from qlora_kit.core.shell import override, shell_line
from qlora_kit.core.units import counted, human_bytes
from qlora_kit.report.page import text
from qlora_kit.report.run_page_facts import Missing, RunPage, Untrained
from qlora_kit.report.run_page_fidelity import decimals
from qlora_kit.report.run_page_record import data_facts, facts_list, hardware_of

NO_TRAINING = (
    "Nothing was trained here: the files are the base in other formats. So this page has no training curves, no "
    "training loss and no adapter."
)


def base_verdict(page: RunPage) -> str:
    """One sentence: what this is, and what became of the files."""
    files = page.exports
    if not files:
        return "A base that was never trained; no file to serve yet."
    rejected = sum(one.rejected for one in files)
    said = f"A base that was never trained; {counted(len(files), 'file')}"
    return (
        f"{said}, of which {rejected} {'is' if rejected == 1 else 'are'} rejected." if rejected else f"{said} to serve."
    )


def base_headline(page: RunPage) -> list[tuple[str, str, str]]:
    """Name, value and unit of the numbers at the top; what is not known is left out."""
    files = page.exports
    sizes = [one.size_bytes for one in files if one.size_bytes]
    near = [(one.mean_kl, one.name) for one in files if one.mean_kl is not None and math.isfinite(one.mean_kl)]
    numbers = [
        ("Files", str(len(files)), ""),
        ("Smallest file", human_bytes(min(sizes)) if sizes else "", ""),
        ("Lowest mean KL", decimals(5)(min(near)[0]) if near else "", "nats"),
        ("Highest mean KL", decimals(5)(max(near)[0]) if len(near) > 1 else "", "nats"),
    ]
    return [(name, value, unit) for name, value, unit in numbers if value]


def base_setup(page: RunPage, untrained: Untrained) -> str:
    """What was exported, on which machine, and that nothing was trained."""
    recipe, facts = untrained.recipe, list[tuple[str, str]]()
    if untrained.base:
        at = f" at {recipe.revision}" if recipe and recipe.revision else ""
        facts.append(("Base", f"{untrained.base}{at}"))
    if hardware := hardware_of(page.environment):
        facts.append(("Hardware", hardware))
    if page.started:
        facts.append(("Started", page.started))
    return f"<p>{text(NO_TRAINING)}</p>\n{facts_list(facts)}"


def base_rows(page: RunPage, untrained: Untrained) -> str:
    """What the files were calibrated and scored on."""
    if page.splits:
        limit = untrained.recipe.export.calibration_rows if untrained.recipe else None
        most = "" if limit is None else f" At most {limit:,} of the rows to calibrate on were looked at."
        return f'{data_facts(page.splits)}\n<p class="note">Each row is in one of the two splits.{most}</p>'
    if untrained.calibration_rows is None:
        return ""
    others = "" if untrained.scored_rows is None else f", and scored on {untrained.scored_rows:,} others"
    long = "" if untrained.row_tokens is None else f", {untrained.row_tokens:,} tokens each"
    return (
        f"<p>Calibrated on {counted(untrained.calibration_rows, 'row')} of {text(untrained.calibration)}{others}{long}"
        ". Rows like those that the model will see tell more of it: "
        "data=&lt;option&gt; data.train_file=&lt;file&gt;.</p>"
    )


def base_missing(page: RunPage, untrained: Untrained) -> Iterator[Missing]:
    """What whole exports of a base would have and these have not."""
    if not page.exports:
        base = override("base", untrained.base) if untrained.base else "base=<model>"
        line = shell_line(["qlora-kit", "export", base, "export=gguf_q4_k_m"])
        yield Missing("There is no finished file.", line)
    if not page.splits and untrained.calibration_rows is None:
        yield Missing("data.json tells nothing about the rows.")
    if not page.environment.packages:
        yield Missing("environment.json tells no versions, so these files cannot be made again exactly.")
    if unscored := _unscored(page):
        what = f"Not scored by eval yet: {', '.join(unscored)}; their numbers are those of the export."
        yield Missing(what, page.line("eval", "base"))


def _unscored(page: RunPage) -> Sequence[str]:
    return [one.name for one in page.exports if not one.is_evaluated]
