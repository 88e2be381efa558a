"""`qlora-kit inspect`: rendered rows with the trained tokens marked; needs the tokenizer alone."""

from typing import cast

from qlora_kit.cli.line import parse_line
from qlora_kit.core.errors import EXIT_OK, RecipeError
from qlora_kit.schema.root import TrainRecipe

HELP = """usage: qlora-kit inspect [rows=N] [group=option] [path=value]

Prints N rendered training rows with the trained tokens marked, and counts over all rows. Loads no weight.

Examples:
  qlora-kit inspect experiment=smollm2_135m_home_commands_cpu
  qlora-kit inspect rows=9 model=llama3_1_8b model.source=/models/llama data=jsonl_messages data.train_file=my.jsonl"""

DEFAULT_ROWS = 3


def run(arguments: list[str]) -> int:
    """Print the rows; returns the exit code."""
    line = parse_line(arguments)
    if line.wants_help:
        print(HELP)
        return EXIT_OK
    count = _count(line.value("rows"))
    overrides = [override for override in line.overrides if not override.startswith("rows=")]

    from qlora_kit.schema.compose import compose_recipe

    recipe = cast(TrainRecipe, compose_recipe("train", overrides).recipe)

    from qlora_kit.model.source import locate_base
    from qlora_kit.model.tokenizer import load_tokenizer
    from qlora_kit.pipelines.inspect import inspect

    tokenizer = load_tokenizer(locate_base(recipe.model), recipe.model.chat_template)
    inspect(recipe.data, tokenizer, count)
    return EXIT_OK


def _count(rows: str | None) -> int:
    if rows is None:
        return DEFAULT_ROWS
    if not rows.isdecimal() or int(rows) < 1:
        raise RecipeError(
            f"rows must be a number of at least 1, got {rows}", "the command line", f"rows={DEFAULT_ROWS}"
        )
    return int(rows)
