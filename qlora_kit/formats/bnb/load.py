"""bitsandbytes folders, loaded as they are stored."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_kit.core.errors import RecipeError, RunError
from qlora_kit.core.files import read_json
from qlora_kit.schema.quant import QuantConfig, QuantKind

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def stored_quant(folder: Path) -> QuantConfig:
    """How a folder's linear weights are stored, `none` for 16 or 32 bit.

    Raises:
        RunError: they are quantized by something else than bitsandbytes.
    """
    settings = read_json(folder / "config.json").get("quantization_config")
    if settings is None:
        return QuantConfig(kind=QuantKind.none)
    if settings.get("quant_method") != "bitsandbytes":
        raise RunError(f"{folder} is not a bitsandbytes folder: it names '{settings.get('quant_method')}'")
    if settings.get("load_in_8bit"):
        return QuantConfig(kind=QuantKind.int8)
    return QuantConfig(kind=QuantKind(settings.get("bnb_4bit_quant_type", "fp4")))


def load_stored(folder: Path) -> "PreTrainedModel":
    """Load a 16-bit or bitsandbytes folder without quantizing it again, on a GPU in bfloat16, on a CPU in float32.

    Raises:
        RunError: the folder is quantized by something else, or its weights cannot be loaded.
    """
    import torch

    from qlora_kit.model.device import this_device
    from qlora_kit.model.load import load_base

    # It tells at every product that int8 takes float16.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    quant = stored_quant(folder)
    dtype = torch.bfloat16 if this_device().type == "cuda" else torch.float32
    try:
        return load_base(folder, quant, compute_dtype=dtype).eval()
    except (RecipeError, OSError, RuntimeError, ValueError) as error:
        # Advice to name another base is no help with a folder that is only read, so the library's own words are told.
        said = error.__cause__ or error if isinstance(error, RecipeError) else error
        raise RunError(f"transformers could not load {folder}: {said}") from error


def load_bnb(folder: Path) -> "PreTrainedModel":
    """Load an exported bitsandbytes folder.

    Raises:
        RunError: the folder is of another kind, or its weights cannot be loaded.
    """
    if stored_quant(folder).kind is QuantKind.none:
        raise RunError(f"{folder} is not a bitsandbytes folder: its weights are not quantized")
    return load_stored(folder)
