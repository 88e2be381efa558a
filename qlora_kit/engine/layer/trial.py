"""Fast layers, tried out: each has to give what the layer itself gives for the same input, or all of them stay plain.

What a family's file tells is held against the modules of a layer when that is read. A choice that a layer makes in its
code leaves no trace there, such as which values of a head are rotated together; it shows in the numbers.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Protocol

import torch
from torch import Tensor

from qlora_kit.engine.linear.fp8 import Fp8Weight
from qlora_kit.engine.linear.frozen_weight import FrozenWeight
from qlora_kit.engine.ops.compiled import as_written

TOKENS = 16
OFF = 0.1  # of what a layer adds to its input, that its results may differ by: rounding in 16 bit is 0.02 at the most
OFF_IN_FP8 = 0.5


class TriedLayer(Protocol):
    """A fast layer, as far as it is tried out."""

    layer: Any
    dtype: torch.dtype

    @property
    def weights(self) -> Sequence[FrozenWeight]:
        """Of the linear modules that are computed by hand."""
        ...

    def compute(self, hidden_states: Tensor, rest: Sequence[Any], settings: Mapping[str, Any]) -> Tensor | None:
        """The result by hand; None where the layer would run plain."""
        ...


def largest_difference(model: torch.nn.Module, layers: Sequence[TriedLayer]) -> tuple[int, float]:
    """The layer whose result by hand is farthest from its own, in parts of what is let through: above 1 it is wrong.

    Args:
        model: decoder without a head, whose layers still have their own forward.
    """
    found = [0.0] * len(layers)
    was_training = model.training
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]  # of transformers
    ids = torch.arange(2, 2 + TOKENS, device=embedding.weight.device)[None] % embedding.num_embeddings
    half = next((layer.dtype for layer in layers if layer.dtype is not torch.float32), None)
    with ExitStack() as stack, torch.no_grad(), as_written():
        for place, layer in enumerate(layers):
            stack.callback(layer.layer.register_forward_hook(_compare(layer, found, place), with_kwargs=True).remove)
        stack.callback(model.train, was_training)
        stack.enter_context(torch.autocast(ids.device.type, half or torch.bfloat16, enabled=half is not None))
        model.eval()
        model(input_ids=ids, use_cache=False)
    worst = max(range(len(found)), key=found.__getitem__)
    return worst, found[worst]


def _compare(layer: TriedLayer, found: list[float], place: int) -> Callable[..., None]:
    def hook(_module: torch.nn.Module, given: tuple[Any, ...], settings: dict[str, Any], result: Any) -> None:
        before, *rest = given
        own = (result[0] if isinstance(result, tuple) else result).float()
        by_hand = layer.compute(before, rest, settings)
        if by_hand is not None:
            rounding = torch.finfo(layer.dtype).eps * own.norm()
            is_fp8 = any(isinstance(weight, Fp8Weight) for weight in layer.weights)
            most = (OFF_IN_FP8 if is_fp8 else OFF) * (own - before.float()).norm() + rounding
            off = ((by_hand.float() - own).norm() / most).item()
            found[place] = off if off == off else float("inf")  # noqa: PLR0124  # not a number is not right

    return hook
