"""The recipe's engine is the one that trains, keeps what memory allows, and gives the plain engine's losses."""

import copy
import gc
import weakref
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from trl import SFTTrainer

from qlora_kit.adapter.attach import attach_lora
from qlora_kit.core.errors import RunError
from qlora_kit.core.units import human_bytes
from qlora_kit.data.packing import pack
from qlora_kit.engine.layer import fast
from qlora_kit.engine.layer.fast import FastEngine, FastLayer
from qlora_kit.engine.linear.fp8 import Fp8Weight, emulate, weight_for
from qlora_kit.model.load import load_base
from qlora_kit.model.stacked_experts import StackedExperts
from qlora_kit.model.tokenizer import load_tokenizer
from qlora_kit.schema.data import Batching, DataConfig
from qlora_kit.schema.engine import Compute, EngineConfig, EngineMode
from qlora_kit.schema.lora import LoraConfig
from qlora_kit.schema.model import ModelConfig
from qlora_kit.schema.quant import ComputeDtype, QuantConfig
from qlora_kit.schema.root import TrainRecipe
from qlora_kit.schema.trainer import TrainerConfig
from qlora_kit.tracking.tracker import AllTrackers
from qlora_kit.training import engine_setup as module
from qlora_kit.training import run
from qlora_kit.training.callbacks import MetricsCallback, StopOnSignal
from qlora_kit.training.engine_setup import enable_engine, layer_policies, step_memory_of
from qlora_kit.training.run import build_trainer, run_training
from tests.drawn_rows import drawn_rows
from tests.families import build
from tests.tiny_models import build_tiny_model

LENGTHS = [9, 40, 3, 21, 33, 14]
FAST = EngineMode.fast


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return build_tiny_model("llama", tmp_path_factory.mktemp("speed") / "base")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return drawn_rows(tmp_path_factory.mktemp("rows") / "train", LENGTHS, 1)


def enabled(model, config, tokens) -> FastEngine:
    engine = enable_engine(model, config, tokens)
    assert engine is not None
    return engine


def copy_of(group):
    """The kept copy of a group's weights; None without one."""
    assert group.concatenated is not None
    return group.concatenated.kept


def trained(base, rows, folder, engine, batching=Batching.padded, **settings):
    recipe = TrainRecipe(
        model=ModelConfig(source="base"),
        quant=QuantConfig(compute_dtype=ComputeDtype.float32),
        data=DataConfig(batching=batching),
        trainer=TrainerConfig(batch_size=2, max_steps=3),
        engine=engine,
    )
    torch.manual_seed(0)
    model = attach_lora(load_base(base, recipe.quant), recipe.lora)
    packing = pack(rows.lengths, 64) if batching is Batching.packed else None
    callback = MetricsCallback(AllTrackers([]), StopOnSignal())
    return build_trainer(model, load_tokenizer(base), recipe, rows, None, folder, callback, packing, **settings)


def losses(trainer):
    run_training(trainer, None)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.slow
@pytest.mark.libraries
@pytest.mark.parametrize("batching", [Batching.padded, Batching.packed])
def test_the_fast_engine_trains_as_the_plain_one(base, rows, tmp_path, batching, capsys):
    plain = trained(base, rows, tmp_path / "plain", EngineConfig(), batching)
    fast = trained(base, rows, tmp_path / "fast", EngineConfig(mode=FAST), batching)
    assert plain.engine is None
    assert plain.args.gradient_checkpointing
    assert fast.engine.fast_layers == 2
    assert not fast.args.gradient_checkpointing
    assert "engine: fast, bf16, 2 layers; for" in capsys.readouterr().err
    np.testing.assert_allclose(losses(fast), losses(plain), rtol=1e-5)  # 1e-7 to 1e-6 measured
    fast.restore_model()
    assert not [m for m in fast.model.modules() if isinstance(vars(m).get("forward"), FastLayer)]


@pytest.mark.parametrize("is_accumulated", [False, True])
def test_rows_of_a_batch_that_lie_in_one_row_give_the_losses_of_padded_ones(
    base, rows, tmp_path, is_accumulated, capsys
):
    padded = trained(base, rows, tmp_path / "padded", EngineConfig(mode=FAST))
    together = trained(base, rows, tmp_path / "together", EngineConfig(mode=FAST), takes_one_row=True)
    assert "rows of a batch lie one after another; padded they would be 36% padding" in capsys.readouterr().err
    batch = next(iter(together.get_train_dataloader()))
    assert len(batch["input_ids"]) == 1 and "attention_mask" not in batch
    for trainer in (padded, together):
        trainer.args.gradient_accumulation_steps = 2 if is_accumulated else 1
    found, wanted = losses(together), losses(padded)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)  # 1e-7 measured
    seen = [[entry["num_tokens"] for entry in one.state.log_history if "loss" in entry] for one in (padded, together)]
    assert seen[0] == seen[1]


def test_rows_are_padded_where_they_would_read_each_other(base, rows, tmp_path, monkeypatch, capsys):
    def leaks(*_):
        raise RunError("packed samples read each other with sdpa", "model.attention=sdpa", "data.batching=padded")

    monkeypatch.setattr(run, "check_isolation", leaks)
    trainer = trained(base, rows, tmp_path / "run", EngineConfig(mode=FAST), takes_one_row=True)
    assert len(next(iter(trainer.get_train_dataloader()))["input_ids"]) == 2
    said = capsys.readouterr().err
    assert "rows are padded, not laid one after another: packed samples read each other with sdpa" in said


def test_experts_of_a_family_that_the_engine_does_not_know_are_sped_up_and_put_back(rows, tmp_path):
    base = build("qwen2_moe", tmp_path / "base")
    trainer = trained(base, rows, tmp_path / "run", EngineConfig(mode=FAST))
    experts = [one for one in trainer.model.modules() if isinstance(one, StackedExperts)]
    assert trainer.engine is None and trainer.args.gradient_checkpointing
    assert experts and all(one.ops is not None for one in experts)
    trainer.restore_model()
    assert all(one.ops is None for one in experts)


def test_the_recipe_says_what_is_computed_again(base, monkeypatch, capsys):
    model = attach_lora(load_base(base, QuantConfig(compute_dtype=ComputeDtype.float32)), TrainRecipe().lora)

    def policies(recompute):
        return layer_policies(model, EngineConfig(mode=FAST, recompute=recompute), 1000)

    assert policies("none") == [0, 0]
    assert policies("all") == [2, 2]
    assert policies("20GB") == [0, 0]
    assert set(policies("0.008GB")) & {1, 2}
    monkeypatch.setattr(module, "free_memory_bytes", lambda: 100e9)
    assert policies("auto") == [0, 0]
    monkeypatch.setattr(module, "free_memory_bytes", lambda: 1e6)
    capsys.readouterr()
    assert policies("auto") == [4, 4]
    assert "warning: layers keep" in capsys.readouterr().err
    assert policies("1MB") == [3, 3]
    made = enabled(model, EngineConfig(mode=FAST), 1000)
    said = capsys.readouterr().err
    assert "recomputed in the backward pass: 2 whole layers, inputs offloaded to the host, MLP in chunks" in said
    made.undo()
    enabled(model, EngineConfig(mode=FAST, recompute="all"), 1000).undo()
    assert "recomputed in the backward pass: 2 whole layers" in capsys.readouterr().err


def test_what_the_host_cannot_hold_is_refused(base, monkeypatch):
    model = attach_lora(load_base(base, QuantConfig(compute_dtype=ComputeDtype.float32)), TrainRecipe().lora)
    config = EngineConfig(mode=FAST, recompute="1MB")
    kept = 2 * 1000 * 2 * model.config.hidden_size  # layers, tokens, bytes of a 16-bit activation
    monkeypatch.setattr(module, "free_host_bytes", lambda: float(kept))
    assert layer_policies(model, config, 1000) == [3, 3]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(RunError) as caught:
        layer_policies(model, config, 1000)
    assert str(caught.value) == (
        f"a step of 1.0 k tokens keeps {human_bytes(2 * kept)} in the host's memory, "
        f"where {human_bytes(kept)} are free\n"
        "  set in   data.max_tokens, trainer.batch_size\n"
        "  do       lower one of them; or engine.recompute=all, if the GPU has room for it"
    )
    assert layer_policies(model, EngineConfig(mode=FAST, recompute="all"), 1000) == [2, 2]


@pytest.mark.slow
def test_weights_are_kept_dequantized_where_memory_is_left(base, monkeypatch, capsys):
    def engine(free, **settings):
        model = attach_lora(load_base(base, QuantConfig(compute_dtype=ComputeDtype.float32)), TrainRecipe().lora)
        monkeypatch.setattr(module, "free_memory_bytes", lambda: free)
        made = enabled(model, EngineConfig(mode=FAST, compute=Compute.fp8_backward, **settings), 100)
        weights = [weight for layer in made.layers for weight in layer.weights]
        assert all(isinstance(weight, Fp8Weight) for weight in weights)
        said = "engine: weights are kept dequantized too" in capsys.readouterr().err
        return said, {vars(weight)["_kept_transposed"] is not None for weight in weights}

    # The GPU's product is emulated: only what is kept matters here.
    monkeypatch.setattr(fast, "weight_for", partial(weight_for, product=emulate))
    assert engine(1e9) == (True, {True})
    assert engine(1e9, cached_weights="none") == (False, {False})
    assert engine(1e9, recompute="all") == (False, {False})
    assert engine(1e9, recompute="all", cached_weights="all") == (True, {True})
    assert engine(1e6) == (False, {False})


@pytest.mark.slow
@pytest.mark.libraries
def test_kept_weights_change_no_number(base, rows, tmp_path):
    losses = []
    for copies in ("none", "all", "0.002GB"):
        trainer = trained(base, rows, tmp_path / copies, EngineConfig(mode=FAST, cached_weights=copies))
        groups = [group for layer in trainer.engine.layers for group in layer.groups]
        copied = [copy_of(group) for group in groups]
        kept = [copy is not None for copy in copied]
        assert all(kept) == (copies == "all") and any(kept) == (copies != "none")
        assert [group.copies_bytes == 0 for group in groups] == kept
        assert sum(copy.nbytes for copy in copied if copy is not None) <= 2e6 or copies == "all"
        run_training(trainer, None)
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses[0]) == 3
    assert losses[0] == losses[1] == losses[2]


@pytest.mark.slow
def test_kept_weights_are_let_go_of_with_the_engine(base):
    model = attach_lora(load_base(base, QuantConfig(compute_dtype=ComputeDtype.float32)), TrainRecipe().lora)
    engine = enabled(model, EngineConfig(mode=FAST, cached_weights="all"), 100)
    kept = [weakref.ref(copy_of(group)) for layer in engine.layers for group in layer.groups]
    engine.undo()
    gc.collect()
    assert kept and [ref() for ref in kept] == [None] * len(kept)


def test_kept_weights_need_no_adapter_in_their_group(base, rows, tmp_path):
    def loss(copies):
        model = attach_lora(load_base(base, QuantConfig(compute_dtype=ComputeDtype.float32)), lora).train()
        engine = enabled(model, EngineConfig(mode=FAST, cached_weights=copies), 100)
        ids = torch.arange(12).view(1, 12)
        found = model(input_ids=ids, labels=ids, use_cache=False).loss
        found.backward()
        kept = [copy_of(group) is not None for layer in engine.layers for group in layer.groups]
        assert kept == [copies == "all"] * (4 * len(engine.layers))
        return found.item(), torch.cat([part.grad.flatten() for part in model.parameters() if part.requires_grad])

    lora = replace(TrainRecipe().lora, targets=["q_proj", "v_proj"])
    torch.manual_seed(0)
    expected = loss("none")
    torch.manual_seed(0)
    found = loss("all")
    assert found[0] == expected[0] and torch.equal(found[1], expected[1])


def test_an_adapter_with_dropout_trains_plain_and_says_so(base, capsys):
    lora = TrainRecipe().lora
    lora.dropout = 0.1
    model = attach_lora(load_base(base, QuantConfig(compute_dtype=ComputeDtype.float32)), lora)
    assert enabled(model, EngineConfig(mode=FAST), 100).layers == []
    assert "2 of 2 layers run plain, because lora.dropout is above 0" in capsys.readouterr().err


def test_loss_accuracy_and_tokens_are_those_of_trl(base, rows, tmp_path):
    trainer = trained(base, rows, tmp_path, EngineConfig())
    trainer.model.train()
    batches = list(trainer.get_train_dataloader())
    items = torch.tensor(17)
    mine = [trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=items) for batch in batches]
    theirs = [
        SFTTrainer.compute_loss(trainer, trainer.model, copy.copy(batch), num_items_in_batch=items) for batch in batches
    ]
    torch.testing.assert_close(torch.stack(mine), torch.stack(theirs))
    expected = trainer._metrics["train"].pop("mean_token_accuracy")
    counted = trainer._total_train_tokens
    trainer._total_train_tokens = 0
    trained_tokens = torch.tensor([(batch["labels"][:, 1:] != -100).sum() for batch in batches])
    trainer.log({})
    logged = trainer.state.log_history[-1]
    assert logged["num_tokens"] == counted == sum(LENGTHS)
    assert logged["mean_token_accuracy"] == pytest.approx(
        float((torch.tensor(expected) * trained_tokens).sum() / trained_tokens.sum())
    )


@pytest.mark.parametrize(
    ("lora", "tensors"),
    [(LoraConfig(), 3), (LoraConfig(r=65), 9), (LoraConfig(targets=["attention"]), 6)],
    ids=["default", "large rank", "attention"],
)
def test_a_model_tells_how_its_layers_are_computed(base, lora, tensors):
    assert step_memory_of(attach_lora(load_base(base, QuantConfig()), lora), 8).extras.beside == tensors


@pytest.mark.parametrize("family", ["gemma4", "qwen3_5", "llama"])
def test_what_layers_keep_is_measured_where_sizes_do_not_tell_it(family, tmp_path):
    folder = build_tiny_model(family, tmp_path / "base", num_hidden_layers=4)
    model = attach_lora(load_base(folder, QuantConfig(compute_dtype=ComputeDtype.float32)), TrainRecipe().lora)
    engine = enable_engine(model, EngineConfig(mode=FAST, recompute="none"), 100)
    memory = step_memory_of(model, 300, engine)
    kept = {}

    def pack(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    ids = torch.arange(300)[None]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = model.train().get_base_model().base_model(input_ids=ids, use_cache=False)
    assert result is not None
    in_16_bit = sum(kept.values()) / 2
    assert (memory.extras.measured > 0) == (family != "llama")
    assert memory.needed([0] * 4) == pytest.approx(in_16_bit, rel=0.1)
    assert memory.needed([1] * 4) < memory.needed([0] * 4)
