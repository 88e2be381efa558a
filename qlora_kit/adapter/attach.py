"""Puts a LoRA adapter on a base, and says how many modules it touches."""

import contextlib
import io
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from transformers import PreTrainedModel

from qlora_kit.core.errors import RecipeError, RunError
from qlora_kit.schema.lora import TARGET_SETS, LoraConfig, LoraInit

WEIGHTS = "adapter_model.safetensors"
_FACTOR = re.compile(r"\.lora_(embedding_)?A(\.|$)")


@dataclass(frozen=True)
class AdapterSize:
    """What is trained."""

    modules: int
    parameters: int


def linear_names(model: torch.nn.Module) -> set[str]:
    """Last parts of the names of the linear modules, the output head aside."""
    names = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    return names - {"lm_head"}


def resolve_targets(targets: list[str], present: set[str]) -> list[str]:
    """Module names for the recipe's targets, sorted.

    Args:
        targets: names of `TARGET_SETS` or of modules.
        present: linear modules of the base.
    Raises:
        RecipeError: a target names nothing in this base.
    """
    resolved: set[str] = set()
    for target in targets:
        wanted = present if target == "all_linear" else present & set(TARGET_SETS.get(target, (target,)))
        if not wanted:
            raise RecipeError(
                f"lora.targets names {target}, which is no linear module of this base; "
                f"it has {', '.join(sorted(present))}",
                "lora.targets",
                "lora.targets=[all_linear]",
            )
        resolved |= wanted
    return sorted(resolved)


def attach_lora(model: PreTrainedModel, lora: LoraConfig) -> PeftModel:
    """Freeze the base and add trainable LoRA weights."""
    config = PeftLoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=resolve_targets(lora.targets, linear_names(model)),
        rank_pattern=dict(lora.rank_pattern),
        alpha_pattern=dict(lora.alpha_pattern),
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        init_lora_weights=True if lora.init is LoraInit.default else lora.init.value,
        modules_to_save=list(lora.modules_to_save) or None,
    )
    return get_peft_model(model, config)


def load_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Put a trained adapter on a freshly loaded base.

    Raises:
        RunError: the adapter holds a module that this base has no place for, or lacks one.
    """
    # peft imports gptqmodel, if it is there, to see whether a layer is one of its own; the import prints a banner.
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Found missing adapter keys")  # told below, as an error
        loaded = PeftModel.from_pretrained(model, folder, is_trainable=False)
    placed = {name for name, module in loaded.named_modules() if isinstance(module, LoraLayer)}
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        held = {_FACTOR.split(name)[0].replace(".base_layer", "") for name in file.keys() if _FACTOR.search(name)}  # noqa: SIM118  # not a mapping
    if odd := sorted(placed ^ held):
        what = f"{len(odd)} modules of the adapter and of this base do not match, such as {odd[0]}"
        raise RunError(f"{what}, so the adapter would not be used as it was trained", str(folder))
    return loaded


def adapter_size(model: PeftModel) -> AdapterSize:
    """Count adapted modules and trainable weights."""
    modules = sum(isinstance(module, LoraLayer) for module in model.modules())
    parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return AdapterSize(modules, parameters)


def train_in_fp32(model: PeftModel) -> None:
    """Hold every trained weight in fp32, in place.

    TRL casts the adapter of a quantized base to bf16 when its trainer is built, and peft reloads it as fp32 from a
    checkpoint, so without this a resumed run would differ from an uninterrupted one.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
