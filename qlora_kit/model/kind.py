"""What a config.json says of the kind of model, before anything is fetched or built: a decoder, or one to refuse."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from qlora_kit.core.errors import DamagedFileError, Problem
from qlora_kit.core.files import read_json

CONFIG = "config.json"
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


def kind_problems(source: str, config: Mapping[str, object]) -> Iterator[Problem]:
    """Why this model cannot be trained, as far as its config.json says.

    Args:
        source: as the user named it.
        config: the parsed config.json.
    """
    if config.get("is_encoder_decoder") is True:
        what = f"{source} is an encoder with a decoder; the kit trains decoders, models that only go on writing a text"
        yield Problem(what, "model.source")
    for key, value in config.items():
        most = MOST_LAYERS if _COUNTED.search(key) else LARGEST_SIZE if _SIZED.search(key) else None
        if most is not None and isinstance(value, (int, float)) and value > most:
            yield Problem(f"config.json of {source} says {key}={value}, which no model has", "model.source")
