"""Where the tensors of a folder are not those of the model that its config.json describes; found in their headers."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from transformers import PreTrainedModel

from qlora_kit.core.units import counted
from qlora_kit.model.conversion import own_name_of_stored
from qlora_kit.model.expert_layout import made_of
from qlora_kit.model.stacked_experts import experts_of, stacked_names
from qlora_kit.model.structure import layers_of
from qlora_kit.weights.headers import FLOATS, StoredTensor


@dataclass(frozen=True)
class UnlikeConfig:
    """Weights by the names of the checkpoint's own class.

    Attributes:
        missing: that no tensor makes.
        odd: in words, those that are stored in another shape, and stacks of experts that lack some.
        beyond: tensors of more layers than there are, but for those that the class is known to leave out.
    """

    missing: tuple[str, ...] = ()
    odd: Mapping[str, str] = field(default_factory=dict)
    beyond: tuple[str, ...] = ()


def unlike_config(model: PreTrainedModel, stored: Mapping[str, StoredTensor]) -> UnlikeConfig:
    """What a class without weights does not find among the tensors of its checkpoint."""
    sources = made_of(model, stored)
    stacks = {f"{name}.{stack}" for name, module in experts_of(model).items() for stack in stacked_names(module)}
    ignored = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    missing, odd = [], {}
    for name, weight in model.named_parameters():
        lists = sources.get(name)
        if name in stacks:  # which may be stored in a form of their own
            if lists and (told := next(_torn(lists, stored, weight.shape[0]), "")):
                odd[name] = told
        elif lists is None:
            if not any(re.search(pattern, name) for pattern in ignored):
                missing.append(name)
        elif len(lists) == 1 and len(lists[0]) == 1:
            found = stored[lists[0][0]]
            if found.dtype in FLOATS and found.shape != tuple(weight.shape):
                odd[name] = f"{name} is {list(found.shape)}, and config.json says {list(weight.shape)}"
    return UnlikeConfig(tuple(missing), odd, tuple(_beyond(model, stored)))


def _beyond(model: PreTrainedModel, stored: Mapping[str, StoredTensor]) -> Iterator[str]:
    """Tensors of layers that config.json does not count; some checkpoints hold layers that guess several tokens."""
    prefix, count = layers_of(model)
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    would_be = own_name_of_stored(model, parts_too=True)
    for name in sorted(stored):
        found = re.match(rf"{re.escape(prefix)}\.(\d+)\.", str(would_be(name))) if prefix else None
        if found and int(found[1]) >= count and not any(re.search(pattern, name) for pattern in ignored):
            yield name


def _torn(lists: list[list[str]], stored: Mapping[str, StoredTensor], experts: int) -> Iterator[str]:
    """What is wrong with a stack that is made of a tensor of each expert."""
    for names in lists:
        shapes = [stored[name].shape for name in names]
        usual = max(shapes, key=shapes.count)
        if len(names) == 1:
            continue
        if len(names) != experts:
            yield f"{names[0]} and its like are {counted(len(names), 'tensor')}, and config.json says {experts} experts"
        for name, shape in zip(names, shapes, strict=True):
            if shape != usual:
                yield f"{name} is {list(shape)}, and those of other experts {list(usual)}"
