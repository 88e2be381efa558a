"""Where the tensors of a checkpoint lie in the stacks of experts that the model makes of them.

Most checkpoints hold each expert by itself, and transformers stacks them while it loads: its own table of conversions
says how. Here the conversions are run on the numbers of rows, so that the answer holds for any of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from qlora_kit.model.stacked_experts import experts_of, stacked_names
from qlora_kit.weights.headers import StoredTensor

_FEW = 2  # columns that a tensor of row numbers has
_APART = 1 << 32  # numbers of rows of one tensor lie below this


@dataclass(frozen=True)
class StackPart:
    """One tensor of a checkpoint in a stack.

    Attributes:
        tensor: its name in the checkpoint.
        expert: whose it is; None where it holds those of all experts, [experts, ...].
        first: its first row in an expert's matrix, as the model holds it.
        rows: how many of them it holds.
        flipped: whether it holds them as columns.
    """

    tensor: str
    expert: int | None
    first: int
    rows: int
    flipped: bool


@dataclass(frozen=True)
class StackLayout:
    """One stack of a model.

    Attributes:
        name: in the model.
        shape: [experts, rows, columns], as the model holds it.
        transposed: whether an expert's rows are inputs, not outputs.
        parts: the tensors that it is made of.
    """

    name: str
    shape: tuple[int, int, int]
    transposed: bool
    parts: tuple[StackPart, ...]

    @property
    def holder(self) -> str:
        """The module that holds it."""
        return self.name.rpartition(".")[0]


def stack_layouts(model: PreTrainedModel, stored: Mapping[str, StoredTensor]) -> dict[str, StackLayout]:
    """The stacks of a model without weights, in the model's order; those that are made in another way are left out.

    Args:
        stored: tensors of its checkpoint.
    """
    shapes = {
        f"{name}.{stack}": (tuple(module.get_parameter(stack).shape), bool(getattr(module, "is_transposed", False)))
        for name, module in experts_of(model).items()
        for stack in stacked_names(module)
    }
    sources = _sources(model, stored)
    known: dict[_Form, tuple[StackPart, ...] | None] = {}
    found = {}
    for name, (shape, transposed) in shapes.items():
        if name not in sources:
            continue
        experts, rows, columns = shape
        form = sources[name].form(shape, stored)
        if form not in known:  # all layers have one or two
            known[form] = _parts(sources[name], shape, stored)
        if (parts := known[form]) is not None:
            named = zip(parts, sources[name].names, strict=True)
            made = tuple(replace(part, tensor=tensor) for part, tensor in named)
            found[name] = StackLayout(name, (experts, rows, columns), transposed, made)
    return found


def made_of(model: PreTrainedModel, stored: Mapping[str, StoredTensor]) -> dict[str, list[list[str]]]:
    """The tensors that each parameter of a model without weights is made of, in lists that become one thing each."""
    return {name: list(sources.tensors.values()) for name, sources in _sources(model, stored).items()}


def _sources(model: PreTrainedModel, stored: Mapping[str, StoredTensor]) -> dict[str, "_Sources"]:
    """The tensors that each parameter is made of, as transformers would rename and gather them."""
    conversions = get_model_conversion_mapping(model)
    renamings = [one for one in conversions if isinstance(one, WeightRenaming)]
    converters = [one for one in conversions if isinstance(one, WeightConverter)]
    by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    known = dict(model.named_parameters())
    found: dict[str, _Sources] = {}
    for name in sorted(stored, key=dot_natural_key):
        renamed, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        of = found.setdefault(renamed, _Sources(by_pattern[pattern] if pattern else None, {}))
        of.tensors.setdefault(pattern or name, []).append(name)
    return found


class _Form(NamedTuple):
    """What decides how a stack is made: equal for all layers of one kind."""

    converter: int
    patterns: tuple[tuple[str, int], ...]
    shapes: tuple[tuple[int, ...], ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class _Sources:
    """Tensors by the pattern of the converter that they match, in the order of their numbers."""

    converter: WeightConverter | None
    tensors: dict[str, list[str]]

    @property
    def names(self) -> list[str]:
        """Of all tensors."""
        return [name for pattern in self.tensors.values() for name in pattern]

    def form(self, shape: tuple[int, ...], stored: Mapping[str, StoredTensor]) -> "_Form":
        """How a stack of a shape is made of them."""
        patterns = () if self.converter is None else tuple((one, len(names)) for one, names in self.tensors.items())
        return _Form(id(self.converter), patterns, tuple(stored[name].shape for name in self.names), shape)


class _Model:
    """As much of a model as conversions ask for: the shape of a parameter."""

    def __init__(self, shape: Sequence[int]) -> None:
        self._shape = tuple(shape)

    def get_parameter(self, _name: str) -> Tensor:
        return torch.empty(self._shape, device="meta")


def _parts(
    sources: _Sources, shape: tuple[int, ...], stored: Mapping[str, StoredTensor]
) -> tuple[StackPart, ...] | None:
    """The parts of a stack; None where it is made in another way than of whole rows side by side."""
    names = sources.names
    if sources.converter is None:
        return (StackPart("", None, 0, shape[1], flipped=False),) if stored[names[0]].shape == shape else None
    if len(names) == 1:
        return _of_one(sources.converter, sources, shape, stored[names[0]].shape)
    numbers = {name: _numbered(place, stored[name].shape) for place, name in enumerate(names)}
    made = _converted(sources, sources.converter, numbers, _Model(shape))
    if made is None or made.ndim != len(shape) or made.shape[:2] != shape[:2]:
        return None
    parts = [_place(place, made, stored[name].shape, shape) for place, name in enumerate(names)]
    return None if any(part is None for part in parts) else tuple(part for part in parts if part is not None)


def _of_one(
    converter: WeightConverter, sources: _Sources, shape: tuple[int, ...], stored: tuple[int, ...]
) -> tuple[StackPart, ...] | None:
    """The one part of a stack that is made of one tensor: as it is, or with rows and columns exchanged."""
    if len(stored) != len(shape):
        return None
    few = (min(_FEW, shape[0]), *shape[1:])  # of the experts, which are all alike
    numbers = torch.arange(stored[1] * stored[2], dtype=torch.int32).view(1, *stored[1:]).expand(few[0], -1, -1)
    made = _converted(sources, converter, {sources.names[0]: numbers}, _Model(few))
    if made is None or made.shape != few:
        return None
    for flipped in (False, True):
        if torch.equal(made, numbers.transpose(1, 2) if flipped else numbers):
            return (StackPart("", None, 0, shape[1], flipped),)
    return None


def _numbered(place: int, shape: Sequence[int]) -> Tensor:
    """A tensor of a few columns whose values are the numbers of its rows."""
    rows = torch.arange(shape[-2]) + place * _APART
    return rows.unsqueeze(1).expand(*shape[:-1], _FEW)


def _converted(
    sources: _Sources, converter: WeightConverter, numbers: Mapping[str, Tensor], model: _Model
) -> Tensor | None:
    values: Any = {
        pattern: [numbers[name] for name in sources.tensors[pattern]]
        for pattern in converter.source_patterns  # in the order in which they are put together
        if pattern in sources.tensors
    }
    try:
        for operation in converter.operations:
            values = operation.convert(
                values,
                source_patterns=converter.source_patterns,
                target_patterns=converter.target_patterns,
                model=model,
                full_layer_name="",
            )
    except Exception:  # an operation that wants more than row numbers
        return None
    (made,) = values.values()
    made = made[0] if isinstance(made, list) else made
    return made if isinstance(made, Tensor) else None


def _place(place: int, made: Tensor, stored: tuple[int, ...], shape: tuple[int, ...]) -> StackPart | None:
    """Where a tensor's rows are found in what was made; None unless they are there in their order, side by side."""
    rows_of = made[:, :, 0]
    own = rows_of // _APART == place
    experts = own.any(dim=1).nonzero().flatten().tolist()
    expected = list(range(stored[-2]))
    if not experts or any(
        (rows_of[e][own[e]] - place * _APART).tolist() != expected for e in (experts[0], experts[-1])
    ):
        return None
    first = int(own[experts[0]].nonzero()[0])
    if not bool(own[experts[0], first : first + stored[-2]].all()):
        return None
    if len(stored) == 2:
        return StackPart("", experts[0], first, stored[0], flipped=False) if len(experts) == 1 else None
    return StackPart("", None, first, stored[1], flipped=False) if len(experts) == shape[0] else None
