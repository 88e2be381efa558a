"""TRL receives the kit's rows as they are: no cut, no packing of its own, the kit's mask and order, fp32 adapters."""

import json
import pickle
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from bitsandbytes.optim import AdamW8bit
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from qlora_kit.adapter.attach import adapter_size, attach_lora
from qlora_kit.core.errors import RunError
from qlora_kit.data.packing import pack
from qlora_kit.data.tokens import TokenRows, TokenStore
from qlora_kit.engine.attention.packed import SDPA_PACKED
from qlora_kit.engine.graphs.layer_graphs import LayerGraphs
from qlora_kit.engine.layer.fast import FastEngine
from qlora_kit.model.load import load_base
from qlora_kit.model.tokenizer import load_tokenizer
from qlora_kit.objectives.sft.collate import Collator, CountingCollator, feature
from qlora_kit.objectives.sft.dataset import training_dataset
from qlora_kit.schema.data import Batching, DataConfig
from qlora_kit.schema.model import Attention, ModelConfig
from qlora_kit.schema.optimizers import OptimizerName
from qlora_kit.schema.quant import ComputeDtype, QuantConfig, QuantKind
from qlora_kit.schema.root import TrainRecipe
from qlora_kit.schema.trainer import TrainerConfig
from qlora_kit.tracking.tracker import AllTrackers
from qlora_kit.training.arguments import sft_config
from qlora_kit.training.callbacks import MetricsCallback, StopOnSignal
from qlora_kit.training.checkpoint import last_complete
from qlora_kit.training.finite import NotFiniteError
from qlora_kit.training.optimizers.flat import FlatOptimizer
from qlora_kit.training.run import _widest, build_trainer, held_out_loss, run_training
from tests.drawn_rows import drawn_rows
from tests.stored_rows import stored_rows
from tests.tiny_models import build_tiny_model

LONG = 1500  # TRL's own default cuts at 1,024
LENGTHS = [9, 40, 3, 21, 33, 14, 5, 60, 12, 27, 18, 2]
HELD_OUT = [50, 4, 4, 31, 2]


def recipe_for(batching=Batching.padded, **loop):
    settings = {"batch_size": 2, "max_steps": 2, "gradient_checkpointing": False, **loop}
    return TrainRecipe(
        quant=QuantConfig(kind=QuantKind.none, compute_dtype=ComputeDtype.float32),
        data=DataConfig(batching=batching),
        trainer=TrainerConfig(**settings),
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return build_tiny_model("llama", tmp_path_factory.mktemp("sft") / "base", max_position_embeddings=2048)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    return drawn_rows(folder / "train", LENGTHS, 1), drawn_rows(folder / "held_out", HELD_OUT, 2)


def trainer_for(base, recipe, train, held_out, folder):
    packing = pack(train.lengths, 64) if recipe.data.batching is Batching.packed else None
    torch.manual_seed(0)
    model = attach_lora(load_base(base, recipe.quant, recipe.model.attention), recipe.lora)
    callback = MetricsCallback(AllTrackers([]), StopOnSignal())
    return build_trainer(model, load_tokenizer(base), recipe, train, held_out, folder, callback, packing)


@pytest.fixture
def built(base, rows, tmp_path):
    """A trainer for each way of batching, on the same rows."""
    train, held_out = rows

    def build(batching=Batching.padded, **loop):
        return trainer_for(base, recipe_for(batching, **loop), train, held_out, tmp_path)

    return build


@pytest.mark.slow
@pytest.mark.libraries
def test_checkpoints_name_the_base_as_the_recipe_does_and_hold_no_cards(base, rows, tmp_path):
    recipe = replace(recipe_for(save_every_steps=1), model=ModelConfig(source="owner/model", revision="0a1b"))
    run_training(trainer_for(base, recipe, rows[0], None, tmp_path), None)
    assert not list(tmp_path.rglob("README.md"))
    settings = json.loads((tmp_path / "checkpoint-2" / "adapter_config.json").read_text())
    assert (settings["base_model_name_or_path"], settings["revision"]) == ("owner/model", "0a1b")


def test_rows_reach_the_loss_whole(base, tmp_path):
    rows = stored_rows(tmp_path / "rows", [([7] * LONG, [True] * LONG), ([8] * 30, [True] * 30)])
    trainer = trainer_for(base, recipe_for(), rows, None, tmp_path)
    (batch,) = trainer.get_train_dataloader()
    assert sorted(batch["attention_mask"].sum(dim=1).tolist()) == [30, LONG]


@pytest.mark.slow
@pytest.mark.parametrize("batching", Batching)
def test_trl_prepares_nothing(base, rows, tmp_path, monkeypatch, batching):
    def prepare(*_, **__):
        raise AssertionError("TRL prepared the rows")

    monkeypatch.setattr(SFTTrainer, "_prepare_dataset", prepare)
    trainer = trainer_for(base, recipe_for(batching, max_steps=1), rows[0], rows[1], tmp_path)
    run_training(trainer, None)
    assert trainer.state.global_step == 1
    loss = held_out_loss(trainer)
    assert loss is not None and 0 < loss < float("inf")


@pytest.mark.parametrize("batching", Batching)
def test_each_row_is_read_once_an_epoch(built, rows, batching):
    trainer = built(batching)
    read = [np.zeros(0, dtype=np.int64)]
    collate = trainer.data_collator
    trainer.data_collator = lambda features: read.extend(one["input_ids"] for one in features) or collate(features)
    steps = len(list(trainer.get_train_dataloader()))
    assert np.array_equal(np.sort(np.concatenate(read)), np.sort(rows[0].store.tokens))
    assert steps == {Batching.packed: 2}.get(batching, 6)  # 244 tokens in bins of 64, two a batch


def test_rows_by_length_are_padded_little(built):
    padded, grouped = (
        sum(batch["attention_mask"].numel() for batch in built(batching).get_train_dataloader())
        for batching in (Batching.padded, Batching.by_length)
    )
    assert sum(LENGTHS) < grouped < padded


def test_packed_batches_hold_no_padding(built):
    batches = list(built(Batching.packed).get_train_dataloader())
    assert sum(batch["input_ids"].numel() for batch in batches) == sum(LENGTHS)
    assert all("attention_mask" not in batch for batch in batches)


def test_the_loss_is_that_of_the_kits_mask(built, rows):
    trainer = built()
    batch: dict[str, Any] = CountingCollator(Collator(0))([feature(rows[0], [1]), feature(rows[0], [3])])
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, dict(batch))
        logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert float(loss) == pytest.approx(float(expected), rel=1e-4)  # measured: 2e-7


def test_gradients_of_every_step_lie_in_the_rows_of_a_flat_optimizer(built, rows):
    trainer = built()
    trained = {name: part for name, part in trainer.model.named_parameters() if part.requires_grad}
    trainer.optimizer = FlatOptimizer(AdamW8bit(trained.values()), trained.items())
    places = {name: part.grad.data_ptr() for name, part in trained.items()}
    batch = CountingCollator(Collator(0))([feature(rows[0], [1]), feature(rows[0], [3])])
    for _ in range(2):
        trainer.model.zero_grad()  # as transformers does between steps
        assert all(part.grad is None for part in trained.values())
        trainer.training_step(trainer.model, dict(batch), torch.tensor(20))
        assert {name: part.grad.data_ptr() for name, part in trained.items()} == places
    assert any(part.grad.any() for part in trained.values())


@pytest.mark.parametrize("batching", Batching)
def test_held_out_loss_is_the_mean_over_tokens(built, rows, batching):
    trainer = built(batching)
    losses, tokens = [], 0
    for index in range(len(HELD_OUT)):
        batch = Collator(0)([feature(rows[1], [index])])
        with torch.no_grad():
            logits = trainer.model.get_base_model()(input_ids=batch["input_ids"]).logits
        labels = batch["labels"][0, 1:]
        losses.append(float(torch.nn.functional.cross_entropy(logits[0, :-1], labels, reduction="sum")))
        tokens += int((labels != -100).sum())
    assert held_out_loss(trainer) == pytest.approx(sum(losses) / tokens, rel=1e-5)


def test_items_that_fill_an_evaluation_add_nothing(rows):
    dataset = training_dataset(rows[1], multiple=4)
    assert len(dataset) == 8
    assert [len(item["input_ids"]) for item in dataset] == [*HELD_OUT, 50, 50, 50]
    assert all((item["labels"] == -100).all() for item in islice(dataset, 5, None))


def test_a_dataset_of_many_rows_reads_them_when_asked(tmp_path, monkeypatch):
    store = stored_rows(tmp_path / "rows", [([5, 6, 7], [False, True, True])])
    many = store.select(np.zeros(200_000, dtype=np.int64))
    packing = pack(many.lengths, 2048)
    read = []
    arrays = TokenRows.arrays
    monkeypatch.setattr(TokenRows, "arrays", lambda rows, index: read.append(index) or arrays(rows, index))
    dataset = training_dataset(many, packing)
    assert read == []
    assert dataset.data.nbytes < 10_000  # 294 bins, one number each
    assert len(dataset[0]["input_ids"]) == 2046
    assert read == packing.bin(0).tolist()


def test_a_pickled_reader_opens_the_store_anew(rows):
    dataset = training_dataset(rows[0])
    before = dataset[3]
    again = pickle.loads(pickle.dumps(dataset))
    assert len(pickle.dumps(dataset)) < 20_000
    assert isinstance(again.format["format_kwargs"]["transform"].rows.store, TokenStore)
    assert np.array_equal(again[3]["labels"], before["labels"])


def test_adapters_are_trained_in_fp32(base, rows, tmp_path):
    recipe = replace(recipe_for(), quant=QuantConfig(compute_dtype=ComputeDtype.float32))  # TRL makes NF4's bf16
    trainer = trainer_for(base, recipe, rows[0], rows[1], tmp_path)
    trained = {parameter.dtype for parameter in trainer.model.parameters() if parameter.requires_grad}
    assert trained == {torch.float32}
    assert adapter_size(trainer.model).modules == 14


def test_no_default_of_trl_cuts_packs_or_hides(tmp_path):
    config = sft_config(recipe_for(), OptimizerName.adamw, tmp_path, items=8, evaluates=False)
    assert config.max_length is None
    assert config.packing is False
    assert config.padding_free is False
    assert config.dataset_kwargs == {"skip_prepare_dataset": True}
    assert config.remove_unused_columns is False
    assert config.average_tokens_across_devices is True
    assert config.logging_nan_inf_filter is False
    assert config.report_to == []
    assert config.output_dir == str(tmp_path)


def test_a_process_trains_on_one_gpu_however_many_it_sees(tmp_path, monkeypatch):
    monkeypatch.setattr(SFTConfig, "n_gpu", property(lambda config: 4))
    config = sft_config(recipe_for(), OptimizerName.adamw, tmp_path, items=8, evaluates=False)
    assert config.n_gpu == 1  # else TRL refuses, when the weights are loaded
    assert config.train_batch_size == recipe_for().trainer.batch_size


def test_steps_are_counted_in_items_of_all_processes(tmp_path):
    recipe = recipe_for(max_steps=None, gradient_accumulation=2)
    steps = [
        sft_config(recipe, OptimizerName.adamw, tmp_path, items=17, evaluates=False, processes=processes).max_steps
        for processes in (1, 2)
    ]
    assert steps == [5, 3]  # 9 batches of 2, then 5 of 4, two a step


def test_the_model_is_isolated_for_training_and_given_back(built):
    trainer = built(Batching.packed)
    model = trainer.model.get_base_model()
    assert model.config._attn_implementation == SDPA_PACKED
    scored = model.forward
    trainer.restore_model()
    assert model.config._attn_implementation == "sdpa"
    assert model.forward is not scored
    trainer.restore_model()


def test_padded_rows_leave_the_attention_alone(built):
    assert built().model.get_base_model().config._attn_implementation == "sdpa"


def test_packing_and_the_recipe_must_agree(base, rows, tmp_path):
    recipe = recipe_for(Batching.packed)
    model = attach_lora(load_base(base, recipe.quant), recipe.lora)
    callback = MetricsCallback(AllTrackers([]), StopOnSignal())
    with pytest.raises(ValueError, match=r"data.batching=packed, and packing is None"):
        build_trainer(model, load_tokenizer(base), recipe, rows[0], None, tmp_path, callback)


def test_attention_that_reads_across_samples_ends_the_run(base, rows, tmp_path):
    recipe = replace(recipe_for(Batching.packed), model=ModelConfig(source="", attention=Attention.eager))
    with pytest.raises(RunError, match="samples cannot be packed with eager"):
        trainer_for(base, recipe, rows[0], rows[1], tmp_path)


def test_a_leak_ends_the_run(base, rows, tmp_path, monkeypatch):
    monkeypatch.setattr("qlora_kit.training.run.enable_packed_attention", lambda model, attention: lambda: None)
    monkeypatch.setattr("transformers.models.llama.modeling_llama.create_causal_mask", lambda **_: None)
    with pytest.raises(RunError, match="packed samples read each other with sdpa"):
        trainer_for(base, recipe_for(Batching.packed), rows[0], rows[1], tmp_path)


def gradients(model):
    return {name: part.grad.clone() for name, part in model.named_parameters() if part.grad is not None}


@pytest.mark.parametrize("starts_in_training", [True, False])
def test_a_step_is_that_of_transformers(built, starts_in_training):
    trainer = built()
    model = trainer.model
    (batch,), items = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, trainer.args.device)
    loss = SFTTrainer.training_step(trainer, model, batch, items)
    expected = gradients(model)
    model.zero_grad()
    model.train(starts_in_training)
    torch.testing.assert_close(trainer.training_step(model, batch, items), loss, rtol=0, atol=0)
    assert all(module.training for module in model.modules())
    found = gradients(model)
    assert found.keys() == expected.keys() and len(found) > 0
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_batch_counts_as_many_operations_as_with_transformers(built):
    trainer = built()
    batch = next(iter(trainer.get_train_dataloader()))
    assert trainer.floating_point_ops(batch) == SFTTrainer.floating_point_ops(trainer, batch) > 0


@pytest.mark.slow
def test_a_weight_that_the_last_update_broke_is_not_saved(built, tmp_path):
    """Loss and gradient of the step were whole, and the checkpoints before it stay."""

    class Breaks(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **rest):
            if state.global_step == 3:
                weight = next(weight for weight in model.parameters() if weight.requires_grad)
                with torch.no_grad():
                    weight.view(-1)[0] = torch.nan

    trainer = built(max_steps=3, save_every_steps=1, keep_checkpoints=2)
    trainer.add_callback(Breaks())
    with pytest.raises(NotFiniteError, match="after step 3"):
        run_training(trainer, None)
    assert sorted(folder.name for folder in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    assert last_complete(tmp_path) == tmp_path / "checkpoint-2"


def test_padded_batches_have_few_widths_where_layers_are_recorded_alone(rows):
    recorded, by_kernel = (FastEngine([], [], lambda: None, graphs) for graphs in (LayerGraphs(), None))
    longest = int(rows[0].lengths.max())
    assert _widest(rows[0], None, recorded) == longest
    assert _widest(rows[0], pack(rows[0].lengths, longest), recorded) is None
    assert _widest(rows[0], None, by_kernel) is None
    assert _widest(rows[0], None, None) is None
