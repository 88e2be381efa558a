"""GPTQ folders, loaded by transformers with gptqmodel, or with their weights unpacked where these read them wrongly."""

from pathlib import Path
from typing import TYPE_CHECKING

from qlora_kit.formats.gptq.layout import PACKED
from qlora_kit.formats.gptq.weights import gptq_weights
from qlora_kit.formats.gptqmodel_folders import is_read_by_library, load_quantized
from qlora_kit.formats.unpacked_folders import Unpacked, load_weights
from qlora_kit.weights.reader import tensor_names, unpacked_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_gptq(folder: Path) -> "PreTrainedModel":
    """Load a GPTQ folder, ready to score.

    Raises:
        RecipeError, RunError: as `load_quantized` and `load_weights`.
    """
    if is_read_by_library(folder):
        return load_quantized(folder)
    return load_weights(folder, unpacked_gptq(folder))


def unpacked_gptq(folder: Path) -> Unpacked:
    """The weights that a GPTQ folder stands for."""
    return Unpacked(unpacked_names(tensor_names(folder), PACKED), gptq_weights(folder))
