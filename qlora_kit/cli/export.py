"""`qlora-kit export`: files to serve from a finished run, or a base model quantized."""

from functools import partial

from qlora_kit.cli.line import parse_line, run_verb_help
from qlora_kit.core.distributed import refuse_several_processes
from qlora_kit.core.errors import EXIT_OK, RecipeError
from qlora_kit.core.shell import shell_line

SUMMARY = "Merge a run's adapter once and write the named files; or quantize a base model."
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
    from qlora_kit.runs.wished import with_wished_exports
    from qlora_kit.schema.check_exported import check_exported
    from qlora_kit.schema.compose import compose_recipe

    overrides = with_wished_exports(line.overrides, line.value("run"))
    composed = compose_recipe("export", overrides)
    recipe = composed.recipe
    option = composed.choices.get("data", "None")
    if found := check_exported(recipe, None if option == "None" else option):
        raise RecipeError([composed.problem(issue) for issue in found])

    from qlora_kit.formats.checks import refuse_unfit
    from qlora_kit.formats.quantized_bases import with_unpacked_base
    from qlora_kit.runs.open import open_to_export

    recipe = with_unpacked_base(recipe)
    opened = open_to_export(recipe, overrides, partial(refuse_unfit, export=recipe.export))

    from qlora_kit.pipelines.export import export  # behind the checks: it takes seconds to import

    export(opened, recipe.export)
    return EXIT_OK
