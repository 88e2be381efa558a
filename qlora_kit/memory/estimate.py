"""What a run will need, by arithmetic alone: bytes by part. An estimate, made before anything is loaded.

Sources: Dettmers et al., QLoRA (2023), section 3, for the 4-bit state; bitsandbytes' functional.py for its block sizes.
What a layer keeps for its backward pass was counted tensor by tensor on a decoder of transformers with peft,
under bf16 autocast; tests/unit/memory repeats the count.
"""

from dataclasses import dataclass

from qlora_kit.memory.shapes import EXPERTS, Linear, frozen_linears, other_parameters
from qlora_kit.memory.shapes import shape_of_config as shape_of_config
from qlora_kit.memory.trainable import target_names
from qlora_kit.memory.trainable import trainable_parameters as trainable_parameters
from qlora_kit.objectives.objective import Objective
from qlora_kit.objectives.sft.sft import SFT
from qlora_kit.schema.lora import LoraConfig
from qlora_kit.schema.model import ModelShape
from qlora_kit.schema.optim import OptimConfig
from qlora_kit.schema.quant import ComputeDtype, QuantConfig, QuantKind
from qlora_kit.schema.trainer import TrainerConfig

BLOCK_4BIT = 64  # weights that share a scale
BLOCK_DOUBLE = 256  # scales that share a scale of their own


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device by part."""

    frozen_linears: float
    quant_state: float
    frozen_rest: float
    adapter: float
    gradients: float
    optimizer: float
    activations: float
    loss: float
    workspace: float
    trainable: int
    frozen: int
    copies: float = 0.0  # of frozen weights that are kept unpacked too

    @property
    def weights(self) -> float:
        """Everything of the frozen base."""
        return self.frozen_linears + self.quant_state + self.frozen_rest

    @property
    def total(self) -> float:
        """All parts; CUDA's context and what the allocator wastes come on top."""
        trained = self.adapter + self.gradients + self.optimizer
        return self.weights + trained + self.activations + self.loss + self.workspace + self.copies


def estimate(
    shape: ModelShape,
    quant: QuantConfig,
    lora: LoraConfig,
    optim: OptimConfig,
    trainer: TrainerConfig,
    tokens: int,
    objective: Objective = SFT,
) -> MemoryEstimate:
    """Peak memory of one training step on transformers and peft.

    Args:
        tokens: of the largest forward pass on one device, padding included.

    Raises:
        RecipeError: the adapter names modules that no supported family has.
    """
    linears = frozen_linears(shape)
    stored = [linear for linear in linears if quant.kind is not QuantKind.none and linear.name not in quant.keep_16bit]
    kept = [linear for linear in linears if linear not in stored]
    wide = _compute_bytes(quant)
    trainable = trainable_parameters(shape, lora)
    return MemoryEstimate(
        frozen_linears=sum(linear.weights for linear in stored) * (0.5 if quant.kind.is_4bit else 1.0),
        quant_state=sum(_state_bytes(linear, quant) for linear in stored),
        frozen_rest=wide * (sum(linear.weights for linear in kept) + other_parameters(shape)),
        adapter=4.0 * trainable,
        gradients=4.0 * trainable,
        optimizer=float(optim.name.value.state_bytes * trainable),
        activations=_activations(shape, lora, trainer, tokens, wide),
        loss=objective.loss_bytes(shape, tokens, wide),
        workspace=0.0 if shape.expert_layers else _workspace(stored, quant, wide),
        trainable=trainable,
        frozen=sum(linear.weights for linear in linears) + other_parameters(shape),
    )


def state_bytes_per_weight(double_quant: bool) -> float:
    """Bytes of 4-bit quantization state for one weight.

    A 32-bit scale for each block of 64 weights: 0.5 bit a weight. With double quantization the scale takes 8 bits, and
    256 of them share a 32-bit one: 0.127 bit (QLoRA, section 3).
    """
    if double_quant:
        return 1 / BLOCK_4BIT + 4 / (BLOCK_4BIT * BLOCK_DOUBLE)
    return 4 / BLOCK_4BIT


def layer_bytes_per_token(shape: ModelShape, lora: LoraConfig, wide: int = 2) -> float:
    """Bytes that one decoder layer keeps for its backward pass, for one token, without gradient checkpointing.

    Both norms keep their input in 32 bit. Attention keeps query, key, value and its output; the MLP keeps the gate, its
    activation and the up projection. A frozen linear keeps nothing; each adapted one keeps a copy of its input, and
    with dropout one more byte a value.
    """
    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    kept = 2 * 4 * shape.hidden_size + wide * (2 * queries + 2 * keys + 3 * _mlp_width(shape))
    linears = [linear for linear in frozen_linears(shape, layers=1) if linear.name not in EXPERTS]
    adapted = sum(linear.inputs for linear in linears if linear.name in target_names(lora))
    return kept + adapted * (wide + (1 if lora.dropout > 0 else 0)) + _kept_for_experts(shape, wide)


def _mlp_width(shape: ModelShape) -> int:
    """Of the MLP that a layer keeps values of: beside experts, the one that every token goes through."""
    return shape.shared_size if shape.expert_layers else shape.intermediate_size


def _kept_for_experts(shape: ModelShape, wide: int) -> int:
    """Bytes that experts keep for a token: their input, the router's scores, and where its choices go."""
    if not shape.expert_layers:
        return 0
    return wide * shape.hidden_size + shape.routing_bytes


def _activations(shape: ModelShape, lora: LoraConfig, trainer: TrainerConfig, tokens: int, wide: int) -> float:
    layer = layer_bytes_per_token(shape, lora, wide) * tokens
    made = float(wide * shape.experts_made(tokens)) if shape.expert_layers else 0.0  # with their unpacked weights
    if trainer.gradient_checkpointing:
        return shape.num_layers * wide * shape.hidden_size * tokens + layer + made
    return shape.num_layers * layer + made


def _workspace(stored: list[Linear], quant: QuantConfig, wide: int) -> float:
    """A 4-bit weight is unpacked into 16 bit for its matrix product, one layer at a time."""
    if not quant.kind.is_4bit or not stored:
        return 0.0
    largest = max(linear.weights // linear.count for linear in stored)
    return float(wide * largest)


def _state_bytes(linear: Linear, quant: QuantConfig) -> float:
    if quant.kind.is_4bit:
        return linear.weights * state_bytes_per_weight(quant.double_quant)
    return 4.0 * linear.outputs * linear.count  # LLM.int8: a 32-bit scale for each output row


def _compute_bytes(quant: QuantConfig) -> int:
    return 4 if quant.compute_dtype is ComputeDtype.float32 else 2
