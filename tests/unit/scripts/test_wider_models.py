"""What the benchmark of wider models counts: choices of experts that flip, noise like that of bf16, values of Q8_0."""

import importlib
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from qlora_kit.data.tokens import TokenRow

BENCH = Path(__file__).parents[3] / "scripts" / "bench"
ROW = TokenRow((1, 2, 3), (False, True, True), "row", 1)


@pytest.fixture
def measure(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("wider_measure")


def said(measure: Any, experts: list[list[int]], shares: list[list[float]], shift: float = 0.0) -> Any:
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0 + shift]] * 2)
    return measure.Said([logits.log_softmax(-1)], [[(torch.tensor(experts), torch.tensor(shares))]])


def test_choices_that_flip_and_shares_that_jump_are_counted(measure: Any) -> None:
    trained = said(measure, [[0, 1], [2, 3]], [[0.5, 0.5], [0.6, 0.4]])
    assert measure.distance([ROW], trained, trained).mean_kl == 0.0
    other = said(measure, [[1, 3], [3, 2]], [[0.5, 0.5], [0.1, 0.9]], shift=0.1)
    found = measure.distance([ROW], trained, other)
    assert (found.flipped, found.jumped, found.choices) == (1, 2, 4)  # the order of the choices is no flip
    assert 0 < found.mean_kl <= found.max_kl


def test_noise_is_as_large_as_the_rounding_and_spares_what_bf16_holds(measure: Any) -> None:
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(1))
    noise, rounding = measure.near_bf16(weight, 0) - weight, weight.bfloat16().float() - weight
    assert 0.95 < float(noise.norm() / rounding.norm()) < 1.05
    assert abs(float((noise * rounding).sum() / noise.norm() / rounding.norm())) < 0.05
    held = weight.bfloat16().float()
    assert torch.equal(measure.near_bf16(held, 0), held)


def test_q8_0_is_that_of_gguf(measure: Any) -> None:
    values = torch.randn(4, 64, generator=torch.Generator().manual_seed(2))
    kind = gguf.GGMLQuantizationType.Q8_0
    expected = gguf.quants.dequantize(gguf.quants.quantize(values.numpy(), kind), kind)
    torch.testing.assert_close(measure.q8_0(values), torch.from_numpy(expected), rtol=0, atol=1e-6)
    assert torch.equal(measure.q8_0(values[:, :30]), values[:, :30])
