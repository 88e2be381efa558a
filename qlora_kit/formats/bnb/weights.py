"""The weights that a bitsandbytes folder stands for."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qlora_kit.export.merging.rounded import read_stored, weight_beside
from qlora_kit.weights.headers import StoredTensor, read_headers
from qlora_kit.weights.reader import WeightReader, stored_tensors

if TYPE_CHECKING:
    from torch import Tensor


def bnb_weights(artifact: Path) -> WeightReader:
    """A reader of them, float32 [out_features, in_features], by the merged name."""
    read = stored_tensors(artifact)
    tensors = read_headers(artifact)
    states: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in tensors.items():
        if (beside := weight_beside(name)) is not None:
            states.setdefault(beside, {})[name] = tensor

    def weight(name: str) -> "Tensor | None":
        if name not in states or name not in tensors:
            return read(name)
        return read_stored(tensors[name], states[name], torch.device("cpu"))

    return weight
