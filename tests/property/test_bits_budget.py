"""A budget of bits against every possible choice, on small random cases."""

import random
from itertools import product

import pytest

from qlora_kit.export.budget.allocate import Layer, Option, allocate, mean_bits


def random_layers(draw: random.Random) -> list[Layer]:
    layers = []
    for number in range(draw.randint(1, 5)):
        bits = sorted(draw.sample(range(2, 17), draw.randint(1, 4)))
        # Mostly falling, as rounding errors are; at times not, as on weights that lie on a grid.
        options = tuple(Option(f"{b}", b / 2, draw.random() * 4.0 ** -(b / 2) * draw.choice([1, 1, 30])) for b in bits)
        layers.append(Layer((f"layer{number}",), draw.choice([1, 4, 16, 64]), options))
    return layers


def rise(chosen: tuple[Option, ...] | list[Option]) -> float:
    return sum(option.rise for option in chosen)


@pytest.mark.parametrize("seed", range(300))
def test_an_allocation_is_within_one_step_of_the_best(seed: int) -> None:
    draw = random.Random(seed)
    layers = random_layers(draw)
    total = sum(layer.weights for layer in layers)
    low, high = (
        sum(layer.weights * end(option.bits for option in layer.options) for layer in layers) / total
        for end in (min, max)
    )
    budget = draw.uniform(low, high)
    chosen = allocate(layers, budget)
    assert mean_bits(layers, chosen) <= budget + 1e-6
    assert all(option in layer.options for layer, option in zip(layers, chosen, strict=True))
    every = product(*(layer.options for layer in layers))
    best = min(rise(choice) for choice in every if mean_bits(layers, choice) <= budget)
    largest_step = max(
        max(option.rise for option in layer.options) - min(option.rise for option in layer.options) for layer in layers
    )
    assert best - 1e-12 <= rise(chosen) <= best + largest_step + 1e-12


@pytest.mark.parametrize("seed", range(100))
def test_where_every_step_fits_the_allocation_is_the_best(seed: int) -> None:
    """Equal sizes, whole bits, a budget of whole bits, each bit worth less than the last: nothing is left over."""
    draw = random.Random(seed)
    layers = []
    for number in range(draw.randint(2, 5)):
        scale = draw.random()
        options = tuple(Option(f"{b}", float(b), scale * 4.0**-b) for b in (2, 3, 4, 5))
        layers.append(Layer((f"layer{number}",), 8, options))
    budget = draw.randint(2 * len(layers), 5 * len(layers)) / len(layers)
    every = product(*(layer.options for layer in layers))
    best = min(rise(choice) for choice in every if mean_bits(layers, choice) <= budget + 1e-9)
    assert rise(allocate(layers, budget)) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("seed", range(50))
def test_nothing_that_still_fits_is_left(seed: int) -> None:
    draw = random.Random(seed)
    layers = random_layers(draw)
    budget = sum(layer.weights * layer.options[-1].bits for layer in layers) / sum(layer.weights for layer in layers)
    chosen = allocate(layers, budget)
    for index, layer in enumerate(layers):
        for option in layer.options:
            other = [*chosen[:index], option, *chosen[index + 1 :]]
            assert mean_bits(layers, other) > budget or rise(other) >= rise(chosen)
