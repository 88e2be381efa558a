"""A model whose weights are read from their files when they are needed, and let go of again."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qlora_kit.weights.float_rows import FloatRows, find_tensors, read_float_rows
from qlora_kit.weights.headers import read_headers
from qlora_kit.weights.own_names import own_names_of

HEAD = "lm_head"


def empty_model(model_dir: Path) -> Any:
    """The language model of a Hugging Face folder without its weights."""
    from accelerate import init_empty_weights

    from qlora_kit.model.language_model import build_language_model

    # buffers, such as rotary frequencies, are computed and not stored: they stay real
    with init_empty_weights(include_buffers=False):
        return build_language_model(model_dir).eval()


def weights_by_model_names(model: nn.Module, model_dir: Path) -> dict[str, FloatRows]:
    """The tensors of a folder by the names that its language model has for them; those of towers are left out."""
    from qlora_kit.model.stored_names import stored_names

    tensors, names = find_tensors(model_dir), own_names_of(model)
    by_own = stored_names(model_dir, read_headers(model_dir)).by_own
    found = {names.trained(own): tensors[stored] for own, stored in by_own.items() if stored in tensors}
    return {name: tensor for name, tensor in found.items() if name is not None}


def fill_weights(model: nn.Module, names: Iterable[str], stored: Mapping[str, FloatRows], device: torch.device) -> None:
    """Read weights into their places, as float32 that no gradient is taken of; the output head stays empty."""
    for name in names:
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        # checkpoints of older libraries hold buffers that are computed today
        if leaf in module._parameters and owner != HEAD:
            _set(module, leaf, stored[name], device)


def fill_head(model: Any, stored: Mapping[str, FloatRows], device: torch.device) -> None:
    """Read the output head, or take the embeddings where it is tied to them."""
    head = model.get_output_embeddings()
    if f"{HEAD}.weight" in stored and not model.config.tie_word_embeddings:
        _set(head, "weight", stored[f"{HEAD}.weight"], device)
    else:
        head.weight = model.get_input_embeddings().weight
    if f"{HEAD}.bias" in stored:
        _set(head, "bias", stored[f"{HEAD}.bias"], device)


def drop_weights(module: nn.Module) -> None:
    """Let go of the weights in a module and below."""
    for part in module.modules():
        for leaf, parameter in part._parameters.items():
            if parameter is not None:
                setattr(part, leaf, nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False))


def _set(module: nn.Module, leaf: str, tensor: FloatRows, device: torch.device) -> None:
    values = torch.from_numpy(read_float_rows(tensor, 0, tensor.rows).reshape(tensor.shape))
    setattr(module, leaf, nn.Parameter(values.to(device), requires_grad=False))
