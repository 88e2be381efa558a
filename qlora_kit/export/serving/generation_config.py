"""generation_config.json of an artifact: the base's own settings, and every token that ends an answer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_kit.core.files import read_json, write_json
from qlora_kit.data.template.closing import closing_id
from qlora_kit.model.tokenizer import stop_ids

GENERATION_CONFIG = "generation_config.json"


def served_stop_ids(base_folder: Path, tokenizer: Any) -> list[int]:
    """Ids that end an answer: the base's and the tokenizer's own, and the token that training closed answers with.

    The trained one comes first: readers that take a single id take that.
    """
    closing = closing_id(tokenizer)
    rest = sorted(stop_ids(base_folder, tokenizer) - {closing})
    return rest if closing is None else [closing, *rest]


def base_generation(base_folder: Path) -> Mapping[str, Any]:
    """The base's generation settings; empty where it has none."""
    path = base_folder / GENERATION_CONFIG
    return read_json(path) if path.is_file() else {}


def write_generation_config(folder: Path, base_folder: Path, tokenizer: Any) -> str:
    """Write the base's settings with the union of stop ids over what a quantizer left; returns the file's name.

    Sampling settings are the base's, to the letter: libraries that quantize switch sampling on, and none is added here.
    """
    ids = served_stop_ids(base_folder, tokenizer)
    settings = dict(base_generation(base_folder))
    if ids:
        settings["eos_token_id"] = ids[0] if len(ids) == 1 else ids
    write_json(folder / GENERATION_CONFIG, settings)
    return GENERATION_CONFIG
