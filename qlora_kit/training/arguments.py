"""TRL's configuration of a run, from the recipe."""

from pathlib import Path
from typing import Any

import torch
from trl import SFTConfig

from qlora_kit.schema.optim import OptimConfig, Schedule
from qlora_kit.schema.optimizers import OptimizerName
from qlora_kit.schema.quant import ComputeDtype
from qlora_kit.schema.root import TrainRecipe
from qlora_kit.training.optimizers.effective import transformers_name

SCHEDULER_NAME = {Schedule.cosine: "cosine", Schedule.linear: "linear", Schedule.constant: "constant_with_warmup"}


class ProcessConfig(SFTConfig):  # type: ignore[misc]  # trl is untyped here
    """TRL's configuration for a process with one GPU, however many it sees.

    transformers would spread each batch over all of them (`nn.DataParallel`), which neither TRL nor the engine allows.
    """

    @property
    def n_gpu(self) -> int:
        """GPUs of this process: one or none."""
        return min(int(super().n_gpu), 1)


def sft_config(
    recipe: TrainRecipe,
    optimizer: OptimizerName,
    checkpoints: Path,
    *,
    items: int,
    evaluates: bool,
    processes: int = 1,
    checkpoints_layers: bool = False,
) -> SFTConfig:
    """TRL's configuration; every value that its defaults would cut, pack or hide is set here.

    Args:
        items: training rows, or bins of a packing.
        processes: that share the items.
        checkpoints_layers: whether transformers computes every layer again; the fast engine sees to that itself.
    """
    loop, optim = recipe.trainer, recipe.optim
    steps = loop.steps(items, processes)
    return ProcessConfig(
        output_dir=str(checkpoints),
        max_length=None,
        packing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        average_tokens_across_devices=True,
        ddp_find_unused_parameters=False,
        per_device_train_batch_size=loop.batch_size,
        per_device_eval_batch_size=loop.batch_size,
        gradient_accumulation_steps=loop.gradient_accumulation,
        gradient_checkpointing=checkpoints_layers,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        max_steps=steps,
        **_optimizer_arguments(optim, optimizer, steps),
        bf16=recipe.quant.compute_dtype is ComputeDtype.bfloat16,
        fp16=recipe.quant.compute_dtype is ComputeDtype.float16,
        seed=loop.seed,
        data_seed=loop.seed,
        logging_steps=loop.log_every_steps,
        logging_first_step=True,  # the loss before anything was learned, to compare the last one with
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=loop.save_every_steps,
        save_total_limit=None,  # older ones go once a new one is marked as whole
        eval_strategy="steps" if evaluates and loop.eval_every_steps else "no",
        eval_steps=loop.eval_every_steps,
        prediction_loss_only=True,
        router_aux_loss_coef=0.0,  # routers are frozen, and the loss of a run is that of its answers alone
        disable_tqdm=True,
        report_to=[],
        **_device_arguments(has_gpu=torch.cuda.is_available()),
    )


def _device_arguments(*, has_gpu: bool) -> dict[str, Any]:
    return {
        "use_cpu": not has_gpu,
        "dataloader_pin_memory": has_gpu,
        "accelerator_config": {"non_blocking": has_gpu},  # else each batch waits for the step before it
    }


def _optimizer_arguments(optim: OptimConfig, optimizer: OptimizerName, steps: int) -> dict[str, Any]:
    return {
        "optim": transformers_name(optimizer, has_gpu=torch.cuda.is_available()),
        "learning_rate": optim.learning_rate,
        "lr_scheduler_type": SCHEDULER_NAME[optim.schedule],
        "warmup_steps": round(optim.warmup_fraction * steps),
        "weight_decay": optim.weight_decay,
        "adam_beta1": optim.beta1,
        "adam_beta2": optim.beta2,
        "max_grad_norm": optim.max_grad_norm,
    }
