"""A whole run of a tiny model: every module trains in training mode, held-out passes do not, and layers run again."""

import errno
import json
import random
import re
import shlex
import shutil
from collections import Counter
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch._guards import detect_fake_mode
from torch.nn.modules import module as torch_module
from transformers import OPTConfig

from qlora_kit.core.errors import RecipeError, RunError
from qlora_kit.core.extras import is_present
from qlora_kit.core.files import write_json
from qlora_kit.core.shell import hydra_text
from qlora_kit.engine.layer.fast import FastLayer
from qlora_kit.formats.next_line import line_to_export
from qlora_kit.model.source import CONFIG_FILES
from qlora_kit.pipelines.train import _tell, train
from qlora_kit.runs.directory import RunDirectory
from qlora_kit.runs.open import open_run
from qlora_kit.schema.compose import compose_recipe, load_recipe
from qlora_kit.schema.data import Batching, DataConfig, Overflow
from qlora_kit.schema.engine import EngineConfig, EngineMode
from qlora_kit.schema.lora import LoraConfig
from qlora_kit.schema.model import ModelConfig
from qlora_kit.schema.optim import OptimConfig
from qlora_kit.schema.optimizers import OptimizerName
from qlora_kit.schema.quant import ComputeDtype, QuantConfig, QuantKind
from qlora_kit.schema.root import TrainRecipe
from qlora_kit.schema.trainer import TrainerConfig
from qlora_kit.training import checkpoint as checkpoint_module
from qlora_kit.training.checkpoint import MARK
from qlora_kit.training.result import TrainResult
from qlora_kit.training.trainer import KitTrainer
from tests.tiny_models import build_tiny_model

LAYERS = 2
STEPS, EVALUATED, SAVED, PASSES = 5, 2, 3, 2
HELD_OUT_BATCHES = 2  # four rows, two at a time
TRIALS = 1
ADAPTER = "adapter_model.safetensors"
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
        if detect_fake_mode() is not None:  # what a plan of memory runs without values is no part of the training
            return
        self.modes[torch.is_grad_enabled(), type(module).__name__, module.training] += 1

    def _after(self, module, inputs, output):
        if isinstance(module, torch.nn.Dropout) and detect_fake_mode() is None:
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
    assert result.final_loss == logged[-1]["loss"]
    assert result.tokens == logged[-1]["tokens"] > 0
    assert result.seconds == logged[-1]["seconds"] > 0


def evaluated(seen):
    """Held-out batches that a run looked at, beside the few tokens that are tried before training."""
    return seen.modes[False, "PeftModelForCausalLM", False] - TRIALS


@pytest.mark.slow
@pytest.mark.parametrize("every", [EVALUATED, STEPS, None])
def test_each_held_out_loss_is_measured_once(workshop, tmp_path, every):
    run = RunDirectory(tmp_path / "run")
    with Seen() as seen:
        result = train(recipe_for(workshop, eval_every_steps=every), run, [])
    steps = [row["step"] for row in metrics_of(run) if "eval_loss" in row]
    assert steps == {EVALUATED: [2, 4, 5], STEPS: [5], None: [5]}[every]
    assert evaluated(seen) == HELD_OUT_BATCHES * len(steps)
    assert result.eval_loss == json.loads(run.result.read_text())["eval_loss"] == metrics_of(run)[-1]["eval_loss"]


@pytest.mark.slow
@pytest.mark.parametrize("killed_before", ["the held-out loss", "result.json"])
def test_a_run_that_was_killed_behind_its_last_checkpoint_only_ends(workshop, tmp_path, killed_before):
    run, recipe = RunDirectory(tmp_path / "run"), recipe_for(workshop, eval_every_steps=None)
    whole = train(recipe, run, [])
    adapter, metrics = (run.adapter / ADAPTER).read_bytes(), run.metrics.read_text()
    cut_back(run, STEPS)
    if killed_before == "the held-out loss":
        run.metrics.write_text("".join(metrics.splitlines(keepends=True)[:-1]))
    base = run.base.read_text()
    run.base.write_text(base.replace('"config.json": "', '"config.json": "other'))
    with pytest.raises(RecipeError, match=r"config\.json of the base .* changed since the run was begun"):
        train(recipe, run, [])
    run.base.write_text(base)
    with Seen() as seen:
        again = train(recipe, run, [])
    assert not any(with_gradients for with_gradients, _, _ in seen.modes)
    assert evaluated(seen) == (HELD_OUT_BATCHES if killed_before == "the held-out loss" else 0)
    assert again.resumed_from == STEPS
    assert replace(again, peak_memory_bytes=0, resumed_from=None) == replace(whole, peak_memory_bytes=0)
    assert (run.adapter / ADAPTER).read_bytes() == adapter
    assert (run.checkpoints / f"checkpoint-{STEPS}" / ADAPTER).read_bytes() == adapter
    assert [row["step"] for row in metrics_of(run)] == [json.loads(line)["step"] for line in metrics.splitlines()]


@pytest.mark.slow
def test_the_commit_that_was_found_is_what_a_run_stays_at(workshop, tmp_path, monkeypatch):
    commits, fetched = iter(["1" * 40, "2" * 40]), []
    monkeypatch.setattr("qlora_kit.model.source._newest_commit", lambda repository: next(commits))
    base = workshop / "base"
    monkeypatch.setattr(
        "qlora_kit.model.source._snapshot", lambda name, revision, files: fetched.append((name, revision)) or base
    )
    run, recipe = RunDirectory(tmp_path / "run"), recipe_for(workshop)
    recipe.model.source = "owner/name"
    train(recipe, run, [])
    cut_back(run, SAVED)
    noted = load_recipe("train", run.recipe)
    assert (noted.model.source, noted.model.revision) == ("owner/name", "1" * 40)
    assert train(noted, run, None).resumed_from == SAVED
    opened = open_run(str(run.path))
    assert astuple(opened.base.name) == ("owner/name", "1" * 40)
    assert json.loads((run.adapter / "adapter_config.json").read_text())["revision"] == "1" * 40
    assert set(fetched) == {("owner/name", "1" * 40)}


@pytest.mark.slow
@pytest.mark.skipif(not is_present("gguf"), reason="the wish needs the extra gguf")
def test_an_export_that_the_base_cannot_become_is_refused_before_its_weights_are_fetched(
    workshop, tmp_path, monkeypatch
):
    fetched = []
    config = OPTConfig(hidden_size=64, word_embed_proj_dim=64, ffn_dim=64, num_attention_heads=4, num_hidden_layers=1)
    config.architectures = ["OPTForCausalLM"]
    config.save_pretrained(tmp_path / "settings")
    monkeypatch.setattr(
        "qlora_kit.model.source._snapshot", lambda name, revision, files: fetched.append(files) or tmp_path / "settings"
    )
    recipe = recipe_for(workshop)
    recipe.model.source, recipe.model.revision, recipe.exports = "owner/name", "1" * 40, ["gguf_q4_k_m"]
    with pytest.raises(RecipeError, match="gguf_q4_k_m, which cannot be written"):
        train(recipe, RunDirectory(tmp_path / "run"), [])
    assert fetched == [CONFIG_FILES]


def command_in(line):
    """The recipe of a printed command line."""
    program, verb, *words = shlex.split(line)
    assert (program, verb) == ("qlora-kit", "train")
    return compose_recipe("train", words).recipe


@pytest.fixture
def typed(workshop):
    """The overrides that a user would have typed for `recipe_for`."""
    return [
        f"model.source={workshop / 'base'}",
        "data=messages",
        f"data.train_file={workshop / 'train.jsonl'}",
        "data.max_tokens=128",
        "trainer.batch_size=2",
        "optim.learning_rate=1e9",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("file", ["rng_state.pth", MARK])
def test_of_a_checkpoint_that_a_full_disk_cut_nothing_is_left(workshop, tmp_path, monkeypatch, file):
    run = RunDirectory(tmp_path / "run")
    number, save, mark = f"checkpoint-{2 * SAVED - 1}", torch.save, write_json

    def full(path):
        if Path(path).parent.name == number and Path(path).name == file:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

    def saving(what, path, *rest):
        full(path)
        save(what, path, *rest)

    def marking(path, what):
        full(path)
        mark(path, what)

    monkeypatch.setattr(torch, "save", saving)
    monkeypatch.setattr(checkpoint_module, "write_json", marking)
    with pytest.raises(OSError, match="No space left"):
        train(recipe_for(workshop, eval_every_steps=None), run, None)
    assert [folder.name for folder in run.checkpoints.iterdir()] == [f"checkpoint-{SAVED}"]


@pytest.mark.slow
def test_a_checkpoint_with_a_number_that_is_not_finite_is_not_kept(workshop, tmp_path, typed):
    run = RunDirectory(tmp_path / "run")
    steps = {"log_every_steps": 50, "save_every_steps": 1, "eval_every_steps": None}
    recipe = recipe_for(workshop, **steps)
    optim = OptimConfig(name=OptimizerName.adamw, learning_rate=1e9, warmup_fraction=0.5, max_grad_norm=1e9)
    # the largest rate of a recipe alone only carries a model with norms to a place where nothing moves
    lora = replace(recipe.lora, alpha=10**10)
    with pytest.raises(RunError) as told:
        train(replace(recipe, optim=optim, lora=lora), run, typed)
    (problem,) = told.value.problems
    assert re.search(r"became (nan|inf) by step \d|hold values that are not finite", problem.what)
    assert "is whole, but goes on with the same rate" in problem.what
    assert command_in(problem.fix).optim.learning_rate == 1e8
    kept = [folder for folder in run.checkpoints.iterdir() if (folder / MARK).exists()]
    assert kept
    for folder in kept:
        assert all(tensor.isfinite().all() for tensor in load_file(folder / ADAPTER).values())
    assert not run.adapter.exists() and not run.result.exists()
    assert "NaN" not in run.metrics.read_text() and "Infinity" not in run.metrics.read_text()


@pytest.mark.slow
def test_memory_that_ran_out_is_told_with_lines_that_need_less(workshop, tmp_path, typed, monkeypatch):
    compute_loss = KitTrainer.compute_loss

    def short_of_memory(trainer, *given, **named):
        if trainer.state.global_step == SAVED:
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a capacity of 8 GiB"
            )
        return compute_loss(trainer, *given, **named)

    monkeypatch.setattr(KitTrainer, "compute_loss", short_of_memory)
    run, recipe = RunDirectory(tmp_path / "run"), recipe_for(workshop, gradient_checkpointing=False)
    with pytest.raises(RunError) as told:
        train(recipe, run, typed)
    problem, less, later = told.value.problems
    assert "ran out of memory; tried to allocate 2.00 gib: this process used" in problem.what
    assert "are free now; plan estimated about" in problem.what
    assert f"the checkpoint of step {SAVED} goes on" in later.what
    same, shorter, resume = problem.fix, less.fix, later.fix
    found = command_in(same)
    assert found.trainer.gradient_checkpointing
    assert (found.trainer.batch_size, found.trainer.gradient_accumulation) == (1, 2 * PASSES)
    assert found.data.max_tokens == 128
    assert found.optim.learning_rate == 1e9
    assert command_in(shorter).data.max_tokens < 64
    assert command_in(shorter).data.overflow is Overflow.drop
    assert shlex.split(resume) == ["qlora-kit", "train", f"resume={run.path}"]


@pytest.mark.slow
def test_a_base_that_does_not_fit_is_told_so(workshop, tmp_path, typed, monkeypatch):
    def load(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("qlora_kit.pipelines.train.load_base", load)
    whole = replace(recipe_for(workshop), quant=QuantConfig(kind=QuantKind.none))
    with pytest.raises(RunError, match="the base does not fit into the memory of this machine: this process") as told:
        train(whole, RunDirectory(tmp_path / "run"), typed)
    assert command_in(told.value.problems[0].fix).quant.kind is QuantKind.nf4
    with pytest.raises(RunError, match="choose a smaller model"):
        train(recipe_for(workshop), RunDirectory(tmp_path / "other"), typed)


@pytest.mark.slow
def test_a_loss_that_was_never_finite_is_no_fault_of_the_learning_rate(workshop, tmp_path, typed, monkeypatch):
    monkeypatch.setattr(KitTrainer, "compute_loss", lambda trainer, model, inputs, **_: nan_loss(model))
    with pytest.raises(RunError) as told:
        train(recipe_for(workshop), RunDirectory(tmp_path / "run"), typed)
    (problem,) = told.value.problems
    assert "the loss became nan by step 1, before anything was learned: the base's weights or" in problem.what
    assert command_in(problem.fix).quant.compute_dtype is ComputeDtype.float32


def nan_loss(model):
    return sum(weight.sum() for weight in model.parameters() if weight.requires_grad) * torch.nan


@pytest.mark.slow
def test_other_errors_of_the_device_are_left_as_they_are(workshop, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(KitTrainer, "compute_loss", fail)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        train(recipe_for(workshop), RunDirectory(tmp_path / "run"), [])


@pytest.mark.slow
def test_a_training_that_diverged_says_so(workshop, tmp_path, typed, capsys):
    """Nothing is worse than a tiny base of random weights, so the loss at the first step is written anew."""
    run = RunDirectory(tmp_path / "run")
    recipe = replace(recipe_for(workshop), optim=OptimConfig(learning_rate=1000.0))
    assert list(train(recipe, run, typed).warnings) == []
    cut_back(run, STEPS)
    first, *rest = metrics_of(run)
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in [{**first, "loss": 2.5}, *rest]))
    train(recipe, run, None)
    result = json.loads(run.result.read_text())
    (warning,) = result["warnings"]
    assert warning.startswith("training diverged: the loss is ")
    said = capsys.readouterr()
    (shown,) = re.findall(r"warning: (training diverged.*)\n  try      (.*)", said.out + said.err)
    assert shown[0] == warning
    assert command_in(shown[1]).optim.learning_rate == 100
    assert result["optimizer"] == "adamw"  # without a GPU, whatever the recipe says


@pytest.mark.slow
def test_the_end_names_the_line_that_comes_next(workshop, tmp_path, capsys):
    run = RunDirectory(tmp_path / "it's mine")
    counts: dict[str, Any] = dict.fromkeys(("steps", "tokens", "trainable_parameters"), 1)
    measures: dict[str, Any] = dict.fromkeys(("seconds", "tokens_per_second", "peak_memory_bytes", "final_loss"), 1.0)
    result = TrainResult(**counts, **measures, optimizer="adamw", eval_loss=None)
    _tell(result, recipe_for(workshop), run, workshop / "base")
    *_, done, following = capsys.readouterr().err.splitlines()
    assert done == f"done: {run.path}"
    assert following == f"next: {line_to_export(run, workshop / 'base')}"
    recipe = recipe_for(workshop)
    recipe.exports = ["merged_16bit", "gptq_4bit"]
    _tell(result, recipe, run, workshop / "base")
    following = shlex.split(capsys.readouterr().err.splitlines()[-1])
    words = [f"run={hydra_text(str(run.path))}", "export=[merged_16bit,gptq_4bit]"]
    assert following == ["next:", "qlora-kit", "export", *words]
