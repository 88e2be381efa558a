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
from qlora_kit.model.language_model import build_language_model
from qlora_kit.schema.model import Attention

_OF_THE_MACHINE = ("out of memory", "allocate memory", "alloc_failed", "cuda error", "cublas", "cudnn")
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


def attention_problem(model: PreTrainedModel, attention: Attention) -> Problem | None:
    """Why a model without weights cannot have this attention; None where it can."""
    kind = model.config.model_type
    if attention is Attention.flash_attention_2:  # which is built only where its package is
        refused = not model._supports_flash_attn
    else:
        try:
            with torch.device("meta"):
                type(model)._from_config(deepcopy(model.config), attn_implementation=attention.value)
            refused = False
        except (ValueError, ImportError):
            refused = True
    if not refused:
        return None
    what = f"transformers has no {attention.value} attention for model_type {kind}"
    return Problem(what, f"model.attention={attention.name}", "model.attention=eager")


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
        if isinstance(error, (KitError, MemoryError)) or _is_of_the_machine(error):
            raise
        said = printable(" ".join(str(error).split()))[:LONGEST_TOLD]
        libraries = ", ".join(f"{name} {metadata.version(name)}" for name in ("transformers", "peft", "trl"))
        what = (
            f"{libraries} cannot {doing} this model (model_type {_kind(config)}, {folder}): "
            f"{type(error).__name__}: {said}; "
            "name another base, or one whose architecture this release of transformers trains"
        )
        raise RecipeError(what, "model.source") from error


def _is_of_the_machine(error: Exception) -> bool:
    """Whether memory, a device or a disk is to blame, which others tell better."""
    if isinstance(error, OSError):
        return error.errno is not None  # the libraries' own carry none
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _OF_THE_MACHINE)


def _kind(config: Mapping[str, object]) -> str:
    return printable(str(config.get("model_type", "unknown")))[:80]
