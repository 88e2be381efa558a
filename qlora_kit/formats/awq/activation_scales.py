"""Scales of activations, for which transformers looks in AWQ files of some kinds of models."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_kit.export.rewrite import Replacement, Tensors
from qlora_kit.model.kind import read_config
from qlora_kit.weights.headers import read_headers

if TYPE_CHECKING:
    from torch import Tensor


def with_activation_scales(folder: Path, replacements: Mapping[str, Tensors]) -> Mapping[str, Replacement]:
    """What replaces the tensors of a folder, and ones beside each linear layer whose activation has scales.

    AutoAWQ divides what such a layer gives by the scales, the kit does not; a file without them is refused by
    transformers (`integrations/awq.py`).
    """
    from transformers.integrations.awq import AWQ_SCALES_MAPPINGS

    names = AWQ_SCALES_MAPPINGS.get(str(read_config(folder).get("model_type")))
    if names is None:
        return replacements
    added: dict[str, Replacement] = dict(replacements)
    for name in read_headers(folder):
        place, _, last = name.removesuffix(".weight").rpartition(".")
        if name.endswith(".weight") and last == names["layer_before_act"]:
            scales = f"{place}.{names['act']}.scales"
            added[name] = partial(_beside, name=name, scales=scales, replacement=replacements.get(name))
    return added


def _beside(weight: "Tensor", *, name: str, scales: str, replacement: Tensors | None) -> Tensors:
    """A weight [outputs, inputs] or what replaces it, and the scales [outputs]."""
    import torch

    return {**(replacement or {name: weight}), scales: torch.ones(weight.shape[0], dtype=torch.float16)}
