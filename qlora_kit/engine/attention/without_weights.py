"""Whether a model's attention takes packed rows, found before there are weights: every linear map gives zeros."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora_kit.core.errors import RunError
from qlora_kit.engine.attention.packed import OWN_TOKENS, enable_packed_attention
from qlora_kit.model.structure import state_carriers
from qlora_kit.objectives.sft.collate import PackedCollator
from qlora_kit.schema.model import Attention

_OF_EXPERTS = 3  # axes of a parameter


def no_packed_rows(model: PreTrainedModel, attention: Attention) -> str:
    """Why packed samples cannot be kept apart in a model; empty where nothing speaks against it.

    What one sample's values do to another's is seen only when there are weights: see `check_isolation`.

    Args:
        model: on the meta device, with that attention; it is of no other use afterwards.
    """
    try:
        enable_packed_attention(model, attention)
        if attention is Attention.sdpa:  # of the others transformers takes care
            _give_zeros(model)
            _run(model)
    except RunError as error:
        return error.problems[0].what
    except Exception:  # code that asks for values: what it has against packed rows is told when there are weights
        return ""
    return ""


def _run(model: PreTrainedModel) -> None:
    """Run two samples in a row through the decoder."""
    ids = torch.arange(OWN_TOKENS).numpy()
    feature = {"input_ids": ids, "labels": ids.copy(), "lengths": torch.tensor([OWN_TOKENS]).numpy()}
    batch = PackedCollator()([feature, {name: values.copy() for name, values in feature.items()}])
    decoder: Any = model.base_model
    with torch.no_grad():
        decoder.eval()(**{name: part for name, part in batch.items() if name != "labels"}, use_cache=False)


def _give_zeros(model: nn.Module) -> None:
    """Have linear maps, tables and experts give zeros without looking at a weight, and all else have small zeros.

    So do layers that carry a state: they take rows apart by themselves, and would need gigabytes without their kernels.
    """
    carriers = set(state_carriers(model))
    for name, module in model.named_modules():
        if name in carriers:
            vars(module)["forward"] = _same_shape
        elif isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
            vars(module)["forward"] = _Zeros(module.out_features)
        elif isinstance(module, nn.Embedding) and type(module).forward is nn.Embedding.forward:
            vars(module)["forward"] = _Rows(module.embedding_dim)
        elif _holds_experts(module):
            vars(module)["forward"] = _same_shape
        else:
            for inner, parameter in list(module._parameters.items()):
                if parameter is not None:
                    zeros = _zeros(parameter.shape, torch.float32)
                    module._parameters[inner] = nn.Parameter(zeros, requires_grad=False)
            for inner, buffer in list(module._buffers.items()):
                if buffer is not None:
                    module._buffers[inner] = _zeros(buffer.shape, buffer.dtype)


def _zeros(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros that take the memory of one, since tables are large."""
    return torch.zeros((), dtype=dtype).expand(list(shape))


def _holds_experts(module: nn.Module) -> bool:
    is_convolution = isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    return not is_convolution and any(one.ndim == _OF_EXPERTS for one in module.parameters(recurse=False))


class _Zeros:
    """Stands for a linear map."""

    def __init__(self, outputs: int) -> None:
        self.outputs = outputs

    def __call__(self, hidden: Tensor) -> Tensor:
        return hidden.new_zeros(*hidden.shape[:-1], self.outputs)


class _Rows:
    """Stands for a table."""

    def __init__(self, width: int) -> None:
        self.width = width

    def __call__(self, ids: Tensor) -> Tensor:
        return torch.zeros(*ids.shape, self.width)


def _same_shape(*places: object, **names: object) -> Tensor:
    hidden = next(one for one in (*places, *names.values()) if isinstance(one, Tensor))
    return torch.zeros_like(hidden)
