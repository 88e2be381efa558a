"""A step is the same however its rows are dealt out: over forward passes, over processes, over an interruption.

Each trainer is the real one of `build_trainer`. Adam's epsilon is set to 1, which makes its update nearly proportional
to the gradient, so that equal weights mean equal gradients; at 1e-8 Adam blows rounding of tiny gradients up to whole
steps. The weights of the tiny model are narrower than usual, so that rounding grows less from layer to layer.
"""

import os
import socket
from multiprocessing import get_context

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from qlora_kit.adapter.attach import attach_lora
from qlora_kit.data.packing import pack
from qlora_kit.data.tokens import TokenRows, TokenStore
from qlora_kit.model.load import load_base
from qlora_kit.model.tokenizer import load_tokenizer
from qlora_kit.schema.data import Batching, DataConfig
from qlora_kit.schema.lora import LoraConfig
from qlora_kit.schema.optim import OptimConfig
from qlora_kit.schema.optimizers import OptimizerName
from qlora_kit.schema.quant import ComputeDtype, QuantConfig, QuantKind
from qlora_kit.schema.root import TrainRecipe
from qlora_kit.schema.trainer import TrainerConfig
from qlora_kit.tracking.tracker import AllTrackers
from qlora_kit.training.callbacks import MetricsCallback, StopOnSignal
from qlora_kit.training.run import build_trainer, held_out_loss, run_training
from tests.drawn_rows import drawn_rows
from tests.tiny_models import build_tiny_model

# 28 rows, or 16 bins of 64: 7 or 4 steps of four an epoch
LENGTHS = [60, 3, 41, 22, 55, 9, 64, 64, 33, 30, 2, 17, 46, 18, 61, 50, 13, 12, 38, 25, 57, 6, 64, 28, 35, 64, 63, 1]
HELD_OUT = [50, 4, 4, 31, 2]  # five, which no two processes share evenly
IN_THE_SECOND_EPOCH = {Batching.padded: 10, Batching.by_length: 10, Batching.packed: 6}


class Notes(TrainerCallback):
    """What a run computed: the loss of each step, and the gradients and weights of the adapter."""

    def __init__(self):
        self.losses = []
        self.gradients = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        named = {name.removeprefix("module."): weight for name, weight in model.named_parameters()}
        self.gradients.append({name: weight.grad.clone() for name, weight in named.items() if weight.requires_grad})

    def on_log(self, args, state, control, logs=None, **_):
        if "loss" in logs:
            self.losses.append(logs["loss"])


def adapter(model):
    return {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}


def built(folder, batching, checkpoints, dropout=0.0, **loop):
    """The trainer of a recipe on the rows in a folder, and its notes."""
    recipe = TrainRecipe(
        quant=QuantConfig(kind=QuantKind.none, compute_dtype=ComputeDtype.float32),
        lora=LoraConfig(r=4, dropout=dropout),
        data=DataConfig(batching=batching),
        optim=OptimConfig(name=OptimizerName.adamw, learning_rate=0.1, max_grad_norm=0.0, warmup_fraction=0.0),
        trainer=TrainerConfig(gradient_checkpointing=False, **loop),
    )
    stores = [TokenStore(folder / name) for name in ("train", "held_out")]
    rows, held_out = (TokenRows.whole(store, np.arange(len(store))) for store in stores)
    torch.manual_seed(0)
    model = attach_lora(load_base(folder / "base", recipe.quant), recipe.lora)
    packing = pack(rows.lengths, 64) if batching is Batching.packed else None
    callback = MetricsCallback(AllTrackers([]), StopOnSignal())
    tokenizer = load_tokenizer(folder / "base")
    trainer = build_trainer(model, tokenizer, recipe, rows, held_out, checkpoints, callback, packing)
    notes = Notes()
    trainer.add_callback(notes)
    trainer.args.adam_epsilon = 1.0
    return trainer, notes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("accumulation")
    build_tiny_model("llama", place / "base", spread=0.03)
    drawn_rows(place / "train", LENGTHS, 1)
    drawn_rows(place / "held_out", HELD_OUT, 2)
    return place


def difference(found, expected):
    """Length of the difference between all tensors, as a share of the length of all of them."""
    assert found.keys() == expected.keys()
    ours, theirs = (torch.cat([named[name].flatten().double() for name in expected]) for named in (found, expected))
    return float((ours - theirs).norm() / theirs.norm())


def moved(run):
    """How far training moved each weight from where all runs began."""
    return {name: weight - run["before"][name] for name, weight in run["weights"].items()}


@pytest.mark.slow
@pytest.mark.parametrize("batching", [Batching.padded, Batching.packed])
def test_rows_of_a_step_may_be_dealt_over_forward_passes(folder, tmp_path, batching):
    runs = []
    for rows, passes in ((8, 1), (4, 2), (1, 8)):
        trainer, notes = built(
            folder, batching, tmp_path / str(rows), batch_size=rows, gradient_accumulation=passes, max_steps=2
        )
        before = adapter(trainer.model)
        run_training(trainer, None)
        runs.append((notes, moved({"before": before, "weights": adapter(trainer.model)})))
    (expected, moved_there), *others = runs
    assert len(expected.losses) == len(expected.gradients) == 2
    assert expected.losses[0] != expected.losses[1]
    for notes, moved_here in others:
        assert notes.losses == pytest.approx(expected.losses, rel=1e-6)
        for found, gradients in zip(notes.gradients, expected.gradients, strict=True):
            assert difference(found, gradients) < 1e-6
        assert difference(moved_here, moved_there) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("batching", Batching)
def test_a_resumed_run_is_the_uninterrupted_one(folder, tmp_path, batching):
    """The checkpoint lies inside the second epoch; dropout draws from the restored generators."""
    last = IN_THE_SECOND_EPOCH[batching]
    settings = {"batch_size": 4, "max_steps": last + 2, "save_every_steps": last, "dropout": 0.1}
    whole, whole_notes = built(folder, batching, tmp_path, **settings)
    run_training(whole, None)
    resumed, notes = built(folder, batching, tmp_path, **settings)
    run_training(resumed, tmp_path / f"checkpoint-{last}")
    assert notes.losses == whole_notes.losses[-2:]
    assert_equal(adapter(resumed.model), adapter(whole.model))


def assert_equal(found, expected):
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def in_each_process(rank, processes, port, folder, out, batching, rows):
    """Train, resume and evaluate as one of several processes, and save what came out."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    torch.set_num_threads(1)
    # accelerate names the device of a process without a GPU cpu:0, and torch.load knows only cpu
    torch.serialization.register_package(
        0, lambda storage: None, lambda storage, place: storage if place.startswith("cpu:") else None
    )
    last = IN_THE_SECOND_EPOCH[batching]
    checkpoints = out / f"{processes}"
    settings = {"batch_size": rows, "max_steps": last + 2, "save_every_steps": last}
    trainer, notes = built(folder, batching, checkpoints, **settings)
    before = adapter(trainer.model)
    run_training(trainer, None)
    held_out = held_out_loss(trainer)
    again, _ = built(folder, batching, checkpoints, **settings)
    run_training(again, checkpoints / f"checkpoint-{last}")
    found = {
        "losses": notes.losses,
        "gradients": notes.gradients,
        "before": before,
        "weights": adapter(trainer.model),
        "resumed": adapter(again.model),
        "held_out": held_out,
    }
    torch.save(found, out / f"{processes}_{rank}.pt")


def run_processes(processes, folder, out, batching, rows):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = get_context("spawn")
    workers = [
        context.Process(target=in_each_process, args=(rank, processes, port, folder, out, batching, rows))
        for rank in range(processes)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(300)
        assert worker.exitcode == 0
    return [torch.load(out / f"{processes}_{rank}.pt", weights_only=False) for rank in range(processes)]


@pytest.mark.slow
@pytest.mark.parametrize("batching", Batching)
def test_rows_of_a_step_may_be_dealt_over_processes(folder, tmp_path, batching):
    (alone,) = run_processes(1, folder, tmp_path, batching, 4)
    both = run_processes(2, folder, tmp_path, batching, 2)
    for found in both:
        assert_equal(found["weights"], both[0]["weights"])
        assert_equal(found["resumed"], found["weights"])
        assert found["losses"] == pytest.approx(alone["losses"], rel=1e-6)
        assert found["held_out"] == pytest.approx(alone["held_out"], rel=1e-6)
        pairs = list(zip(found["gradients"], alone["gradients"], strict=True))
        assert max(difference(*pair) for pair in pairs[:2]) < 1e-6
        # rounding of each step moves the weights that the next begins with; a lost factor would be a difference of 1
        assert max(difference(*pair) for pair in pairs[2:]) < 1e-5
        assert difference(moved(found), moved(alone)) < 1e-5


def test_the_rows_make_even_steps():
    assert len(LENGTHS) % 4 == len(pack(np.array(LENGTHS), 64)) % 8 == 0
