"""What an error came of."""

import pytest

from qlora_kit.core.errors import chain


def raised(*errors):
    """The last of some errors, each raised from the one before."""
    before = None
    for error in errors:
        try:
            raise error from before
        except Exception as caught:
            before = caught
    return before


def test_an_error_and_what_it_came_of():
    first, last = ValueError("a"), KeyError("b")
    assert list(chain(raised(first, last))) == [last, first]


@pytest.mark.timeout(10)
def test_an_error_that_was_raised_from_itself_comes_once():
    first, last = ValueError("a"), KeyError("b")
    assert list(chain(raised(first, first))) == [first]
    assert list(chain(raised(first, last, first))) == [first, last]
