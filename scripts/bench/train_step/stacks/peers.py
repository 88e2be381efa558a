"""TRL's SFTTrainer with PEFT and bitsandbytes, as it is and with Liger's kernels."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from transformers import PrinterCallback
from trl import SFTConfig, SFTTrainer

from train_step.clock import LEARNING_RATE, MEASURED, WARM_UP, StepClock
from train_step.rows import ids_of, lengths_of
from train_step.runs import Run
from train_step.shapes import random_base, tiny_tokenizer

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def padded(features: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Rows padded on the right with id 0: `input_ids`, `attention_mask`, `labels`, int64 (rows, longest row)."""
    longest = max(len(one["input_ids"]) for one in features)
    shape = (len(features), longest)
    ids, mask = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    for row, one in enumerate(features):
        length = len(one["input_ids"])
        ids[row, :length] = torch.as_tensor(one["input_ids"])
        mask[row, :length] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def settings(run: Run, batch_rows: int, work: Path) -> SFTConfig:
    """TRL's own defaults, its optimizer (fused AdamW) among them, but for what the runs must have in common."""
    return SFTConfig(
        output_dir=str(work / "checkpoints"),
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        per_device_train_batch_size=batch_rows,
        max_steps=WARM_UP + MEASURED,
        train_sampling_strategy="sequential",
        gradient_checkpointing=run.variant != "no recompute",
        gradient_checkpointing_kwargs={"use_reentrant": False},
        use_liger_kernel=run.stack == "liger",
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        bf16=True,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def train(run: Run, base: Path, work: Path, *, profiled: bool = False) -> dict[str, object]:
    """Measure a run.

    Returns:
        The columns of a result.
    """
    if run.stack == "liger":
        import liger_kernel  # type: ignore[import-not-found]  # noqa: F401  # fails at once where it is missing
    disable_progress_bars()
    lengths = lengths_of(run.batch)
    rows = [row.tolist() for row in ids_of(lengths)] * (WARM_UP + MEASURED)
    clock = StepClock()
    trainer: Any = SFTTrainer(
        model=random_base(run.shape),
        args=settings(run, len(lengths), work),
        train_dataset=Dataset.from_dict({"input_ids": rows}),
        data_collator=padded,
        processing_class=tiny_tokenizer(),
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=16, target_modules=LINEARS),
        callbacks=[clock],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return clock.result(sum(lengths))
