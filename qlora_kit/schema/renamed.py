"""Keys of older recipes, such as recipe.yaml of a run that was made before, under their names of today."""

from typing import Any


def with_todays_names(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe as plain containers whose keys have today's names; `tracker.name: wandb` was one service of several."""
    tracker = recipe.get("tracker")
    if not isinstance(tracker, dict) or "name" not in tracker:
        return recipe
    others = {key: value for key, value in tracker.items() if key != "name"}
    chosen = {} if tracker["name"] in (None, "jsonl") else {str(tracker["name"]): True}
    return {**recipe, "tracker": others | chosen}
