"""`qlora-kit eval`: one table over every artifact of a run, or of a base model."""

from dataclasses import asdict

from qlora_kit.cli.line import parse_line, run_verb_help
from qlora_kit.core.console.lines import log
from qlora_kit.core.distributed import refuse_several_processes
from qlora_kit.core.errors import EXIT_OK, RecipeError
from qlora_kit.core.shell import shell_line

SUMMARY = "Score every export of a run beside base and adapter, or of a quantized base model beside the base itself."
EXAMPLES = [
    "qlora-kit eval run=latest",
    "qlora-kit eval run=latest 'eval.artifacts=[adapter,gguf_q4_k_m]' eval.kl_rows=100",
    "qlora-kit eval run=latest data.eval_file=held_out.jsonl",
    "qlora-kit eval base=outputs/my_base/2026-01-31_12-00-00",
]


def run(arguments: list[str]) -> int:
    """Score as the line says; returns the exit code."""
    line = parse_line(arguments, "run")
    if line.wants_help:
        print(run_verb_help("eval", SUMMARY, EXAMPLES))
        return EXIT_OK
    refuse_several_processes(shell_line(["qlora-kit", "eval", *arguments]), "an evaluation")
    from qlora_kit.schema.check_exported import check_evaluated
    from qlora_kit.schema.compose import compose_recipe

    composed = compose_recipe("eval", line.overrides)
    recipe = composed.recipe
    if found := check_evaluated(recipe):
        raise RecipeError([composed.problem(issue) for issue in found])

    from qlora_kit.formats.next_line import line_to_report
    from qlora_kit.pipelines.evaluate import evaluate, raise_failed_scores
    from qlora_kit.report.scores import print_scores
    from qlora_kit.runs.open import open_exports, open_idle_run

    if recipe.base is None:
        subject = open_idle_run("latest" if recipe.run is None else recipe.run, recipe.data)
    else:
        subject = open_exports(recipe.base)
    rows = evaluate(subject, recipe.eval)
    table = [asdict(row) for row in rows]
    print_scores(str(subject.directory.path), table, subject.models[-1], subject.reference_as_stored)
    log.info(f"next: {line_to_report(subject.directory)}")
    raise_failed_scores(rows, subject.directory.exports)
    return EXIT_OK
