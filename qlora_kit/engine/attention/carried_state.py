"""Layers that carry a state from token to token, run on each sample of a packed row by itself.

State-space layers, linear attention and short convolutions go over a row from left to right, and what they keep of one
sample would flow into the next. Here the row is cut into its samples, which go through such a layer side by side, each
from an empty state. A token sees none that come after it, so what a shorter sample is filled up with changes nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from qlora_kit.model.structure import layers_of, state_carriers

# What tells a layer of samples in a row; each gets rows of one sample.
_OF_PACKED_ROWS = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}


@dataclass(frozen=True)
class Group:
    """Samples that go through a layer together.

    Attributes:
        rows: where each of their tokens lies in the packed row, [samples, longest]; of a shorter one the last again.
        real: which of these, counted through, are tokens and no filling.
    """

    rows: Tensor
    real: Tensor


@dataclass(frozen=True)
class Cut:
    """How a packed row is cut.

    Attributes:
        groups: of samples of like length: none is filled up to more than twice its own.
        back: for each token of the row, its place in the outputs of all groups one after another.
        tokens: of the row.
    """

    groups: Sequence[Group]
    back: Tensor
    tokens: int


def keep_states_apart(model: nn.Module) -> Callable[[], None] | None:
    """Have every layer of a model that carries a state start anew with each sample of a packed row.

    Batches that are padded, and generation, are computed as before.

    Returns:
        A function that takes it off again; None where the model has no such layer.
    """
    names = state_carriers(model)
    if not names:
        return None
    row = _Row()
    layers, _ = layers_of(model)
    decoder = model.get_submodule(layers.rpartition(".")[0])
    changed = [model, *(model.get_submodule(name) for name in names)]
    # peft calls the forward of the model itself, and a head of the kit's the decoder: the row is noted by both.
    noting = decoder.register_forward_pre_hook(row.note_decoder, with_kwargs=True)
    model.forward = row.noting(model.forward)
    for module in changed[1:]:
        module.forward = _by_sample(module.forward, row)

    def undo() -> None:
        noting.remove()
        for module in changed:
            del module.forward

    return undo


class _Row:
    """The row that a model is at work on; the backward pass of recomputed layers finds it too."""

    def __init__(self) -> None:
        self.cut: Cut | None = None
        self._inside = False

    def note(self, given: Mapping[str, Any]) -> None:
        """Note how a row is cut that the model or its decoder is given."""
        bounds = given.get("cu_seq_lens_q")
        self.cut = None if bounds is None else cut(bounds)

    def noting(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The forward of the model, which notes the row first."""

        @wraps(forward)
        def run(*arguments: Any, **given: Any) -> Any:
            self.note(given)
            self._inside = True
            try:
                return forward(*arguments, **given)
            finally:
                self._inside = False

        return run

    def note_decoder(self, _decoder: nn.Module, _arguments: tuple[Any, ...], given: Mapping[str, Any]) -> None:
        """Note the row where the decoder is called by itself."""
        if not self._inside:
            self.note(given)


def cut(bounds: Tensor) -> Cut:
    """Cut a row where its samples begin.

    Args:
        bounds: int32 [samples + 1], on any device; read once.
    """
    spans = [(start, end) for start, end in pairwise(bounds.tolist()) if end > start]
    alike: dict[int, list[tuple[int, int]]] = {}
    for start, end in spans:
        alike.setdefault((end - start - 1).bit_length(), []).append((start, end))
    groups, order = [], []
    for members in alike.values():
        longest = max(end - start for start, end in members)
        rows = [[min(start + offset, end - 1) for offset in range(longest)] for start, end in members]
        real = [place * longest + offset for place, (start, end) in enumerate(members) for offset in range(end - start)]
        groups.append(Group(torch.tensor(rows, device=bounds.device), torch.tensor(real, device=bounds.device)))
        order += [token for start, end in members for token in range(start, end)]
    back = torch.empty(len(order), dtype=torch.long)
    back[torch.tensor(order)] = torch.arange(len(order))
    return Cut(groups, back.to(bounds.device), len(order))


def _by_sample(forward: Callable[..., Any], row: _Row) -> Callable[..., Any]:
    @wraps(forward)
    def run(*arguments: Any, **named: Any) -> Any:
        if (one := row.cut) is None:
            return forward(*arguments, **named)
        kept = {name: value for name, value in named.items() if name not in _OF_PACKED_ROWS}
        made = [
            forward(
                *(_cut_out(value, group, one.tokens) for value in arguments),
                **{name: _cut_out(value, group, one.tokens) for name, value in kept.items()},
            )
            for group in one.groups
        ]
        return _joined(made, one)

    return run


def _cut_out(value: Any, group: Group, tokens: int) -> Any:
    """The samples of a group from what a layer is given for every token of a row."""
    if isinstance(value, tuple):
        return tuple(_cut_out(part, group, tokens) for part in value)
    if isinstance(value, Tensor) and value.ndim > 1 and value.shape[:2] == (1, tokens):
        return value[0][group.rows]
    return value


def _joined(made: Sequence[Any], one: Cut) -> Any:
    """The outputs of all groups as those of one row."""
    first = made[0]
    if isinstance(first, tuple):
        return tuple(_joined(parts, one) for parts in zip(*made, strict=True))
    if not isinstance(first, Tensor):
        return first
    flat = [part.flatten(0, 1)[group.real] for part, group in zip(made, one.groups, strict=True)]
    return torch.cat(flat)[one.back][None]
