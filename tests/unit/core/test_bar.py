"""A bar on a terminal, a line now and then elsewhere, nothing where nothing is to be shown."""

import time

import pytest

from qlora_kit.core.console.bar import BYTES, bar, each
from qlora_kit.core.console.lines import TERMINAL, log
from qlora_kit.core.console.session import session

EVIL = "\x1b]0;owned\x07"


@pytest.fixture
def clock(monkeypatch):
    """Time that passes as the test says."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def sleep(seconds):
        now[0] += seconds

    return sleep


@pytest.fixture
def as_terminal(monkeypatch):
    """Makes standard error a terminal; called in the test, for which pytest exchanges it once more."""

    def make():
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", "60")
        monkeypatch.setattr("sys.stderr.isatty", lambda: True)

    return make


def test_in_a_file_there_is_a_line_every_half_minute(clock, capsys):
    with bar("AWQ", 32, "layer", done=2) as one:
        for _ in range(10):
            clock(4)
            one.advance()
        one.note = "loss 2.1"
        clock(22)
        one.advance()
    assert capsys.readouterr() == (
        "",
        "AWQ: 10 of 32 layers, 1 min 28 s left\nAWQ: 13 of 32 layers, 1 min 47 s left, loss 2.1\n",
    )


@pytest.mark.parametrize(
    ("total", "unit", "state"),
    [
        (None, "row", "1,500 rows"),
        (4_000_000, "weight", "1.5 k of 4.0 M weights, 44 min 26 s left"),
        (3000, BYTES, "1.5 kB of 3.0 kB, 1.0 s left"),
        (None, BYTES, "1.5 kB"),
    ],
)
def test_amounts_are_in_units_that_people_read(clock, total, unit, state):
    with bar("a", total, unit) as one:
        clock(1)
        one.advance(1500)
        assert one.state == state


def test_a_terminal_has_a_bar_whose_texts_cannot_act_and_lines_above_it_that_are_whole(as_terminal, clock, capsys):
    as_terminal()
    line = "fix qlora-kit train " + " ".join(f"lora.r={number}" for number in range(20))
    for _ in each(range(3), f"[bold]x{EVIL}", "layer"):
        clock(1)
        log.info(line)
    shown = capsys.readouterr().err
    assert shown.count(line) == 3
    assert "[bold]x␛]0;" in shown and "\x1b]0;" not in shown
    assert "3 of 3 layers" in shown
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")  # the cursor is shown again


def test_one_bar_of_a_part_stands_below_that_of_the_whole(as_terminal, clock, capsys):
    as_terminal()
    for _ in each(range(2), "whole", "layer"):
        clock(1)
        for _ in each(range(2), "part", "row"):
            clock(1)
    last = capsys.readouterr().err.rpartition("\x1b[?25h")[0].rpartition("\x1b[2K")[2]
    assert "whole" in last and "part" not in last


def test_what_is_over_soon_has_no_bar(as_terminal, clock, capsys):
    as_terminal()
    with bar("tokenize", 3, "row", after=2) as one:
        clock(1)
        one.advance(3)
    assert capsys.readouterr().err == ""


def test_a_quiet_command_draws_none(as_terminal, clock, capsys):
    as_terminal()
    with session(quiet=True):
        for _ in each(range(3), "AWQ", "layer"):
            clock(40)
    assert capsys.readouterr().err == ""


def test_a_command_that_failed_leaves_no_bar_behind(as_terminal, clock, capsys):
    as_terminal()
    with session():
        one = bar("AWQ", 3, "layer").__enter__()
        clock(1)
        one.advance()
        assert TERMINAL.above_bar is not None
    assert TERMINAL.above_bar is None
    assert capsys.readouterr().err.endswith("\x1b[?25h")  # type: ignore[unreachable]  # mypy keeps what held before
