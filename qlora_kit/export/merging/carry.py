"""The small files of a merged folder: config.json that fits its tensors, other settings, licenses."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_kit.core.files import read_json, write_json
from qlora_kit.export.license import license_files
from qlora_kit.export.merging.plan import Plan

GENERATION = "generation_config.json"
# What an image-text checkpoint's processor is made from; without them no reader takes an image.
PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
DTYPE_FIELDS = ("dtype", "torch_dtype")


def says_tied(folder: Path) -> bool:
    """Whether a folder's config.json, or the default of its architecture, makes the head the embedding."""
    config = read_json(folder / "config.json")
    for level in (config, config.get("text_config") or {}):
        if "tie_word_embeddings" in level:
            return bool(level["tie_word_embeddings"])
    from transformers import AutoConfig

    return bool(AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False).tie_word_embeddings)


def carry_files(base: Path, plan: Plan, out: Path) -> None:
    """Write config.json for the merged tensors, and copy the base's other settings and licenses."""
    config = dict(read_json(base / "config.json"))
    config.pop("quantization_config", None)
    levels = [config]
    if isinstance(config.get("text_config"), dict):
        config["text_config"] = dict(config["text_config"])
        levels.append(config["text_config"])
    for level in levels:
        _fit(level, plan)
    if not any(name in config for name in DTYPE_FIELDS):
        config["dtype"] = "bfloat16"
    if plan.untied:
        config["tie_word_embeddings"] = False
    write_json(out / "config.json", config)
    for path in carried(base):
        (out / path.name).write_bytes(path.read_bytes())


def carried(base: Path) -> list[Path]:
    """The files of a base that every model made from it keeps."""
    settings = (base / name for name in (GENERATION, *PROCESSORS))
    return sorted({*license_files(base), *(path for path in settings if path.is_file())})


def vocabulary_size(config: Mapping[str, Any]) -> int | None:
    """Rows of the embedding by a config.json."""
    for level in (config, config.get("text_config") or {}):
        if level.get("vocab_size") is not None:
            return int(level["vocab_size"])
    return None


def _fit(level: dict[str, Any], plan: Plan) -> None:
    for name in DTYPE_FIELDS:
        if name in level:
            level[name] = "bfloat16"
    if plan.untied and "tie_word_embeddings" in level:
        level["tie_word_embeddings"] = False
    if plan.vocabulary is not None and "vocab_size" in level:
        level["vocab_size"] = plan.vocabulary
