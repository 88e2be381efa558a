"""What the converter wrote: keys, tensors, and what the type rules look at."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_kit.core.extras import require
from qlora_kit.families.family import ConfigFields
from qlora_kit.formats.gguf import EXTRA
from qlora_kit.formats.gguf.mixes import MixContext
from qlora_kit.formats.gguf.model import GgufModel
from qlora_kit.formats.gguf.tensors import PlannedTensor
from qlora_kit.weights.float_rows import FloatRows

_NOT_THE_MODELS = ("GGUF.", "general.", "tokenizer.", "split.", "quantize.")  # the kit writes its own, or none


@dataclass(frozen=True)
class _Key:
    name: str
    value: Any
    types: Sequence[Any]


def read_converted(file: Path, config: ConfigFields) -> GgufModel:
    """The model of a file that the converter wrote.

    Args:
        config: fields of the folder's config.json.
    """
    gguf = require("gguf", "writing a GGUF file", EXTRA)
    reader = gguf.GGUFReader(file)
    architecture = str(reader.fields["general.architecture"].contents())
    keys = [
        _Key(name, field.contents(), list(field.types))
        for name, field in reader.fields.items()
        if not name.startswith(_NOT_THE_MODELS)
    ]
    tensors = [
        PlannedTensor(
            name=tensor.name,
            type="",
            stored=FloatRows(
                file,
                int(tensor.data_offset),
                gguf.GGMLQuantizationType(tensor.tensor_type).name,
                tuple(int(size) for size in reversed(tensor.shape)) or (1,),  # a single number
            ),
        )
        for tensor in reader.tensors
    ]

    def add_keys(writer: Any) -> None:
        for key in keys:
            kind, inner = key.types[0], key.types[-1] if len(key.types) > 1 else None
            writer.add_key_value(key.name, key.value, kind, inner)

    shape = _shape(architecture, {key.name: key.value for key in keys}, tensors)
    split = reader.fields.get("tokenizer.ggml.pre")
    named = "" if split is None else str(split.contents())
    return GgufModel(architecture, "", _text_at_top(config), tensors, {}, shape, add_keys, named)


def _shape(architecture: str, keys: dict[str, Any], tensors: Sequence[PlannedTensor]) -> MixContext:
    def first(name: str) -> int:
        value = keys.get(f"{architecture}.{name}", 0)
        return int(value[0] if isinstance(value, list) else value)  # of the first layer, where layers differ

    return MixContext(
        layers=first("block_count"),
        heads=first("attention.head_count"),
        kv_heads=first("attention.head_count_kv"),
        tied_embeddings=all(tensor.name != "output.weight" for tensor in tensors),
        experts=first("expert_count"),
    )


def _text_at_top(config: ConfigFields) -> ConfigFields:
    text = config.get("text_config") or {}
    return {**text, **{name: value for name, value in config.items() if value is not None}}
