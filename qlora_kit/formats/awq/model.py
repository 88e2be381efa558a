"""Quantizing a whole model: one layer widened, quantized and dropped at a time."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from qlora_kit.core.errors import RecipeError
from qlora_kit.export.group_sizes import check_group_size
from qlora_kit.export.quantize_layers import QuantizedModel, quantize_layers
from qlora_kit.export.stored_linears import linear_shapes
from qlora_kit.formats.awq.layer import quantize_layer
from qlora_kit.formats.awq.settings import Settings


def quantized_tensors(model_dir: Path, settings: Settings, calibration: Sequence[Sequence[int]]) -> QuantizedModel:
    """Every tensor of a checkpoint that quantizing changes, and the linear layers that stay in 16 bits.

    Raises:
        RecipeError: the group size does not divide a layer's inputs.
    """
    shapes = linear_shapes(model_dir)
    left = {*settings.short(shapes), *settings.undivided(shapes)}
    widths = {name: width for name, (_, width) in shapes.items() if name not in left}
    if problem := check_group_size(settings.group_size, widths):
        raise RecipeError([problem])
    return quantize_layers(
        model_dir, calibration, partial(quantize_layer, settings=settings), title="AWQ", follows=False
    )
