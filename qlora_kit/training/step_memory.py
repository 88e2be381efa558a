"""What a step of the fast engine needs beside the weights, and what its layers may therefore keep; without torch.

The engine asks once the model is loaded, `plan` before: the same arithmetic answers both.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from qlora_kit.engine.layer.checkpoint_policy import (
    Amount,
    CheckpointPolicy,
    LayerExtras,
    Workspace,
    auto_budget,
    beside_gate_and_up,
    kept_bytes,
    made_bytes,
    parse_amount,
    peak_bytes,
    plan_policies,
)
from qlora_kit.engine.layer.layer_needs import LayerNeeds
from qlora_kit.engine.ops.limits import LOGITS_TILE_BYTES
from qlora_kit.families.family import Family
from qlora_kit.memory.estimate import MemoryEstimate
from qlora_kit.memory.shapes import EXPERTS, frozen_linears
from qlora_kit.memory.trainable import target_names
from qlora_kit.schema.engine import Compute, EngineConfig
from qlora_kit.schema.lora import LoraConfig
from qlora_kit.schema.model import ModelShape

TRAINED_BYTES = 12  # a gradient and two moments in 32 bit, of each trained weight
# Beside a tile of logits the head and the norm before it hold, for each hidden value of a token: two copies of 32 bits
# and the norm's result in the forward pass, then three gradients of 16 bits and one of 32.
HEAD_BYTES = 22
WHATEVER_IS_FREE = {
    Amount.none: CheckpointPolicy.keep_all,
    Amount.all: CheckpointPolicy.recompute_layer,
}  # of every layer
AGAIN = {
    CheckpointPolicy.recompute_gate_up: "gate and up",
    CheckpointPolicy.recompute_layer: "whole layers",
    CheckpointPolicy.offload_input: "whole layers, inputs offloaded to the host",
    CheckpointPolicy.chunked_mlp: "whole layers, inputs offloaded to the host, MLP in chunks",
}
COPIES_SHARE = 0.5  # of the memory that a step leaves over, for copies of weights: recordings and longer rows need some
COPY_BYTES = {Compute.bf16: 2, Compute.fp8_backward: 1, Compute.fp8: 2}  # of a weight that is kept dequantized
MLP = ("gate_proj", "up_proj", "down_proj")
GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))  # kept together


@dataclass(frozen=True)
class StepNeeds:
    """What is known of a step before its model is loaded.

    Attributes:
        layers: what they were found to need; None where their sizes tell that.
        trained_bytes: of each trained weight, for its gradient and the optimizer's state.
    """

    layers: LayerNeeds | None
    trained_bytes: float = TRAINED_BYTES


@dataclass(frozen=True)
class StepMemory:
    """What a training step of a model needs beside its weights.

    Attributes:
        tokens: of one forward pass on one device, padding included.
        trained: weights.
        trained_bytes: of each, for its gradient and the optimizer's state.
        recorded: whether layers are to be launched as CUDA graphs.
    """

    shape: ModelShape
    tokens: int
    extras: LayerExtras
    trained: int
    trained_bytes: float = TRAINED_BYTES
    recorded: bool = False

    @property
    def head(self) -> float:
        """Bytes of the output head and its gradient."""
        return head_bytes(self.shape, self.tokens)

    def budget(self, free_bytes: float, *, in_pieces: bool = False) -> float:
        """Bytes that layers may keep, from what is free once model and adapter are loaded."""
        workspace = Workspace(logits=self.head, trained=self.trained_bytes * self.trained)
        recorded = self.recorded and not in_pieces
        return auto_budget(
            self.shape, free_bytes, self.tokens, workspace, in_pieces=in_pieces, recorded=recorded, extras=self.extras
        )

    @property
    def layer(self) -> float:
        """Bytes that a layer takes at work whose values are made again."""
        return self.backward([CheckpointPolicy.recompute_layer])

    def backward(self, policies: Sequence[int]) -> float:
        """Bytes of the layers' backward pass, with what they keep."""
        in_pieces = CheckpointPolicy.chunked_mlp in policies
        return self.needed(policies) + made_bytes(self.shape, self.tokens, in_pieces=in_pieces, extras=self.extras)

    def needed(self, policies: Sequence[int]) -> float:
        """Bytes that layers keep at these policies, and make again, at the most at once."""
        return peak_bytes(self.shape, policies, self.tokens, extras=self.extras)

    def room_for_copies(self, cached_weights: str, policies: Sequence[int], free_bytes: float) -> float:
        """Bytes for copies of weights that the recipe's word for it comes to, where layers keep what policies say.

        For auto there are none where memory is so short that something is recomputed.
        """
        wanted = parse_amount(cached_weights)
        if wanted.amount is Amount.auto:
            return 0.0 if any(policies) else COPIES_SHARE * (self.budget(free_bytes) - self.needed(policies))
        return math.inf if wanted.amount is Amount.all else wanted.budget_bytes

    def policies(self, recompute: str, free_bytes: float) -> tuple[list[int], float]:
        """The policies that the recipe's word for it comes to, and the bytes that there are for what layers keep.

        Where even the last policy needs more than there is, that is the caller's to say.
        """
        wanted = parse_amount(recompute)
        if wanted.amount in WHATEVER_IS_FREE:
            return [WHATEVER_IS_FREE[wanted.amount]] * self.shape.num_layers, math.inf
        budget = self.budget(free_bytes) if wanted.amount is Amount.auto else wanted.budget_bytes
        policies = plan_policies(self.shape, self.tokens, budget, extras=self.extras)
        if wanted.amount is Amount.auto and self.needed(policies) > budget:
            return [CheckpointPolicy.chunked_mlp] * self.shape.num_layers, self.budget(free_bytes, in_pieces=True)
        return policies, budget


def head_bytes(shape: ModelShape, tokens: int) -> float:
    """Bytes of the output head and its gradient, where logits exist a tile at a time."""
    tile = min(LOGITS_TILE_BYTES, 2 * tokens * shape.vocab_size)
    return 2.0 * tile + HEAD_BYTES * tokens * shape.hidden_size


def as_found(extras: LayerExtras, needs: LayerNeeds | None, tokens: int) -> LayerExtras:
    """What a layer keeps and makes as it was found, where that is known."""
    if needs is None:
        return extras
    kept, made, at_work = (found(tokens) / tokens for found in (needs.kept, needs.beside, needs.at_work))
    return replace(extras, measured=kept, made=made, at_work=at_work)


def fast_estimate(
    plain: MemoryEstimate, engine: EngineConfig, lora: LoraConfig, step: StepMemory, free_bytes: float | None
) -> tuple[MemoryEstimate, list[int]]:
    """What the fast engine will need, and the checkpoint policy of each layer.

    Args:
        plain: the estimate of the plain engine, whose weights, adapter and optimizer are the same.
        free_bytes: before anything is loaded; None where no device is at hand: what `engine.recompute=auto` then
            needs at the least is estimated, with every layer recomputed and no copies.
    """
    if free_bytes is None:
        least = "all" if parse_amount(engine.recompute).amount is Amount.auto else engine.recompute
        no_copies = "none" if parse_amount(engine.cached_weights).amount is Amount.auto else engine.cached_weights
        engine = replace(engine, recompute=least, cached_weights=no_copies)
    left = math.inf if free_bytes is None else max(0.0, free_bytes - plain.weights - plain.adapter)
    policies, _ = step.policies(engine.recompute, left)
    kept = float(step.tokens * sum(kept_bytes(step.shape, policy, extras=step.extras) for policy in policies))
    room = step.room_for_copies(engine.cached_weights, policies, left)
    found = replace(
        plain,
        activations=kept,
        loss=step.head,
        workspace=max(0.0, step.backward(policies) - kept - step.head),  # the head is done when that begins
        copies=_copies(step.shape, lora, engine.compute, room),
    )
    return found, policies


def again(policies: Sequence[int]) -> str:
    """In words, what layers at these policies recompute."""
    counts = ", ".join(f"{count} {what}" for policy, what in AGAIN.items() if (count := policies.count(policy)))
    return f"recomputed in the backward pass: {counts}" if counts else "nothing is recomputed"


def extras_of_recipe(shape: ModelShape, lora: LoraConfig, family: Family | None) -> LayerExtras:
    """What a layer keeps beside what its sizes say, before there is a model; family: None where it is not known."""
    linears = {linear.name for linear in frozen_linears(shape, layers=1)} - set(EXPERTS)
    adapted = linears & target_names(lora)
    largest = max([lora.r, *lora.rank_pattern.values()])
    beside = beside_gate_and_up([largest for name in MLP if name in adapted])
    ranks = lora.r * len(adapted)
    return (
        LayerExtras(ranks, beside=beside)
        if family is None
        else LayerExtras(ranks, family.qk_norm, family.post_norms, beside)
    )


def _copies(shape: ModelShape, lora: LoraConfig, compute: Compute, room: float) -> float:
    """Bytes of the groups of weights that fit into the room, in the order of the layers."""
    taken = 0.0
    for size in _groups(shape, lora, compute):
        if 0 < size <= room - taken:
            taken += size
    return taken


def _groups(shape: ModelShape, lora: LoraConfig, compute: Compute) -> Iterator[float]:
    linears = {linear.name: linear for linear in frozen_linears(shape, layers=1)}
    names = target_names(lora)
    for _ in range(shape.num_layers):
        for group in [group for group in GROUPS if group[0] in linears]:
            outputs = sum(linears[name].outputs for name in group)
            room = lora.r * sum(name in names for name in group) if compute is Compute.bf16 else 0
            yield float(COPY_BYTES[compute] * (outputs + room) * linears[group[0]].inputs)
