"""The same rows as a user of Unsloth trains on them: its loader, and TRL's trainer as it patches it.

Started by `user_line.py` with the peer's packages in PYTHONPATH. Writes a JSON file with what was measured.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

BEGAN = time.time()
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WARM = 5  # steps that are not counted in the rate


def main() -> None:
    """Train, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", required=True)
    parser.add_argument("--rows", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--packed", action="store_true")
    parser.add_argument("--keep-all", action="store_true", help="recompute nothing, instead of Unsloth's default")
    asked = parser.parse_args()

    from unsloth import FastLanguageModel  # type: ignore[import-not-found]  # isort: skip  # first, as it asks for

    import torch
    from datasets import load_dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    recompute: Any = False if asked.keep_all else "unsloth"
    model, tokenizer = FastLanguageModel.from_pretrained(
        asked.base,
        max_seq_length=asked.tokens,
        dtype=torch.bfloat16,
        load_in_4bit=True,
        use_gradient_checkpointing=recompute,
    )
    loaded = torch.cuda.memory_allocated()
    has_experts = any(name.endswith("gate_up_proj") for name, _ in model.named_parameters())
    model = FastLanguageModel.get_peft_model(
        model,
        r=asked.rank,
        lora_alpha=2 * asked.rank,
        lora_dropout=0,
        bias="none",
        target_modules=[*LINEAR, "gate_up_proj"] if has_experts else LINEAR,
        use_gradient_checkpointing=recompute,
        random_state=0,
    )
    rows = load_dataset("json", data_files=asked.rows, split="train").map(
        lambda row: {"text": tokenizer.apply_chat_template(row["messages"], tokenize=False)},
        remove_columns=["messages"],
    )
    ends: list[float] = []
    losses: list[float] = []

    class Watch(TrainerCallback):  # type: ignore[misc]  # typed by its library alone
        """Notes when steps end, and their losses."""

        def on_step_end(self, *_: Any, **__: Any) -> None:
            """A step is done on the device."""
            torch.cuda.synchronize()
            ends.append(time.time())

        def on_log(self, *_: Any, logs: dict[str, float] | None = None, **__: Any) -> None:
            """What was logged."""
            if logs and "loss" in logs:
                losses.append(logs["loss"])

    settings = SFTConfig(
        output_dir=str(asked.out.parent / "unsloth"),
        per_device_train_batch_size=asked.batch,
        gradient_accumulation_steps=1,
        max_steps=asked.steps,
        learning_rate=2e-4,
        optim="paged_adamw_8bit",
        bf16=True,
        logging_steps=1,
        report_to="none",
        packing=asked.packed,
        max_length=asked.tokens,
        dataset_text_field="text",
        save_strategy="no",
        seed=0,
        include_num_input_tokens_seen="non_padding",
    )
    trainer = SFTTrainer(
        model=model, processing_class=tokenizer, train_dataset=rows, callbacks=[Watch()], args=settings
    )
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    seen = int(trainer.state.num_input_tokens_seen)
    warm = min(WARM, len(ends) - 1) - 1
    per_step = (ends[-1] - ends[warm]) / max(1, len(ends) - 1 - warm)
    asked.out.write_text(
        json.dumps(
            {
                "first_step_seconds": round(ends[0] - BEGAN, 1),
                "last_step_seconds": round(ends[-1] - BEGAN, 1),
                "steps": len(ends),
                "tokens": seen,
                "tokens_per_second": round(seen / len(ends) / per_step, 1),
                "loaded_memory_bytes": loaded,
                "peak_memory_bytes": torch.cuda.max_memory_allocated(),
                "trainable_parameters": sum(part.numel() for part in model.parameters() if part.requires_grad),
                "losses": losses,
            }
        ),
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
