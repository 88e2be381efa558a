"""What eval scores the files of: a trained run, or a base that was never trained."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

from qlora_kit.core.errors import Problem, RecipeError
from qlora_kit.core.files import read_json
from qlora_kit.core.lock import BusyError
from qlora_kit.core.shell import override, shell_line
from qlora_kit.data.conversation import Conversation
from qlora_kit.data.tokens import TokenRow
from qlora_kit.evaluation.scores import Scorer
from qlora_kit.evaluation.trained import open_trained
from qlora_kit.export.manifest import MANIFEST
from qlora_kit.pipelines.base_rows import parted_general_text, prepared_rows
from qlora_kit.pipelines.exportable import Exportable, TrainedRun
from qlora_kit.pipelines.opened_run import OpenedRun, open_run, refuse_changed
from qlora_kit.pipelines.untrained_base import UntrainedBase, base_in
from qlora_kit.runs.directory import RunDirectory, find_run, refuse_at_work
from qlora_kit.runs.exported_base import find_exported_base, no_run_but_exports
from qlora_kit.runs.named_base import named_base
from qlora_kit.schema.check_exported import names_rows
from qlora_kit.schema.compose import load_recipe
from qlora_kit.schema.data import LaterRows, Task
from qlora_kit.schema.eval import EvalConfig
from qlora_kit.schema.root import ExportRecipe


@dataclass(frozen=True)
class HeldOut:
    """Rows to score on, and the conversations whose last answer a model may give."""

    scored: Sequence[TokenRow]
    conversations: list[Conversation]


class Evaluated(ABC):
    """Whose files are scored."""

    models: ClassVar[tuple[str, ...]]
    """Names of the models beside the files, as the table has them; the last is what all are compared with."""

    directory: RunDirectory
    base_folder: Path
    tokenizer: Any
    task: Task

    @property
    @abstractmethod
    def reference(self) -> str:
        """What all are compared with, and how its weights are stored."""

    @property
    @abstractmethod
    def exportable(self) -> Exportable:
        """What its files were exported from."""

    @abstractmethod
    def rows(self, config: EvalConfig, asked: int | None) -> HeldOut:
        """Held-out rows, `eval.kl_rows` of them; and `asked` conversations, all of them for None.

        Raises:
            RecipeError: there are none, or they are other rows than they were.
        """

    @abstractmethod
    def open_models(self) -> dict[str, Scorer]:
        """The models beside the files, by name."""

    @abstractmethod
    def folder_of(self, model: str) -> Path:
        """Where one of those models lies."""


class EvaluatedRun(Evaluated):
    """A finished run, against the trained model."""

    models = ("base", "adapter")

    def __init__(self, opened: OpenedRun) -> None:
        self._opened = opened
        self.directory = opened.directory
        self.base_folder = opened.base_folder
        self.tokenizer = opened.tokenizer
        self.task = opened.recipe.data.task

    @property
    def reference(self) -> str:
        """The trained model, its base as it was trained on."""
        return f"the trained model (base {self._opened.recipe.quant.kind.stored} + adapter)"

    @property
    def exportable(self) -> TrainedRun:
        """The run."""
        return TrainedRun.of(self._opened)

    def rows(self, config: EvalConfig, asked: int | None) -> HeldOut:
        """The run's held-out rows."""
        data = self._opened.held_out()
        return HeldOut(data.scored(config.kl_rows), [] if asked == 0 else data.held_out_conversations(asked))

    def open_models(self) -> dict[str, Scorer]:
        """The base, and the adapter on it."""
        pad = int(self.tokenizer.pad_token_id)
        adapter, base = open_trained(self.base_folder, self.directory.adapter, self._opened.recipe.quant, pad)
        return {"base": base, "adapter": adapter}

    def folder_of(self, model: str) -> Path:
        """The base's folder, or the adapter's."""
        return self.base_folder if model == "base" else self.directory.adapter


class EvaluatedBase(Evaluated):
    """Exports of a base that was never trained, against the base as it is stored."""

    models = ("base",)

    def __init__(self, base: UntrainedBase) -> None:
        self._base = base
        self.directory = base.directory
        self.base_folder = base.base.folder
        self.tokenizer = base.tokenizer
        self.task = base.recipe.data.task if names_rows(base.recipe.data) else Task.none

    @property
    def reference(self) -> str:
        """The base, its weights as they are stored."""
        return "the base as it is stored"

    @property
    def exportable(self) -> UntrainedBase:
        """The base."""
        return self._base

    def rows(self, config: EvalConfig, asked: int | None) -> HeldOut:
        """The rows that the export scored on: held-out ones of its data, else its part of the general text."""
        recipe = self._base.recipe
        if not names_rows(recipe.data):
            if asked:
                what = "these files were scored on general text, which holds no prompt to answer"
                raise RecipeError(what, "eval.stop_prompts", "eval.stop_prompts=0")
            _, scored = parted_general_text(recipe.export, self.tokenizer, self._base.seed)
            return HeldOut(scored[: config.kl_rows], [])
        data = prepared_rows(recipe.data, self.base_folder, self.tokenizer)
        if self.directory.data.is_file():
            recorded = read_json(self.directory.data)
            refuse_changed(recorded, asdict(data.summary), self.directory.data, "the files were exported")
        return HeldOut(data.scored(config.kl_rows), [] if asked == 0 else data.held_out_conversations(asked))

    def open_models(self) -> dict[str, Scorer]:
        """The base in 16 bit."""
        return {"base": self._base.open_reference()[0]}

    def folder_of(self, model: str) -> Path:
        """The base's folder."""
        return self.base_folder


def open_evaluated_run(name: str, later: LaterRows | None = None) -> EvaluatedRun:
    """A finished run by path, or the newest one by `latest`; loads no weight.

    Args:
        later: held-out rows that are given now, instead of the run's own.

    Raises:
        RecipeError: there is none.
    """
    try:
        found = find_run(name, finished=True)
        refuse_at_work(found)
    except RecipeError as error:
        if name == "latest" and not isinstance(error, BusyError):
            raise no_run_but_exports(error) from error
        raise
    return EvaluatedRun(open_run(str(found.path), later))


def open_evaluated_base(name: str) -> EvaluatedBase:
    """Exports of a base by their folder, by the base's name, or the newest ones by `latest`; loads no weight.

    Raises:
        RecipeError: there are none, or the base is not where it was.
    """
    directory = find_exported_base(name)
    if not any(directory.exports.glob(f"[!.]*/{MANIFEST}")):
        what = f"{directory.path} holds no finished export that could be scored"
        out = shell_line([override("out", directory.path)])
        raise RecipeError(what, f"base={name}", f"qlora-kit export base=<model> {out} export=gguf_q4_k_m")
    recipe = cast(ExportRecipe, load_recipe("export", directory.export_recipe))
    try:
        return EvaluatedBase(base_in(directory, recipe, named_base(recipe)))
    except RecipeError as error:
        # The base is named there, not on this command line.
        place = str(directory.export_recipe)
        problems = [Problem(problem.what, f"{problem.where} in {place}", problem.fix) for problem in error.problems]
        raise RecipeError(problems) from error
