"""One buffer, the numbers of bitsandbytes tensor by tensor."""

import copy
import io

import bitsandbytes
import pytest
import torch
from bitsandbytes.optim import GlobalOptimManager

import qlora_kit.training.optimizers.flat as module
from qlora_kit.core.errors import RunError
from qlora_kit.training.optimizers.flat import FlatOptimizer, flat
from tests.trained_weights import (
    OPTIMIZERS,
    SHAPES,
    Weights,
    addresses,
    assert_equal,
    flat_pair,
    give,
    gradients,
    groups,
    of_gradients,
    train,
)

pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("by_model", [False, True], ids=["views", "foreign gradients"])
def test_weights_equal_those_of_bitsandbytes_bit_for_bit(kind, by_model):
    expected = Weights()
    plain = OPTIMIZERS[kind](groups(expected), lr=1e-2)
    train(expected, plain, range(20), plain.zero_grad)

    found, optimizer = flat_pair(kind)
    train(found, optimizer, range(20), found.zero_grad if by_model else optimizer.zero_grad)

    assert isinstance(optimizer, FlatOptimizer)
    assert_equal(found, expected)
    assert not torch.equal(found.get_parameter("a"), Weights().get_parameter("a"))


def test_weights_are_views_of_one_buffer_at_whole_blocks():
    weights, _ = flat_pair(shapes={name: shape for name, shape in SHAPES.items() if name in ("a", "b", "odd", "c")})
    starts = [parameter.storage_offset() for parameter in weights.parameters()]
    assert starts == [0, 4096, 4096 + 6144, 4096 + 6144 + 5120]  # odd has 5,063 weights: 20 blocks of 256
    assert len({parameter.untyped_storage().data_ptr() for parameter in weights.parameters()}) == 1


def test_one_call_updates_all_tensors_of_a_kind(monkeypatch):
    calls = []
    update = bitsandbytes.functional.optimizer_update_8bit_blockwise
    monkeypatch.setattr(
        bitsandbytes.functional,
        "optimizer_update_8bit_blockwise",
        lambda *args, **rest: calls.append(args[1].numel()) or update(*args, **rest),
    )
    weights, optimizer = flat_pair()
    train(weights, optimizer, range(1), optimizer.zero_grad)
    assert calls == [4096 + 6144 + 5120 + 5120]


def test_zero_grad_keeps_the_views():
    weights, optimizer = flat_pair()
    before = addresses(weights)
    give(weights, 0)
    assert weights.a.grad.abs().sum() > 0
    optimizer.zero_grad(set_to_none=True)
    assert addresses(weights) == before
    assert all(not gradient.any() for gradient in of_gradients(weights).values())

    weights.zero_grad()
    assert weights.a.grad is None
    optimizer.zero_grad()
    assert addresses(weights)["a"] == before["a"]


def test_gradients_are_laid_in_rows_again_after_the_model_dropped_them():
    weights, optimizer = flat_pair()
    before = addresses(weights)
    give(weights, 0)
    optimizer.lay_gradients()  # of a step that goes on, none is lost
    assert weights.a.grad.abs().sum() > 0
    weights.zero_grad()
    optimizer.lay_gradients()
    assert addresses(weights) == before
    assert all(not gradient.any() for gradient in of_gradients(weights).values())


def test_gradients_from_before_are_kept():
    weights = Weights()
    give(weights, 0)
    optimizer = flat(OPTIMIZERS["AdamW8bit"](groups(weights)), weights)
    assert isinstance(optimizer, FlatOptimizer)
    assert all(torch.equal(gradient, gradients(0)[name]) for name, gradient in of_gradients(weights).items())


def test_clipping_reaches_the_step():
    """Clipped to a norm so small that Lion, which follows signs, would hide it; AdamW's first moment does not."""
    weights, optimizer = flat_pair("PagedAdamW32bit")
    optimizer.zero_grad()
    give(weights, 0)
    norm = torch.nn.utils.clip_grad_norm_(weights.parameters(), 1e-3)
    optimizer.step()
    first = optimizer.state_dict()["state"][0]["state1"][:4096].view(16, 256)
    expected = gradients(0)["a"] * (1e-3 / (norm + 1e-6)) * 0.1  # 1 - beta1
    torch.testing.assert_close(first, expected, rtol=1e-5, atol=0)


def test_a_tensor_without_a_gradient_counts_as_zero_and_none_at_all_is_no_step():
    weights, optimizer = flat_pair()
    weights.zero_grad()
    before = copy.deepcopy(weights)
    optimizer.step()
    assert_equal(weights, before)

    optimizer.zero_grad()
    give(weights, 0)  # into the row, where b's gradient stays behind
    weights.b.grad = None
    optimizer.step()
    torch.testing.assert_close(weights.b, before.b * (1 - 1e-2 * 0.1))  # decay alone
    assert not torch.equal(weights.a, before.a)


def test_weights_replaced_from_outside_are_taken_in_again():
    weights, optimizer = flat_pair()
    weights.a.data = torch.full((16, 256), 3.0)
    weights.zero_grad()
    give(weights, 0)
    optimizer.step()
    torch.testing.assert_close(weights.a, torch.full((16, 256), 3.0), rtol=0, atol=0.02)
    assert weights.a.untyped_storage().data_ptr() == weights.b.untyped_storage().data_ptr()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_resume_is_exact(kind):
    straight, optimizer = flat_pair(kind)
    train(straight, optimizer, range(7), straight.zero_grad)
    file = io.BytesIO()
    torch.save({"weights": straight.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(straight, optimizer, range(7, 20), straight.zero_grad)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed, again = flat_pair(kind)
    resumed.load_state_dict(saved["weights"])
    again.load_state_dict(saved["optimizer"])
    assert again.param_groups[0]["lr"] == pytest.approx(1e-2 / 7)
    train(resumed, again, range(7, 20), resumed.zero_grad)
    assert_equal(resumed, straight)


def test_a_state_before_the_first_step_loads():
    _, optimizer = flat_pair()
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.state_dict()["state"] == [{}, {}, {}]


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (SHAPES | {"b": (64, 96)}, "has b 96x64 in 8 bits where this run has b 64x96 in 8 bits"),
        ({"a": (16, 256), "b": (96, 64)}, "has odd 83x61 in 8 bits|only the checkpoint's optimizer has odd 83x61"),
        (SHAPES | {"z": (300,)}, "this run has z 300 in 32 bits|where this run has z 300"),
    ],
)
def test_a_checkpoint_of_other_tensors_is_refused_by_name(shapes, message):
    _, optimizer = flat_pair()
    _, other = flat_pair(shapes=shapes)
    with pytest.raises(RunError, match=message):
        other.load_state_dict(optimizer.state_dict())


def test_a_checkpoint_of_an_optimizer_that_was_not_flat_is_refused():
    _, optimizer = flat_pair()
    with pytest.raises(RunError, match="was not flat"):
        optimizer.load_state_dict(OPTIMIZERS["AdamW8bit"](groups(Weights())).state_dict())


def test_an_embedding_that_transformers_keeps_in_32_bits_stays_so():
    model = torch.nn.Sequential(torch.nn.Embedding(64, 128), torch.nn.Linear(128, 64, bias=False))
    manager = GlobalOptimManager.get_instance()
    manager.register_module_override(model[0], "weight", {"optim_bits": 32})
    try:
        optimizer = flat(OPTIMIZERS["AdamW8bit"](model.parameters()), model)
    finally:
        manager.module_weight_config_triple.pop()
    layout = {buffer["names"][0]: buffer["bits"] for buffer in optimizer.state_dict()["layout"]}
    assert layout == {"0.weight": 32, "1.weight": 8}


def test_a_large_tensor_keeps_its_own_memory(monkeypatch):
    monkeypatch.setattr(module, "LONE", 6000)
    expected = Weights()
    plain = OPTIMIZERS["AdamW8bit"](groups(expected), lr=1e-2)
    train(expected, plain, range(5), plain.zero_grad)

    found = Weights()
    where = found.get_parameter("b").data_ptr()
    optimizer = flat(OPTIMIZERS["AdamW8bit"](groups(found), lr=1e-2), found)
    train(found, optimizer, range(5), optimizer.zero_grad)
    assert found.get_parameter("b").data_ptr() == where
    assert_equal(found, expected)


def test_a_full_buffer_is_followed_by_another(monkeypatch):
    monkeypatch.setattr(module, "LIMIT", 12000)
    expected = Weights()
    plain = OPTIMIZERS["AdamW8bit"](groups(expected), lr=1e-2)
    train(expected, plain, range(5), plain.zero_grad)
    found, optimizer = flat_pair()
    train(found, optimizer, range(5), optimizer.zero_grad)
    assert [buffer["names"] for buffer in optimizer.state_dict()["layout"]] == [
        ["a", "b"],
        ["odd", "c"],
        ["small"],
        ["norm"],
    ]
    assert_equal(found, expected)


def test_plain_adamw_is_left_alone():
    weights = Weights()
    optimizer = torch.optim.AdamW(weights.parameters())
    assert flat(optimizer, weights) is optimizer
    _, once = flat_pair()
    assert flat(once, weights) is once


def test_what_would_lose_state_or_train_nothing_is_refused():
    weights, optimizer = flat_pair()
    with pytest.raises(ValueError, match="no group can be added"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(3))]})
    stepped = OPTIMIZERS["AdamW8bit"](Weights().parameters())
    with pytest.raises(ValueError, match="no name"):
        FlatOptimizer(stepped, weights.named_parameters())
    for parameter in stepped.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    stepped.step()
    with pytest.raises(ValueError, match="has stepped"):
        FlatOptimizer(stepped, weights.named_parameters())


@pytest.mark.parametrize("kind", ["PagedAdEMAMix8bit", "LAMB8bit"])
def test_what_looks_at_whole_tensors_stays_as_it_is(kind):
    weights = Weights()
    optimizer = getattr(bitsandbytes.optim, kind)(weights.parameters(), lr=1e-2)
    assert flat(optimizer, weights) is optimizer
