"""What each layer keeps for its backward, and how much a budget of memory lets all layers keep; without torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

from qlora_kit.engine.ops.limits import FUSED_RANK, RECORDED_SPARE, WHOLE_BYTES
from qlora_kit.schema.amount import Amount as Amount
from qlora_kit.schema.amount import Asked as Asked
from qlora_kit.schema.amount import parse_amount as parse_amount
from qlora_kit.schema.model import ModelShape

PIECE = 8192  # tokens of which a chunked MLP holds gate and up at a time: enough for whole rounds of tiles
_FP32 = 4
_SPARED_BESIDE = 4  # tensors of an MLP's width that a budget leaves room for at the least: one to spare
_SPARED_PARTS = 20  # a twentieth of the free memory is left to fragmentation and to what is not counted
# Kernels that are loaded in the first steps, and gaps in memory (measured on an H200: .56 GB beside the part above). A
# step that is not recorded finds them where its head was, whose memory its layers can have.
_LOADED_LATER = 0.6e9


class CheckpointPolicy(IntEnum):
    """What a layer computes again in its backward pass; each keeps less on the device than the one before.

    Attributes:
        keep_all: nothing.
        recompute_gate_up: gate and up of the MLP.
        recompute_layer: the whole layer, from its input.
        offload_input: the whole layer, from its input in the host's memory.
        chunked_mlp: the same; and the MLP takes some tokens at a time, and computes their gate and up once more: for
            rows so long that one layer's work does not fit.
    """

    keep_all = 0
    recompute_gate_up = 1
    recompute_layer = 2
    offload_input = 3
    chunked_mlp = 4


MIXED = tuple(CheckpointPolicy)[: CheckpointPolicy.chunked_mlp]  # that plans mix


@dataclass(frozen=True)
class LayerExtras:
    """What a layer keeps beside what its sizes say.

    Attributes:
        ranks: of all its adapters together; one product x A^T is kept for each.
        qk_norm: q and k are kept as they were before their norms too.
        post_norms: outputs of attention and MLP are kept as they were before their norms too.
        beside: tensors of the MLP's width that its backward makes beside gate and up: see `beside_gate_and_up`.
        measured: bytes of each token that were found kept where nothing is recomputed, instead of what all of this
            tells; for layers that run plain, if only in part, and for wirings of their own.
        made: with it, those that the backward pass of a layer was found to take beside; 0 where sizes tell that.
        at_work: with it, those that a layer was found to take whose values are made again from its input.
    """

    ranks: int = 0
    qk_norm: bool = False
    post_norms: bool = False
    beside: int = 3
    measured: float = 0.0
    made: float = 0.0
    at_work: float = 0.0


@dataclass(frozen=True)
class Workspace:
    """Memory beside kept activations, in bytes.

    Attributes:
        logits: the largest tile of logits with its gradient.
        trained: gradients and optimizer states that do not exist yet.
    """

    logits: float = 0.0
    trained: float = 0.0


def beside_gate_and_up(ranks: Sequence[int]) -> int:
    """Tensors of the MLP's width that its backward makes on a GPU, beside gate and up, which were kept.

    The gradient of the product and those of gate and up, where one kernel does it all. Else the product too, both
    gradients before they are put in their place, and gate, up and the product's gradient with what adapters add.

    Args:
        ranks: of the adapters of gate, up and down.
    """
    if not ranks:
        return 6
    return 3 if max(ranks) <= FUSED_RANK else 9


def kept_bytes(shape: ModelShape, policy: int, wide: int = 2, extras: LayerExtras | None = None) -> int:
    """Bytes on the device that one layer keeps for each token.

    Args:
        policy: a `CheckpointPolicy`, here as elsewhere.
        wide: bytes of an activation.
    """
    extras = extras or LayerExtras()
    if policy >= CheckpointPolicy.recompute_layer:
        return wide * shape.hidden_size if policy == CheckpointPolicy.recompute_layer else 0
    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    values = 2 * shape.hidden_size + 2 * queries + 2 * keys + extras.ranks
    if extras.qk_norm:
        values += queries + keys
    if extras.post_norms:
        values += 2 * shape.hidden_size
    of_mlp, more_told = 2 * shape.intermediate_size, _FP32 * shape.num_heads
    if shape.expert_layers:  # which make their own values again; their input is kept, and what the router said
        of_mlp = 0
        values += shape.hidden_size + 3 * shape.shared_size
        more_told += shape.routing_bytes
    told = wide * (values + of_mlp) + more_told
    kept = math.ceil(extras.measured) if extras.made else max(told, math.ceil(extras.measured))
    return kept - (0 if policy == CheckpointPolicy.keep_all else wide * of_mlp)


def peak_bytes(
    shape: ModelShape, policies: Sequence[int], tokens: int, wide: int = 2, extras: LayerExtras | None = None
) -> int:
    """The most that is kept at once, in bytes, over the backward of all layers from the last to the first.

    While a layer computes again what it did not keep, later layers have already let go of theirs.
    """
    whole = kept_bytes(shape, CheckpointPolicy.keep_all, wide, extras)
    of_layer = max(0, math.ceil(extras.at_work - extras.made)) if extras is not None and extras.made else whole
    without_gate_up = kept_bytes(shape, CheckpointPolicy.recompute_gate_up, wide, extras)
    peak = below = 0
    for policy in policies:
        below += kept_bytes(shape, policy, wide, extras)
        at_work = whole if policy == CheckpointPolicy.recompute_gate_up else of_layer
        if policy == CheckpointPolicy.chunked_mlp:
            at_work -= whole - without_gate_up
        again = 0 if policy == CheckpointPolicy.keep_all else max(0, at_work - kept_bytes(shape, policy, wide, extras))
        peak = max(peak, below + again)
    return peak * tokens


def plan_policies(
    shape: ModelShape, tokens: int, budget_bytes: float, wide: int = 2, extras: LayerExtras | None = None
) -> list[int]:
    """The policy of each layer that costs the least time within a budget; `offload_input` for all where nothing fits.

    The first layers compute again, since in their backward the others' activations are gone.

    Args:
        tokens: of one forward pass, padding included.
        budget_bytes: for kept activations and those that are recomputed.
    """
    layers = shape.num_layers
    for higher in MIXED[1:]:
        for count in range(layers + 1):
            policies = [higher] * count + [higher - 1] * (layers - count)
            if peak_bytes(shape, policies, tokens, wide, extras) <= budget_bytes:
                return policies
    return [MIXED[-1]] * layers


def auto_budget(
    shape: ModelShape,
    free_bytes: float,
    tokens: int,
    workspace: Workspace | None = None,
    wide: int = 2,
    *,
    in_pieces: bool = False,
    recorded: bool = False,
    extras: LayerExtras | None = None,
) -> float:
    """Bytes for activations, once the workspace of a step is set aside from what is free after loading.

    Args:
        free_bytes: on the device, with the model and its adapter loaded.
        tokens: of one forward pass.
        in_pieces: whether the MLPs of all layers are chunked.
        recorded: whether layers are to be launched as CUDA graphs, which share their memory with nothing else.
    """
    workspace, extras = workspace or Workspace(), extras or LayerExtras()
    spared = free_bytes / _SPARED_PARTS
    extras = replace(extras, beside=max(extras.beside, _SPARED_BESIDE))
    needed = made_bytes(shape, tokens, wide, in_pieces=in_pieces, extras=extras)
    left = free_bytes - spared - workspace.logits - workspace.trained
    return max(0.0, ((left - _LOADED_LATER) / RECORDED_SPARE if recorded else left) - needed)


def made_bytes(
    shape: ModelShape, tokens: int, wide: int = 2, *, in_pieces: bool = False, extras: LayerExtras | None = None
) -> float:
    """Bytes that the backward pass of one layer takes beside what was kept for it, unpacked weights included."""
    extras = extras or LayerExtras()
    if extras.made:
        return extras.made * tokens
    made = temporary_bytes(shape, tokens, wide, in_pieces=in_pieces, beside=extras.beside)
    return unpacked_bytes(shape, wide) + made


def unpacked_bytes(shape: ModelShape, wide: int = 2) -> int:
    """Bytes of the largest frozen weight that is unpacked at a time: gate and up; experts count with what they make."""
    middle = shape.shared_size if shape.expert_layers else shape.intermediate_size
    widest = max(2 * middle, (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim)
    return 0 if shape.expert_layers else wide * shape.hidden_size * widest


def temporary_bytes(shape: ModelShape, tokens: int, wide: int = 2, *, in_pieces: bool = False, beside: int = 3) -> int:
    """Bytes that the backward pass of one layer holds beside what was kept for it.

    The MLP's backward makes tensors of its own width (`beside`, see `LayerExtras`), and gradients of the hidden width:
    of the layer's output and of its input, in the parts that are summed.
    """
    at_once = min(tokens, PIECE) if in_pieces else tokens
    if shape.expert_layers:
        beside_experts = tokens * (beside * shape.shared_size + shape.hidden_size)  # the gradient of the output
        return wide * (shape.experts_made(tokens, WHOLE_BYTES // wide) + beside_experts)
    return wide * (at_once * beside * shape.intermediate_size + tokens * 4 * shape.hidden_size)
