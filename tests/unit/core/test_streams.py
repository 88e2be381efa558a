"""A write that fails ends no work, is remembered, and the interpreter ends as if it had gone well."""

import errno
import io
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_kit.core.streams import Unfailing, unfailing_streams


class Broken(io.StringIO):
    """Fails with one error after the other, and with the last from then on."""

    def __init__(self, *fails):
        super().__init__()
        self.fails = list(fails)

    def write(self, text):
        raise self.fails.pop(0) if len(self.fails) > 1 else self.fails[0]

    def flush(self):
        raise self.fails.pop(0) if len(self.fails) > 1 else self.fails[0]


def full():
    return OSError(errno.ENOSPC, "No space left on device")


def test_what_can_be_written_is():
    written = io.StringIO()
    stream = Unfailing(written, ends_with_reader=True)
    assert stream.write("four") == 4
    stream.flush()
    assert (written.getvalue(), stream.error) == ("four", None)
    assert stream.getvalue() == "four"  # and all else is the stream's own


def test_the_first_error_is_remembered():
    first = full()
    stream = Unfailing(Broken(first, full(), full()), ends_with_reader=True)
    assert stream.write("four") == 4
    stream.flush()
    assert stream.write("x") == 1
    assert stream.error is first


@pytest.mark.parametrize(
    "act", [lambda stream: stream.write("x"), lambda stream: stream.flush()], ids=["write", "flush"]
)
def test_a_reader_that_went_away_ends_a_result_and_nothing_else(act):
    with pytest.raises(BrokenPipeError):
        act(Unfailing(Broken(BrokenPipeError()), ends_with_reader=True))
    stream = Unfailing(Broken(BrokenPipeError()), ends_with_reader=False)
    act(stream)
    assert isinstance(stream.error, BrokenPipeError)


def test_inside_the_block_both_streams_take_all(monkeypatch):
    out, told = Broken(no_space := full()), Broken(full())
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", told)
    with unfailing_streams() as shown:
        print("a result", end="")
        print("told", end="", file=sys.stderr)
    assert shown is not None and shown.error is no_space
    assert (sys.stdout, sys.stderr) == (out, told)


def test_a_process_without_standard_streams(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    with unfailing_streams() as shown:
        assert shown is None


def test_a_full_disk_leaves_the_exit_code_to_the_command():
    code = (
        "import sys\nfrom qlora_kit.core.streams import unfailing_streams\n"
        "with unfailing_streams() as shown:\n"
        "    print('a result'); shown.flush(); print('told', file=sys.stderr)\n"
        "    number = shown.error.errno\n"
        "sys.exit(number)\n"
    )
    with Path("/dev/full").open("w") as disk:
        done = subprocess.run([sys.executable, "-c", code], stdout=disk, stderr=disk, check=False)
    assert done.returncode == errno.ENOSPC  # 120 if the interpreter failed to flush at its end
