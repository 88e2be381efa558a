"""qlora_kit: the very pieces of `qlora-kit train`, on a random base and random rows."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qlora_kit.adapter.attach import attach_lora
from qlora_kit.core.errors import RunError
from qlora_kit.data.packing import Packing, pack
from qlora_kit.model.load import quiet_libraries
from qlora_kit.schema.data import Batching, DataConfig
from qlora_kit.schema.engine import Compute, EngineConfig, EngineMode
from qlora_kit.schema.lora import LoraConfig
from qlora_kit.schema.model import ModelConfig
from qlora_kit.schema.optim import OptimConfig, Schedule
from qlora_kit.schema.optimizers import OptimizerName
from qlora_kit.schema.root import TrainRecipe
from qlora_kit.schema.trainer import TrainerConfig
from qlora_kit.tracking.tracker import AllTrackers
from qlora_kit.training.callbacks import MetricsCallback, StopOnSignal
from qlora_kit.training.engine_setup import layer_policies
from qlora_kit.training.run import build_trainer, run_training
from qlora_kit.training.trainer import KitTrainer
from train_step.clock import LEARNING_RATE, MEASURED, WARM_UP, StepClock
from train_step.rows import ids_of, lengths_of, stored
from train_step.runs import Run
from train_step.shapes import device, random_base, tiny_tokenizer
from train_step.step_profile import StepProfile

RECOMPUTE = {"plain": "all", "fast": "auto", "few copies": "auto", "no recompute": "none", "least memory": "1MB"}
COPIES = {"few copies": "6.4GB", "least memory": "none"}  # of weights; auto for the rest


def recipe_of(run: Run, batch_rows: int, steps: int, engine: EngineConfig) -> TrainRecipe:
    """The recipe that a user would write for this run."""
    return TrainRecipe(
        model=ModelConfig(source="random"),
        lora=LoraConfig(r=16, alpha=16),
        data=DataConfig(batching=Batching.packed if run.packs else Batching.padded, max_tokens=run.batch.seq_len),
        optim=OptimConfig(
            name=OptimizerName.adamw, learning_rate=LEARNING_RATE, schedule=Schedule.constant, warmup_fraction=0.0
        ),
        trainer=TrainerConfig(
            batch_size=batch_rows,
            max_steps=steps,
            gradient_checkpointing=run.variant == "plain",
            save_every_steps=10 * steps,
        ),
        engine=engine,
    )


def engine_of(run: Run) -> EngineConfig:
    """The recipe's engine."""
    mode = EngineMode.plain if run.variant == "plain" else EngineMode.fast
    copies = COPIES.get(run.variant, "auto")
    return EngineConfig(
        mode=mode, compute=Compute(run.compute), recompute=RECOMPUTE[run.variant], cached_weights=copies
    )


def trainer_for(run: Run, work: Path, steps: int, engine: EngineConfig | None = None) -> KitTrainer:
    """The kit's trainer, whose every batch holds the same rows."""
    lengths = lengths_of(run.batch)
    recipe = recipe_of(run, run.batch.rows if run.packs else len(lengths), steps, engine or engine_of(run))
    rows = stored(work / "rows", ids_of(lengths))
    packing = _repeated(pack(rows.lengths, run.batch.seq_len), steps) if run.packs else None
    if packing is None:
        rows = rows.select(np.tile(np.arange(len(rows)), steps))
    callback = MetricsCallback(AllTrackers([]), StopOnSignal())
    quiet_libraries()
    model = attach_lora(random_base(run.shape), recipe.lora)
    trainer = build_trainer(model, tiny_tokenizer(), recipe, rows, None, work / "checkpoints", callback, packing)
    items = len(trainer.train_dataset)
    trainer.order = lambda epoch: np.arange(items)
    return trainer


def _repeated(packing: Packing, times: int) -> Packing:
    """The same bins again and again."""
    sizes = np.tile(np.diff(packing.offsets), times)
    offsets = np.concatenate(([0], np.cumsum(sizes)))
    return Packing(np.tile(packing.rows, times), offsets, packing.capacity, packing.tokens * times)


def train(run: Run, base: Path, work: Path, *, profiled: bool = False) -> dict[str, object]:
    """Measure a run; with a profile of one more step if asked.

    Returns:
        The columns of a result.
    """
    profile = StepProfile(at=WARM_UP + MEASURED + 1) if profiled else None
    trainer = trainer_for(run, work, WARM_UP + MEASURED + (profile is not None))
    lengths = lengths_of(run.batch)
    tokens = sum(lengths)
    clock = StepClock(profile)
    trainer.add_callback(clock)
    run_training(trainer, None)
    found = clock.result(tokens) | _levels(trainer)
    if profile is not None:
        found["profile"] = profile.table(trainer.model.config, tokens)
    return found


def _levels(trainer: KitTrainer) -> dict[str, object]:
    """How many layers are fast, and how many run at each checkpoint policy."""
    if trainer.engine is None:
        return {}
    policies = [layer.policy for layer in trainer.engine.layers]
    return {
        "fast_layers": trainer.engine.fast_layers,
        "levels": [policies.count(policy) for policy in range(max(policies) + 1)],
    }


def single_steps(run: Run, work: Path) -> Callable[[int], None]:
    """A function that trains one step of one row of so many tokens, on a model that stays loaded."""
    # The rows of the run are short, and would leave room for copies of weights that longer ones need.
    engine = replace(engine_of(run), cached_weights="none")
    trainer = trainer_for(run, work, 1, engine)
    model: Any = trainer.model
    model.train()
    if run.variant == "plain":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, fused=device().type == "cuda")

    def policies_of(tokens: int) -> list[int]:
        try:
            return layer_policies(model, engine, tokens)
        except RunError as error:
            raise RuntimeError(f"out of memory: {error}") from error

    def step(tokens: int) -> None:
        ids = torch.from_numpy(ids_of([tokens])[0])[None].to(device())
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        if trainer.engine is not None:
            trainer.engine.set_policies(policies_of(tokens))
        try:
            with torch.autocast(device().type, dtype=torch.bfloat16):
                loss = trainer.compute_loss(model, batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
        finally:
            optimizer.zero_grad(set_to_none=True)

    return step
