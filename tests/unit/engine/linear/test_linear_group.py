"""Grouped LoRA products equal peft's modules and torch's gradients."""

from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model

from qlora_kit.engine.linear.adapted_linear import adapted_linear
from qlora_kit.engine.linear.frozen_weight import Bf16Weight, NotFastError
from qlora_kit.engine.linear.linear_group import Gradients, LinearGroup

NAMES = ("one", "two", "three")
WIDTHS = {"one": 24, "two": 40, "three": 8}
CLOSE = 2e-6  # of the largest entry; measured: 4e-7


class Three(torch.nn.Module):
    """Three linear modules with one input of 32; only the first has a bias."""

    def __init__(self):
        super().__init__()
        for name in NAMES:
            setattr(self, name, torch.nn.Linear(32, WIDTHS[name], bias=name == "one"))

    def forward(self, x):
        return [getattr(self, name)(x) for name in NAMES]


def adapted(**settings):
    torch.manual_seed(0)
    settings = {"r": 4, "lora_alpha": 12, "target_modules": list(NAMES), "init_lora_weights": False, **settings}
    return get_peft_model(Three(), LoraConfig(**settings)).base_model.model.train()


def make(name, linear):
    return Bf16Weight(linear, torch.float32)


def make_bf16(name, linear):
    return Bf16Weight(linear, torch.bfloat16)


def group_of(model):
    return LinearGroup([adapted_linear(name, getattr(model, name), make) for name in NAMES])


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def drawn_gradients():
    return Gradients(drawn(11, sum(WIDTHS.values())))


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=CLOSE * float(expected.abs().max()))


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_rslora": True}, {"rank_pattern": {"two": 7}}, {"target_modules": ["one", "three"]}],
    ids=["plain", "rslora", "ranks differ", "two of three"],
)
@pytest.mark.parametrize("are_joined", [True, False], ids=["concatenated", "apart"])
def test_outputs_and_gradients_equal_pefts(settings, are_joined):
    model = adapted(**settings)
    x = drawn(11, 32).requires_grad_()
    grads = [drawn(11, WIDTHS[name]) for name in NAMES]
    expected = model(x)
    torch.autograd.backward(expected, grads)
    group = group_of(model)
    outputs, xa = group.forward(x.detach())
    gradients = group.gradient_buffers(x) if are_joined else Gradients(torch.empty(11, sum(WIDTHS.values())))
    gradients.outputs.copy_(torch.cat(grads, dim=1))
    dx, trained = group.backward(x.detach(), gradients, xa)

    for found, wanted in zip(outputs, expected, strict=True):
        close(found, wanted.detach())
    close(dx, x.grad)
    parameters = group.parameters()
    assert len(parameters) == len(trained) == sum(part.requires_grad for part in model.parameters())
    for found, parameter in zip(trained, parameters, strict=True):
        close(found, parameter.grad)


@pytest.fixture
def unwritten_is_nan():
    """Memory that is only reserved holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def test_nothing_is_read_that_was_not_written(unwritten_is_nan):
    """Kernels of some CPUs read beyond the last column, and multiply by zero what lies there."""
    group = LinearGroup([adapted_linear(name, getattr(adapted().bfloat16(), name), make_bf16) for name in NAMES])
    x = drawn(11, 32).bfloat16()
    gradients = group.gradient_buffers(x)
    assert gradients.with_xa is not None
    line = gradients.with_xa.stride(0)
    assert gradients.with_xa.as_strided((11, line), (line, 1)).isfinite().all()
    gradients.outputs.copy_(drawn(11, sum(WIDTHS.values())))
    assert group.backward_input(gradients, group.backward_xa(gradients)).isfinite().all()


def test_one_thin_product_serves_all_modules_and_can_be_handed_in_again():
    group = group_of(adapted(rank_pattern={"two": 7}))
    x = drawn(11, 32)
    outputs, xa = group.forward(x)
    assert xa.shape == (11, 4 + 7 + 4)
    again, _ = group.forward(x, 2 * xa)
    plain = [linear.weight.forward(x) + (0 if linear.bias is None else linear.bias) for linear in group.linears]
    for once, twice, base in zip(outputs, again, plain, strict=True):
        close(twice - base, 2 * (once - base))


def test_without_an_adapter_nothing_is_trained():
    model = Three().requires_grad_(False)
    group, x = group_of(model), drawn(11, 32)
    outputs, xa = group.forward(x)
    dx, trained = group.backward(x, drawn_gradients(), xa)
    assert xa is None and trained == [] and dx is not None and dx.shape == x.shape
    close(outputs[0], model.get_submodule("one")(x))


def test_an_input_that_needs_no_gradient_costs_no_frozen_product(monkeypatch):
    group, x = group_of(adapted()), drawn(11, 32)
    _, xa = group.forward(x)
    gradients = drawn_gradients()
    _, expected = group.backward(x, gradients, xa)
    monkeypatch.setattr(Bf16Weight, "matrix", lambda self: pytest.fail("a frozen weight was multiplied"))
    dx, trained = group.backward(x, gradients, xa, needs_input=False)
    assert dx is None
    assert all(torch.equal(found, wanted) for found, wanted in zip(trained, expected, strict=True))


def test_16_bit_products_give_fp32_gradients():
    group = LinearGroup([adapted_linear("one", adapted().one, lambda _, linear: Bf16Weight(linear, torch.bfloat16))])
    x, grad = drawn(64, 32).bfloat16(), drawn(64, 24).bfloat16()
    (y,), xa = group.forward(x)
    dx, trained = group.backward(x, Gradients(grad), xa)
    assert dx is not None and xa is not None
    assert y.dtype is dx.dtype is xa.dtype is torch.bfloat16
    assert [part.dtype for part in trained] == [torch.float32] * 2


def test_gradients_are_written_where_they_are_wanted():
    group, x, grads = group_of(adapted()), drawn(11, 32), drawn_gradients()
    _, xa = group.forward(x)
    _, expected = group.backward(x, grads, xa)
    group.grad_targets = [torch.full_like(part, 7.0) for part in expected]
    _, found = group.backward(x, grads, xa)
    assert [part.data_ptr() for part in found] == [place.data_ptr() for place in group.grad_targets]
    assert all(torch.equal(part, wanted) for part, wanted in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"lora_dropout": 0.1}, "lora.dropout is above 0"),
        ({"use_dora": True}, "Dora is not plain LoRA"),
        ({"lora_bias": True}, "lora_bias trains a bias"),
    ],
)
def test_other_kinds_of_adapters_are_refused(settings, reason):
    with pytest.raises(NotFastError, match=reason):
        group_of(adapted(**settings))


def test_several_active_and_merged_adapters_are_refused():
    model = get_peft_model(Three(), LoraConfig(r=2, target_modules=list(NAMES)))
    read = partial(adapted_linear, "one", model.base_model.model.one, make)
    linear = read()
    assert linear.is_as_made()
    with model.disable_adapter():
        assert not linear.is_as_made()
        with pytest.raises(NotFastError, match="merged or switched off"):
            read()
    model.add_adapter("other", LoraConfig(r=2, target_modules=list(NAMES)))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(NotFastError, match="more than one adapter"):
        read()
    model.set_adapter("default")
    model.merge_adapter()
    assert not linear.is_as_made()
    with pytest.raises(NotFastError, match="merged or switched off"):
        read()
