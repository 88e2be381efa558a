"""`qlora-kit eval`: one table over every artifact of a run."""

from typing import cast

from qlora_kit.cli.line import parse_line, run_verb_help
from qlora_kit.core.errors import EXIT_OK

EXAMPLES = [
    "qlora-kit eval run=latest",
    "qlora-kit eval run=latest 'eval.artifacts=[adapter,gguf_q4_k_m]' eval.kl_rows=100",
]


def run(arguments: list[str]) -> int:
    """Score as the line says; returns the exit code."""
    line = parse_line(arguments)
    if line.wants_help:
        print(run_verb_help("eval", "Score base, adapter, merged and every export on held-out rows.", EXAMPLES))
        return EXIT_OK
    from qlora_kit.schema.compose import compose_recipe
    from qlora_kit.schema.root import EvalRecipe

    recipe = cast(EvalRecipe, compose_recipe("eval", line.overrides).recipe)

    from qlora_kit.pipelines.evaluate import evaluate
    from qlora_kit.pipelines.opened_run import open_run
    from qlora_kit.report.scores import print_scores

    opened = open_run(recipe.run)
    rows = evaluate(opened, recipe.eval)
    print_scores(str(opened.directory.path), [vars(row) | {"fidelity": vars(row.fidelity)} for row in rows])
    return EXIT_OK
