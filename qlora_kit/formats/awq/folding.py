"""Moving channel scales into the operation before, so that the model computes the same function.

A layer (x s) (W / s)^T equals x W^T; the s is multiplied into the weights before they are quantized and divided out
of whatever makes x: a norm's gain, or the rows of the linear layer before.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

# Pairs of names inside one block: the second reads what the first makes, channel by channel, with nothing between
# that mixes channels. A pair that breaks this in some model is found by comparing the layer's output and left alone.
CHAINS = (("v_proj", "o_proj"), ("up_proj", "down_proj"))


def gain_offset(norm: nn.Module, width: int) -> float:
    """What a norm adds to its stored weight before multiplying: 1 for an offset from one, 0 for the others."""
    probe = copy.deepcopy(norm)
    parameters = dict(probe.named_parameters())
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.zero_()
        sample = torch.linspace(-1, 1, width, device=parameters["weight"].device)
        return 1.0 if bool(probe(sample[None, None]).abs().max() > 0) else 0.0


def divide_norm(norm: nn.Module, scales: Tensor, stored: torch.dtype) -> Tensor:
    """Divide a norm's output by scales and give back the factors it was really divided by.

    The new gain is rounded to the dtype the file keeps it in first; consumers multiplied by the returned factors,
    float32 [width], then make up for the rounding exactly. A channel without gain is left alone.
    """
    weight = dict(norm.named_parameters())["weight"]
    offset = gain_offset(norm, len(scales))
    with torch.no_grad():
        before = weight + offset
        stored_weight = (before / scales - offset).to(stored).to(weight.dtype)
        after = stored_weight + offset
        kept = (before.abs() < 1e-6) | (after.abs() < 1e-6)
        weight.copy_(torch.where(kept, weight, stored_weight))
        factors = torch.where(kept, torch.ones_like(before), before / torch.where(kept, 1, after))
        bias = dict(norm.named_parameters()).get("bias")
        if bias is not None:
            bias.div_(factors)
    return factors


def divide_rows(linear: nn.Linear, scales: Tensor) -> None:
    """Divide each output of a linear layer by its scale, float32 [out_features]."""
    with torch.no_grad():
        linear.weight.div_(scales[:, None])
        if linear.bias is not None:
            linear.bias.div_(scales)


def multiply_columns(modules: Sequence[nn.Module], factors: Tensor) -> None:
    """Multiply each input channel of weights [out_features, in_features] by its factor, float32 [in_features]."""
    with torch.no_grad():
        for module in modules:
            module.get_parameter("weight").mul_(factors)


def shared_over_heads(magnitude: Tensor, made: int, head_dim: int) -> Tensor:
    """Average channel magnitudes, [in_features], over the query heads that read one key-value head: [made].

    With grouped-query attention a channel of the value projection reaches several channels of the output projection,
    and they have to share a scale.
    """
    if len(magnitude) == made:
        return magnitude
    heads = made // head_dim
    return magnitude.view(heads, -1, head_dim).mean(1).flatten()


def spread_over_heads(scales: Tensor, read: int, head_dim: int) -> Tensor:
    """The opposite of `shared_over_heads`: [made] scales repeated for each reading head, [read]."""
    if len(scales) == read:
        return scales
    heads = len(scales) // head_dim
    repeats = read // len(scales)
    return scales.view(heads, 1, head_dim).expand(-1, repeats, -1).flatten()
