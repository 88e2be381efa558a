"""README.md of a run's own adapter: what it is, of which base, and how it is used."""

from pathlib import Path

from qlora_kit import __version__
from qlora_kit.adapter.saved import CARD
from qlora_kit.core.files import write_text
from qlora_kit.export.license import read_license
from qlora_kit.export.serving.markdown import code, plain
from qlora_kit.export.serving.model_card import front_matter
from qlora_kit.runs.base import Base


def write_adapter_card(folder: Path, name: str, base: Base, told: str = "") -> None:
    """Write the card into an adapter's folder; no path of the machine is in it.

    Args:
        name: of the run.
        told: what a reader makes of it; empty for nothing.
    """
    write_text(folder / CARD, adapter_card(name, base, told))


def adapter_card(name: str, base: Base, told: str = "") -> str:
    """The card's text."""
    license = read_license(base.folder)
    head = front_matter(
        {
            "license": license.id,
            "license_name": license.name,
            "license_link": license.link,
            "base_model": base.hub_id,
            "base_model_relation": "adapter" if base.hub_id else None,
            "library_name": "peft",
            "pipeline_tag": "text-generation",
            "tags": ["lora", "qlora", "qlora-kit"],
        }
    )
    at = f" at revision {code(base.name.revision)}" if base.name.revision else ""
    lines = [
        *head,
        "",
        f"# {plain(name)}",
        "",
        f"A LoRA adapter for {plain(base.shown)}{at}, trained with qlora-kit {__version__}.",
        "It needs that base beside it; `qlora-kit export` merges both and writes files to serve.",
        *([f"{told[:1].upper()}{told[1:]}."] if told else []),
        "",
        f"License of the base: {plain(license.shown)}.",
    ]
    return "\n".join(lines) + "\n"
