"""Bases whose experts are stored in MXFP4, as transformers unpacks them; see `weights/microscaled.py`."""

from collections.abc import Mapping
from typing import Any

from transformers import Mxfp4Config
from transformers.quantizers.quantizer_mxfp4 import Mxfp4HfQuantizer

from qlora_kit.weights.microscaled import STORED_AS


def is_microscaled(config: Mapping[str, object]) -> bool:
    """Whether a config.json says that experts are stored so."""
    stored = config.get("quantization_config")
    return isinstance(stored, Mapping) and stored.get("quant_method") == STORED_AS


def unpacking() -> Mxfp4Config:
    """Has transformers load them in 16 bit."""
    return Mxfp4Config(dequantize=True)


def unpacks(quantization: object) -> bool:
    """Whether that is what is to be done."""
    return isinstance(quantization, Mxfp4Config)


def unpacking_conversions() -> list[Any]:
    """What transformers makes of the stored tensors then, before a quantizer sees them."""
    quantizer = Mxfp4HfQuantizer(unpacking())
    quantizer.pre_quantized = True
    found: list[Any] = quantizer.get_weight_conversions()
    return found
