"""The weights that a GPTQ folder stands for."""

from pathlib import Path
from typing import TYPE_CHECKING

from qlora_kit.formats.gptq.layout import PACKED, unpacked_weight
from qlora_kit.weights.reader import WeightReader, stored_tensors, tensors_by_kind

if TYPE_CHECKING:
    from torch import Tensor


def gptq_weights(artifact: Path) -> WeightReader:
    """A reader of them, float32 [out_features, in_features], by the merged name."""
    read = stored_tensors(artifact)

    def weight(name: str) -> "Tensor | None":
        packed = tensors_by_kind(read, name, PACKED)
        return read(name) if packed is None else unpacked_weight(packed)

    return weight
