"""Registers the recipe classes and folders with Hydra."""

import io
from functools import cache
from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigLoadError, ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf

from qlora_kit.core.errors import RecipeError
from qlora_kit.schema.folders import recipe_folders
from qlora_kit.schema.recipe_file import check_recipe_file, path_above
from qlora_kit.schema.recipe_text import read_recipe_text
from qlora_kit.schema.renamed import tell_renamed
from qlora_kit.schema.renamed_file import under_todays_names
from qlora_kit.schema.root import RECIPE_OF_VERB


class RecipeSource(ConfigSource):
    """A folder of recipe files for Hydra, each of which is looked at before Hydra sees it."""

    @staticmethod
    def scheme() -> str:
        """The word before :// in a search path."""
        return "recipes"

    def available(self) -> bool:
        """Whether the folder is there."""
        return Path(self.path).is_dir()

    def is_group(self, config_path: str) -> bool:
        """Whether a path names a folder of options."""
        return (Path(self.path) / config_path).is_dir()

    def is_config(self, config_path: str) -> bool:
        """Whether a path names a file."""
        return self._file(config_path).is_file()

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        """Options and groups within a group, sorted."""
        found: list[str] = []
        for file in sorted((Path(self.path) / config_path).iterdir()):
            self._list_add_result(found, f"{config_path}/{file.name}", file.name, results_filter)
        return sorted(set(found))

    def load_config(self, config_path: str) -> ConfigResult:
        """Read one file.

        Raises:
            RecipeError: it could do more than set values, or fits no recipe.
        """
        if not self.is_config(config_path):
            raise ConfigLoadError(f"Config not found : {self._file(config_path)}")
        found = read_recipe_text(self._file(config_path))
        group = config_path.removesuffix(".yaml").rpartition("/")[0]
        try:
            header = self._get_header_dict(found.text[:512])
        except ValueError as error:
            raise RecipeError(f"{found.shown} has a first line that says nothing: {error}", found.place(1)) from error
        rewritten = under_todays_names(found, path_above(group, header["package"]))
        for line in rewritten.lines:
            tell_renamed(line)
        found = rewritten.file
        check_recipe_file(found, group, header["package"])
        config = OmegaConf.load(io.StringIO(found.text))
        return ConfigResult(config=config, path=f"recipes://{self.path}", provider=self.provider, header=header)

    def _file(self, config_path: str) -> Path:
        return Path(self.path) / self._normalize_file_name(config_path)


class RecipeFolders(SearchPathPlugin):
    """Puts the user's ./recipes first in Hydra's search path, and the packaged recipes after it."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Name every folder; a user's file wins over a packaged one of the same name."""
        for folder in reversed(recipe_folders()):
            search_path.prepend(provider="recipes", path=f"recipes://{folder}")


@cache
def register() -> None:
    """Make the schemas and the recipe folders known to Hydra; calling it again changes nothing."""
    for verb, recipe in RECIPE_OF_VERB.items():
        ConfigStore.instance().store(name=f"{verb}_schema", node=recipe, provider="qlora_kit")
    Plugins.instance().register(RecipeSource)
    Plugins.instance().register(RecipeFolders)
