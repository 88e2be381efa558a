"""The whole way from a Hugging Face folder to one GGUF file."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.core.extras import require
from qlora_kit.export.gguf.architectures import Architecture, extra_tensors, find_architecture
from qlora_kit.export.gguf.blocks import converted_pieces, tensor_bytes
from qlora_kit.export.gguf.metadata import add_general, add_hyper_parameters, read_config, stop_token_ids
from qlora_kit.export.gguf.mixes import find_mix
from qlora_kit.export.gguf.tensors import PlannedTensor, plan_tensors
from qlora_kit.export.gguf.vocabulary import Vocabulary, add_vocabulary, read_vocabulary

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


@dataclass(frozen=True)
class GgufSummary:
    """What was written: the mix, how many tensors have which type, and the file's size in bytes."""

    mix: str
    type_counts: Mapping[str, int]
    bytes: int


def write_gguf(
    model_dir: Path, out_file: Path, mix: str, *, name: str | None = None, workers: int | None = None
) -> GgufSummary:
    """Write a merged model as one GGUF file, quantized straight from its stored precision.

    Args:
        model_dir: Hugging Face folder: config.json, safetensors in 16 or 32 bits, tokenizer.
        out_file: the file to write; written beside its place and renamed, so it is complete or absent.
        mix: a name of `mixes.MIXES`.
        name: `general.name`; the folder's name by default.
        workers: processes that quantize; by default every usable core, or none for a small model.

    Raises:
        RecipeError: an architecture, tokenizer, mix or weight type that cannot be written; found before writing.
        RunError: a weight is not finite, or too large for the type.
    """
    gguf = require("gguf", "writing a GGUF file")
    require("libgguf", "writing a GGUF file")
    chosen = find_mix(mix)
    config = read_config(model_dir)
    architecture = find_architecture(config)
    tensors, _ = plan_tensors(model_dir, architecture, config, chosen)
    embedding_rows = next(tensor.stored.rows for tensor in tensors if tensor.name == "token_embd.weight")
    vocabulary = read_vocabulary(model_dir, embedding_rows, stop_token_ids(model_dir, config), config)
    title = _title(name or model_dir.resolve().name, architecture, vocabulary)
    out_file.parent.mkdir(parents=True, exist_ok=True)
    partial = out_file.with_name(f".{out_file.name}.partial")
    writer = gguf.GGUFWriter(partial, architecture.gguf_name)
    try:
        add_general(writer, model_dir, config, title, chosen.file_type)
        add_hyper_parameters(writer, architecture, config, embedding_rows)
        add_vocabulary(writer, vocabulary)
        counts = _write_tensors(writer, extra_tensors(architecture, config), tensors, workers)
        partial.replace(out_file)
    finally:
        writer.close()
        partial.unlink(missing_ok=True)
    return GgufSummary(mix.upper(), counts, out_file.stat().st_size)


def _title(name: str, architecture: Architecture, vocabulary: Vocabulary) -> str:
    # llama.cpp has no key for "swallow the space after this token": it does so when the name says phi-3
    needs_marker = architecture.gguf_name == "phi3" and vocabulary.strips_after_special
    marked = any(marker in name.lower() for marker in ("phi-3", "phi3"))
    return f"{name} (phi-3)" if needs_marker and not marked else name


def _write_tensors(
    writer: Any, extras: Mapping[str, "npt.NDArray[np.float32]"], tensors: list[PlannedTensor], workers: int | None
) -> dict[str, int]:
    import gguf
    import numpy as np

    for name, values in extras.items():
        writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
    for tensor in tensors:
        kind = gguf.GGMLQuantizationType[tensor.type]
        writer.add_tensor_info(tensor.name, tensor.stored.shape, np.dtype(np.float32), tensor_bytes(tensor), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for values in extras.values():
        writer.write_tensor_data(values)
    pieces = converted_pieces(tensors, workers)
    for tensor in tensors:
        writer.write_tensor_data(_joined(pieces, tensor_bytes(tensor)))
    writer.close()
    return dict(Counter([tensor.type for tensor in tensors] + ["F32"] * len(extras)))


def _joined(pieces: Iterator["npt.NDArray[np.uint8]"], size: int) -> "npt.NDArray[np.uint8]":
    import numpy as np

    whole = np.empty(size, dtype=np.uint8)
    filled = 0
    while filled < size:
        piece = next(pieces)
        whole[filled : filled + len(piece)] = piece
        filled += len(piece)
    return whole
