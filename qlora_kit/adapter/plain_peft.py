"""Saved settings by which peft alone loads an adapter of a mixture as it was trained.

For some kinds of mixtures peft takes targets such as gate_proj for parts of the experts of an older transformers, and
leaves out the dense and the shared experts' modules of that name (`transformers_weight_conversion.py`). It does not
where these are named as parameters, `mlp.gate_proj.weight`, whose factors have the same names and shapes.
"""

from collections.abc import Collection, Mapping
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

from peft import LoraConfig
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

from qlora_kit.adapter.expert_lora import short_names
from qlora_kit.adapter.saved import PARAMETER


def taken_for_experts(kind: str, config: LoraConfig) -> set[str]:
    """Targets that peft takes for parts of experts.

    Args:
        kind: `model_type` of the base.
    """
    model: Any = SimpleNamespace(config=SimpleNamespace(model_type=kind))
    found = set()
    for target in config.target_modules or ():
        alone = deepcopy(config)
        alone.target_modules, alone.target_parameters = {target}, None
        try:
            convert_peft_config_for_transformers(alone, model, None)
        except ValueError:  # of parts that lie in one parameter it wants both
            found.add(target)
        else:
            found |= {target} - set(alone.target_modules)
    return found


def for_plain_peft(settings: Mapping[str, Any], kind: str, adapted: Collection[str]) -> dict[str, Any]:
    """Settings that peft reads right, where there are such; else as they are, see `told_of_plain_peft`.

    Args:
        settings: of adapter_config.json.
        kind: `model_type` of the checkpoint.
        adapted: full names of the linear modules that carry factors.
    """
    taken = _taken(settings, kind)
    named = [name for name in adapted if name.rpartition(".")[2] in taken]
    shorts = short_names(named)
    if not taken or _is_beyond_parameters(settings):
        return dict(settings)
    targets = [target for target in settings["target_modules"] if target not in taken]
    parameters = sorted([*(settings.get("target_parameters") or []), *(f"{short}{PARAMETER}" for short in shorts)])
    return {**settings, "target_modules": targets, "target_parameters": parameters}


def told_of_plain_peft(settings: Mapping[str, Any], kind: str) -> str:
    """What peft alone makes of saved settings that it reads otherwise; empty where it reads them as they are meant."""
    taken = sorted(_taken(settings, kind))
    if not taken:
        return ""
    return (
        f"peft alone takes {', '.join(taken)} of this base for its experts and would leave out what was trained; "
        "load it with qlora-kit or vLLM, or merge it"
    )


def _taken(settings: Mapping[str, Any], kind: str) -> set[str]:
    targets = settings.get("target_modules") or []
    if isinstance(targets, str):
        return set()
    return taken_for_experts(kind, LoraConfig(target_modules=list(targets)))


def _is_beyond_parameters(settings: Mapping[str, Any]) -> bool:
    """Whether an adapter has what peft knows of modules alone."""
    patterns = bool(settings.get("rank_pattern") or settings.get("alpha_pattern"))
    return bool(settings.get("lora_dropout") or settings.get("use_dora") or patterns)
