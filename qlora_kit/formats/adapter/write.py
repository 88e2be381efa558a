"""The adapter alone, beside its base at run time: peft's form for Python servers, GGUF for llama.cpp."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_kit.adapter.saved import CONFIG, WEIGHTS, BaseName
from qlora_kit.core.errors import RunError
from qlora_kit.core.files import read_json, write_json
from qlora_kit.export.rewrite import INDEX
from qlora_kit.formats.adapter.lora_gguf import refuse_changed_base, write_lora_gguf
from qlora_kit.schema.export import AdapterFormat, AdapterTarget

_NOT_COPIED = (INDEX, "config.json", "README.md", CONFIG)


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
    for name in (CONFIG, WEIGHTS):
        if not (adapter_dir / name).is_file():
            raise RunError(f"{adapter_dir} holds no {name}", fix="train the run to its end first")
    settings = read_json(adapter_dir / CONFIG)
    if target.format is AdapterFormat.gguf:
        write_lora_gguf(adapter_dir, model_dir, out_dir / file, base.source)
    else:
        _write_peft(adapter_dir, model_dir, out_dir, settings, base)


def _write_peft(adapter_dir: Path, model_dir: Path, out_dir: Path, settings: Mapping[str, Any], base: BaseName) -> None:
    refuse_changed_base(settings)
    shutil.copyfile(adapter_dir / WEIGHTS, out_dir / WEIGHTS)
    for path in sorted(model_dir.iterdir()):
        if path.is_file() and path.suffix != ".safetensors" and path.name not in _NOT_COPIED:
            shutil.copyfile(path, out_dir / path.name)
    named = {"base_model_name_or_path": base.source, "revision": base.revision}
    write_json(out_dir / CONFIG, {**settings, **named})
