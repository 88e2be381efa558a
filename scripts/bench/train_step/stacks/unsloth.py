"""Unsloth: its loader, its patches and its loss, in a loop without a trainer's overhead, with fused AdamW."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

# Unsloth patches transformers and peft, and must come before them.
import unsloth  # type: ignore[import-not-found]  # isort: skip
import torch

from train_step.clock import LEARNING_RATE, MEASURED, WARM_UP, Marks, Steps, reset_peak, synchronized
from train_step.rows import ids_of, lengths_of
from train_step.runs import Run

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapted(run: Run, base: Path, longest: int) -> Any:
    """The saved random base with Unsloth's adapter in fp32, ready to train rows of up to `longest` tokens."""
    recompute = False if run.variant == "no recompute" else "unsloth"
    model, _ = unsloth.FastLanguageModel.from_pretrained(
        str(base),
        max_seq_length=longest,
        dtype=torch.bfloat16,
        load_in_4bit=True,
        use_gradient_checkpointing=recompute,
    )
    model = unsloth.FastLanguageModel.get_peft_model(
        model,
        r=16,
        lora_alpha=16,
        lora_dropout=0,
        bias="none",
        target_modules=LINEARS,
        use_gradient_checkpointing=recompute,
        random_state=0,
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    model.train()
    return model


def batch_of(run: Run) -> dict[str, torch.Tensor]:
    """The rows of a step on the GPU; short ones lie in one row, with the lengths that Unsloth's packing passes."""
    rows = [torch.from_numpy(row) for row in ids_of(lengths_of(run.batch))]
    if not run.packs:
        ids = torch.stack(rows).cuda()
        return {"input_ids": ids, "labels": ids.clone()}
    ids = torch.cat(rows)[None]
    labels = ids.clone()
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int32)
    labels[0, (lengths.cumsum(0) - lengths).long()] = -100
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    return {
        "input_ids": ids.cuda(),
        "labels": labels.cuda(),
        "position_ids": positions.cuda(),
        "packed_seq_lengths": lengths.cuda(),
    }


def stepper(model: Any) -> Callable[[dict[str, torch.Tensor]], tuple[torch.Tensor, torch.Tensor]]:
    """A function that trains one step on a batch and returns its loss and gradient norm."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)

    def step(batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        try:
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss: torch.Tensor = model(**batch).loss
            torch.autograd.backward(loss)
            norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
        finally:
            optimizer.zero_grad(set_to_none=True)
        return loss.detach(), norm

    return step


def train(run: Run, base: Path, work: Path, *, profiled: bool = False) -> dict[str, object]:
    """Measure a run.

    Returns:
        The columns of a result.
    """
    batch = batch_of(run)
    step = stepper(adapted(run, base, max(batch["input_ids"].shape[1], 2048)))
    seen, marks = [], Marks()
    synchronized()
    reset_peak()
    marks.set()
    for _ in range(WARM_UP + MEASURED):
        seen.append(step(batch))
        marks.set()
    losses, norms = ([float(value) for value in values] for values in zip(*seen, strict=True))
    return Steps(marks.seconds(), losses, norms).result(sum(lengths_of(run.batch)))


def single_steps(run: Run, base: Path, longest: int) -> Callable[[int], None]:
    """A function that trains one step of one row of so many tokens, on a model that stays loaded."""
    step = stepper(adapted(run, base, longest))

    def once(tokens: int) -> None:
        ids = torch.from_numpy(ids_of([tokens])[0])[None].cuda()
        step({"input_ids": ids, "labels": ids.clone()})

    return once
