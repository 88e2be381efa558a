"""The weights that an AWQ folder stands for."""

from pathlib import Path
from typing import TYPE_CHECKING

from qlora_kit.core.files import read_json
from qlora_kit.formats.awq.layout import KINDS, unpacked_weight
from qlora_kit.schema.export import AwqLayout
from qlora_kit.weights.reader import WeightReader, stored_tensors, tensors_by_kind

if TYPE_CHECKING:
    from torch import Tensor

FITTING_ROUNDS = 3


def awq_weights(artifact: Path, merged_dir: Path) -> WeightReader:
    """A reader of them, float32 [out_features, in_features], by the merged name.

    AWQ moves factors between neighboring weights; they are fitted to the merged weight and taken out again.
    """
    settings = read_json(artifact / "config.json")["quantization_config"]
    read, merged = stored_tensors(artifact), stored_tensors(merged_dir)

    def weight(name: str) -> "Tensor | None":
        packed, source = tensors_by_kind(read, name, KINDS), merged(name)
        if packed is None or source is None:
            return read(name)
        found = unpacked_weight(packed, int(settings["group_size"]), AwqLayout(settings["version"]))
        return without_factors(found, source.float())

    return weight


def without_factors(scaled: "Tensor", like: "Tensor") -> "Tensor":
    """A weight with a factor on each row and each column, divided by the factors that fit `like` best.

    Both float32 [out_features, in_features]. Least squares for columns and rows in turn, each with the other taken out
    before, so that large factors do not weigh more; a factor is fitted to hundreds of weights, so it takes out the
    folded scale and next to nothing of the rounding error.
    """
    import torch

    square = like.square()
    columns, rows = torch.ones(1, like.shape[1]), torch.ones(len(like), 1)
    for _ in range(FITTING_ROUNDS):
        columns = _factors(scaled / rows, like, square, 0)
        rows = _factors(scaled / columns, like, square, 1)
    return scaled / rows / columns


def _factors(scaled: "Tensor", like: "Tensor", square: "Tensor", dim: int) -> "Tensor":
    import torch

    factors = (scaled * like).sum(dim, keepdim=True) / square.sum(dim, keepdim=True)
    # A row or column of zeros has no factor.
    return torch.where(factors.isfinite() & (factors != 0), factors, 1)
