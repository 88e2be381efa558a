"""What verbs work on: a base with the adapter that was trained on it, or a base alone."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from qlora_kit.core.console.lines import log
from qlora_kit.core.errors import RecipeError, UnreadableFileError
from qlora_kit.core.files import read_json
from qlora_kit.data.prepare import HeldOutRows, PreparedData, later_rows, prepare
from qlora_kit.data.tokens import TokenRows
from qlora_kit.model.sizes import context_of
from qlora_kit.runs.base import Base
from qlora_kit.runs.directory import RunDirectory
from qlora_kit.schema.check_exported import names_rows
from qlora_kit.schema.data import DataConfig, LaterRows, Task
from qlora_kit.schema.quant import QuantConfig, QuantKind
from qlora_kit.schema.root import ExportRecipe, TrainRecipe

EVAL_FILE = "data.eval_file=<rows that were not trained on>"
HELD_OUT_SHARE = 0.2  # of the rows for a base alone, where their recipe holds none out itself


@dataclass(frozen=True)
class Run:
    """A base with its adapter, or a base alone, and a directory that holds or gets its files.

    Attributes:
        directory: its `exports/` has a folder for each file.
        recipe: that it was trained with; of a base alone, that of its export.
        later: held-out rows that are given now, instead of the run's own.
        overrides: words of the command line that exports a base alone, for the record.
    """

    directory: RunDirectory
    recipe: TrainRecipe | ExportRecipe
    base: Base
    tokenizer: Any
    later: LaterRows = field(default_factory=LaterRows)
    overrides: Sequence[str] = ()

    @property
    def trained(self) -> RunDirectory | None:
        """Its directory where an adapter was trained there; None for a base alone."""
        return self.directory if isinstance(self.recipe, TrainRecipe) else None

    @property
    def kind(self) -> str:
        """A word for it."""
        return "run" if self.trained else "base"

    @property
    def name(self) -> str:
        """First part of the names of its files."""
        return self.recipe.name if isinstance(self.recipe, TrainRecipe) else self.base.shown.rpartition("/")[2]

    @property
    def seed(self) -> int:
        """Of every draw."""
        return self.recipe.trainer.seed if isinstance(self.recipe, TrainRecipe) else self.recipe.data.seed

    @property
    def quant(self) -> QuantConfig:
        """How the base was held in training; not at all for a base alone."""
        return self.recipe.quant if isinstance(self.recipe, TrainRecipe) else QuantConfig(kind=QuantKind.none)

    @property
    def reference(self) -> str:
        """What its files are compared with, in words."""
        return "the trained model" if self.trained else "the 16-bit base"

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the models beside its files; the last is what all are compared with."""
        return ("base", "adapter") if self.trained else ("base",)

    @property
    def reference_as_stored(self) -> str:
        """What its files are compared with, and how its weights are stored."""
        stored = self.quant.kind.stored
        return f"the trained model (base {stored} + adapter)" if self.trained else "the base as it is stored"

    @property
    def has_rows(self) -> bool:
        """Whether it has rows of its own; a base alone may have none."""
        return isinstance(self.recipe, TrainRecipe) or names_rows(self.recipe.data)

    @property
    def task(self) -> Task:
        """How answers to its rows are judged."""
        return self.recipe.data.task if self.has_rows else Task.none

    @property
    def holds_out(self) -> bool:
        """Whether there are rows to score on, by the recipe or given now; reads no row.

        Of a base alone some rows, or some of the general text, are always set aside.
        """
        return self.later.eval_file is not None or self.trained is None or self.recipe.data.holds_out

    @property
    def unmeasured(self) -> str:
        """Why its files are not measured, in words."""
        return f"this {self.kind} has no held-out rows, so nothing tells how close a file is to {self.reference}"

    def rows(self) -> PreparedData:
        """The rows, read again; the recipe names their files.

        Rows that are given now take the place of the held-out ones. For a base alone, a recipe that holds nothing out
        has a share of its rows held out here, and `data.max_tokens=auto` is the base's context.

        Raises:
            RecipeError: a file is not what it was when the run was trained, or a row that is given now was trained on.
        """
        if not self.trained:
            return self._set_aside()
        if self.later.eval_file is None:
            return self._own(self.recipe.data)
        data = self._own(_without_eval_file(self.recipe.data))
        held = self._later(data.train)
        return replace(data, held_out=held.held_out, held_out_source=held.held_out_source)

    def held_out(self) -> HeldOutRows:
        """Rows to score on.

        Rows that are given now are compared with the training rows as long as those can be read.

        Raises:
            RecipeError: there are none, they are other rows than they were, or a row was trained on.
        """
        if not self.trained:
            data = self._set_aside()
            if self.directory.data.is_file():
                recorded = read_json(self.directory.data)
                refuse_changed(recorded, asdict(data.summary), self.directory.data, "the files were exported")
            return data
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

    def _set_aside(self) -> PreparedData:
        data = self.recipe.data
        if not data.holds_out:
            log.info(f"data holds no rows out: {HELD_OUT_SHARE:.0%} of them are set aside to score on")
            data = replace(data, eval_share=HELD_OUT_SHARE)
        context = context_of(read_json(self.base.folder / "config.json"))
        return prepare(data, self.tokenizer, lambda longest: min(longest, context))

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
