"""The page of `qlora-kit report`: what a run or a base's exports were made of, and how good the files are."""

from collections.abc import Sequence
from itertools import pairwise
from statistics import median

from qlora_kit import __version__
from qlora_kit.core.shell import is_line
from qlora_kit.core.units import counted, human_bytes, human_count, human_seconds
from qlora_kit.report.page import page, text
from qlora_kit.report.run_page_base import base_headline, base_rows, base_setup, base_verdict
from qlora_kit.report.run_page_curves import curves, series
from qlora_kit.report.run_page_facts import Missing, RunPage
from qlora_kit.report.run_page_fidelity import fidelity_table, samples, serving, size_against_kl
from qlora_kit.report.run_page_record import data_facts, reproduction, setup
from qlora_kit.report.run_page_weights import merge_bases, survival

STYLE = "run_page.css"


def run_page(run: RunPage) -> str:
    """The whole page as HTML."""
    parts = [
        _header(run),
        _section("Warnings", "warnings", _missing([Missing(warning) for warning in run.warnings])),
        _section("Missing", "missing", _missing(run.missing)),
        *_made(run),
        _section("Fidelity", "fidelity", _fidelity(run)),
        _section("Merge bases", "bases", merge_bases(run.exports)),
        _section("What is left of the update", "survival", survival(run.exports)),
        _section("Samples", "samples", samples(run.samples, run.reference)),
        _section("Serving", "serving", serving(run)),
        _section("Making it again", "record", reproduction(run)),
        f"<footer>Written by qlora-kit {text(__version__)}. This file needs no network.</footer>",
    ]
    kind = "a run" if run.untrained is None else "exports of a base"
    return page(f"{run.name}: {kind}", "\n".join(part for part in parts if part), STYLE)


def _section(title: str, name: str, inner: str) -> str:
    return f'<section id="{name}">\n<h2>{text(title)}</h2>\n{inner}\n</section>' if inner else ""


def _made(run: RunPage) -> list[str]:
    """How the files came about: by training, or straight from a base."""
    if run.untrained is not None:
        return [
            _section("How the files were made", "setup", base_setup(run, run.untrained)),
            _section("Rows", "rows", base_rows(run, run.untrained)),
        ]
    return [
        _section("How it was trained", "setup", setup(run)),
        _section("Curves", "curves", curves(run.metrics)),
        _section("Rows", "rows", data_facts(run.splits)),
    ]


def _fidelity(run: RunPage) -> str:
    return fidelity_table(run.artifacts, run.reference) + size_against_kl(run.exports, run.reference)


def _header(run: RunPage) -> str:
    numbers = headline(run) if run.untrained is None else base_headline(run)
    said = verdict(run) if run.untrained is None else base_verdict(run)
    shown = "".join(
        f"<div><dt>{text(name)}</dt><dd>{text(value)}{f' <small>{text(unit)}</small>' if unit else ''}</dd></div>"
        for name, value, unit in numbers
    )
    return (
        f'<header>\n<p class="eyebrow">qlora-kit report</p>\n<h1>{str(text(run.name)).replace("_", "_<wbr>")}</h1>\n'
        f'<p class="lead">{text(said)}</p>\n<p class="soft"><code>{text(run.path)}</code></p>\n'
        f'<dl class="numbers eight">{shown}</dl>\n</header>'
    )


def verdict(run: RunPage) -> str:
    """One sentence: whether training ended, and what became of the files."""
    if not run.is_finished:
        return "Training has not ended."
    exports = run.exports
    if not exports:
        return "Trained; no file to serve yet."
    rejected = sum(export.rejected for export in exports)
    files = counted(len(exports), "file")
    if not rejected:
        return f"Trained; {files} to serve."
    return f"Trained; {files}, of which {rejected} {'is' if rejected == 1 else 'are'} rejected."


def headline(run: RunPage) -> list[tuple[str, str, str]]:
    """Name, value and unit of the numbers at the top; a dash for one that the run has not."""
    losses, held_out = series(run.metrics, "loss"), series(run.metrics, "eval_loss")
    steps = int(max((row["step"] for row in run.metrics), default=0))
    planned = run.recipe.trainer.max_steps if run.recipe else None
    tokens = max((row.get("tokens", 0.0) for row in run.metrics), default=0.0)
    memory = max((value for _, value in series(run.metrics, "peak_memory_bytes")), default=0.0)
    speeds = [value for _, value in series(run.metrics, "tokens_per_second")]
    seconds = seconds_in_steps(run)
    rows = next((split.rows for split in run.splits if split.name == "training"), None)
    numbers = [
        ("Held-out loss", f"{held_out[-1][1]:.4f}" if held_out else "", ""),
        ("Training loss", f"{losses[-1][1]:.4f}" if losses else "", "last step"),
        ("Steps", f"{steps:,}", f"of {planned:,}" if planned else ""),
        ("Time in steps", human_seconds(seconds) if seconds else "", ""),
        ("Training rows", f"{rows:,}" if rows is not None else "", ""),
        ("Tokens seen", human_count(tokens) if tokens else "", ""),
        ("Throughput", f"{median(speeds[1:] or speeds):,.0f}" if speeds else "", "tokens/s"),
        ("Peak memory", human_bytes(memory) if memory else "", "GPU" if run.environment.gpus else "process"),
    ]
    return [(name, value or "-", unit if value else "") for name, value, unit in numbers]


def seconds_in_steps(run: RunPage) -> float:
    """Time spent in logged steps: the tokens of each by its speed; loading, saving and scoring are not in it."""
    rows = [row for row in run.metrics if row.get("tokens_per_second", 0) > 0 and "tokens" in row]
    before = [0.0, *(row["tokens"] for row in rows)]
    return sum(
        max(0.0, after - earlier) / row["tokens_per_second"]
        for (earlier, after), row in zip(pairwise(before), rows, strict=True)
    )


def _missing(missing: Sequence[Missing]) -> str:
    items = "".join(f"<li><p>{text(one.what)}</p>{_remedy(one.fix)}</li>" for one in missing)
    return f'<ul class="missing">{items}</ul>' if items else ""


def _remedy(fix: str) -> str:
    """A line to paste; what is none, as where something is left to fill in, is told as words."""
    return f"<pre>{text(fix)}</pre>" if is_line(fix) else f"<p>{text(f'Do: {fix}')}</p>" if fix else ""
