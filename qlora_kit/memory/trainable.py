"""How many weights an adapter trains, from the recipe and the sizes alone."""

import re
from collections.abc import Mapping

from qlora_kit.core.errors import RecipeError
from qlora_kit.memory.shapes import EXPERTS, Linear, frozen_linears
from qlora_kit.schema.lora import TARGET_SETS, LoraConfig
from qlora_kit.schema.model import ModelShape

ATTENTION = frozenset(TARGET_SETS["attention"])
TABLES = ("embed_tokens", "lm_head")
FUSED_PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def target_names(lora: LoraConfig) -> set[str]:
    """Names of adapted linear modules; fused modules count as their parts."""
    names: set[str] = set()
    for target in lora.targets:
        for name in TARGET_SETS.get(target, (target,)):
            names.update(FUSED_PARTS.get(name, (name,)))
    if lora.adapts_experts:
        names.update(EXPERTS)
    return names


def trainable_parameters(shape: ModelShape, lora: LoraConfig) -> int:
    """Weights of A and B over all layers, DoRA's magnitudes, and modules trained in full.

    Fused modules are counted as separate ones, which is up to a sixth too many.

    Raises:
        RecipeError: a target or a module to save is unknown.
    """
    linears = frozen_linears(shape)
    names, known = target_names(lora), {linear.name for linear in linears}
    unknown = sorted(names - known - {*ATTENTION, *TARGET_SETS["mlp"], *EXPERTS})
    if unknown:
        raise RecipeError(
            f"lora.targets names {', '.join(unknown)}; the sizes of {', '.join(sorted(known))} are known",
            "lora.targets",
            "lora.targets=[all_linear]",
        )
    adapted = [linear for linear in linears if linear.name in names]
    saved = _saved_in_full(shape, lora, {linear.name: linear for linear in linears})
    return sum(_adapter_weights(linear, lora) for linear in adapted) + saved


def rank_of(module: str, default: int, patterns: Mapping[str, int]) -> int:
    """The rank of a module by its full name; a pattern matches its end, as peft matches it."""
    for pattern, rank in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return rank
    return default


def _adapter_weights(linear: Linear, lora: LoraConfig) -> int:
    block = "self_attn" if linear.name in ATTENTION else "mlp"
    total = 0
    for layer in range(linear.count):
        rank = rank_of(f"model.layers.{layer}.{block}.{linear.name}", lora.r, lora.rank_pattern)
        total += rank * (linear.inputs + linear.outputs)
        total += linear.outputs * (int(lora.use_dora) + int(lora.lora_bias))
    return total


def _saved_in_full(shape: ModelShape, lora: LoraConfig, linears: Mapping[str, Linear]) -> int:
    total = 0
    for name in lora.modules_to_save:
        if name in TABLES:
            total += shape.vocab_size * shape.hidden_size
        elif name in linears:
            total += linears[name].weights
        else:
            raise RecipeError(
                f"lora.modules_to_save names {name}; the sizes of {', '.join([*TABLES, *linears])} are known",
                "lora.modules_to_save",
                "lora.modules_to_save=[]",
            )
    return total
