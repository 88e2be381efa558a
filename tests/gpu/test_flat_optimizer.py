"""On a GPU, where bitsandbytes pages and launches: the same numbers, at a fraction of the time."""

import io
import statistics
import time

import bitsandbytes
import pytest
import torch

from qlora_kit.training.optimizers.flat import FlatOptimizer, flat

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

RANK = 16
# Llama-3.1-8B: in and out of q, k, v, o, gate, up, down
LINEARS = ((4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096), (4096, 14336), (4096, 14336), (14336, 4096))
SMALL = [(16, 4096), (1024, 16), (16, 100), (83, 61), (14336, 16), (16, 14336)]


class Weights(torch.nn.Module):
    """Trained tensors of given shapes, the same at every call."""

    def __init__(self, shapes):
        super().__init__()
        draw = torch.Generator("cuda").manual_seed(1)
        drawn = [torch.randn(shape, generator=draw, device="cuda") for shape in shapes]
        self.tensors = torch.nn.ParameterList(map(torch.nn.Parameter, drawn))


def train(weights, optimizer, steps):
    for step in steps:
        weights.zero_grad()
        draw = torch.Generator("cuda").manual_seed(100 + step)
        for parameter in weights.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=draw, device="cuda") * 0.1
        optimizer.step()


def made(kind, shapes, is_flat=True):
    weights = Weights(shapes)
    optimizer = getattr(bitsandbytes.optim, kind)(weights.parameters(), lr=1e-2, weight_decay=0.1)
    return weights, flat(optimizer, weights) if is_flat else optimizer


def assert_equal(found, expected):
    for parameter, other in zip(found.parameters(), expected.parameters(), strict=True):
        assert torch.equal(parameter, other), tuple(parameter.shape)


@pytest.mark.parametrize("kind", ["PagedAdamW8bit", "AdamW8bit", "PagedAdamW32bit", "PagedLion8bit"])
def test_weights_equal_those_of_bitsandbytes(kind):
    expected, plain = made(kind, SMALL, is_flat=False)
    found, optimizer = made(kind, SMALL)
    assert isinstance(optimizer, FlatOptimizer)
    train(expected, plain, range(20))
    train(found, optimizer, range(20))
    assert_equal(found, expected)


@pytest.mark.parametrize("kind", ["PagedAdamW8bit", "PagedAdamW32bit"])
def test_resume_is_exact_and_stays_paged(kind):
    straight, optimizer = made(kind, SMALL)
    train(straight, optimizer, range(5))
    file = io.BytesIO()
    torch.save({"weights": straight.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(straight, optimizer, range(5, 10))

    file.seek(0)
    saved = torch.load(file, weights_only=True, map_location="cuda")
    resumed, again = made(kind, SMALL)
    resumed.load_state_dict(saved["weights"])
    again.load_state_dict(saved["optimizer"])
    assert getattr(again.state_dict()["state"][0]["state1"], "is_paged", False)
    train(resumed, again, range(5, 10))
    assert_equal(resumed, straight)


def median_ms(weights, optimizer):
    times = []
    for step in range(8):
        train(weights, optimizer, [step])
        torch.cuda.synchronize()
        began = time.perf_counter()
        optimizer.step()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - began) * 1000)
    return statistics.median(times[3:])


def test_a_step_of_an_8b_models_adapter_takes_under_5_ms():
    """Gradients are foreign, as after `model.zero_grad()`; their copy is inside the time."""
    shapes = [shape for a, b in LINEARS * 32 for shape in ((RANK, a), (b, RANK))]
    assert len(shapes) == 448
    plain = median_ms(*made("PagedAdamW8bit", shapes, is_flat=False))
    torch.cuda.empty_cache()
    one = median_ms(*made("PagedAdamW8bit", shapes))
    print(f"PagedAdamW8bit, 448 tensors: {plain:.2f} ms tensor by tensor, {one:.2f} ms flat")
    assert one < 5
