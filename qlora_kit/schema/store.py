"""Registers the recipe classes with Hydra, and puts ./recipes before the packaged folder."""

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin

from qlora_kit.schema.field import Sealed
from qlora_kit.schema.folders import user_recipes
from qlora_kit.schema.root import EvalRecipe, ExportRecipe, TrainRecipe

RECIPE_OF_VERB: dict[str, type[Sealed]] = {"train": TrainRecipe, "export": ExportRecipe, "eval": EvalRecipe}


class UserRecipes(SearchPathPlugin):
    """Puts the user's ./recipes first in Hydra's search path."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Prepend ./recipes, so a user's file wins over a packaged one of the same name."""
        mine = user_recipes()
        if mine:
            search_path.prepend(provider="user", path=f"file://{mine}")


def register() -> None:
    """Make the schemas and the user's folder known to Hydra; calling it again changes nothing."""
    for verb, recipe in RECIPE_OF_VERB.items():
        ConfigStore.instance().store(name=f"{verb}_schema", node=recipe, provider="qlora_kit")
    Plugins.instance().register(UserRecipes)
