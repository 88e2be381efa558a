"""The base's license: its id, and its files, which go along with everything made from it."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_PATTERNS = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "COPYING*")
# What a license's own text begins with, for bases without a model card.
_KNOWN_TEXTS = {"apache-2.0": ("Apache License", "Version 2.0"), "mit": ("MIT License", "Permission is hereby granted")}
_TEXT_LOOKED_AT = 2_000


@dataclass(frozen=True)
class License:
    """As the base's model card states it; every part may be missing.

    Attributes:
        id: the hub's name of it, such as `apache-2.0`; `other` where only name and link tell.
    """

    id: str | None = None
    name: str | None = None
    link: str | None = None

    @property
    def shown(self) -> str:
        """The name to print."""
        return self.name or self.id or "not stated by the base"


def license_files(base_folder: Path) -> list[Path]:
    """The base's license, notice and use policy, sorted."""
    found = {path for pattern in _PATTERNS for path in base_folder.glob(pattern) if path.is_file()}
    return sorted(found)


def read_license(base_folder: Path) -> License:
    """The license by the base's README.md, else by the text of its license file."""
    card = read_front_matter(base_folder / "README.md")
    if isinstance(card.get("license"), str):
        return License(card["license"], _text(card, "license_name"), _text(card, "license_link"))
    for path in license_files(base_folder):
        head = path.read_text(encoding="utf-8", errors="replace")[:_TEXT_LOOKED_AT]
        for name, words in _KNOWN_TEXTS.items():
            if all(word in head for word in words):
                return License(name)
    return License()


def copy_license(base_folder: Path, folder: Path) -> list[str]:
    """Copy the base's license files; returns their names."""
    names = []
    for path in license_files(base_folder):
        shutil.copyfile(path, folder / path.name)
        names.append(path.name)
    return names


def read_front_matter(readme: Path) -> Mapping[str, Any]:
    """The facts at the head of a model card; none where it is absent or damaged."""
    if not readme.is_file():
        return {}
    import yaml  # type: ignore[import-untyped]  # PyYAML ships no types
    from huggingface_hub import metadata_load

    try:
        return metadata_load(readme) or {}
    except (ValueError, yaml.YAMLError, RecursionError):
        return {}  # a license line is not worth failing a training or an export for


def _text(card: Mapping[str, Any], key: str) -> str | None:
    value = card.get(key)
    return value if isinstance(value, str) else None
