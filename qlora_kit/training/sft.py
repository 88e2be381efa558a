"""Supervised fine-tuning on TRL's SFTTrainer, with rows, masks and adapter prepared by the kit."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PrinterCallback
from trl import SFTConfig, SFTTrainer

from qlora_kit.adapter.attach import train_in_fp32
from qlora_kit.core.say import say
from qlora_kit.data.collate import Collator, training_features
from qlora_kit.data.render import TokenRow
from qlora_kit.engine.trained_positions import skip_untrained_positions
from qlora_kit.schema.optim import OptimConfig, OptimizerName, Schedule
from qlora_kit.schema.quant import ComputeDtype
from qlora_kit.schema.root import TrainRecipe
from qlora_kit.training.callbacks import Watch
from qlora_kit.training.optimizer import TRANSFORMERS_NAME, effective_optimizer

SCHEDULER_NAME = {Schedule.cosine: "cosine", Schedule.linear: "linear", Schedule.constant: "constant_with_warmup"}


@dataclass(frozen=True)
class Progress:
    """Where training stands."""

    step: int
    last_step: int
    train_loss: float

    @property
    def is_finished(self) -> bool:
        """Whether every step was done."""
        return self.step >= self.last_step


def build_trainer(
    model: PeftModel,
    tokenizer: Any,
    recipe: TrainRecipe,
    train: Sequence[TokenRow],
    held_out: Sequence[TokenRow],
    checkpoints: Path,
    watch: Watch,
) -> SFTTrainer:
    """A trainer over prepared rows whose own preparation is off.

    Args:
        model: base with an adapter attached.
        checkpoints: folder for checkpoints; nothing is written elsewhere.
    """
    optimizer, line = effective_optimizer(recipe.optim, has_gpu=torch.cuda.is_available())
    if line:
        say(line)
    trainer = SFTTrainer(
        model=model,
        args=sft_config(recipe, optimizer, checkpoints, rows=len(train), evaluates=bool(held_out)),
        train_dataset=Dataset.from_list(training_features(train)),
        eval_dataset=Dataset.from_list(training_features(held_out)) if held_out else None,
        data_collator=Collator(tokenizer.pad_token_id),
        processing_class=tokenizer,
        callbacks=[watch],
    )
    trainer.remove_callback(PrinterCallback)
    train_in_fp32(model)
    if not torch.cuda.is_available():
        skip_untrained_positions(model.get_base_model())
    return trainer


def sft_config(
    recipe: TrainRecipe, optimizer: OptimizerName, checkpoints: Path, *, rows: int, evaluates: bool
) -> SFTConfig:
    """TRL's configuration; every value that its defaults would cut, pack or hide is set here."""
    loop, optim = recipe.trainer, recipe.optim
    steps = loop.steps(rows)
    evaluation = "steps" if evaluates and loop.eval_every_steps else "no"
    return SFTConfig(
        output_dir=str(checkpoints),
        max_length=None,
        packing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        per_device_train_batch_size=loop.batch_size,
        per_device_eval_batch_size=loop.batch_size,
        gradient_accumulation_steps=loop.gradient_accumulation,
        gradient_checkpointing=loop.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        max_steps=steps,
        **_optimizer_arguments(optim, optimizer, steps),
        bf16=recipe.quant.compute_dtype is ComputeDtype.bfloat16,
        fp16=recipe.quant.compute_dtype is ComputeDtype.float16,
        seed=loop.seed,
        data_seed=loop.seed,
        logging_steps=loop.log_every_steps,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=loop.save_every_steps,
        save_total_limit=loop.keep_checkpoints,
        eval_strategy=evaluation,
        eval_steps=loop.eval_every_steps,
        prediction_loss_only=True,
        disable_tqdm=True,
        report_to=[],
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def _optimizer_arguments(optim: OptimConfig, optimizer: OptimizerName, steps: int) -> dict[str, Any]:
    return {
        "optim": TRANSFORMERS_NAME[optimizer],
        "learning_rate": optim.learning_rate,
        "lr_scheduler_type": SCHEDULER_NAME[optim.schedule],
        "warmup_steps": round(optim.warmup_fraction * steps),
        "weight_decay": optim.weight_decay,
        "adam_beta1": optim.beta1,
        "adam_beta2": optim.beta2,
        "max_grad_norm": optim.max_grad_norm,
    }


def fit(trainer: SFTTrainer, checkpoint: Path | None) -> Progress:
    """Train to the end, or until a stop was asked for; resumes exactly from a checkpoint."""
    output = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return Progress(trainer.state.global_step, trainer.state.max_steps, float(output.training_loss))


def held_out_loss(trainer: SFTTrainer) -> float | None:
    """Mean loss over the trained tokens of the held-out rows; None without such rows."""
    if trainer.eval_dataset is None:
        return None
    return float(cast("dict[str, float]", trainer.evaluate())["eval_loss"])
