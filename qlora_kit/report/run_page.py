"""The page of `qlora-kit report`: what a run or a base's exports were made of, and how good the files are."""

import math

from qlora_kit.core.units import counted, human_bytes, human_count, human_seconds
from qlora_kit.report.page import Number, render
from qlora_kit.report.run_page_curves import curves, series
from qlora_kit.report.run_page_facts import RunPage
from qlora_kit.report.run_page_fidelity import decimals, fidelity, samples, size_against_kl
from qlora_kit.report.run_page_record import data_facts, reproduction, setup
from qlora_kit.report.run_page_weights import merge_bases, survival
from qlora_kit.tracking.rates import rate_of_run


def run_page(run: RunPage) -> str:
    """The whole page as HTML."""
    trained = run.untrained is None
    return render(
        "run_page.html.jinja",
        run=run,
        verdict=verdict(run),
        numbers=headline(run) if trained else base_headline(run),
        facts=setup(run),
        rows=data_facts(run.splits),
        record=reproduction(run),
        curves=curves(run.metrics),
        fidelity=fidelity(run.artifacts, run.reference),
        plot=size_against_kl(run.exports, run.reference),
        bases=merge_bases(run.exports),
        survival=survival(run.exports),
        samples=samples(run.samples, run.reference),
        served=[one for one in run.exports if one.serve],
    )


def verdict(run: RunPage) -> str:
    """One sentence: whether training ended or there was none, and what became of the files."""
    if not run.is_finished and run.untrained is None:
        return "Training has not ended."
    made = "Trained" if run.untrained is None else "A base that was never trained"
    exports = run.exports
    if not exports:
        return f"{made}; no file to serve yet."
    rejected = sum(export.rejected for export in exports)
    files = counted(len(exports), "file")
    if not rejected:
        return f"{made}; {files} to serve."
    return f"{made}; {files}, of which {rejected} {'is' if rejected == 1 else 'are'} rejected."


def headline(run: RunPage) -> list[Number]:
    """The numbers at the top; a dash for one that the run has not."""
    losses, held_out = series(run.metrics, "loss"), series(run.metrics, "eval_loss")
    steps = int(max((row["step"] for row in run.metrics), default=0))
    planned = run.recipe.trainer.max_steps if run.recipe else None
    tokens = max((row.get("tokens", 0.0) for row in run.metrics), default=0.0)
    memory = max((value for _, value in series(run.metrics, "peak_memory_bytes")), default=0.0)
    speed = rate_of_run([row for row in run.metrics if "loss" in row])
    seconds = seconds_in_steps(run)
    rows = next((split.rows for split in run.splits if split.name == "training"), None)
    numbers = [
        ("Held-out loss", f"{held_out[-1][1]:.4f}" if held_out else "", ""),
        ("Training loss", f"{losses[-1][1]:.4f}" if losses else "", "last step"),
        ("Steps", f"{steps:,}", f"of {planned:,}" if planned else ""),
        ("Time in steps", human_seconds(seconds) if seconds else "", ""),
        ("Training rows", f"{rows:,}" if rows is not None else "", ""),
        ("Tokens seen", human_count(tokens) if tokens else "", ""),
        ("Throughput", f"{speed:,.0f}" if speed else "", "tokens/s"),
        ("Peak memory", human_bytes(memory) if memory else "", "GPU" if run.environment.gpus else "process"),
    ]
    return [Number(name, value or "-", unit if value else "") for name, value, unit in numbers]


def base_headline(run: RunPage) -> list[Number]:
    """The numbers at the top of the page of a base; what is not known is left out."""
    files = run.exports
    sizes = [one.size_bytes for one in files if one.size_bytes]
    near = [(one.mean_kl, one.name) for one in files if one.mean_kl is not None and math.isfinite(one.mean_kl)]
    numbers = [
        ("Files", str(len(files)), ""),
        ("Smallest file", human_bytes(min(sizes)) if sizes else "", ""),
        ("Lowest mean KL", decimals(5)(min(near)[0]) if near else "", "nats"),
        ("Highest mean KL", decimals(5)(max(near)[0]) if len(near) > 1 else "", "nats"),
    ]
    return [Number(name, value, unit) for name, value, unit in numbers if value]


def seconds_in_steps(run: RunPage) -> float:
    """Time spent in logged steps; loading, saving and scoring are not in it."""
    return max((value for _, value in series(run.metrics, "seconds")), default=0.0)
