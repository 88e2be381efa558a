"""Notices of libraries are left out, their errors are not."""

import logging
import sys

import pytest

from qlora_kit.core.quiet import NOISY_LOGGERS, no_banners, quiet_loggers


@pytest.fixture
def levels():
    """The levels of those loggers, put back afterwards."""
    before = {name: logging.getLogger(name).level for name in NOISY_LOGGERS}
    for name in NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.NOTSET)
    yield
    for name, level in before.items():
        logging.getLogger(name).setLevel(level)


@pytest.mark.parametrize("name", [*NOISY_LOGGERS, "torchao.quantization.linear"])
def test_warnings_of_noisy_loggers_and_of_those_below_are_left_out(levels, caplog, name):
    logging.getLogger(name).warning("before")
    quiet_loggers()
    logging.getLogger(name).warning("a notice")
    logging.getLogger(name).error("an error")
    logging.getLogger("bitsandbytes").warning("of another")
    assert [record.getMessage() for record in caplog.records] == ["before", "an error", "of another"]


def test_what_a_library_prints_is_left_out_until_the_block_ends(capsys):
    with pytest.raises(ValueError, match="of the library"), no_banners():
        print("a banner")
        print("told", file=sys.stderr)
        raise ValueError("of the library")
    print("a result")
    assert capsys.readouterr() == ("a result\n", "told\n")
