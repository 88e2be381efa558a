"""A finished run, opened: what export, eval and chat need of it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from qlora_kit.adapter.strange import refuse_strange_adapter
from qlora_kit.core.console.lines import log
from qlora_kit.core.errors import RecipeError, UnreadableFileError
from qlora_kit.core.files import read_json
from qlora_kit.data.prepare import HeldOutRows, PreparedData, later_rows, prepare
from qlora_kit.data.tokens import TokenRows
from qlora_kit.model.source import locate_base
from qlora_kit.model.tokenizer import load_tokenizer
from qlora_kit.runs.as_written import refuse_edited
from qlora_kit.runs.directory import RunDirectory, find_run
from qlora_kit.runs.same_base import refuse_other_base
from qlora_kit.schema.compose import load_recipe
from qlora_kit.schema.data import DataConfig, LaterRows
from qlora_kit.schema.root import TrainRecipe

EVAL_FILE = "data.eval_file=<rows that were not trained on>"


@dataclass(frozen=True)
class OpenedRun:
    """A run directory with its recipe, base and tokenizer at hand.

    Attributes:
        later: held-out rows that are given now, instead of the run's own.
    """

    directory: RunDirectory
    recipe: TrainRecipe
    base_folder: Path
    tokenizer: Any
    later: LaterRows = field(default_factory=LaterRows)

    @property
    def holds_out(self) -> bool:
        """Whether there are rows to score on, by the recipe or given now; reads no row."""
        return self.later.eval_file is not None or self.recipe.data.holds_out

    def rows(self) -> PreparedData:
        """The run's rows, read again; the recipe names their files.

        Rows that are given now take the place of the held-out ones.

        Raises:
            RecipeError: a file is not what it was when the run was trained, or a row that is given now was trained on.
        """
        if self.later.eval_file is None:
            return self._own(self.recipe.data)
        data = self._own(_without_eval_file(self.recipe.data))
        held = self._later(data.train)
        return replace(data, held_out=held.held_out, held_out_source=held.held_out_source)

    def held_out(self) -> HeldOutRows:
        """Rows to score on.

        Rows that are given now are compared with the training rows as long as those can be read.

        Raises:
            RecipeError: there are none, or a row was trained on.
        """
        if not self.holds_out:
            what = "this run has no held-out rows to score on"
            raise RecipeError(what, str(self.directory.recipe), EVAL_FILE)
        if self.later.eval_file is None:
            return self._own(self.recipe.data)
        try:
            train = self._own(_without_eval_file(self.recipe.data)).train
        except RecipeError as error:
            train = None
            log.warning(
                f"nothing tells whether rows of {self.later.eval_file} were trained on, for the training rows "
                f"cannot be read again: {error.problems[0].what}"
            )
        return self._later(train)

    def _own(self, config: DataConfig) -> PreparedData:
        recorded = self._recorded()
        data = prepare(config, self.tokenizer, recorded["train"]["max_tokens"])
        wanted = recorded if self.later.eval_file is None else {**recorded, "held_out": None}
        refuse_changed(wanted, asdict(data.summary), self.directory.data)
        return data

    def _recorded(self) -> Mapping[str, Any]:
        recorded = read_json(self.directory.data)
        try:
            _hashes(recorded)
            if not isinstance(recorded["train"]["max_tokens"], int):
                raise TypeError
        except (KeyError, TypeError, AttributeError) as error:
            what = f"{self.directory.data} is damaged: it does not tell which rows the run was trained on"
            raise UnreadableFileError(what) from error
        return recorded

    def _later(self, train: TokenRows | None) -> HeldOutRows:
        limit = self._recorded()["train"]["max_tokens"]
        return later_rows(self.later, self.recipe.data, self.tokenizer, limit, train)


def _without_eval_file(config: DataConfig) -> DataConfig:
    """A recipe's rows without its file of held-out ones; a split stays, or other rows would count as trained on."""
    return config if config.eval_file is None else replace(config, eval_file=None, eval_share=None, eval_rows=None)


def open_run(name: str, later: LaterRows | None = None) -> OpenedRun:
    """Open a finished run by path, or the newest one by `latest`; loads no weight.

    Args:
        later: held-out rows that are given now.
    Raises:
        DamagedFileError: its adapter is not one that the kit could have trained.
    """
    directory = find_run(name, finished=True)
    refuse_edited(directory)
    recipe = cast(TrainRecipe, load_recipe("train", directory.recipe))
    base_folder = locate_base(recipe.model)
    refuse_other_base(directory, base_folder, is_trained=True)
    refuse_strange_adapter(directory.adapter, base_folder)
    return OpenedRun(directory, recipe, base_folder, load_tokenizer(directory.adapter), later or LaterRows())


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
