"""A budget of bits, on cases done by hand."""

import pytest

from qlora_kit.core.errors import RecipeError
from qlora_kit.export.budget.allocate import Layer, Option, allocate, mean_bits


def layer(name: str, *rises: tuple[float, float], weights: int = 100) -> Layer:
    return Layer((name,), weights, tuple(Option(f"{bits:g}", bits, rise) for bits, rise in rises))


def formats(layers: list[Layer], budget: float) -> list[str]:
    return [option.format for option in allocate(layers, budget)]


TWO = [layer("a", (4, 1.0), (8, 0.1)), layer("b", (4, 10.0), (8, 1.0))]


def test_bits_go_where_the_rise_falls_most() -> None:
    assert formats(TWO, 4) == ["4", "4"]
    assert formats(TWO, 6) == ["4", "8"]
    assert formats(TWO, 8) == ["8", "8"]
    assert mean_bits(TWO, allocate(TWO, 6)) == 6


def test_a_large_layer_pays_for_its_size() -> None:
    layers = [layer("small", (4, 1.0), (8, 0.0)), layer("large", (4, 2.0), (8, 0.0), weights=300)]
    assert formats(layers, 5.5) == ["8", "4"]


def test_the_budget_is_not_crossed_by_a_hair() -> None:
    assert formats(TWO, 5.999) == ["4", "4"]


def test_an_option_above_the_hull_is_passed_by_and_fills_room_at_the_end() -> None:
    # 5 bits gain little for their price, so they are no step on the way; with room for no more they are better than 4
    bent = [layer("a", (4, 10.0), (5, 9.9), (8, 0.0))]
    assert formats(bent, 8) == ["8"]
    assert formats(bent, 7) == ["5"]


def test_a_large_step_behind_a_poor_one_is_seen() -> None:
    # 2.5 a bit from 4 to 8, against 1 a bit; its first bit alone gains 0.1
    layers = [layer("bent", (4, 10.0), (5, 9.9), (8, 0.0)), layer("straight", (4, 4.0), (8, 0.0))]
    assert formats(layers, 6) == ["8", "4"]


def test_more_bits_that_are_worse_are_never_taken() -> None:
    assert formats([layer("grid", (4.5, 0.2), (5, 0.001), (6, 0.3))], 6) == ["5"]


def test_fewest_bits_lose_to_others_of_the_same_size() -> None:
    assert formats([layer("same", (4.5, 0.2), (4.5, 0.1), (6, 0.15))], 6) == ["4.5"]
    assert allocate([layer("same", (4.5, 0.2), (4.5, 0.1))], 4.5)[0].rise == 0.1


@pytest.mark.parametrize(
    ("budget", "what", "fix"),
    [
        (3.5, "bits_budget=3.5 cannot be met: the smallest formats have 4 bits a weight with scales", "bits_budget=4"),
        (9, "bits_budget=9 cannot be spent: the largest formats have 8 bits a weight with scales", "bits_budget=8"),
    ],
)
def test_a_budget_out_of_reach_is_refused(budget: float, what: str, fix: str) -> None:
    with pytest.raises(RecipeError) as caught:
        allocate(TWO, budget)
    (problem,) = caught.value.problems
    assert (problem.what, problem.where, problem.fix) == (what, "bits_budget", fix)


def test_the_budget_that_a_message_names_is_within_reach() -> None:
    uneven = [layer("a", (4.15625, 1.0), (8.1875, 0.1))]
    for budget, fix in ((4.0, "bits_budget=4.16"), (8.5, "bits_budget=8.18")):
        with pytest.raises(RecipeError) as caught:
            allocate(uneven, budget)
        assert caught.value.problems[0].fix == fix
        allocate(uneven, float(fix.partition("=")[2]))
