"""The most memory of a training step, counted on a CPU as a GPU would take it.

A step is the forward and the backward pass of a model that is set up as training sets it up, with the gradients and the
optimizer's states of steps before. Products, norms and attention are those of the CPU; an operation that is one kernel
on a GPU counts by its results alone, and experts are multiplied in one grouped product.
"""

import gc
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from qlora_kit.adapter.attach import attach_lora, train_in_fp32
from qlora_kit.engine.attention.rows import enable_row_attention
from qlora_kit.engine.attention.sinks import enable_sink_attention
from qlora_kit.engine.head import enable_fused_head
from qlora_kit.engine.layer.fast import patch_model
from qlora_kit.model.live_memory import LiveMemory
from qlora_kit.model.load import load_base
from qlora_kit.model.structure import not_adapted
from qlora_kit.objectives.sft.collate import IGNORED_LABEL
from qlora_kit.schema.amount import parse_amount
from qlora_kit.schema.engine import EngineMode
from qlora_kit.schema.root import TrainRecipe
from qlora_kit.training.step_memory import WHATEVER_IS_FREE


def model_as_trained(recipe: TrainRecipe, folder: Path) -> PeftModel:
    """The base of a folder with its adapter, engine and head, as a recipe has them; `engine.recompute` all or none."""
    base = load_base(folder, recipe.quant, recipe.model.attention)
    model = attach_lora(base, recipe.lora, not_adapted(base)).train()
    train_in_fp32(model)
    engine = patch_model(model, recipe.engine, is_tried=False) if recipe.engine.mode is EngineMode.fast else None
    if engine is not None and engine.layers:
        policy = WHATEVER_IS_FREE[parse_amount(recipe.engine.recompute).amount]
        engine.set_policies([policy] * len(engine.layers))
        enable_row_attention(model.get_base_model())
    elif recipe.trainer.gradient_checkpointing:
        if engine is not None:
            enable_sink_attention(model.get_base_model())
        model.gradient_checkpointing_enable({"use_reentrant": False})
    assert enable_fused_head(model.get_base_model()) is not None
    return model


def peak_of_step(recipe: TrainRecipe, folder: Path, rows: int, tokens: int) -> int:
    """Bytes that are live at the most in the second step over random rows, the last token of one left out."""
    elsewhere = {id(tensor): tensor for tensor in _tensors()}  # held, so that no other takes the number of one
    model = model_as_trained(recipe, folder)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    ids = torch.randint(0, model.get_base_model().config.get_text_config().vocab_size, (rows, tokens))
    labels, mask = ids.clone(), torch.ones_like(ids)
    labels[0, -1], mask[0, -1] = IGNORED_LABEL, 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels, "trained_tokens": rows * (tokens - 1) - 1}

    def step() -> None:
        with AutocastAsOnGpu():
            found = model(**batch, use_cache=False, fused_lm_head=True)
            loss = -found.log_probs.sum() / ids.numel()
        del found
        torch.set_autocast_enabled("cuda", True)  # as a layer that is computed again finds it on a GPU
        loss.backward()
        torch.set_autocast_enabled("cuda", False)

    step()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)  # as over a flat buffer
    gc.collect()
    with LiveMemory(as_on_gpu=True) as live:
        live.hold(tensor for tensor in _tensors() if id(tensor) not in elsewhere)
        step()
    return live.peak


class AutocastAsOnGpu(torch.autocast):
    """Of the CPU; peft asks whether that of a GPU is on."""

    def __init__(self) -> None:
        super().__init__("cpu", torch.bfloat16)

    def __enter__(self) -> None:
        torch.set_autocast_enabled("cuda", True)
        super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        torch.set_autocast_enabled("cuda", False)


def _tensors() -> Iterator[Tensor]:
    """Every tensor that there is, with values."""
    for found in gc.get_objects():
        if issubclass(type(found), Tensor) and not isinstance(found, FakeTensor) and found.device.type == "cpu":
            yield found
