"""A folder with its linear weights in FP8, rounded tensor by tensor; the model is not loaded."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_kit.export.rewrite import rewrite_checkpoint
from qlora_kit.export.stored_linears import linear_shapes
from qlora_kit.formats.fp8_block import BLOCK, LARGEST, METHOD, SCALE
from qlora_kit.weights.headers import read_headers

if TYPE_CHECKING:
    from torch import Tensor

_MATRIX_AXES = 2


def write_fp8_block(model_dir: Path, out_dir: Path) -> None:
    """Round the linear weights inside the blocks of a merged 16-bit folder, experts too; embeddings and head stay.

    Args:
        out_dir: an existing, empty folder.

    Raises:
        RunError: the folder has other names for the layers than the model.
    """
    names = [f"{module}.weight" for module in linear_shapes(model_dir)]
    matrices = (name for name, tensor in read_headers(model_dir).items() if len(tensor.shape) == _MATRIX_AXES)
    left = [name.removesuffix(".weight") for name in matrices if name not in names and name.endswith(".weight")]
    quantization = {
        "quant_method": METHOD,
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": sorted({"lm_head", *left}),  # routers and the like, one by one
    }
    rewrite_checkpoint(model_dir, out_dir, {name: partial(_rounded, name) for name in names}, quantization)


def block_codes(weight: "Tensor") -> "tuple[Tensor, Tensor]":
    """Codes float8_e4m3fn [out_features, in_features], and scales float32 [out_features / 128, in_features / 128].

    The largest weight of a block becomes the largest code.

    Args:
        weight: any float dtype, the inputs a multiple of 128; of the outputs the last block need not be whole.
    """
    import torch

    outputs, inputs = weight.shape
    rows, columns = -(-outputs // BLOCK), inputs // BLOCK
    whole = torch.nn.functional.pad(weight.float(), (0, 0, 0, rows * BLOCK - outputs))
    blocks = whole.reshape(rows, BLOCK, columns, BLOCK)
    largest = blocks.abs().amax((1, 3))
    scale = torch.where(largest > 0, largest / LARGEST, 1.0)
    codes = (blocks / scale[:, None, :, None]).clamp(-LARGEST, LARGEST).reshape(whole.shape)
    return codes[:outputs].to(torch.float8_e4m3fn), scale


def _rounded(name: str, weight: "Tensor") -> "dict[str, Tensor]":
    codes, scale = block_codes(weight)
    return {name: codes, f"{name}{SCALE}": scale}
