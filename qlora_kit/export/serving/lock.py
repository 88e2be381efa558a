"""lock.json: what it takes to make an artifact again, and to tell whether another one was made alike.

File names and hashes only: no row of the data and no path of the machine.
"""

import json
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from qlora_kit import __version__
from qlora_kit.core.environment import package_versions
from qlora_kit.core.files import file_hash, read_json, write_json
from qlora_kit.export.serving.facts import ServingFacts
from qlora_kit.runs.base import Base
from qlora_kit.runs.directory import RunDirectory
from qlora_kit.weights.headers import raw_header

LOCK = "lock.json"


def write_lock(folder: Path, facts: ServingFacts) -> str:
    """Write lock.json; returns its name."""
    write_json(folder / LOCK, lock_of(facts))
    return LOCK


def lock_of(facts: ServingFacts) -> dict[str, object]:
    """The content of lock.json."""
    return {
        "kit": __version__,
        "artifact": {"name": facts.name, "format": facts.format.name, "settings": dict(facts.settings)},
        "base": {
            "source": facts.base.shown,
            "revision": facts.base.revision,
            "config_sha256": _hash_if_there(facts.base.folder / "config.json"),
            "tokenizer_sha256": _hash_if_there(facts.base.folder / "tokenizer.json"),
            "weights": weight_hashes(facts.base),
        },
        "chat_template_sha256": _text_hash(facts.tokenizer.chat_template),
        "seed": facts.seed,
        **(_base(facts.directory) if facts.run is None else _run(facts.run)),
        "packages": package_versions(),
    }


def weight_hashes(base: Base) -> list[dict[str, object]]:
    """Size and header hash of each weight file of the base: quick to compute, and no two conversions share them.

    The header names every tensor with its type, shape and place; the numbers themselves are not read.
    """
    files = sorted(base.folder.glob("*.safetensors"))
    return [{"file": path.name, "bytes": path.stat().st_size, "header_sha256": _header_hash(path)} for path in files]


def _base(directory: RunDirectory | None) -> dict[str, object]:
    """Of a base model: the rows that it was calibrated and scored on."""
    data = data_hashes(directory) if directory else {}
    return {"recipe_sha256": None, "adapter_sha256": None, "data": data, "trained_with": {}}


def _run(run: RunDirectory) -> dict[str, object]:
    return {
        "recipe_sha256": _hash_if_there(run.recipe),
        "adapter_sha256": _hash_if_there(run.adapter / "adapter_model.safetensors"),
        "data": data_hashes(run),
        "trained_with": dict(_json_if_there(run.environment).get("packages", {})),
    }


def data_hashes(run: RunDirectory) -> dict[str, dict[str, str]]:
    """SHA-256 of each file of rows by its name, for training and for held-out rows."""
    recorded = _json_if_there(run.data)
    splits: dict[str, dict[str, str]] = {}
    for split in ("train", "held_out"):
        sources = (recorded.get(split) or {}).get("sources", [])
        splits[split] = {Path(path).name: digest for source in sources for path, digest in source["sha256"].items()}
    return splits


def _json_if_there(path: Path) -> Mapping[str, Any]:
    return read_json(path) if path.is_file() else {}


def _hash_if_there(path: Path) -> str | None:
    return file_hash(path) if path.is_file() else None


def _text_hash(value: object) -> str | None:
    if not value:
        return None
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return sha256(text.encode("utf-8")).hexdigest()


def _header_hash(path: Path) -> str | None:
    header = raw_header(path)
    return None if header is None else sha256(header).hexdigest()
