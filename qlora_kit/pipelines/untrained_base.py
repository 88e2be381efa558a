"""A base that was never trained, opened for export: for people who want the quantizers alone."""

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

from qlora_kit.core.console.lines import log
from qlora_kit.core.environment import capture_environment
from qlora_kit.core.errors import Problem, RecipeError
from qlora_kit.core.files import clear_left_overs, read_json, remove, typed_path, write_json, write_text
from qlora_kit.core.links import links_outside
from qlora_kit.core.lock import BusyError, hold
from qlora_kit.core.overrides import write_overrides
from qlora_kit.core.shell import override, shell_line
from qlora_kit.core.units import human_bytes, human_seconds
from qlora_kit.data.audit.embedding import beyond_embedding
from qlora_kit.data.audit.finding import Level
from qlora_kit.evaluation.scores import Scorer
from qlora_kit.export.merge import MergeReport
from qlora_kit.export.serving.facts import BaseFacts
from qlora_kit.export.sixteen_bit import write_sixteen_bit
from qlora_kit.formats.job import ExportJob
from qlora_kit.model.tokenizer import load_tokenizer
from qlora_kit.pipelines.base_rows import rows_of_data, rows_of_general_text
from qlora_kit.pipelines.exportable import MERGED, Exportable, ExportRows
from qlora_kit.pipelines.rows import embedding_rows
from qlora_kit.runs.directory import RunDirectory, make_run_folder, no_empty_folder_left
from qlora_kit.runs.named_base import NamedBase, in_words_of_base
from qlora_kit.schema.check_exported import names_rows
from qlora_kit.schema.compose import load_recipe, recipe_yaml
from qlora_kit.schema.export import ExportConfig, MergeBase
from qlora_kit.schema.quant import QuantConfig, QuantKind
from qlora_kit.schema.root import ExportRecipe
from qlora_kit.weights.headers import read_headers

FP32_BYTES = 5  # a weight in fp32, with what scoring needs beside the model


@dataclass(frozen=True)
class UntrainedBase(Exportable):
    """A base in 16 bit, and where its files go.

    Attributes:
        overrides: the command line's words, for the record.
    """

    recipe: ExportRecipe
    overrides: Sequence[str] = ()

    kind: ClassVar[str] = "base"
    reference: ClassVar[str] = "the 16-bit base"

    @property
    def trained(self) -> None:
        """None: it was never trained."""
        return None

    @property
    def holds_out(self) -> bool:
        """True: some of its rows, or of the general text, are always set aside."""
        return True

    def rows(self, config: ExportConfig) -> ExportRows:
        """Rows of `data` where it names some, else general text; what is scored on is never calibrated on."""
        data = self.recipe.data
        if names_rows(data):
            return rows_of_data(data, config, self.base.folder, self.tokenizer)
        return rows_of_general_text(config, self.tokenizer, self.seed)

    def begin(self, rows: ExportRows) -> None:
        """Write the recipe, the line, environment.json, data.json and tokenizer/; clear what killed exports left."""
        write_text(self.directory.export_recipe, recipe_yaml(self.recipe))
        write_overrides(self.directory.overrides, self.overrides)
        write_json(self.directory.environment, capture_environment())
        write_json(self.directory.data, dict(rows.origin))
        # Not every file holds a tokenizer that transformers reads; `chat` turns token ids into text with this one.
        self.tokenizer.save_pretrained(self.directory.path / "tokenizer")
        clear_killed(self.directory.path)
        _clear_copies(self.directory.exports)

    def open_reference(self) -> tuple[Scorer, None]:
        """The base as it is stored, with fp32 activations where they fit."""
        import torch

        from qlora_kit.evaluation.torch_scorer import TorchScorer
        from qlora_kit.memory.free import free_memory_bytes
        from qlora_kit.model.load import load_base

        weights = sum(math.prod(tensor.shape) for tensor in read_headers(self.base.folder).values())
        fits = not torch.cuda.is_available() or weights * FP32_BYTES < free_memory_bytes()
        if not fits:
            log.info("the base is scored in bfloat16: in float32 it does not fit into the GPU's memory")
        dtype = torch.float32 if fits else torch.bfloat16
        model = load_base(self.base.folder, QuantConfig(kind=QuantKind.none), compute_dtype=dtype)
        return TorchScorer(model, int(self.tokenizer.pad_token_id)), None

    def merge_bases(self, config: ExportConfig) -> list[MergeBase]:
        """The one there is."""
        return [MergeBase.original]

    def base_for(self, rounds_to: str | None) -> MergeBase:
        """The one there is."""
        return MergeBase.original

    def write_sixteen_bit(self, merge_base: MergeBase, out: Path) -> MergeReport:
        """Copy the base."""
        report = write_sixteen_bit(self.base.folder, self.tokenizer, out)
        wider = sorted({tensor.dtype for tensor in read_headers(self.base.folder).values()} & {"F64", "F32", "F16"})
        rounded = f" rounded from {' and '.join(wider)} to BF16," if wider else ""
        log.info(f"copied the base,{rounded} {human_bytes(report.size)} in {human_seconds(report.seconds)}")
        return report

    def survival(self, job: ExportJob, folder: Path, merged: Path, merge: MergeReport) -> dict[str, object]:
        """Nothing: nothing was learned."""
        return {}


def open_base(recipe: ExportRecipe, named: NamedBase, overrides: Sequence[str] = ()) -> UntrainedBase:
    """A located base as something to export; loads no weight, and makes no more than the folder for it.

    Args:
        overrides: the command line's words, for the record.

    Raises:
        RecipeError: its tokenizer cannot be read, or `out` is another thing's folder.
    """
    name = facts_of(named).shown.rpartition("/")[2]
    if recipe.out:
        directory = RunDirectory(typed_path(recipe.out))
        _refuse_taken(directory.path, recipe)
        return base_in(directory, recipe, named, overrides)
    path = make_run_folder(name)
    with no_empty_folder_left(path):
        return base_in(RunDirectory(path), recipe, named, overrides)


def base_in(
    directory: RunDirectory, recipe: ExportRecipe, named: NamedBase, overrides: Sequence[str] = ()
) -> UntrainedBase:
    """A located base whose files go to a directory, or are there already.

    Raises:
        RecipeError: transformers does not know its kind, or its tokenizer cannot be read.
    """
    base = facts_of(named)
    _refuse_unknown(named.folder, recipe)
    with in_words_of_base(recipe):
        tokenizer = load_tokenizer(named.folder, named.model.chat_template)
    _refuse_beyond_embedding(named.folder, tokenizer, recipe)
    name = base.shown.rpartition("/")[2]
    return UntrainedBase(directory, base, tokenizer, name, recipe.data.seed, recipe, tuple(overrides))


def facts_of(named: NamedBase) -> BaseFacts:
    """What the files of a base say of it."""
    return BaseFacts(named.model.source, named.folder, named.model.revision)


def clear_killed(path: Path) -> None:
    """Clear away what killed exports left in the folders beside `path`, each of which was one export of a base.

    A folder whose export is at work is left alone, and so is one with links that lead out of it.
    """
    for noted in path.parent.glob("*/export.yaml"):
        folder = noted.parent
        if folder.resolve() == path.resolve() or any(links_outside(folder)):
            continue
        with suppress(BusyError), hold(folder, "clearing", patience=0):
            clear_left_overs(folder / "exports")
            _clear_copies(folder / "exports")


def _clear_copies(exports: Path) -> None:
    """Remove 16-bit copies that a killed export left: unlike a merge they are not gone on with."""
    for copied in exports.glob(f"{MERGED}*"):
        remove(copied)


def _refuse_unknown(folder: Path, recipe: ExportRecipe) -> None:
    """Refuse a kind of model that nothing could score, before a minute is spent on it."""
    from transformers import __version__
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    kind = read_json(folder / "config.json").get("model_type")
    if kind not in CONFIG_MAPPING_NAMES:
        what = f"{folder} is a model of type '{kind}', which transformers {__version__} does not know"
        raise RecipeError(what, f"base={recipe.base}", "pip install --upgrade transformers, or base=<another model>")


def _refuse_beyond_embedding(folder: Path, tokenizer: Any, recipe: ExportRecipe) -> None:
    """Refuse a base whose answers, batches or prompts need tokens that it has no embedding for."""
    size = embedding_rows(read_json(folder / "config.json"))
    if size is None:
        return
    problems = [
        Problem(found.what, f"base={recipe.base}", found.fix)
        for found in beyond_embedding({}, tokenizer, size)
        if found.level is Level.error
    ]
    if problems:
        raise RecipeError(problems)


def _refuse_taken(path: Path, recipe: ExportRecipe) -> None:
    if path.exists() and not path.is_dir():
        fix = shell_line([override("out", f"{path}_exports")])
        raise RecipeError(f"{path} is a file, and out names a folder", f"out={recipe.out}", fix)
    if (path / "recipe.yaml").is_file():
        what = f"{path} is the directory of a training run"
        raise RecipeError(
            what,
            f"out={recipe.out}",
            f"{shell_line([override('run', path)])} to export that run, or out=<another folder>",
        )
    before = RunDirectory(path).export_recipe
    if before.is_file() and (other := cast(ExportRecipe, load_recipe("export", before)).base) != recipe.base:
        what = f"{path} holds exports of another base, {other}"
        raise RecipeError(what, f"out={recipe.out}", "out=<another folder>")
