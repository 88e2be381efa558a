"""The recipe's engine on a model that is about to be trained, and what its memory allows each layer to keep."""

from typing import Any

import torch
from peft import PeftModel

from qlora_kit.core.say import say
from qlora_kit.core.units import human_bytes, human_count
from qlora_kit.engine.fast import FastEngine, speed_up
from qlora_kit.engine.head_loss import TILE_BYTES
from qlora_kit.engine.recompute import (
    Amount,
    LayerExtras,
    Workspace,
    auto_budget,
    parse_recompute,
    peak_bytes,
    plan_levels,
)
from qlora_kit.memory.free import free_memory_bytes
from qlora_kit.memory.shapes import shape_of_config
from qlora_kit.schema.engine import EngineConfig, EngineMode

TRAINED_BYTES = 12  # a gradient and two moments in 32 bit, of each trained weight
# Beside a tile of logits the head and the norm before it hold, for each hidden value of a token: two copies of 32 bits
# and the norm's result in the forward pass, then three gradients of 16 bits and one of 32.
HEAD_BYTES = 22
LAYER_AGAIN = 2  # the level that computes a whole layer again


def put_engine(model: PeftModel, config: EngineConfig, tokens: int) -> FastEngine | None:
    """Make a model's decoder layers fast, as the recipe says; None where they stay plain.

    Args:
        tokens: of one forward pass on one device, padding included.

    Raises:
        RecipeError: the recipe asks for fp8, and this machine has none.
    """
    if config.mode is EngineMode.plain:
        return None
    engine = speed_up(model, config)
    for line in engine.said:
        say(line)
    if not engine.layers:
        return None
    levels = layer_levels(model, config, tokens)
    engine.set_levels(levels)
    again = ", ".join(
        f"{count} {what}"
        for level, what in ((1, "gate and up"), (2, "whole layers"), (3, "whole layers, from the host's memory"))
        if (count := levels.count(level))
    )
    say(
        f"engine: fast, {config.compute.name}, {engine.fast_layers} layers; for {human_count(tokens)} tokens "
        + (f"computed again in the backward pass: {again}" if again else "nothing is computed again")
    )
    return engine


def layer_levels(model: PeftModel, config: EngineConfig, tokens: int) -> list[int]:
    """What each decoder layer computes again: see `engine/recompute.py`."""
    base: Any = model.get_base_model()
    shape = shape_of_config(base.config.to_dict())
    wanted = parse_recompute(config.recompute)
    if wanted.amount is Amount.none:
        return [0] * shape.num_layers
    if wanted.amount is Amount.all:
        return [LAYER_AGAIN] * shape.num_layers
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    ranks = sum(parameter.shape[0] for name, parameter in model.named_parameters() if "lora_A" in name)
    names = {name.rsplit(".", 1)[-1] for name, _ in base.named_modules()}
    extras = LayerExtras(
        ranks=ranks // shape.num_layers,
        head_norms="q_norm" in names,
        sandwich="pre_feedforward_layernorm" in names,
    )
    budget = wanted.budget_bytes
    if wanted.amount is Amount.auto:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        head = 2.0 * TILE_BYTES + HEAD_BYTES * tokens * shape.hidden_size
        workspace = Workspace(logits=head, trained=float(TRAINED_BYTES * trained))
        budget = auto_budget(shape, free_memory_bytes(), tokens, workspace)
    levels = plan_levels(shape, tokens, budget, extras=extras)
    if (needed := peak_bytes(shape, levels, tokens, extras=extras)) > budget:
        say(f"warning: layers keep {human_bytes(needed)} at the least, where there is room for {human_bytes(budget)}")
    return levels
