"""An adapter's folder as peft saved it, made fit to be handed on."""

from dataclasses import dataclass
from pathlib import Path

from qlora_kit.core.files import read_json, write_json

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # of every tensor's name
CARD = "README.md"


@dataclass(frozen=True)
class BaseName:
    """What is loaded under an adapter: a hub's repository or a folder, and the revision of the former."""

    source: str
    revision: str | None = None


def name_base(folder: Path, base: BaseName) -> None:
    """Name the base in a saved adapter as the recipe does, and remove peft's card.

    peft writes where the base was read from, which may be a cache below somebody's home, and a card of blanks.
    """
    (folder / CARD).unlink(missing_ok=True)
    named = {"base_model_name_or_path": base.source, "revision": base.revision}
    write_json(folder / CONFIG, {**read_json(folder / CONFIG), **named})
