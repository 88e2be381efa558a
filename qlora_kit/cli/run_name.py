"""What a run is called that nobody named."""

from qlora_kit.cli.line import Line
from qlora_kit.core.errors import RecipeError
from qlora_kit.core.shell import override
from qlora_kit.schema.folders import recipe_file
from qlora_kit.schema.recipe_text import read_recipe_text


def named(line: Line) -> list[str]:
    """The overrides, with the run named after its experiment unless the line or the experiment's file names it."""
    experiment = line.value("experiment")
    if line.value("name") is not None or experiment is None or "," in experiment or _has_a_name(experiment):
        return line.overrides
    return [*line.overrides, override("name", experiment)]


def _has_a_name(experiment: str) -> bool:
    file = recipe_file("experiment", experiment)
    try:
        return file is not None and any(entry.path == ("name",) for entry in read_recipe_text(file).entries())
    except RecipeError:  # composing tells it, with all else that is wrong
        return False
