"""The adapter alone, beside its base at run time: peft's form for Python servers, GGUF for llama.cpp."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_kit.core.errors import RunError
from qlora_kit.core.files import read_json, write_json, write_text
from qlora_kit.export.gguf.lora import ADAPTER_SETTINGS, ADAPTER_WEIGHTS, refuse_changed_base, write_lora_gguf
from qlora_kit.export.targets.splice import INDEX
from qlora_kit.schema.export import AdapterFormat, AdapterTarget

# Ranks that vLLM makes room for.
_SERVED_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_NOT_COPIED = (INDEX, "config.json", "README.md", ADAPTER_SETTINGS)


@dataclass(frozen=True)
class BaseName:
    """What a server loads under the adapter: `model.source` of the recipe and its `model.revision`."""

    source: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.source} at {self.revision}" if self.revision else self.source


def write_adapter(
    adapter_dir: Path, model_dir: Path, out_dir: Path, target: AdapterTarget, base: BaseName, file: str
) -> None:
    """Write a trained adapter for servers that load it beside its base.

    Args:
        adapter_dir: what training saved.
        model_dir: the merged folder, for the tokenizer, chat template, generation config and config.json.
        out_dir: an existing, empty folder.
        base: named in the files, in place of the folder that training read.
        file: name of the GGUF file, where that is the form.

    Raises:
        RecipeError: the adapter fits only a base that its start has changed, or llama.cpp has no place for what it
            holds.
        RunError: the adapter's files are not there.
    """
    for name in (ADAPTER_SETTINGS, ADAPTER_WEIGHTS):
        if not (adapter_dir / name).is_file():
            raise RunError(f"{adapter_dir} holds no {name}", fix="train the run to its end first")
    settings = read_json(adapter_dir / ADAPTER_SETTINGS)
    if target.format is AdapterFormat.gguf:
        write_lora_gguf(adapter_dir, model_dir, out_dir / file, base.source)
        serve = f"llama-server -m <{base.source} as GGUF> --lora {file}"
    else:
        _write_peft(adapter_dir, model_dir, out_dir, settings, base)
        rank = next((size for size in _SERVED_RANKS if size >= _largest_rank(settings)), _largest_rank(settings))
        revision = f" --revision {base.revision}" if base.revision else ""
        serve = f"vllm serve {base.source}{revision} --enable-lora --max-lora-rank {rank} --lora-modules tuned=."
    write_text(out_dir / "README.md", _card(base, settings, serve))


def _write_peft(adapter_dir: Path, model_dir: Path, out_dir: Path, settings: Mapping[str, Any], base: BaseName) -> None:
    refuse_changed_base(settings)
    shutil.copyfile(adapter_dir / ADAPTER_WEIGHTS, out_dir / ADAPTER_WEIGHTS)
    for path in sorted(model_dir.iterdir()):
        if path.is_file() and path.suffix != ".safetensors" and path.name not in _NOT_COPIED:
            shutil.copyfile(path, out_dir / path.name)
    named = {"base_model_name_or_path": base.source, "revision": base.revision}
    write_json(out_dir / ADAPTER_SETTINGS, {**settings, **named})


def _largest_rank(settings: Mapping[str, Any]) -> int:
    patterns: Mapping[str, int] = settings.get("rank_pattern") or {}
    return max(int(settings["r"]), *patterns.values()) if patterns else int(settings["r"])


def _card(base: BaseName, settings: Mapping[str, Any], serve: str) -> str:
    # Only a hub repository has a revision, and the hub takes nothing else for a base.
    of_hub = f"base_model: {base.source}\n" if base.revision else ""
    beyond = {"use_dora": "DoRA", "modules_to_save": "modules trained in full", "lora_bias": "biases"}
    held = [words for key, words in beyond.items() if settings.get(key)]
    warning = f"\nIt holds {' and '.join(held)}, which peft loads and vLLM does not.\n" if held else ""
    return (
        f"---\n{of_hub}library_name: peft\ntags:\n- lora\n---\n\n# LoRA adapter of {base.source}\n\n"
        f"The trained update alone, of rank {_largest_rank(settings)}; a server loads it beside its base, {base}.\n"
        f"{warning}\n```\n{serve}\n```\n"
    )
