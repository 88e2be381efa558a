"""Writes the reference pages of the site from the recipe classes and the recipe files; mkdocs calls it as a hook."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.schema.explain import facts
from qlora_kit.schema.field import MISSING, Sealed
from qlora_kit.schema.folders import groups
from qlora_kit.schema.root import RECIPE_OF_VERB
from qlora_kit.schema.walk import schema_paths

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

RECIPES = Path(__file__).resolve().parents[1] / "recipes"


def pages() -> dict[str, str]:
    """Path in the site -> text, for every recipe that a verb takes, and for the groups."""
    made = {f"reference/{verb}.md": "\n".join(fields_page(verb, RECIPE_OF_VERB[verb])) for verb in RECIPE_OF_VERB}
    return made | {"reference/groups.md": "\n".join(groups_page())}


def fields_page(verb: str, recipe: type[Sealed]) -> Iterator[str]:
    """Every field of a recipe, a table for each group."""
    tables: dict[str, list[str]] = {}
    for path, annotation, field in schema_paths(recipe):
        group, _, name = path.rpartition(".")
        setting = field.metadata["setting"]
        kind, default, *bounds = facts(annotation, field, setting)
        default = "**required**" if field.default == MISSING else _cell(default.removeprefix("default "))
        told = "; ".join([_cell(kind), *map(_cell, bounds)])
        tables.setdefault(group, []).append(f"| `{name}` | {default} | {_cell(setting.help)}<br>*{told}* |")
    yield f"# Fields of {verb}\n"
    yield f"Set a field of a group with `group.field=value` behind `qlora-kit {verb}`, or in a recipe file."
    yield "A `*` stands for a name of yours. This page is made from the recipe classes, as `--help` is.\n"
    for group, rows in tables.items():
        yield f"\n## {group or 'Without a group'}\n"
        yield "| field | default | what it is |"
        yield "|---|---|---|"
        yield from rows


def groups_page() -> Iterator[str]:
    """Every group of recipes with its options, and what the first comment of each file says."""
    yield "# Recipe groups\n"
    yield "Choose an option with `group=option`. Files of yours below `./recipes` come first."
    yield "This page is made from the recipe files.\n"
    for group, options in groups().items():
        yield f"\n## {group}\n"
        yield "| option | what it is |"
        yield "|---|---|"
        for option in options:
            yield f"| `{option}` | {_cell(_header(RECIPES / group / f'{option}.yaml'))} |"


def _header(file: Path) -> str:
    """What the comments on top of a recipe file say, without the lines for programs."""
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        if not line.startswith("#"):
            break
        if not line.startswith(("# @package", "# launch:")):
            lines.append(line.removeprefix("#").strip())
    return " ".join(lines)


def _cell(text: str) -> str:
    """A text as a cell of a table takes it; what stands between backticks stays as it is."""
    parts = text.replace("|", "\\|").split("`")
    for index in range(0, len(parts), 2):
        for sign, shown in (("<", "&lt;"), ("*", "\\*"), ("[", "\\["), ("_", "\\_")):
            parts[index] = parts[index].replace(sign, shown)
    return "`".join(parts)


def on_files(files: "Files", config: "MkDocsConfig", **_: Any) -> "Files":
    """Add the pages to those of the docs folder."""
    from mkdocs.structure.files import File

    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))
    return files
