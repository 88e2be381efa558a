"""Numbers as people read them."""

import pytest

from qlora_kit.core.units import counted


@pytest.mark.parametrize(
    ("count", "words", "text"),
    [
        (0, ("row",), "0 rows"),
        (1, ("row",), "1 row"),
        (1200, ("row",), "1,200 rows"),
        (1, ("copy", "copies"), "1 copy"),
        (2, ("row begins", "rows begin"), "2 rows begin"),
    ],
)
def test_a_count_has_the_words_that_fit_it(count, words, text):
    assert counted(count, *words) == text
