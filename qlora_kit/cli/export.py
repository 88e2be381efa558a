"""`qlora-kit export`: files to serve from a finished run, or from a base that was never trained."""

from typing import TYPE_CHECKING, cast

from qlora_kit.cli.line import parse_line, run_verb_help
from qlora_kit.core.distributed import refuse_several_processes
from qlora_kit.core.errors import EXIT_OK, RecipeError
from qlora_kit.core.shell import shell_line
from qlora_kit.schema.export import ExportConfig

if TYPE_CHECKING:
    from pathlib import Path

    from qlora_kit.runs.run import Run
    from qlora_kit.schema.root import ExportRecipe

SUMMARY = "Merge a run's adapter once and write the named files; or write them from a base that was never trained."
EXAMPLES = [
    "qlora-kit export run=latest export=gguf_q4_k_m",
    "qlora-kit export run=latest 'export=[gguf_q4_k_m,gptq_4bit,awq_4bit,merged_16bit]' export.max_mean_kl=0.05",
    "qlora-kit export run=outputs/my_run/2026-01-31_12-00-00 export=gptq_4bit export.gptq.gptq_4bit.group_size=64",
    "qlora-kit export run=latest export=gguf_q4_k_m data.eval_file=held_out.jsonl export.max_mean_kl=0.05",
    "qlora-kit export base=models/my_base 'export=[gguf_q4_k_m,awq_4bit]' data=rows data.train_file=chats.jsonl",
]


def run(arguments: list[str]) -> int:
    """Export as the line says; returns the exit code."""
    line = parse_line(arguments, "run")
    if line.wants_help:
        print(run_verb_help("export", SUMMARY, EXAMPLES))
        return EXIT_OK
    refuse_several_processes(shell_line(["qlora-kit", "export", *arguments]), "an export")
    from qlora_kit.schema.check_exported import check_exported
    from qlora_kit.schema.compose import compose_recipe
    from qlora_kit.schema.root import ExportRecipe

    composed = compose_recipe("export", line.overrides)
    recipe = cast(ExportRecipe, composed.recipe)
    option = composed.choices.get("data", "None")
    if found := check_exported(recipe, None if option == "None" else option):
        raise RecipeError([composed.problem(finding) for finding in found])
    subject = _run(recipe) if recipe.base is None else _base(recipe, line.overrides)

    from qlora_kit.pipelines.export import export

    export(subject, recipe.export)
    return EXIT_OK


def _run(recipe: "ExportRecipe") -> "Run":
    from qlora_kit.model.source import locate_base
    from qlora_kit.runs.directory import find_run, refuse_at_work
    from qlora_kit.schema.compose import load_recipe
    from qlora_kit.schema.data import LaterRows
    from qlora_kit.schema.root import TrainRecipe

    name = "latest" if recipe.run is None else recipe.run
    found = find_run(name, finished=True)
    refuse_at_work(found)
    trained = cast(TrainRecipe, load_recipe("train", found.recipe))
    _check_shapes(locate_base(trained.model), recipe.export)

    from qlora_kit.runs.open import open_run

    later = LaterRows(eval_file=recipe.data.eval_file, eval_rows=recipe.data.eval_rows)
    return open_run(str(found.path), later)


def _base(recipe: "ExportRecipe", overrides: list[str]) -> "Run":
    from qlora_kit.runs.named_base import named_base

    named = named_base(recipe)
    _check_shapes(named.folder, recipe.export)

    from qlora_kit.runs.open import open_base

    return open_base(recipe, named, overrides)


def _check_shapes(base_folder: "Path", config: ExportConfig) -> None:
    """Refuse what the base cannot be written as: group sizes by config.json alone, at once, then all by its layers."""
    from qlora_kit.formats.checks import check_exports, refuse_group_sizes

    refuse_group_sizes(base_folder, config)
    if unfit := check_exports(base_folder, config).problems:
        raise RecipeError(unfit)
