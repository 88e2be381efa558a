"""The best job of a sweep, as its record ranks them."""

from pathlib import Path

from qlora_kit.core.errors import RecipeError
from qlora_kit.core.files import read_json

SWEEP_RECORD = "sweep.json"


def best_job(sweep: Path) -> Path | None:
    """The run directory of the first row of sweep.json that has an objective.

    Args:
        sweep: a folder that may be a sweep's.
    Returns:
        None where there is no such record, or no such job any more.
    """
    if not (sweep / SWEEP_RECORD).is_file():
        return None
    try:
        rows = read_json(sweep / SWEEP_RECORD).get("rows")
    except RecipeError:
        return None
    for row in rows if isinstance(rows, list) else []:
        if isinstance(row, dict) and row.get("objective") is not None and isinstance(row.get("folder"), str):
            # By its name alone: the record has the place where the sweep ran, and the folder may have been moved.
            job = sweep / Path(row["folder"]).name
            if (job / "recipe.yaml").is_file():
                return job
    return None
