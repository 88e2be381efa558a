"""A step that is logged while the next one runs is logged as it would be at once, and rates count all of its time."""

import pytest
import torch
from transformers import TrainerCallback

from qlora_kit.adapter.attach import attach_lora
from qlora_kit.model.load import load_base
from qlora_kit.model.tokenizer import load_tokenizer
from qlora_kit.schema.model import ModelConfig
from qlora_kit.schema.quant import ComputeDtype, QuantConfig
from qlora_kit.schema.root import TrainRecipe
from qlora_kit.schema.trainer import TrainerConfig
from qlora_kit.tracking.tracker import AllTrackers
from qlora_kit.training import step_clock
from qlora_kit.training.callbacks import MetricsCallback, StopOnSignal
from qlora_kit.training.run import build_trainer, run_training
from tests.drawn_rows import drawn_rows
from tests.tiny_models import build_tiny_model


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return build_tiny_model("llama", tmp_path_factory.mktemp("late") / "base")


LENGTHS = [9, 40, 3, 21, 33, 14] * 2
ROWS, LAST, SAVED = len(LENGTHS), 7, 4


def made(base, folder, callback, *, late, every=1, accumulation=1, evaluates=False, save_every=100):
    """The trainer of a run of seven steps."""
    folder.mkdir()
    rows = drawn_rows(folder / "train", LENGTHS, 1)
    recipe = TrainRecipe(
        model=ModelConfig(source="base"),
        quant=QuantConfig(compute_dtype=ComputeDtype.float32),
        trainer=TrainerConfig(
            batch_size=1,
            gradient_accumulation=accumulation,
            max_steps=LAST,
            log_every_steps=every,
            save_every_steps=save_every,
            eval_every_steps=2 if evaluates else 100,
        ),
    )
    torch.manual_seed(0)
    model = attach_lora(load_base(base, recipe.quant), recipe.lora)
    held_out = drawn_rows(folder / "held_out", [5, 8], 2) if evaluates else None
    trainer = build_trainer(model, load_tokenizer(base), recipe, rows, held_out, folder / "run", callback)
    trainer.logs_late = late
    return trainer


def logged(base, folder, **settings):
    """What a run of seven steps logs, and when: pairs of (last step begun, entry)."""
    trainer = made(base, folder, MetricsCallback(AllTrackers([]), StopOnSignal()), **settings)
    began = []

    class Seen(TrainerCallback):
        def on_step_begin(self, args, state, control, **rest):
            began.append(state.global_step + 1)

        def on_log(self, args, state, control, logs=None, **rest):
            if "loss" in logs:
                when.append(began[-1])

    when = []
    trainer.add_callback(Seen())
    run_training(trainer, None)
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
    """Seconds that pass where a test says so."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    found = Clock()
    monkeypatch.setattr(step_clock, "time", found)
    return found


class Kept:
    """A tracker that keeps what it is told."""

    def __init__(self):
        self.rows = []

    def log(self, step, metrics):
        self.rows.append({"step": step, **metrics})

    def finish(self):
        pass


class Pauses(TrainerCallback):
    """Time that is no training: checkpoints and held-out passes take 1000 seconds."""

    def __init__(self, clock):
        self.clock = clock

    def on_save(self, *_, **__):
        self.clock.now += 1000

    def on_evaluate(self, *_, **__):
        self.clock.now += 1000


TOKENS_A_SECOND = 10.0


@pytest.mark.slow
@pytest.mark.parametrize("late", [False, True], ids=["at once", "late"])
@pytest.mark.parametrize(("every", "accumulation"), [(1, 1), (3, 2), (100, 1)])
def test_each_line_divides_the_tokens_of_its_steps_by_their_time(base, tmp_path, clock, late, every, accumulation):
    """Each forward pass takes a second for 10 tokens, whatever lies between steps, also where a run is resumed."""
    settings = {"every": every, "accumulation": accumulation, "evaluates": True, "save_every": SAVED}
    kept, tokens, seconds = [], 0, 0.0
    for checkpoint in (None, SAVED):
        tracker = Kept()
        callback = MetricsCallback(tracker, StopOnSignal(), tokens, seconds)
        trainer = made(base, tmp_path / str(checkpoint), callback, late=late, **settings)

        def spend(module, inputs, named):
            if torch.is_grad_enabled():
                clock.now += int(named["attention_mask"].sum()) / TOKENS_A_SECOND

        trainer.model.register_forward_pre_hook(spend, with_kwargs=True)
        trainer.add_callback(Pauses(clock))
        run_training(trainer, tmp_path / "None" / "run" / f"checkpoint-{checkpoint}" if checkpoint else None)
        lines = [row for row in tracker.rows if "loss" in row]
        assert lines[-1]["step"] == LAST
        assert [row["tokens_per_second"] for row in lines] == pytest.approx([TOKENS_A_SECOND] * len(lines))
        assert [row["seconds"] for row in lines] == pytest.approx([row["tokens"] / TOKENS_A_SECOND for row in lines])
        assert all(row["epoch"] == pytest.approx(row["step"] * accumulation / ROWS) for row in tracker.rows)
        kept.append([{name: row[name] for name in row.keys() - {"peak_memory_bytes"}} for row in lines])
        tokens, seconds = next((int(row["tokens"]), row["seconds"]) for row in lines if row["step"] >= SAVED)
    whole, resumed = kept
    assert resumed == [row for row in whole if row["step"] > SAVED]


def test_the_clock_of_a_device_that_is_behind(monkeypatch):
    """What is logged while the next step runs is of the steps that ended, not of the time until then."""

    class Moment:
        def __init__(self, done_at):
            self.done_at = done_at

        def since(self, earlier):
            return self.done_at - earlier.done_at

    ends = iter([0.0, 2.0, 5.0, 5.5, 1000.0, 1003.0])
    monkeypatch.setattr(step_clock, "now", lambda: Moment(next(ends)))
    clock = step_clock.StepClock()
    clock.begin_step()
    clock.end_step(pauses=False)
    clock.begin_step()  # the second step runs on the host when the first is read
    assert clock.read() == 2.0
    clock.end_step(pauses=False)
    clock.begin_step()
    clock.end_step(pauses=True)
    assert clock.read() == 3.5
    assert clock.read() == 0.0
    clock.begin_step()
    clock.end_step(pauses=True)
    assert clock.read() == 3.0
