"""Which Hugging Face architectures can be written, and how their tensors differ from llama.cpp's layout."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qlora_kit.core.errors import RecipeError
from qlora_kit.families.family import ROPE_BY_WAVELENGTH, ConfigFields, GgufRules
from qlora_kit.families.registry import ARCHITECTURES

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


def has_own_rules(config: ConfigFields) -> bool:
    """Whether the kit writes this architecture by itself."""
    names = config.get("architectures") or ["(none)"]
    return names[0] in ARCHITECTURES


def find_architecture(config: ConfigFields) -> GgufRules:
    """The rules for a configuration's family, after checking that llama.cpp computes what the configuration says.

    Raises:
        RecipeError: without such rules, quantized already, or with settings llama.cpp has no key for.
    """
    names = config.get("architectures") or ["(none)"]
    found = ARCHITECTURES.get(names[0])
    if found is None or (rules := found.gguf) is None:
        raise RecipeError(
            f"the kit has no GGUF rules for the architecture {names[0]}, of which a whole model is converted alone",
            where="config.json, architectures",
            fix=f"with rules: {', '.join(ARCHITECTURES)}",
        )
    refuse_quantized(config)
    for field, expected in rules.fixed(config):
        raise fixed_otherwise(field, expected)
    return rules


def refuse_quantized(config: ConfigFields) -> None:
    """Refuse weights that are quantized.

    Raises:
        RecipeError: they are.
    """
    if config.get("quantization_config"):
        raise RecipeError(
            "a GGUF file is made from 16- or 32-bit weights; this folder is quantized already",
            where="config.json, quantization_config",
            fix="export the merged 16-bit model first, and convert that folder",
        )


def fixed_otherwise(field: str, expected: str) -> RecipeError:
    """The error for a setting that llama.cpp has in its code."""
    return RecipeError(
        f"llama.cpp has no key for this model's {field}: it expects {expected}",
        where=f"config.json, {field}",
        fix="choose another export target",
    )


def rope_settings(config: ConfigFields) -> Mapping[str, Any]:
    """The rotary settings of the (full-attention) layers: rope_type, rope_theta and what scaling needs."""
    settings: Mapping[str, Any] = config.get("rope_parameters") or {}
    full: Mapping[str, Any] = settings.get("full_attention") or settings
    return full


def head_width(config: ConfigFields) -> int:
    """Values per attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def extra_tensors(architecture: GgufRules, config: ConfigFields) -> dict[str, "npt.NDArray[np.float32]"]:
    """Tensors that are computed from the configuration: rotary frequency factors, float32 [rotary width / 2].

    Raises:
        RecipeError: long-context factors of the wrong length.
    """
    import numpy as np

    rope = rope_settings(config)
    kind = rope.get("rope_type")
    if kind == ROPE_BY_WAVELENGTH:
        return {"rope_freqs.weight": np.array(_factors_by_wavelength(rope, head_width(config)), dtype=np.float32)}
    if kind == "longrope" and architecture.long_rope:
        factors = {}
        for length in ("long", "short"):
            values = np.array(rope[f"{length}_factor"], dtype=np.float32)
            if len(values) != rotary_width(config) // 2:
                raise RecipeError(
                    f"{length}_factor has {len(values)} values, not {rotary_width(config) // 2}",
                    where="config.json, rope_parameters",
                )
            factors[f"rope_factors_{length}.weight"] = values
        return factors
    return {}


def rotary_width(config: ConfigFields) -> int:
    """Values per head that are rotated."""
    share = rope_settings(config).get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    return int(share * head_width(config))


def _factors_by_wavelength(rope: Mapping[str, Any], width: int) -> list[float]:
    """Divisor of each rotary frequency under the scaling by wavelength (transformers, `modeling_rope_utils.py`)."""
    original = rope["original_max_position_embeddings"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    factors = []
    for index in range(0, width, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (index / width)
        if wavelength < original / high:
            factors.append(1.0)
        elif wavelength > original / low:
            factors.append(float(rope["factor"]))
        else:
            smooth = (original / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return factors
