"""Where the tensors of a checkpoint lie in the stacks of experts that the model makes of them.

Most checkpoints hold each expert by itself, and transformers stacks them while it loads: its own table of conversions
says how. Here the conversions are run on the numbers of rows, so that the answer holds for any of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
    found = {}
    for name, (shape, transposed) in shapes.items():
        if name in sources and (parts := _parts(sources[name], shape, stored)):
            experts, rows, columns = shape
            found[name] = StackLayout(name, (experts, rows, columns), transposed, parts)
    return found


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


@dataclass(frozen=True)
class _Sources:
    """Tensors by the pattern of the converter that they match, in the order of their numbers."""

    converter: WeightConverter | None
    tensors: dict[str, list[str]]


def _parts(
    sources: _Sources, shape: tuple[int, ...], stored: Mapping[str, StoredTensor]
) -> tuple[StackPart, ...] | None:
    names = [name for pattern in sources.tensors.values() for name in pattern]
    if sources.converter is None:
        (name,) = names
        return (StackPart(name, None, 0, shape[1], flipped=False),) if stored[name].shape == shape else None
    alone = len(names) == 1
    numbers = {name: _numbered(place, stored[name].shape, whole=alone) for place, name in enumerate(names)}
    made = _converted(sources, sources.converter, numbers)
    if made is None or made.ndim != len(shape) or (not alone and made.shape[:2] != shape[:2]):
        return None
    parts = [_place(name, place, made, stored[name].shape, shape, whole=alone) for place, name in enumerate(names)]
    return None if any(part is None for part in parts) else tuple(part for part in parts if part is not None)


def _numbered(place: int, shape: Sequence[int], *, whole: bool) -> Tensor:
    """A tensor of a shape whose values are the numbers of its rows; of few columns where it may be copied."""
    columns = shape[-1] if whole else _FEW
    rows = torch.arange(shape[-2]) + place * _APART
    return rows.unsqueeze(1).expand(*shape[:-1], columns)


def _converted(sources: _Sources, converter: WeightConverter, numbers: Mapping[str, Tensor]) -> Tensor | None:
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
            )
    except Exception:  # an operation that wants more than row numbers
        return None
    (made,) = values.values()
    made = made[0] if isinstance(made, list) else made
    return made if isinstance(made, Tensor) else None


def _place(
    name: str, place: int, made: Tensor, stored: tuple[int, ...], shape: tuple[int, ...], *, whole: bool
) -> StackPart | None:
    """Where a tensor's rows are found in what was made; None unless they are there in their order, side by side."""
    flipped = whole and made.shape[1:] == stored[:0:-1] and bool((made[0, 0] == made[0, 0, 0]).logical_not().any())
    rows_of = made[:, 0, :] if flipped else made[:, :, 0]
    own = rows_of // _APART == place
    experts = own.any(dim=1).nonzero().flatten().tolist()
    expected = list(range(stored[-2]))
    if not experts or any(
        (rows_of[e][own[e]] - place * _APART).tolist() != expected for e in (experts[0], experts[-1])
    ):
        return None
    first = int(own[experts[0]].nonzero()[0])
    if len(stored) == 2:
        return StackPart(name, experts[0], first, stored[0], flipped) if len(experts) == 1 else None
    if len(experts) != shape[0]:
        return None
    return StackPart(name, None, 0 if flipped else first, shape[1] if flipped else stored[1], flipped)
