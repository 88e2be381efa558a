"""What transformers makes of a checkpoint's names, by its own rules."""

from collections.abc import Callable

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key


def own_name_of_stored(model: PreTrainedModel, *, parts_too: bool = False) -> Callable[[str], str | None]:
    """A function of a checkpoint's name that gives the name of the same weight in its class.

    It answers None for a tensor that the class does not take as it is: it has no place for it, or makes one weight of
    several, or changes it.

    Args:
        model: of the class, with or without weights.
        parts_too: tensors of which a weight is made get a name too: the one that it would have by itself.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters = [] if parts_too else [one for one in transforms if isinstance(one, WeightConverter)]
    there = dict(model.state_dict())  # keys alone count

    def own_name(stored: str) -> str | None:
        name: str
        name, changed = rename_source_key(stored, renamings, converters, model.base_model_prefix, there)
        if parts_too:
            return name
        return name if changed is None and name in there else None

    return own_name
