"""`qlora-kit inspect`: rendered rows with the loss tokens marked, and audits; needs the tokenizer alone."""

from pathlib import Path

from qlora_kit.cli.line import looking_verb_help, parse_line
from qlora_kit.core.errors import EXIT_BAD_RECIPE, EXIT_OK, RecipeError
from qlora_kit.core.files import typed_path

HELP = """usage: qlora-kit inspect [rows=N] [page=FILE.html] [group=option] [path=value]

Prints N rendered training rows with the loss tokens marked, how long rows are, what each source holds, and what is
wrong or worth knowing: repeats, leaks, answers that never end, broken text. page= writes it all as one HTML file.
Loads no weight. Exits with 2 where training would not start.

Examples:
  qlora-kit inspect experiment=smollm2_135m_home_commands_cpu
  qlora-kit inspect page=inspect.html experiment=smollm2_135m_home_commands_cpu
  qlora-kit inspect rows=9 model=qwen3_4b data=messages data.train_file=chats.jsonl data.max_tokens=2048"""

DEFAULT_ROWS = 3
OWN = ("rows", "page")


def run(arguments: list[str]) -> int:
    """Print the rows and the findings; returns the exit code."""
    line = parse_line(arguments)
    if line.wants_help:
        print(looking_verb_help(HELP))
        return EXIT_OK
    count, page = _count(line.value("rows")), _page(line.value("page"))
    if page is not None:
        from qlora_kit.report.page import check_place

        check_place(page)
    overrides = [override for override in line.overrides if override.split("=", 1)[0] not in OWN]

    from qlora_kit.schema.compose import compose_recipe

    recipe = compose_recipe("train", overrides).recipe

    from qlora_kit.pipelines.inspect import inspect

    audit = inspect(recipe, line.value("experiment") or recipe.name, count, page)
    return EXIT_BAD_RECIPE if audit.has_errors else EXIT_OK


def _count(rows: str | None) -> int:
    if rows is None:
        return DEFAULT_ROWS
    if not rows.isdecimal() or int(rows) < 1:
        raise RecipeError(
            f"rows must be a number of at least 1, got {rows}", "the command line", f"rows={DEFAULT_ROWS}"
        )
    return int(rows)


def _page(name: str | None) -> Path | None:
    if name is None:
        return None
    if Path(name).suffix not in (".html", ".htm"):
        raise RecipeError(
            f"page must name an HTML file, got {name or 'nothing'}", "the command line", "page=inspect.html"
        )
    return typed_path(name)
