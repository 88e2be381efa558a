"""Small trained tensors of awkward sizes, and a loop that gives them the same gradients at every call."""

import bitsandbytes
import torch

from qlora_kit.training.optimizers.flat import flat

# Multiples of 256 from 4,096 weights on; one that ends inside a block; two that bitsandbytes holds in 32 bits.
SHAPES = {"a": (16, 256), "b": (96, 64), "odd": (83, 61), "small": (7, 9), "c": (5, 1024), "norm": (300,)}
OPTIMIZERS = {
    "AdamW8bit": bitsandbytes.optim.AdamW8bit,
    "PagedAdamW8bit": bitsandbytes.optim.PagedAdamW8bit,
    "PagedAdamW32bit": bitsandbytes.optim.PagedAdamW32bit,
    "PagedLion8bit": bitsandbytes.optim.PagedLion8bit,
}


class Weights(torch.nn.Module):
    """Tensors of the shapes above, the same at every call."""

    def __init__(self, shapes=SHAPES):
        super().__init__()
        draw = torch.Generator().manual_seed(1)
        for name, shape in shapes.items():
            self.register_parameter(name, torch.nn.Parameter(torch.randn(shape, generator=draw)))


def of_gradients(weights: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The gradient of every weight, each of which has one."""
    found = {name: parameter.grad for name, parameter in weights.named_parameters()}
    assert all(gradient is not None for gradient in found.values())
    return {name: gradient for name, gradient in found.items() if gradient is not None}


def addresses(weights: torch.nn.Module) -> dict[str, int]:
    """Where the gradient of every weight lies."""
    return {name: gradient.data_ptr() for name, gradient in of_gradients(weights).items()}


def groups(weights):
    """Two groups, as transformers makes them: norms do not decay."""
    named = dict(weights.named_parameters())
    decayed = [parameter for name, parameter in named.items() if name != "norm"]
    still = [named["norm"]] if "norm" in named else []
    return [{"params": decayed, "weight_decay": 0.1}, {"params": still, "weight_decay": 0.0}]


def flat_pair(kind="AdamW8bit", shapes=SHAPES):
    weights = Weights(shapes)
    return weights, flat(OPTIMIZERS[kind](groups(weights), lr=1e-2), weights)


def gradients(step):
    draw = torch.Generator().manual_seed(100 + step)
    return {name: torch.randn(shape, generator=draw) * 0.1 for name, shape in SHAPES.items()}


def give(weights, step):
    """Gradients through autograd, so that they are added to what is there or made anew."""
    found = gradients(step)
    sum((parameter * found[name]).sum() for name, parameter in weights.named_parameters()).backward()


def train(weights, optimizer, steps, zero):
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (1 + step)
        zero()
        give(weights, step)
        optimizer.step()


def assert_equal(found, expected):
    for (name, weight), other in zip(found.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(weight, other), name
