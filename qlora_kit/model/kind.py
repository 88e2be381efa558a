"""What a config.json says of the kind of model, before anything is fetched or built: a text model, or one to refuse."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from qlora_kit.core.errors import DamagedFileError, Problem
from qlora_kit.core.files import read_json

CONFIG = "config.json"
# Keys of the parts of a model that sees or hears, and modules of checkpoints that keep no such key.
_SENSES = r"(vision|visual|image|audio|speech|video|thinker|talker|mm_)"
_PART = re.compile(rf"^{_SENSES}\w*(_config|_tower|_encoder)$")
_TOWER = re.compile(rf"(^|\.){_SENSES}\w*\.")
# A text encoder beside the decoder, or a text model that is wrapped in another one.
_WRAPPED = ("text_config", "language_config", "llm_config")
MOST_LAYERS = 4096  # of one kind; the deepest published decoders have 126
LARGEST_SIZE = 2**27  # of a width, a vocabulary or a context: libraries make tables of so many numbers
_SIZED = re.compile(r"(_size|_dim|_rank|_heads|_positions|_embeddings|_embd|_inner|_model|d_ff|d_kv)$")
_COUNTED = re.compile(r"^(num|n)_(\w+_)?(layers?|blocks?|experts)$")


def read_config(folder: Path) -> Mapping[str, object]:
    """A folder's config.json.

    Raises:
        DamagedFileError: it is no JSON object.
    """
    path = folder / CONFIG
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        what = f"{path} cannot be read: {error}"
        raise DamagedFileError(what, str(path), "fetch or copy this file again") from error


def other_senses(config: Mapping[str, object]) -> str | None:
    """The key of config.json that gives a model eyes or ears; None for a text model."""
    for key, value in config.items():
        if _PART.match(key) and value:
            return key
    return next((key for key in _WRAPPED if isinstance(config.get(key), dict)), None)


def tower(names: list[str]) -> str | None:
    """The first tensor that belongs to an encoder of images or sound; None where there is none."""
    return next((name for name in sorted(names) if _TOWER.search(name)), None)


def image_text(source: str, why: str) -> Problem:
    """The refusal of a model that takes more than text."""
    what = (
        f"{source} takes images or sound too ({why}); the kit trains and exports text models only so far: "
        "name a text-only checkpoint of the family as model.source"
    )
    return Problem(what, "model.source")


def kind_problems(source: str, config: Mapping[str, object], names: list[str]) -> Iterator[Problem]:
    """Why this model cannot be trained, as far as its config.json and the names of its tensors say.

    Args:
        source: as the user named it.
        config: the parsed config.json.
        names: of the tensors, where the checkpoint is at hand.
    """
    if key := other_senses(config):
        yield image_text(source, f"config.json has a {key}")
    elif name := tower(names):
        yield image_text(source, f"it holds {name}")
    if config.get("is_encoder_decoder") is True:
        what = f"{source} is an encoder with a decoder; the kit trains decoders, models that only go on writing a text"
        yield Problem(what, "model.source")
    for key, value in config.items():
        most = MOST_LAYERS if _COUNTED.search(key) else LARGEST_SIZE if _SIZED.search(key) else None
        if most is not None and isinstance(value, (int, float)) and value > most:
            yield Problem(f"config.json of {source} says {key}={value}, which no model has", "model.source")
