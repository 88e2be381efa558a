"""A card is named by its size or by its name, as it is sold or as people write it."""

import pytest

from qlora_kit.core.errors import RecipeError
from qlora_kit.memory.card import CARDS, CONTEXT_BYTES, card_of


@pytest.mark.parametrize(
    ("text", "gigabytes"),
    [
        ("24GB", 24),
        ("24", 24),
        ("7.6 GiB", 7.6),
        ("rtx_4090", 24),
        ("RTX 4090", 24),
        ("NVIDIA GeForce RTX 4060 Ti", 16),
        ("A100-80GB", 80),
        ("h200", 141),
    ],
)
def test_a_card_is_found_by_what_people_call_it(text, gigabytes):
    card = card_of(text)
    assert card.gigabytes == gigabytes
    assert card.free_bytes == gigabytes * 1e9 - CONTEXT_BYTES


@pytest.mark.parametrize("text", ["", "0", "0.4GB", "big", "24TB", "-24GB", "rtx_9999"])
def test_what_is_no_card_is_refused_with_those_that_there_are(text):
    with pytest.raises(RecipeError) as error:
        card_of(text)
    (problem,) = error.value.problems
    assert problem.fix == "card=24GB" and all(name in problem.what for name in CARDS)


@pytest.mark.parametrize(
    ("text", "meant"),
    [("4090", "rtx_4090"), ("3090", "rtx_3090"), ("rtx4091", "rtx_4090"), ("rtx_4091", "rtx_4090"), ("h10", "h100")],
)
def test_a_name_that_is_almost_one_is_asked_for(text, meant):
    with pytest.raises(RecipeError, match=f"card={meant}$"):
        card_of(text)


def test_no_card_has_thousands_of_gigabytes():
    with pytest.raises(RecipeError, match=r"card=24GB$"):
        card_of("2000GB")
