"""A whole run of a tiny model: every module trains in training mode, held-out passes do not, and layers run again."""

import json
import random
import shutil
from collections import Counter

import pytest
import torch
from torch.nn.modules import module as torch_module

from qlora_kit.core.rundir import RunDirectory
from qlora_kit.engine.fast import FastLayer
from qlora_kit.pipelines.train import train
from qlora_kit.schema.data import Batching, DataConfig
from qlora_kit.schema.engine import EngineConfig, EngineMode
from qlora_kit.schema.lora import LoraConfig
from qlora_kit.schema.model import ModelConfig
from qlora_kit.schema.optim import OptimConfig, OptimizerName
from qlora_kit.schema.quant import ComputeDtype, QuantConfig
from qlora_kit.schema.root import TrainRecipe
from qlora_kit.schema.trainer import TrainerConfig
from tests.tiny_models import build_tiny_model

LAYERS = 2
STEPS, EVALUATED, SAVED, PASSES = 5, 2, 3, 2
WORDS = ["lamp", "door", "fan", "clock", "radio"]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """A base with rows, and a cache of its own."""
    folder = tmp_path_factory.mktemp("workshop")
    build_tiny_model("llama", folder / "base")
    draw = random.Random(1)
    for name, count in (("train", 24), ("held_out", 4)):
        turns = [[draw.choice(WORDS) * draw.randint(1, 5), draw.choice(WORDS)] for _ in range(count)]
        rows = [
            {"messages": [{"role": "user", "content": f"{number} {asked}"}, {"role": "assistant", "content": answered}]}
            for number, (asked, answered) in enumerate(turns)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("QLORA_KIT_CACHE", str(folder / "cache"))
        yield folder


def recipe_for(workshop, batching=Batching.padded, mode=EngineMode.plain, dropout=0.0, **loop):
    settings = {
        "batch_size": 2,
        "gradient_accumulation": PASSES,
        "max_steps": STEPS,
        "save_every_steps": SAVED,
        "eval_every_steps": EVALUATED,
        **loop,
    }
    return TrainRecipe(
        model=ModelConfig(source=str(workshop / "base")),
        quant=QuantConfig(compute_dtype=ComputeDtype.float32),
        lora=LoraConfig(r=4, dropout=dropout),
        data=DataConfig(
            train_file=str(workshop / "train.jsonl"),
            eval_file=str(workshop / "held_out.jsonl"),
            max_tokens=128,
            batching=batching,
            processes=1,
        ),
        optim=OptimConfig(name=OptimizerName.adamw),
        trainer=TrainerConfig(**settings),
        engine=EngineConfig(mode=mode, recompute="all"),
    )


class Seen:
    """What every forward pass of a run was, seen by hooks on all modules of the process."""

    def __init__(self):
        self.modes = Counter()  # (with gradients, name of the module's class, training) -> calls
        self.dropped = Counter()  # with gradients -> dropouts that changed their input

    def __enter__(self):
        self._handles = [
            torch_module.register_module_forward_pre_hook(self._before),
            torch_module.register_module_forward_hook(self._after),
        ]
        return self

    def __exit__(self, *_):
        for handle in self._handles:
            handle.remove()

    def _before(self, module, inputs):
        self.modes[torch.is_grad_enabled(), type(module).__name__, module.training] += 1

    def _after(self, module, inputs, output):
        if isinstance(module, torch.nn.Dropout):
            self.dropped[torch.is_grad_enabled()] += not torch.equal(inputs[0], output)

    def wrong(self):
        """Classes of modules that ran in the wrong mode."""
        return {name for with_gradients, name, training in self.modes if with_gradients is not training}

    def calls(self, name):
        return self.modes[True, name, True]


def cut_back(run, step):
    """Leave a run as a kill after the checkpoint of a step leaves it."""
    run.result.unlink()
    shutil.rmtree(run.adapter)
    for folder in run.checkpoints.glob("checkpoint-*"):
        if int(folder.name.split("-")[1]) > step:
            shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.parametrize("mode", EngineMode, ids=lambda mode: mode.name)
@pytest.mark.parametrize("batching", Batching, ids=lambda batching: batching.name)
def test_every_module_trains_in_training_mode(workshop, tmp_path, monkeypatch, batching, mode):
    """Held-out passes lie in the middle, and the run is resumed after one of its checkpoints."""
    by_hand = []
    one_layer = FastLayer._by_hand
    monkeypatch.setattr(
        FastLayer, "_by_hand", lambda layer, *a, **k: by_hand.append(layer) or one_layer(layer, *a, **k)
    )
    run, recipe = RunDirectory(tmp_path / "run"), recipe_for(workshop, batching, mode)
    for steps in (STEPS, STEPS - SAVED):
        by_hand.clear()
        with Seen() as seen:
            train(recipe, run, [])
        assert seen.wrong() == set()
        assert seen.modes[False, "LlamaDecoderLayer", False] > 0
        micro_batches = seen.calls("PeftModelForCausalLM")
        assert steps < micro_batches <= steps * PASSES
        if mode is EngineMode.fast:
            assert seen.calls("LlamaDecoderLayer") == LAYERS * micro_batches
            assert len(by_hand) == 2 * LAYERS * micro_batches
        else:
            assert seen.calls("LlamaDecoderLayer") == 2 * LAYERS * micro_batches
        cut_back(run, SAVED)


@pytest.mark.slow
@pytest.mark.parametrize("batching", Batching, ids=lambda batching: batching.name)
def test_dropout_acts_in_training_alone(workshop, tmp_path, batching):
    with Seen() as seen:
        train(recipe_for(workshop, batching, dropout=0.5), RunDirectory(tmp_path / "run"), [])
    assert seen.wrong() == set()
    adapted = 7 * LAYERS
    assert seen.dropped == {True: 2 * adapted * seen.calls("PeftModelForCausalLM"), False: 0}


def metrics_of(run):
    return [json.loads(line) for line in run.metrics.read_text().splitlines()]


@pytest.mark.slow
def test_the_first_step_the_last_one_and_every_saved_one_are_logged(workshop, tmp_path):
    run, recipe = RunDirectory(tmp_path / "run"), recipe_for(workshop, log_every_steps=100, eval_every_steps=None)
    result = train(recipe, run, [])
    logged = [row for row in metrics_of(run) if "loss" in row]
    assert [row["step"] for row in logged] == [1, SAVED, STEPS]
    assert result["final_loss"] == logged[-1]["loss"]
    assert result["tokens"] == logged[-1]["tokens"] > 0
    assert result["seconds"] == logged[-1]["seconds"] > 0
