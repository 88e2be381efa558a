"""A base without its weights, on torch's meta device: what would be loaded, looked at before it is."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from importlib import metadata
from pathlib import Path

import torch
from transformers import PreTrainedModel

from qlora_kit.core.errors import KitError, Problem, RecipeError
from qlora_kit.core.terminal import printable
from qlora_kit.model.kind import read_config
from qlora_kit.model.language_model import build_language_model, caps_scores
from qlora_kit.schema.model import Attention

_OF_MEMORY = ("out of memory", "allocate memory", "alloc_failed", "create a primitive")
_OF_THE_MACHINE = (*_OF_MEMORY, "start new thread", "cuda error", "cublas", "cudnn")
LONGEST_TOLD = 300  # characters of a library's own message


def skeleton(folder: Path) -> PreTrainedModel:
    """The language model that a folder's config.json describes, its weights on the meta device.

    Raises:
        RecipeError: the libraries refuse the model.
        DamagedFileError: there is no config.json, or it is no JSON object.
    """
    config = read_config(folder)
    with told_plainly(folder, config, "build"), torch.device("meta"):
        return build_language_model(folder)


def attention_for(model: PreTrainedModel, wanted: Attention) -> Attention:
    """The attention that a model without weights is given: what is wanted, or eager where it has no sdpa.

    Raises:
        RecipeError: it cannot have what is wanted.
    """
    if _has_attention(model, wanted) and not (wanted is Attention.sdpa and caps_scores(model)):
        return wanted
    if wanted is Attention.sdpa and _has_attention(model, Attention.eager):
        return Attention.eager
    what = f"transformers has no {wanted.value} attention for model_type {model.config.model_type}"
    raise RecipeError([Problem(what, f"model.attention={wanted.name}", "model.attention=eager")])


def _has_attention(model: PreTrainedModel, attention: Attention) -> bool:
    if attention is Attention.flash_attention_2:  # which is built only where its package is
        return bool(model._supports_flash_attn)
    try:
        with torch.device("meta"):
            type(model)._from_config(deepcopy(model.config), attn_implementation=attention.value)
    except (ValueError, ImportError):
        return False
    return True


@contextmanager
def told_plainly(folder: Path, config: Mapping[str, object], doing: str) -> Iterator[None]:
    """Turn a library's own error into one that names model, library and what can be done; exit code 2.

    Args:
        folder: of the base.
        config: its config.json.
        doing: what is tried, as in "cannot <doing> this model".
    Raises:
        RecipeError: anything but an error of the kit's, of memory or of the disk was raised.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, (KitError, MemoryError)) or is_of_the_machine(error):
            raise
        said = printable(" ".join(str(error).split()))[:LONGEST_TOLD]
        libraries = ", ".join(f"{name} {metadata.version(name)}" for name in ("transformers", "peft", "trl"))
        what = (
            f"{libraries} cannot {doing} this model (model_type {_kind(config)}, {folder}): "
            f"{type(error).__name__}: {said}; "
            "name another base, or one whose architecture this release of transformers trains"
        )
        raise RecipeError(what, "model.source") from error


def is_of_the_machine(error: Exception) -> bool:
    """Whether memory, a device or a disk is to blame, which others tell better."""
    if isinstance(error, OSError):
        return error.errno is not None  # the libraries' own carry none
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _OF_THE_MACHINE)


def _kind(config: Mapping[str, object]) -> str:
    return printable(str(config.get("model_type", "unknown")))[:80]
