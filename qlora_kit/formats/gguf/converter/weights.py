"""Weights of a file that llama.cpp's converter made, put back into the merged model's order where that can be shown.

The converter reorders rows of some matrices, and no list says of which. A reading is taken for right where it is near
the merged weight: another order of its rows is as far from it as another matrix.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qlora_kit.families.family import ConfigFields
from qlora_kit.formats.gguf.tensors import paired_order
from qlora_kit.weights.reader import WeightReader

if TYPE_CHECKING:
    from torch import Tensor

NEAR = 0.8  # of the weight's norm; blocks of one bit are off by 0.5, another order by 1.4
_LAYER = re.compile(r"blk\.(\d+)\.")  # config.json need not say how many there are, nor under which key
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(.+)")


def converted_weights(
    tensors: Mapping[str, Any], architecture: str, config: ConfigFields, merged: WeightReader
) -> WeightReader:
    """A reader of them by the merged name, float32 [out_features, in_features]; None where no reading is right.

    Args:
        tensors: of the file, as `gguf.GGUFReader` has them, by name.
        architecture: llama.cpp's name of it.
        config: fields of config.json.
        merged: reader of the merged weights.
    """
    import gguf
    import torch

    text = {**config, **(config.get("text_config") or {})}
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    layers = 1 + max((int(found[1]) for name in tensors if (found := _LAYER.match(name))), default=0)
    names = gguf.get_tensor_name_map(kinds[architecture], layers)
    heads = [int(count) for key in ("num_attention_heads", "num_key_value_heads") if (count := text.get(key))]

    def weight(name: str) -> "Tensor | None":
        expected = merged(name)
        if expected is None:
            return None
        for place, index in _places(name):
            found = tensors.get(names.get_name(place, try_suffixes=(".weight", ".bias")))
            if found is None:
                continue
            blocks = found.data if index is None else found.data[index]
            values = torch.from_numpy(gguf.dequantize(blocks, found.tensor_type).copy())
            return _ordered(values, expected.float(), heads)
        return None

    return weight


def _places(name: str) -> Iterator[tuple[str, int | None]]:
    """Names to look for, with the matrix of the tensor; experts are one tensor in the file."""
    plain = name.replace("language_model.", "")
    yield plain, None
    if found := _EXPERT.fullmatch(plain):
        yield f"{found[1]}.{found[3]}", int(found[2])


def _ordered(values: "Tensor", expected: "Tensor", heads: Sequence[int]) -> "Tensor | None":
    if values.shape != expected.shape:
        return None
    limit = NEAR * float(expected.norm())
    if float((values - expected).norm()) < limit:
        return values
    for count in heads:
        if len(values) % (2 * count) == 0:
            ordered = values[paired_order(len(values), count).argsort()]
            if float((ordered - expected).norm()) < limit:
                return ordered
    return None
