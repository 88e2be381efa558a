"""Checks that need the base's files but no weight: target names, group sizes."""

from pathlib import Path

from qlora_kit.core.errors import Problem, RecipeError
from qlora_kit.core.files import typed_path
from qlora_kit.schema.check import check_targets
from qlora_kit.schema.compose import Composed
from qlora_kit.schema.lora import TARGET_SETS
from qlora_kit.schema.root import TrainRecipe


def check_train(composed: Composed[TrainRecipe]) -> TrainRecipe:
    """Check the adapter's targets against the base, when its files are at hand.

    Raises:
        RecipeError: the base is not there, has no commit or is no text decoder, or a target names no module of it.
    """
    from qlora_kit.model.source import check_source
    from qlora_kit.weights.names import linear_module_names

    recipe = composed.recipe
    folder = typed_path(recipe.model.source)
    check_source(recipe.model)
    if problems := _other_kind(recipe, folder):
        raise RecipeError(problems)
    at_hand = linear_module_names(folder) if folder.is_dir() else set()
    issues = check_targets(recipe.lora.targets, at_hand or set(TARGET_SETS["all_linear"]))
    if issues and (at_hand or recipe.model.source == "demo"):
        raise RecipeError([composed.problem(issue) for issue in issues])
    return recipe


def _other_kind(recipe: TrainRecipe, folder: Path) -> list[Problem]:
    """Why the base is no decoder, by its config.json where that is at hand."""
    from qlora_kit.model.kind import CONFIG, kind_problems, read_config

    if not (folder / CONFIG).is_file():
        return []
    return list(kind_problems(recipe.model.source, read_config(folder)))
