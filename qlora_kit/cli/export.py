"""`qlora-kit export`: files to serve from a finished run."""

from typing import cast

from qlora_kit.cli.line import parse_line, run_verb_help
from qlora_kit.core.errors import EXIT_OK, Problem, RecipeError
from qlora_kit.schema.export import ExportConfig

EXAMPLES = [
    "qlora-kit export run=latest export=gguf_q4_k_m",
    "qlora-kit export run=latest 'export=[gguf_q4_k_m,gptq_4bit,awq_4bit,merged_16bit]' export.max_mean_kl=0.05",
    "qlora-kit export run=outputs/my_run/2026-01-31_12-00-00 export=gptq_4bit export.gptq.gptq_4bit.group_size=64",
]


def run(arguments: list[str]) -> int:
    """Export as the line says; returns the exit code."""
    line = parse_line(arguments)
    if line.wants_help:
        print(run_verb_help("export", "Merge the adapter once and write the named files.", EXAMPLES))
        return EXIT_OK
    from qlora_kit.schema.compose import Composed, compose_recipe
    from qlora_kit.schema.root import ExportRecipe

    composed: Composed = compose_recipe("export", line.overrides)
    recipe = cast(ExportRecipe, composed.recipe)
    _check_group_sizes(recipe.run, recipe.export)

    from qlora_kit.pipelines.export import export
    from qlora_kit.pipelines.opened_run import open_run

    export(open_run(recipe.run), recipe.export)
    return EXIT_OK


def _check_group_sizes(run_name: str, config: ExportConfig) -> None:
    """Refuse a group size that does not divide a layer's width, before anything heavy is imported."""
    from pathlib import Path

    from qlora_kit.core.files import read_json
    from qlora_kit.core.rundir import find_run
    from qlora_kit.export.group_sizes import check_group_size, dividing_group_sizes, linear_input_widths
    from qlora_kit.model.source import locate_base
    from qlora_kit.schema.compose import load_recipe
    from qlora_kit.schema.root import TrainRecipe

    directory = find_run(run_name, finished=True)
    trained = cast(TrainRecipe, load_recipe("train", directory.recipe))
    folder: Path = locate_base(trained.model)
    widths = linear_input_widths(read_json(folder / "config.json"))
    sizes = {f"export.gptq.{name}.group_size": target.group_size for name, target in config.gptq.items()}
    sizes |= {f"export.awq.{name}.group_size": target.group_size for name, target in config.awq.items()}
    problems = []
    for path, size in sizes.items():
        if problem := check_group_size(size, widths):
            fitting = [str(fit) for fit in dividing_group_sizes(widths.values()) if fit > 0]
            what = f"{problem.what}; {', '.join(fitting)} do"
            problems.append(Problem(what, path, f"{path}={fitting[-1] if fitting else -1}"))
    if problems:
        raise RecipeError(problems)
