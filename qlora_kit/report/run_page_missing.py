"""What a run or the exports of a base lack, in words, with the command that makes it."""

from collections.abc import Iterator

from qlora_kit.core.shell import override, shell_line
from qlora_kit.core.units import counted
from qlora_kit.report.run_page_facts import Missing, RunPage, Untrained


def what_is_missing(page: RunPage) -> list[Missing]:
    """Everything that a whole one would have and this one has not."""
    if page.untrained is not None:
        return list(_of_base(page, page.untrained))
    return [*_training(page), *_records(page), *_files(page)]


def _training(page: RunPage) -> Iterator[Missing]:
    steps = int(max((row["step"] for row in page.metrics), default=0))
    if not page.is_finished:
        logged = counted(steps, "step is", "steps are") if steps else "no step is"
        what = f"Training has not ended: {logged} logged, and there is no adapter. If it was stopped, it can go on."
        yield Missing(what, page.line("train", "resume"))
    elif not steps:
        yield Missing("metrics.jsonl holds no step, so there are no curves.")
    was_scored = any(artifact.loss is not None for artifact in page.artifacts)  # on rows given after training too
    if steps and not was_scored and not any("eval_loss" in row for row in page.metrics):
        if page.splits and all(split.name != "held out" for split in page.splits):
            fix = page.line("eval", "run", "data.eval_file=held_out.jsonl")
            yield Missing("No rows are held out, so nothing tells how well the model does on rows it never saw.", fix)
        else:
            yield Missing("No held-out loss was measured yet; training measures it at its end.")


def _records(page: RunPage) -> Iterator[Missing]:
    if not page.splits:
        yield Missing("data.json tells nothing about the rows.")
    if not page.environment.packages:
        yield Missing("environment.json tells no versions, so this run cannot be repeated exactly.")


def _files(page: RunPage) -> Iterator[Missing]:
    if not page.is_finished:
        return
    if not page.exports:
        yield Missing("No file to serve was exported yet.", page.line("export", "run", "export=gguf_q4_k_m"))
    if any(split.name == "held out" for split in page.splits):
        unscored = [export.name for export in page.exports if not export.is_evaluated]
        if not any(artifact.is_evaluated for artifact in page.artifacts):
            what = "Nothing was scored by eval yet, so base, adapter and files cannot be compared."
            yield Missing(what, page.line("eval", "run"))
        elif unscored:
            what = f"Not scored by eval yet: {', '.join(unscored)}; their numbers are those of the export."
            yield Missing(what, page.line("eval", "run"))


def _of_base(page: RunPage, untrained: Untrained) -> Iterator[Missing]:
    """What whole exports of a base would have and these have not."""
    if not page.exports:
        base = override("base", untrained.base) if untrained.base else "base=<model>"
        line = shell_line(["qlora-kit", "export", base, "export=gguf_q4_k_m"])
        yield Missing("There is no finished file.", line)
    if not page.splits and untrained.calibration_rows is None:
        yield Missing("data.json tells nothing about the rows.")
    if not page.environment.packages:
        yield Missing("environment.json tells no versions, so these files cannot be made again exactly.")
    if unscored := [one.name for one in page.exports if not one.is_evaluated]:
        what = f"Not scored by eval yet: {', '.join(unscored)}; their numbers are those of the export."
        yield Missing(what, page.line("eval", "base"))
