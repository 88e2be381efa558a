"""The recipe's engine on a model that is about to be trained, and what its memory allows each layer to keep."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel

from qlora_kit.adapter.expert_lora import ExpertLora
from qlora_kit.core.console.lines import log
from qlora_kit.core.distributed import local_world_size
from qlora_kit.core.errors import RunError
from qlora_kit.core.units import counted, human_bytes, human_count
from qlora_kit.engine.graphs.recording_room import Beside
from qlora_kit.engine.layer.checkpoint_policy import (
    CheckpointPolicy,
    LayerExtras,
    beside_gate_and_up,
    kept_bytes,
)
from qlora_kit.engine.layer.fast import FastEngine, patch_model
from qlora_kit.engine.layer.kept_memory import kept_per_token
from qlora_kit.families.registry import FAMILIES
from qlora_kit.memory.free import free_host_bytes, free_memory_bytes
from qlora_kit.memory.shapes import shape_of_config
from qlora_kit.schema.engine import EngineConfig, EngineMode
from qlora_kit.training.step_memory import MLP, TRAINED_BYTES, StepMemory, StepNeeds, again, as_found

ACTIVATION_BYTES = 2
PARTS, WIDEST = 32, 33  # padded batches are made wider by a 32nd at the most


def enable_engine(
    model: PeftModel, config: EngineConfig, tokens: int, found: StepNeeds | None = None
) -> FastEngine | None:
    """Make a model's decoder layers fast, as the recipe says; None where it says plain.

    Of a family that it does not know the engine has no layers; a mixture's experts are sped up all the same.

    Args:
        tokens: of one forward pass on one device, padding included.
        found: before there were weights.

    Raises:
        RecipeError: the recipe asks for fp8, and this machine has none.
        RunError: layers would keep more in the host's memory than is free.
    """
    if config.mode is not EngineMode.fast:
        return None
    engine = patch_model(model, config)
    for line in engine.messages:
        log.info(line)
    if not engine.layers:
        return engine
    memory = replace(step_memory_of(model, tokens, engine, found), recorded=config.cuda_graphs)
    policies = _policies(memory, config.recompute)
    engine.set_policies(policies)
    if engine.graphs is not None:
        engine.graphs.beside = Beside(memory.head, memory.layer)
        engine.graphs.largest = tokens * WIDEST // PARTS * memory.shape.hidden_size
    if copies := engine.keep_copies(memory.room_for_copies(config.cached_weights, policies, _free())):
        back = "engine.cached_weights=none gives it back"
        log.info(f"engine: weights are kept dequantized too, {human_bytes(copies)} ({back})")
    log.info(
        f"engine: fast, {config.compute.name}, {counted(engine.fast_layers, 'layer')}; for {human_count(tokens)} "
        f"tokens {again(policies)}"
    )
    return engine


def layer_policies(model: PeftModel, config: EngineConfig, tokens: int) -> list[int]:
    """What each decoder layer computes again: see `engine/layer/checkpoint_policy.py`."""
    return _policies(replace(step_memory_of(model, tokens), recorded=config.cuda_graphs), config.recompute)


def step_memory_of(
    model: PeftModel, tokens: int, engine: FastEngine | None = None, found: StepNeeds | None = None
) -> StepMemory:
    """What a step needs, from a model with its adapter.

    Args:
        tokens: of one forward pass on one device, padding included.
        engine: in the model; what its layers keep is measured where neither their sizes nor `found` tell it.
        found: before there were weights.
    """
    base: Any = model.get_base_model()
    shape = shape_of_config(base.config.to_dict())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    of_experts = tuple(f"{name}.lora_" for name, module in model.named_modules() if isinstance(module, ExpertLora))
    ranks = {
        name: parameter.shape[0]
        for name, parameter in model.named_parameters()
        if "lora_A" in name and not name.startswith(of_experts)  # which keep nothing of their products
    }
    family = FAMILIES.get(base.config.get_text_config().model_type)
    needs = None if found is None else found.layers
    extras = LayerExtras(
        ranks=sum(ranks.values()) // shape.num_layers,
        qk_norm=family is not None and family.qk_norm,
        post_norms=family is not None and family.post_norms,
        beside=beside_gate_and_up([rank for name, rank in ranks.items() if any(part in name for part in MLP)]),
        measured=0.0 if needs is not None or engine is None or engine.keeps_as_told else _measured(base, engine),
    )
    trained_bytes = TRAINED_BYTES if found is None else found.trained_bytes
    return StepMemory(shape, tokens, as_found(extras, needs, tokens), trained, trained_bytes)


def _measured(base: Any, engine: FastEngine) -> float:
    """Bytes of a token that a layer keeps on average where activations have 16 bits."""
    was_training = base.training
    base.train()
    kept = kept_per_token(base.base_model, [fast.layer for fast in engine.layers])
    base.train(was_training)
    return sum(kept.values()) / len(engine.layers) * ACTIVATION_BYTES / engine.layers[0].dtype.itemsize


def _free() -> float:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return free_memory_bytes()


def _policies(memory: StepMemory, recompute: str) -> list[int]:
    """The policies that the recipe's word for it comes to; with a warning where even the last one is too much."""
    policies, budget = memory.policies(recompute, _free())
    if (needed := memory.needed(policies)) > budget:
        room = human_bytes(budget)
        log.warning(f"layers keep {human_bytes(needed)} at the least, where there is room for {room}")
    _check_host(memory, policies)
    return policies


def _check_host(memory: StepMemory, policies: Sequence[int]) -> None:
    """Refuse what the host's memory cannot hold: the system would end the process without a word."""
    layers = sum(policy >= CheckpointPolicy.offload_input for policy in policies)
    needed = layers * memory.tokens * kept_bytes(memory.shape, CheckpointPolicy.recompute_layer) * local_world_size()
    if layers and needed > (free := free_host_bytes()):
        raise RunError(
            f"a step of {human_count(memory.tokens)} tokens keeps {human_bytes(needed)} in the host's memory, where "
            f"{human_bytes(free)} are free",
            "data.max_tokens, trainer.batch_size",
            "lower one of them; or engine.recompute=all, if the GPU has room for it",
        )
