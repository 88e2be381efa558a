"""A step that runs out of memory is computed again in halves: the same rows, the same loss, the same weights."""

from typing import Any

import numpy as np
import pytest
import torch

from qlora_kit.adapter.attach import attach_lora
from qlora_kit.data.packing import pack
from qlora_kit.model.load import load_base
from qlora_kit.model.tokenizer import load_tokenizer
from qlora_kit.objectives.sft.collate import (
    Collator,
    CountingCollator,
    PackedCollator,
    StaticBatchShape,
    feature,
    in_halves,
)
from qlora_kit.schema.data import Batching, DataConfig
from qlora_kit.schema.engine import EngineConfig, EngineMode
from qlora_kit.schema.model import ModelConfig
from qlora_kit.schema.quant import ComputeDtype, QuantConfig
from qlora_kit.schema.root import TrainRecipe
from qlora_kit.schema.trainer import TrainerConfig
from qlora_kit.tracking.tracker import AllTrackers
from qlora_kit.training.callbacks import MetricsCallback, StopOnSignal
from qlora_kit.training.halving import Halving
from qlora_kit.training.run import build_trainer, run_training
from tests.drawn_rows import drawn_rows
from tests.tiny_models import build_tiny_model

LENGTHS = [9, 40, 3, 21, 33, 14, 27, 8]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return build_tiny_model("llama", tmp_path_factory.mktemp("halving") / "base")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return drawn_rows(tmp_path_factory.mktemp("rows") / "train", LENGTHS, 1)


def trained(base, rows, folder, batch_size, accumulation, way, fails=None):
    """Losses, tokens, weights and what was logged of two steps over 4 rows each; fails: of which batches, by tokens."""
    batching = Batching.packed if way == "packed" else Batching.padded
    recipe = TrainRecipe(
        model=ModelConfig(source="base"),
        quant=QuantConfig(compute_dtype=ComputeDtype.float32),
        data=DataConfig(batching=batching),
        trainer=TrainerConfig(batch_size=batch_size, gradient_accumulation=accumulation, max_steps=4),
        engine=EngineConfig(mode=EngineMode.plain if way == "plain" else EngineMode.fast),
    )
    torch.manual_seed(0)
    model = attach_lora(load_base(base, recipe.quant), recipe.lora)
    packing = pack(rows.lengths, 64) if batching is Batching.packed else None
    callback = MetricsCallback(AllTrackers([]), StopOnSignal())
    trainer = build_trainer(
        model, load_tokenizer(base), recipe, rows, None, folder, callback, packing, takes_one_row=way == "one row"
    )
    whole, computed = trainer.compute_loss, []

    def compute_loss(model, inputs, **settings):
        computed.append(tuple(inputs["input_ids"].shape))
        loss = whole(model, inputs, **settings)
        if fails is not None and fails(inputs["input_ids"]):  # its gradients are there in part
            (loss * 3).backward(retain_graph=True)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has\nmore")
        return loss

    trainer.__dict__["compute_loss"] = compute_loss
    run_training(trainer, None)
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    weights = torch.cat([part.detach().flatten() for part in trainer.model.parameters() if part.requires_grad])
    return [(one["loss"], one["num_tokens"], one["mean_token_accuracy"]) for one in history], weights, computed


@pytest.mark.parametrize("way", ["plain", "padded", "one row", "packed"])
def test_losses_and_weights_are_those_of_a_run_with_smaller_batches(base, rows, tmp_path, way, capsys):
    size, accumulation = (2, 2) if way == "packed" else (4, 1)
    smaller, wanted, _ = trained(base, rows, tmp_path / "smaller", size // 2, 2 * accumulation, way)
    capsys.readouterr()
    seen = []

    def fails(ids):
        """From the third batch on, for more than half of one."""
        seen.append(ids.shape)
        return len(seen) > 2 and (ids.shape[0] > 2 if way in ("plain", "padded") else ids.shape[1] > 64)

    found, weights, computed = trained(base, rows, tmp_path / "whole", size, accumulation, way, fails)
    assert len(computed) > 4 * accumulation
    np.testing.assert_allclose(found, smaller, rtol=2e-5)
    assert ((weights - wanted).norm() / wanted.norm()).item() < 1e-4
    said = capsys.readouterr().err
    assert said.count("ran out of memory (CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has)") == 1
    assert "in 2 parts from here on, with the same rows in a step and, where nothing is dropped out, the same" in said


def test_what_a_single_row_has_no_room_for_ends_the_run(base, rows, tmp_path):
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        trained(base, rows, tmp_path, 4, 1, "padded", lambda ids: True)


def test_other_errors_are_no_shortage_of_memory(base, rows, tmp_path):
    def fails(ids):
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        trained(base, rows, tmp_path, 4, 1, "padded", fails)


@pytest.mark.parametrize(
    "collator",
    [
        Collator(0),
        PackedCollator(),
        PackedCollator(200, 0, StaticBatchShape(20, 60)),
        PackedCollator(sizes=(64, 128, 192)),
    ],
    ids=["padded", "packed", "filled", "one row"],
)
def test_halves_hold_what_the_whole_does(rows, collator):
    batch: dict[str, Any] = CountingCollator(collator)([feature(rows, [index]) for index in range(5)])
    parts = in_halves(batch)
    assert parts is not None
    for name in ("tokens", "trained_tokens"):
        assert sum(part[name] for part in parts) == batch[name]
    held = [part["input_ids"][part["labels"] != -100].tolist() for part in (batch, *parts)]
    assert held[1] + held[2] == held[0]
    if "cu_seq_lens_q" in batch:
        assert [part["cu_seq_lens_q"].tolist() for part in parts] == [[0, 9, 49, 52], [0, 21, 54]]
        assert [part["max_length_q"] for part in parts] == [40, 33]
        assert all(part["position_ids"].max() + 1 == part["max_length_q"] for part in parts)
    else:
        assert [tuple(part["input_ids"].shape) for part in parts] == [(2, 40), (3, 33)]


@pytest.mark.parametrize("collator", [Collator(0), PackedCollator(), PackedCollator(sizes=(64, 128, 192))])
def test_a_single_row_has_no_halves(rows, collator):
    assert in_halves(CountingCollator(collator)([feature(rows, [1])])) is None


def test_held_out_batches_are_scored_in_parts_where_memory_is_short(rows, capsys):
    batch = CountingCollator(Collator(0))([feature(rows, [index]) for index in range(5)])
    halving, sizes = Halving(), list[int]()

    def sums(part):
        sizes.append(len(part["input_ids"]))
        if len(part["input_ids"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return torch.tensor([float(part["tokens"]), float(len(part["input_ids"]))], dtype=torch.float64)

    assert halving.summed(batch, sums).tolist() == [batch["tokens"], 5]
    assert sizes == [5, 2, 3, 1, 1, 1, 2]
    assert halving.summed(batch, sums).tolist() == [batch["tokens"], 5] and sizes[7:] == [1, 1, 1, 2]
    assert halving.times == 0  # training is as it was
    assert capsys.readouterr().err.count("each is scored in") == 2
    single = CountingCollator(Collator(0))([feature(rows, [0])])
    with pytest.raises(torch.OutOfMemoryError):
        halving.summed(single, lambda part: sums({**part, "input_ids": [0, 0, 0]}))
