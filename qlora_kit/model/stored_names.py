"""Where the weights of a folder's model lie among the tensors of its files."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedModel

from qlora_kit.model.conversion import own_name_of_stored
from qlora_kit.model.expert_layout import StackLayout, stack_layouts
from qlora_kit.model.language_model import language_model, outer_modules
from qlora_kit.model.structure import transposed_modules
from qlora_kit.model.unlike_config import UnlikeConfig, unlike_config
from qlora_kit.weights.headers import StoredTensor


@dataclass(frozen=True)
class StoredNames:
    """Names of a folder's tensors.

    Attributes:
        by_own: the tensor of each weight that the checkpoint's own class holds as it is stored, by the class's name.
        outside: tensors that are no part of the language model, with the outermost module that holds each.
        stacks: how tensors make stacks of experts, by the class's name of a stack.
        flipped: tensors of linear maps that lie the other way around, [inputs, outputs].
        embedding, head: tensors of the language model's table and output head; empty where there is none.
        kept_in_fp32: tensors that the class computes with in fp32 whatever the others are in.
        unlike: where they are not those of the class.
    """

    by_own: Mapping[str, str] = field(default_factory=dict)
    outside: Mapping[str, str] = field(default_factory=dict)
    stacks: Mapping[str, StackLayout] = field(default_factory=dict)
    flipped: frozenset[str] = frozenset()
    embedding: str = ""
    head: str = ""
    kept_in_fp32: frozenset[str] = frozenset()
    unlike: UnlikeConfig = field(default_factory=UnlikeConfig)


def stored_names(folder: Path, tensors: Mapping[str, StoredTensor]) -> StoredNames:
    """Ask transformers' own rules where each weight of a folder's model lies.

    Args:
        tensors: of the folder's files.
    Raises:
        RecipeError: transformers has no class for the folder.
    """
    found = language_model(folder)
    own_name = own_name_of_stored(found.own)
    would_be = own_name_of_stored(found.own, parts_too=True)
    by_own = {own: name for name in sorted(tensors) if (own := own_name(name)) is not None}
    towers = outer_modules(found.names.outside)
    outside = {
        name: next((tower for tower in towers if own.startswith(f"{tower}.")), name.partition(".")[0])
        for name in sorted(tensors)
        if found.names.trained(own := str(would_be(name))) is None
    }
    tables = (found.own.get_input_embeddings(), found.own.get_output_embeddings())
    embedding, head = (
        next((f"{name}.weight" for name, module in found.own.named_modules() if module is table), "")
        for table in tables
    )
    stacks = {
        name: layout
        for name, layout in stack_layouts(found.own, tensors).items()
        if found.names.trained(name) is not None
    }
    turned = [f"{name}.weight" for name in transposed_modules(found.own)]
    flipped = frozenset(by_own[name] for name in turned if name in by_own)
    return StoredNames(
        by_own,
        outside,
        stacks,
        flipped,
        by_own.get(embedding, ""),
        by_own.get(head, head),
        frozenset(name for name in tensors if _is_in_fp32(found.own, str(would_be(name)))),
        unlike_config(found.own, tensors),
    )


def _is_in_fp32(model: PreTrainedModel, name: str) -> bool:
    """Whether transformers holds a weight in fp32 in a model that is loaded in 16 bit; it matches parts of names."""
    kept = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    return any(f".{part}." in f".{name}." for part in kept)
