"""A finished run, opened: what export, eval and chat need of it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from qlora_kit.core.errors import RecipeError
from qlora_kit.core.files import read_json
from qlora_kit.core.rundir import RunDirectory, find_run
from qlora_kit.data.prepare import PreparedData, prepare
from qlora_kit.model.source import locate_base
from qlora_kit.model.tokenizer import load_tokenizer
from qlora_kit.schema.compose import load_recipe
from qlora_kit.schema.root import TrainRecipe


@dataclass(frozen=True)
class OpenedRun:
    """A run directory with its recipe, base and tokenizer at hand."""

    directory: RunDirectory
    recipe: TrainRecipe
    base_folder: Path
    tokenizer: Any

    def rows(self) -> PreparedData:
        """The run's rows, read again; the recipe names their files.

        Raises:
            RecipeError: a file is not what it was when the run was trained.
        """
        recorded = read_json(self.directory.data)
        data = prepare(self.recipe.data, self.tokenizer, recorded["train"]["max_tokens"])
        refuse_changed(recorded, asdict(data.summary), self.directory.data)
        return data

    def held_out(self) -> PreparedData:
        """The run's rows, of which some are held out.

        Raises:
            RecipeError: the run has no held-out rows to score on.
        """
        rows = self.rows()
        if rows.held_out is None:
            raise RecipeError(
                "this run has no held-out rows to score on",
                str(self.directory.recipe),
                "qlora-kit train ... data.eval_file=<a JSONL file>",
            )
        return rows


def open_run(name: str) -> OpenedRun:
    """Open a finished run by path, or the newest one by `latest`; loads no weight."""
    directory = find_run(name, finished=True)
    recipe = cast(TrainRecipe, load_recipe("train", directory.recipe))
    base_folder = locate_base(recipe.model)
    return OpenedRun(directory, recipe, base_folder, load_tokenizer(directory.adapter))


def refuse_changed(
    recorded: Mapping[str, Any], now: Mapping[str, Any], place: Path, since: str = "the run was trained"
) -> None:
    """Refuse rows whose files are not those of data.json, which lies at `place`.

    Args:
        since: what data.json was written at, in words.

    Raises:
        RecipeError: a file has another hash, or is another file.
    """
    changed = [path for path, hash_ in _hashes(recorded).items() if _hashes(now).get(path) != hash_]
    if changed:
        raise RecipeError(
            f"{', '.join(changed)} changed since {since}, so its rows are other rows",
            str(place),
            "put the file back as it was",
        )


def _hashes(summary: Mapping[str, Any]) -> dict[str, str]:
    splits = [split for split in (summary["train"], summary["held_out"]) if split]
    return {path: hash_ for split in splits for source in split["sources"] for path, hash_ in source["sha256"].items()}
