"""A step that is logged while the next one runs is logged as it would be at once, and rates count all of its time."""

from pathlib import Path

import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from qlora_kit.adapter.attach import attach_lora
from qlora_kit.model.load import load_base
from qlora_kit.model.tokenizer import load_tokenizer
from qlora_kit.schema.model import ModelConfig
from qlora_kit.schema.quant import ComputeDtype, QuantConfig
from qlora_kit.schema.root import TrainRecipe
from qlora_kit.schema.trainer import TrainerConfig
from qlora_kit.tracking.tracker import AllTrackers
from qlora_kit.training import callbacks
from qlora_kit.training.callbacks import StopOnSignal, Watch
from qlora_kit.training.sft import build_trainer, fit
from tests.drawn_rows import drawn_rows
from tests.tiny_models import build_tiny_model


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return build_tiny_model("llama", tmp_path_factory.mktemp("late") / "base")


def logged(base, folder, *, late, every=1, accumulation=1, evaluates=False):
    """What a run of seven steps logs, and when: pairs of (last step begun, entry)."""
    folder.mkdir()
    rows = drawn_rows(folder / "train", [9, 40, 3, 21, 33, 14] * 2, 1)
    recipe = TrainRecipe(
        model=ModelConfig(source="base"),
        quant=QuantConfig(compute_dtype=ComputeDtype.float32),
        trainer=TrainerConfig(
            batch_size=1,
            gradient_accumulation=accumulation,
            max_steps=7,
            log_every_steps=every,
            save_every_steps=100,
            eval_every_steps=2 if evaluates else 100,
        ),
    )
    torch.manual_seed(0)
    model = attach_lora(load_base(base, recipe.quant), recipe.lora)
    held_out = drawn_rows(folder / "held_out", [5, 8], 2) if evaluates else None
    watch = Watch(AllTrackers([]), StopOnSignal())
    trainer = build_trainer(model, load_tokenizer(base), recipe, rows, held_out, folder / "run", watch)
    trainer.logs_late = late
    began = []

    class Seen(callbacks.TrainerCallback):
        def on_step_begin(self, args, state, control, **rest):
            began.append(state.global_step + 1)

        def on_log(self, args, state, control, logs=None, **rest):
            if "loss" in logs:
                when.append(began[-1])

    when = []
    trainer.add_callback(Seen())
    fit(trainer, None)
    timed = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "eval_runtime")
    entries = [
        {name: value for name, value in entry.items() if name not in timed and "per_second" not in name}
        for entry in trainer.state.log_history
    ]
    return entries, when


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"every": 3}, {"accumulation": 2}, {"evaluates": True}], ids=str)
def test_a_late_log_says_what_one_at_once_says(base, tmp_path, settings):
    at_once, when_at_once = logged(base, tmp_path / "at once", late=False, **settings)
    late, when = logged(base, tmp_path / "late", late=True, **settings)
    assert late == at_once
    losses = [entry["step"] for entry in late if "loss" in entry]
    assert when_at_once == losses
    # A step is logged during the next one, unless it is the last, of an epoch too, or an evaluation follows.
    steps_at_once = (
        {7} | ({2, 4, 6} if settings.get("evaluates") else set()) | ({6} if "accumulation" in settings else set())
    )
    assert when == [step if step in steps_at_once else step + 1 for step in losses]


class Clock:
    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        return self.now


def test_rates_count_the_time_between_steps_but_not_evaluations(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(callbacks, "time", clock)
    watch = Watch(AllTrackers([]), StopOnSignal())
    args, state = TrainingArguments(output_dir=str(Path("unused"))), TrainerState()
    control = TrainerControl()

    def step(host, *, evaluates=False):
        watch.on_step_begin(args, state, control)
        clock.now += host
        control.should_evaluate = evaluates
        watch.on_step_end(args, state, control)

    def rate(tokens):
        return watch._throughput({"num_tokens": tokens})["tokens_per_second"]

    step(0.1)  # the host is done long before the device
    clock.now += 1.9  # the log waits for the device
    assert rate(100) == 50.0
    step(0.5)
    clock.now += 0.5
    step(0.5, evaluates=True)
    assert rate(250) == 100.0
    clock.now += 1000  # evaluation
    step(1.0)
    clock.now += 1.0
    assert rate(450) == 100.0
