"""On a GPU the recipe's own optimizer runs, through the code that a CPU run takes."""

import json
from itertools import pairwise

import pytest
import torch

from qlora_kit.adapter.attach import attach_lora
from qlora_kit.cli.verbs import main
from qlora_kit.model.load import load_base
from qlora_kit.model.tokenizer import load_tokenizer
from qlora_kit.schema.optim import OptimConfig
from qlora_kit.schema.optimizers import OptimizerName
from qlora_kit.schema.quant import QuantConfig
from qlora_kit.schema.root import TrainRecipe
from qlora_kit.schema.trainer import TrainerConfig
from qlora_kit.tracking.tracker import AllTrackers
from qlora_kit.training.callbacks import MetricsCallback, StopOnSignal
from qlora_kit.training.run import build_trainer
from tests.e2e.conftest import only_run, train_line, write_rows
from tests.stored_rows import stored_rows
from tests.tiny_models import build_tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("batching", ["padded", "packed"])
def test_paged_adamw_8bit_trains_through_the_command_line(batching, tmp_path, monkeypatch):
    build_tiny_model("llama", tmp_path / "base")
    write_rows(tmp_path / "train.jsonl", 4, 1, "turn on")
    write_rows(tmp_path / "held_out.jsonl", 4, 2, "please start")
    monkeypatch.chdir(tmp_path)
    line = train_line(
        tmp_path,
        "optim.fallback=false",
        "quant.compute_dtype=bfloat16",
        "trainer.max_steps=12",
        f"data.batching={batching}",
    )
    assert main(line) == 0
    losses = [json.loads(text).get("loss") for text in (only_run(tmp_path) / "metrics.jsonl").read_text().splitlines()]
    losses = [loss for loss in losses if loss is not None]
    assert losses[-1] < 0.8 * losses[0]


def test_packed_batches_for_flex_attention_are_compiled_once(tmp_path, monkeypatch, recwarn):
    """Bins differ in length; compiled anew for each, torch would give up after eight and run with all scores."""
    build_tiny_model("llama", tmp_path / "base")
    write_rows(tmp_path / "train.jsonl", 64, 1, "turn on")
    write_rows(tmp_path / "held_out.jsonl", 4, 2, "please start")
    monkeypatch.chdir(tmp_path)
    settings = (
        "data.batching=packed",
        "model.attention=flex_attention",
        "trainer.batch_size=1",
        "trainer.max_steps=16",
    )
    assert main(train_line(tmp_path, *settings, "quant.compute_dtype=bfloat16")) == 0
    tokens = [
        json.loads(text).get("tokens") for text in (only_run(tmp_path) / "metrics.jsonl").read_text().splitlines()
    ]
    steps = [later - sooner for sooner, later in pairwise([count for count in tokens if count])]
    assert len(set(steps)) > 8  # samples without what they are filled up with
    assert not [warning for warning in recwarn if "without torch.compile" in str(warning.message)]


@pytest.mark.parametrize("name", OptimizerName)
def test_each_optimizer_is_the_one_that_was_named(name, tmp_path):
    folder = build_tiny_model("llama", tmp_path / "base")
    recipe = TrainRecipe(
        optim=OptimConfig(name=name, fallback=False),
        trainer=TrainerConfig(batch_size=1, max_steps=2, gradient_checkpointing=False),
    )
    rows = stored_rows(tmp_path / "rows", [(range(5, 45), (False,) * 20 + (True,) * 20)])
    model = attach_lora(load_base(folder, QuantConfig()), recipe.lora)
    callback = MetricsCallback(AllTrackers([]), StopOnSignal())
    trainer = build_trainer(model, load_tokenizer(folder), recipe, rows, None, tmp_path / "checkpoints", callback)
    trainer.train()
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    assert getattr(optimizer, "is_paged", False) is name.name.startswith("paged")
    bits = next((bits for bits in (8, 32) if name.name.endswith(f"{bits}bit")), None)
    told = getattr(optimizer, "optim_bits", None) or getattr(getattr(optimizer, "args", None), "optim_bits", None)
    assert told == bits  # bitsandbytes keeps them in `args`
