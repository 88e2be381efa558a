"""What a command shows, what its log has, and that neither can act on a terminal."""

import re

import pytest

from qlora_kit.core.console.lines import NOTICE, log, show
from qlora_kit.core.console.session import log_to, session
from qlora_kit.core.terminal import printable

EVIL = "\x1b]0;owned\x07\x9b31m"


def tell_one_of_each():
    log.debug("a detail")
    log.info("a fact")
    log.warning("a doubt")
    log.log(NOTICE, "stopped")
    log.error("a fault")
    show("a result")


FACT, DOUBT = "a fact\n", "warning: a doubt\nstopped\nerror: a fault\n"


@pytest.mark.parametrize(
    ("asked", "shown"),
    [
        ({}, FACT + DOUBT),
        ({"quiet": True}, DOUBT),
        ({"verbose": True}, "a detail\n" + FACT + DOUBT),
    ],
    ids=["default", "quiet", "verbose"],
)
def test_what_is_shown_is_what_was_asked_for_and_the_log_has_all(capsys, tmp_path, asked, shown):
    with session(**asked):
        log_to(tmp_path / "run.log")
        tell_one_of_each()
    assert capsys.readouterr() == ("a result\n", shown)
    lines = (tmp_path / "run.log").read_text().splitlines()
    assert [re.findall(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (.*)$", line)[0] for line in lines] == [
        "debug   a detail",
        "info    a fact",
        "warning a doubt",
        "notice  stopped",
        "error   a fault",
        "info    a result",
    ]


def test_outside_of_a_session_facts_are_shown_and_no_log_is_written(capsys, tmp_path):
    log_to(tmp_path / "run.log")
    tell_one_of_each()
    assert capsys.readouterr() == ("a result\n", FACT + DOUBT)
    assert list(tmp_path.iterdir()) == []


def test_the_log_begins_with_what_was_told_before_there_was_a_folder_and_is_gone_on_with(capsys, tmp_path):
    for word in ("first", "second"):
        with session(quiet=True):
            log.info(f"{word}, before")
            log_to(tmp_path / "run.log")
            log_to(tmp_path / "run.log")
            log.info(f"{word}, after")
        log.info("of no command")
    told = [line.split(" info    ")[1] for line in (tmp_path / "run.log").read_text().splitlines()]
    assert told == ["first, before", "first, after", "second, before", "second, after"]


def test_every_line_of_a_text_has_its_time_and_level_and_none_can_act(capsys, tmp_path):
    with session():
        log_to(tmp_path / "run.log")
        log.error(f"no such {EVIL}\n  fix      100%s {{}}")
    text = (tmp_path / "run.log").read_text()
    assert [line[19:] for line in text.splitlines()] == [
        f" error   no such {printable(EVIL)}",
        " error     fix      100%s {}",
    ]
    assert capsys.readouterr().err == f"error: no such {printable(EVIL)}\n  fix      100%s {{}}\n"


def test_a_log_that_cannot_be_written_is_told_of_and_ends_nothing(capsys, tmp_path):
    with session():
        log_to(tmp_path / "absent" / "run.log")
        log.info("a fact")
    place = tmp_path / "absent" / "run.log"
    warning = f"warning: {place} cannot be written, so this command leaves no log: No such file or directory\n"
    assert capsys.readouterr().err == warning + FACT


def test_other_ranks_are_silent_and_leave_no_log(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with session(verbose=True):
        log_to(tmp_path / "run.log")
        log.info("a fact")
        log.error("a fault")
        log.critical("a fault of this rank")
    assert capsys.readouterr().err == "error: a fault of this rank\n"
    assert list(tmp_path.iterdir()) == []


def test_a_line_is_whole_on_a_narrow_terminal_where_only_the_first_word_has_a_color(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    line = "  fix      qlora-kit train " + " ".join(f"lora.r={number}" for number in range(20))
    log.error(f"[bold]wrong[/bold] :smile:{EVIL}\n{line}")
    shown = capsys.readouterr().err
    assert shown == f"\x1b[31merror: \x1b[0m[bold]wrong[/bold] :smile:{printable(EVIL)}\n{line}\n"
