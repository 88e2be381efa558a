"""Finds the base that `base=` names, and refuses one that is quantized already; imports no torch."""

import difflib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_kit.core.errors import Problem, RecipeError
from qlora_kit.core.files import read_json
from qlora_kit.model.source import locate_base, pinned
from qlora_kit.schema.folders import groups, recipe_file
from qlora_kit.schema.model import ModelConfig
from qlora_kit.schema.root import ExportRecipe
from qlora_kit.weights.headers import FLOATS, read_headers

# Keys of config.json under which quantizers leave their settings: transformers' own, an older one of vLLM's, and MLX's.
QUANTIZED_KEYS = ("quantization_config", "compression_config", "quantization")
_WORDS = {"model.source": "base", "model.revision": "revision", "training starts from": "an export is made from"}


@dataclass(frozen=True)
class NamedBase:
    """A base by the words of the command line, and its checked folder."""

    model: ModelConfig
    folder: Path


def named_base(recipe: ExportRecipe) -> NamedBase:
    """The base of an export recipe, fetched first where needed.

    Raises:
        RecipeError: it is not there, lacks a file, or is quantized.
    """
    found = located_base(recipe)
    refuse_quantized(found.folder, recipe)
    return found


def located_base(recipe: ExportRecipe) -> NamedBase:
    """The base of an export recipe, quantized or not, fetched first where needed.

    Raises:
        RecipeError: it is not there, or lacks a file.
    """
    with in_words_of_base(recipe):
        model = pinned(_model(recipe))
        return NamedBase(model, locate_base(model))


@contextmanager
def in_words_of_base(recipe: ExportRecipe) -> Iterator[None]:
    """Turn errors about `model.source` into such about `base`, which is what the user wrote."""
    try:
        yield
    except RecipeError as error:
        raise RecipeError([_reworded(problem, recipe) for problem in error.problems]) from error


def refuse_quantized(folder: Path, recipe: ExportRecipe) -> None:
    """Refuse every format of a base whose weights were rounded already.

    Raises:
        RecipeError: its config.json says so, or its weights are integers.
    """
    told = next(map(_told, _settings(read_json(folder / "config.json"))), None) or _integers(folder)
    if told is None:
        return
    names = [name for group in vars(recipe.export).values() if isinstance(group, dict) for name in group]
    what = (
        f"{folder} is itself quantized ({told}), so {', '.join(names)} and every other format are refused: "
        "what was rounded away is in no file of it, a second rounding adds to the first, and scores against such a "
        "base would not show what both have cost"
    )
    raise RecipeError(what, f"base={recipe.base}", "base=<the 16-bit model that it was made from>")


def _model(recipe: ExportRecipe) -> ModelConfig:
    """What `base` names: a folder or hub id, or an option of the recipe group `model`, which pins a commit."""
    from omegaconf import OmegaConf

    name = str(recipe.base)
    if "/" in name or Path(name).exists():
        return ModelConfig(source=name, revision=recipe.revision)
    option = recipe_file("model", name)
    if option is None:
        if near := difflib.get_close_matches(name, groups()["model"], n=1, cutoff=0.75):
            what = f"there is neither a folder nor a model named '{name}'; did you mean '{near[0]}'?"
            raise RecipeError(what, f"base={name}", f"base={near[0]}")
        return ModelConfig(source=name, revision=recipe.revision)
    model = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), OmegaConf.load(option)))
    assert isinstance(model, ModelConfig)
    model.revision = recipe.revision or model.revision
    return model


def _settings(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for level in (config, config.get("text_config") or {}):
        yield from (level[key] for key in QUANTIZED_KEYS if level.get(key))


def _integers(folder: Path) -> str | None:
    """What gives away weights that were packed without a word in config.json."""
    for tensor in read_headers(folder).values():
        if tensor.dtype not in FLOATS and tensor.name.endswith(("weight", "weight_packed")):
            return f"{tensor.name} holds integers"
    return None


def _told(settings: Mapping[str, Any]) -> str:
    """Method and bits, as far as they are written there."""
    method = str(settings.get("quant_method") or "a method that it does not name")
    bits = settings.get("bits") or (4 if settings.get("load_in_4bit") else 8 if settings.get("load_in_8bit") else None)
    return f"{method}, {bits} bit" if bits else method


def _reworded(problem: Problem, recipe: ExportRecipe) -> Problem:
    what, fix = problem.what, problem.fix
    for word, ours in _WORDS.items():
        what, fix = what.replace(word, ours), fix.replace(word, ours)
    where = "revision" if problem.where == "model.revision" else f"base={recipe.base}"
    return Problem(what, where, fix)
