"""What a run says of itself before its first step, and the rows that a run which goes on began with."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.core.console.lines import log
from qlora_kit.core.environment import capture_environment
from qlora_kit.core.files import read_json, write_json, write_text
from qlora_kit.core.overrides import write_overrides
from qlora_kit.data.prepare import PreparedData, prepare
from qlora_kit.runs.as_written import note_recipe
from qlora_kit.runs.directory import RunDirectory
from qlora_kit.runs.run import refuse_changed
from qlora_kit.schema.compose import recipe_yaml
from qlora_kit.schema.root import TrainRecipe
from qlora_kit.training.rows import rows_that_fit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def rows_of(
    recipe: TrainRecipe, run: RunDirectory, base_folder: Path, tokenizer: "PreTrainedTokenizerFast"
) -> PreparedData:
    """The rows of a run; of one that goes on, those that it began with.

    Raises:
        RecipeError: they cannot be used, or are other rows by now.
    """
    recorded = _recorded(run.data)
    if recorded is None:
        if run.has_steps and not run.data.exists():
            log.warning(f"{run.data} is not there, so nothing tells whether its rows are those that it began with")
        return rows_that_fit(recipe, base_folder, tokenizer)
    # What `data.max_tokens=auto` came to stays, whatever memory is free by now.
    data = prepare(recipe.data, tokenizer, recorded["train"]["max_tokens"])
    refuse_changed(recorded, asdict(data.summary), run.data, "the run was begun")
    return data


def describe(recipe: TrainRecipe, run: RunDirectory, overrides: list[str] | None, data: PreparedData) -> None:
    """Write what is not written yet: the recipe first, without which nothing else would be found again.

    Args:
        overrides: the command line's; None leaves what is there.
    """
    if not run.recipe.exists():
        write_text(run.recipe, recipe_yaml(recipe))
    note_recipe(run)
    if overrides is not None:
        write_overrides(run.overrides, overrides)
    if not run.environment.exists():
        write_json(run.environment, capture_environment())
    if _recorded(run.data) is None:
        write_json(run.data, asdict(data.summary))


def _recorded(place: Path) -> Mapping[str, Any] | None:
    """What data.json says; None where it is not there, or is damaged and to be written again."""
    if not place.is_file():
        return None
    try:
        recorded = read_json(place)
        splits = [split for split in (recorded["train"], recorded["held_out"]) if split]
        if isinstance(recorded["train"]["max_tokens"], int) and all(split["sources"] for split in splits):
            return recorded
    except (ValueError, KeyError, TypeError):
        pass
    log.warning(f"{place} is damaged; it is written again")
    return None
