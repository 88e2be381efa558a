"""The whole way from a Hugging Face folder to a GGUF file, or to several that belong together."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from qlora_kit.core.console.bar import bar
from qlora_kit.core.errors import RunError
from qlora_kit.core.extras import require
from qlora_kit.export.uncalibrated import Uncalibrated
from qlora_kit.families.registry import FAMILIES
from qlora_kit.formats.gguf import EXTRA
from qlora_kit.formats.gguf.blocks import PlacedTensor, tensor_bytes, write_blocks
from qlora_kit.formats.gguf.container import open_container
from qlora_kit.formats.gguf.converter.convert import Conversion
from qlora_kit.formats.gguf.imatrix import ImportanceMatrix
from qlora_kit.formats.gguf.metadata import add_general, stop_token_ids
from qlora_kit.formats.gguf.mixes import find_mix, is_weighted, requires_imatrix
from qlora_kit.formats.gguf.model import GgufModel, read_gguf_model
from qlora_kit.formats.gguf.shards import shard_paths, split_tensors, tensor_offsets
from qlora_kit.formats.gguf.tensors import PlannedTensor, typed_tensors
from qlora_kit.formats.gguf.vocabulary import Vocabulary, add_vocabulary, read_vocabulary

if TYPE_CHECKING:
    from qlora_kit.formats.gguf.model import Extras

_IN_LAYERS = "blk."
_STACKED = 3  # axes of a tensor that holds all experts of a layer


@dataclass(frozen=True)
class GgufChoices:
    """What a file shall be.

    Attributes:
        mix: a name of `mixes.MIXES`.
        overrides: glob on GGUF tensor names to the block type that replaces the mix's choice; the last match counts.
        shard_bytes: most bytes of tensors in one file; None writes a single file.
    """

    mix: str
    overrides: Mapping[str, str] | None = None
    shard_bytes: int | None = None


@dataclass(frozen=True)
class GgufSummary:
    """What was written: the mix, how many tensors have which type, size in bytes, and the files, first one first.

    `uncalibrated` is what the importance matrix holds nothing for, where there is one.
    """

    mix: str
    type_counts: Mapping[str, int]
    bytes: int
    files: tuple[Path, ...]
    uncalibrated: Uncalibrated | None = None


@dataclass(frozen=True)
class _Plan:
    model: GgufModel
    tensors: Sequence[PlannedTensor]
    parts: Sequence[Sequence[str]]

    @property
    def extras(self) -> "Extras":
        return self.model.extras


def planned_files(
    model_dir: Path,
    out_file: Path,
    choices: GgufChoices,
    *,
    has_imatrix: bool = False,
    conversion: Conversion | None = None,
) -> list[Path]:
    """The files that `write_gguf` will write, without writing; llama.cpp is given the first.

    Raises:
        RecipeError, RunError: as `write_gguf`.
    """
    return shard_paths(out_file, len(_plan(model_dir, choices, has_imatrix, conversion).parts))


def write_gguf(
    model_dir: Path,
    out_file: Path,
    mix: str | GgufChoices,
    *,
    name: str | None = None,
    imatrix: ImportanceMatrix | None = None,
    conversion: Conversion | None = None,
    workers: int | None = None,
) -> GgufSummary:
    """Write a merged model as one GGUF file or several, quantized straight from its stored precision.

    An architecture that the kit has no rules for goes through llama.cpp's converter first.

    Args:
        model_dir: Hugging Face folder: config.json, safetensors in 16 or 32 bits, tokenizer.
        out_file: the file to write, or the stem of several; written in a folder beside its place and moved, the first
            file last, so it is complete or absent.
        mix: a name of `mixes.MIXES`, or all choices.
        name: `general.name`; the folder's name by default.
        imatrix: what the blocks are fitted to; left unused by types that have no use for it.
        conversion: of the folder, where several files are made of it; by default one for this file.
        workers: threads that quantize; by default one for every usable core.

    Raises:
        RecipeError: an architecture, tokenizer, mix, override or weight type that cannot be written, or a type that
            needs an importance matrix without one; found before writing.
        RunError: a weight is not finite, or too large for the type, or llama.cpp's converter failed.
    """
    require("gguf", "writing a GGUF file", EXTRA)
    require("libgguf", "writing a GGUF file", EXTRA)
    choices = GgufChoices(mix) if isinstance(mix, str) else mix
    out_file.parent.mkdir(parents=True, exist_ok=True)
    conversion = conversion or Conversion(model_dir, out_file.parent)  # its file is there for as long as it is
    plan = _plan(model_dir, choices, imatrix is not None, conversion)
    config = plan.model.config
    stops = stop_token_ids(model_dir, config)
    vocabulary = read_vocabulary(model_dir, plan.model.rows, stops, config, plan.model.split)
    is_fitted = imatrix is not None and any(is_weighted(tensor.type) for tensor in plan.tensors)
    if imatrix is not None and is_fitted:
        plan = replace(plan, tensors=_with_importance(plan.tensors, imatrix, choices))
    title = _title(name or model_dir.resolve().name, plan.model.marker, vocabulary)

    def describe(writer: Any) -> None:
        add_general(writer, model_dir, config, title, find_mix(choices.mix).file_type)
        plan.model.add_keys(writer)
        add_vocabulary(writer, vocabulary)
        if imatrix is not None and is_fitted:
            imatrix.add_metadata(writer)

    places = _write_files(out_file, plan, describe, workers)
    counts = Counter([tensor.type for tensor in plan.tensors] + ["F32"] * len(plan.extras))
    size = sum(place.stat().st_size for place in places)
    uncalibrated = _uncalibrated(plan.tensors, imatrix) if imatrix is not None and is_fitted else None
    return GgufSummary(choices.mix.upper(), dict(counts), size, tuple(places), uncalibrated)


def _uncalibrated(tensors: Sequence[PlannedTensor], imatrix: ImportanceMatrix) -> Uncalibrated:
    """What of the layers is fitted to nothing; embeddings and output head never are to anything."""
    fitted = [tensor for tensor in tensors if is_weighted(tensor.type) and tensor.name.startswith(_IN_LAYERS)]
    without = tuple(tensor.name for tensor in fitted if tensor.importance is None)
    experts = [tensor.stored.shape[0] for tensor in fitted if len(tensor.stored.shape) == _STACKED]
    return Uncalibrated(sum(imatrix.unseen.get(tensor.name, 0) for tensor in fitted), sum(experts), without)


def _write_files(out_file: Path, plan: _Plan, describe: Callable[[Any], None], workers: int | None) -> list[Path]:
    """Write in a folder beside and move, the first file last: it is the one that readers are given."""
    places = shard_paths(out_file, len(plan.parts))
    with TemporaryDirectory(dir=out_file.parent, prefix=f".{out_file.name}.") as folder:
        staged = [Path(folder) / place.name for place in places]
        for number, file in enumerate(staged):
            writer = _open(file, number, plan)
            try:
                if number == 0:
                    describe(writer)
                _write_head(writer, file, number, plan)
            finally:
                writer.close()
        _write_tensors(staged, plan, workers, out_file.name)
        for file, place in reversed(list(zip(staged, places, strict=True))):
            file.replace(place)
    return places


def _plan(model_dir: Path, choices: GgufChoices, has_imatrix: bool, conversion: Conversion | None) -> _Plan:
    mix = find_mix(choices.mix)
    model = read_gguf_model(model_dir, conversion)
    tensors = typed_tensors(model.tensors, model.shape, mix, overrides=choices.overrides, has_imatrix=has_imatrix)
    sizes = {name: values.nbytes for name, values in model.extras.items()}
    sizes |= {tensor.name: tensor_bytes(tensor) for tensor in tensors}
    return _Plan(model, tensors, split_tensors(sizes, choices.shard_bytes))


def _with_importance(
    tensors: Sequence[PlannedTensor], imatrix: ImportanceMatrix, choices: GgufChoices
) -> list[PlannedTensor]:
    mix, means = find_mix(choices.mix), imatrix.means
    for tensor in tensors:
        if tensor.name not in means and requires_imatrix(tensor.name, tensor.type, mix):
            raise RunError(f"the importance matrix holds nothing for {tensor.name}, which {tensor.type} needs")
    return [replace(t, importance=means.get(t.name)) if is_weighted(t.type) else t for t in tensors]


def _open(file: Path, number: int, plan: _Plan) -> Any:
    import gguf

    writer = open_container(file, plan.model.architecture)
    if len(plan.parts) > 1:
        writer.add_uint16(gguf.Keys.Split.LLM_KV_SPLIT_NO, number)
        writer.add_uint16(gguf.Keys.Split.LLM_KV_SPLIT_COUNT, len(plan.parts))
        writer.add_int32(gguf.Keys.Split.LLM_KV_SPLIT_TENSORS_COUNT, sum(len(part) for part in plan.parts))
    return writer


def _title(name: str, marker: str, vocabulary: Vocabulary) -> str:
    # llama.cpp has no key for "swallow the space after this token": it does so when the name has the marker, and then
    # looks for tokens that other vocabularies lack
    if marker and vocabulary.strips_after_special:
        marked = any(text in name.lower() for text in _spellings(marker))
        return name if marked else f"{name} ({marker})"
    markers = {family.gguf.marker for family in FAMILIES.values() if family.gguf and family.gguf.marker}
    for text in (spelled for one in markers for spelled in _spellings(one)):
        name = re.sub(
            re.escape(text), lambda found: re.sub(r"-?(?=\d)", " ", found[0], count=1), name, flags=re.IGNORECASE
        )
    return name


def _spellings(marker: str) -> tuple[str, str]:
    return marker, marker.replace("-", "")


def _write_head(writer: Any, file: Path, number: int, plan: _Plan) -> None:
    """Everything of a file but its tensors' values: header, metadata, table of tensors."""
    import gguf
    import numpy as np

    planned = {tensor.name: tensor for tensor in plan.tensors}
    float32 = np.dtype(np.float32)
    for name in plan.parts[number]:
        if name in plan.extras:
            values = plan.extras[name]
            writer.add_tensor_info(name, values.shape, float32, values.nbytes)
        else:
            tensor = planned[name]
            kind = gguf.GGMLQuantizationType[tensor.type]
            writer.add_tensor_info(name, tensor.stored.shape, float32, tensor_bytes(tensor), kind)
    writer.write_header_to_file(file)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


def _write_tensors(files: Sequence[Path], plan: _Plan, workers: int | None, title: str) -> None:
    planned = {tensor.name: tensor for tensor in plan.tensors}
    placed: list[PlacedTensor] = []
    for file, part in zip(files, plan.parts, strict=True):
        sizes = [plan.extras[n].nbytes if n in plan.extras else tensor_bytes(planned[n]) for n in part]
        offsets = tensor_offsets([*sizes, 0], file.stat().st_size)
        with file.open("r+b") as stream:
            stream.truncate(offsets[-1])
            for name, offset in zip(part, offsets, strict=False):
                if name in plan.extras:
                    stream.seek(offset)
                    stream.write(plan.extras[name].tobytes())
                else:
                    placed.append(PlacedTensor(planned[name], file, offset))
    values = sum(tensor.stored.rows * tensor.stored.width for tensor in plan.tensors)
    with bar(title, values, "weight") as one:
        write_blocks(placed, workers, one.advance)
