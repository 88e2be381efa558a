"""The recipe's engine on a model that is about to be trained, and what its memory allows each layer to keep."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel

from qlora_kit.core.errors import RunError
from qlora_kit.core.say import say
from qlora_kit.core.units import human_bytes, human_count
from qlora_kit.engine.fast import FastEngine, speed_up
from qlora_kit.engine.head_loss import TILE_BYTES
from qlora_kit.engine.recompute import (
    GATE_UP_AGAIN,
    IN_PIECES,
    KEEP_ALL,
    LAYER_AGAIN,
    LAYER_FROM_HOST,
    Amount,
    LayerExtras,
    Workspace,
    auto_budget,
    kept_bytes,
    parse_amount,
    peak_bytes,
    plan_levels,
)
from qlora_kit.memory.free import free_host_bytes, free_memory_bytes
from qlora_kit.memory.shapes import shape_of_config
from qlora_kit.schema.engine import EngineConfig, EngineMode
from qlora_kit.schema.model import ModelShape

TRAINED_BYTES = 12  # a gradient and two moments in 32 bit, of each trained weight
# Beside a tile of logits the head and the norm before it hold, for each hidden value of a token: two copies of 32 bits
# and the norm's result in the forward pass, then three gradients of 16 bits and one of 32.
HEAD_BYTES = 22
AGAIN = {
    GATE_UP_AGAIN: "gate and up",
    LAYER_AGAIN: "whole layers",
    LAYER_FROM_HOST: "whole layers, from the host's memory",
    IN_PIECES: "whole layers, from the host's memory, some tokens at a time",
}
WHATEVER_IS_FREE = {
    Amount.none: KEEP_ALL,
    Amount.all: LAYER_AGAIN,
}  # of every layer
COPIES_SHARE = 0.5  # of the memory that a step leaves over, for copies of weights: recordings and longer rows need some


def put_engine(model: PeftModel, config: EngineConfig, tokens: int) -> FastEngine | None:
    """Make a model's decoder layers fast, as the recipe says; None where they stay plain.

    Args:
        tokens: of one forward pass on one device, padding included.

    Raises:
        RecipeError: the recipe asks for fp8, and this machine has none.
        RunError: layers would keep more in the host's memory than is free.
    """
    if config.mode is EngineMode.plain:
        return None
    engine = speed_up(model, config)
    for line in engine.said:
        say(line)
    if not engine.layers:
        return None
    memory = StepMemory.of(model, tokens)
    levels = memory.levels(config.recompute)
    engine.set_levels(levels)
    if copies := engine.keep_copies(memory.room_for_copies(config.weight_copies, levels)):
        say(f"engine: weights are kept unpacked too, {human_bytes(copies)} (engine.weight_copies=none gives it back)")
    again = ", ".join(f"{count} {what}" for level, what in AGAIN.items() if (count := levels.count(level)))
    say(
        f"engine: fast, {config.compute.name}, {engine.fast_layers} layers; for {human_count(tokens)} tokens "
        + (f"computed again in the backward pass: {again}" if again else "nothing is computed again")
    )
    return engine


def layer_levels(model: PeftModel, config: EngineConfig, tokens: int) -> list[int]:
    """What each decoder layer computes again: see `engine/recompute.py`."""
    return StepMemory.of(model, tokens).levels(config.recompute)


@dataclass(frozen=True)
class StepMemory:
    """What a training step of a model needs beside its weights.

    Attributes:
        tokens: of one forward pass on one device, padding included.
        trained: weights.
    """

    shape: ModelShape
    tokens: int
    extras: LayerExtras
    trained: int

    @classmethod
    def of(cls, model: PeftModel, tokens: int) -> "StepMemory":
        """From a model with its adapter."""
        base: Any = model.get_base_model()
        shape = shape_of_config(base.config.to_dict())
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        ranks = sum(parameter.shape[0] for name, parameter in model.named_parameters() if "lora_A" in name)
        names = {name.rsplit(".", 1)[-1] for name, _ in base.named_modules()}
        extras = LayerExtras(
            ranks=ranks // shape.num_layers,
            head_norms="q_norm" in names,
            sandwich="pre_feedforward_layernorm" in names,
        )
        return cls(shape, tokens, extras, trained)

    def budget(self, *, in_pieces: bool = False) -> float:
        """Bytes that layers may keep, from what is free now."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        head = 2.0 * TILE_BYTES + HEAD_BYTES * self.tokens * self.shape.hidden_size
        workspace = Workspace(logits=head, trained=float(TRAINED_BYTES * self.trained))
        return auto_budget(self.shape, free_memory_bytes(), self.tokens, workspace, in_pieces=in_pieces)

    def needed(self, levels: Sequence[int]) -> float:
        """Bytes that layers keep at these levels."""
        return peak_bytes(self.shape, levels, self.tokens, extras=self.extras)

    def room_for_copies(self, weight_copies: str, levels: Sequence[int]) -> float:
        """Bytes for copies of weights that the recipe's word for it comes to, where layers keep what levels say.

        For auto there are none where memory is so short that something is computed again.
        """
        wanted = parse_amount(weight_copies)
        if wanted.amount is Amount.auto:
            return 0.0 if any(levels) else COPIES_SHARE * (self.budget() - self.needed(levels))
        return math.inf if wanted.amount is Amount.all else wanted.budget_bytes

    def levels(self, recompute: str) -> list[int]:
        """The levels that the recipe's word for it comes to; with a warning where even the last one is too much."""
        wanted = parse_amount(recompute)
        if wanted.amount in WHATEVER_IS_FREE:
            return [WHATEVER_IS_FREE[wanted.amount]] * self.shape.num_layers
        budget = self.budget() if wanted.amount is Amount.auto else wanted.budget_bytes
        levels = plan_levels(self.shape, self.tokens, budget, extras=self.extras)
        if wanted.amount is Amount.auto and self.needed(levels) > budget:
            levels, budget = [IN_PIECES] * self.shape.num_layers, self.budget(in_pieces=True)
        if (needed := self.needed(levels)) > budget:
            room = human_bytes(budget)
            say(f"warning: layers keep {human_bytes(needed)} at the least, where there is room for {room}")
        self._check_host(levels)
        return levels

    def _check_host(self, levels: Sequence[int]) -> None:
        """Refuse what the host's memory cannot hold: the system would end the process without a word."""
        layers = sum(level >= LAYER_FROM_HOST for level in levels)
        needed = layers * self.tokens * kept_bytes(self.shape, LAYER_AGAIN) * _processes_here()
        if layers and needed > (free := free_host_bytes()):
            raise RunError(
                f"a step of {human_count(self.tokens)} tokens keeps {human_bytes(needed)} in the host's memory, where "
                f"{human_bytes(free)} are free",
                "data.max_tokens, trainer.batch_size",
                "lower one of them; or engine.recompute=all, if the GPU has room for it",
            )


def _processes_here() -> int:
    """Training processes on this machine, which share its memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
