"""Saves a trained adapter under the names that the class of its checkpoint has for its modules."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from qlora_kit.adapter.attach import exact_targets
from qlora_kit.adapter.expert_lora import ExpertLora
from qlora_kit.adapter.expert_updates import BASE_LAYER
from qlora_kit.adapter.plain_peft import for_plain_peft, told_of_plain_peft
from qlora_kit.adapter.saved import CONFIG, PREFIX, WEIGHTS
from qlora_kit.core.files import read_json, write_json
from qlora_kit.weights.own_names import OwnNames, own_names_of


def save_adapter(model: PeftModel, folder: Path, kind: str) -> str:
    """Save an adapter as peft does, under the names by which the class of the checkpoint knows its modules.

    So peft reads it on that class, and servers that load the whole checkpoint.

    Args:
        kind: `model_type` of the checkpoint.

    Returns:
        what peft alone makes of it, where that is something else; else nothing.
    """
    model.save_pretrained(folder)
    base = model.get_base_model()
    names = own_names_of(base)
    layers = [(name, one) for name, one in base.named_modules() if isinstance(one, LoraLayer)]
    held = {names.own(name) for name, one in layers if not isinstance(one, ExpertLora)}
    if names.is_part:
        _rename_weights(folder / WEIGHTS, names)
        modules = {names.own(name.replace(BASE_LAYER, "")) for name, _ in base.named_modules() if name}
        write_json(folder / CONFIG, _renamed_settings(read_json(folder / CONFIG), names, modules, held))
    settings = for_plain_peft(read_json(folder / CONFIG), kind, held)
    write_json(folder / CONFIG, settings)
    return told_of_plain_peft(settings, kind)


def _rename_weights(file: Path, names: OwnNames) -> None:
    tensors = load_file(file)
    renamed = {f"{PREFIX}{names.own(name.removeprefix(PREFIX))}": value for name, value in tensors.items()}
    save_file(renamed, file, metadata={"format": "pt"})


def _renamed_settings(
    settings: Mapping[str, Any], names: OwnNames, modules: Collection[str], held: Collection[str]
) -> dict[str, Any]:
    targets, spared = exact_targets(held, {*modules, *names.outside})
    patterns = {
        key: {names.own(pattern): value for pattern, value in (settings.get(key) or {}).items()}
        for key in ("rank_pattern", "alpha_pattern")
    }
    return {**settings, **patterns, "target_modules": targets, "exclude_modules": spared or None}
