"""A folder has one writer; the lock ends with its process, however that ends, and its file alone means nothing."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time

import pytest

from qlora_kit.core import lock
from qlora_kit.core.errors import EXIT_BAD_RECIPE, RecipeError
from qlora_kit.core.lock import LOCK, BusyError, hold, holder

HOLDS = """
import sys, time
from pathlib import Path
from qlora_kit.core.lock import hold
with hold(Path(sys.argv[1]), "train"):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


@pytest.fixture
def other(tmp_path):
    """Starts another process that holds the folder for some seconds."""
    started = []

    def start(seconds=60.0):
        command = [sys.executable, "-c", HOLDS, str(tmp_path), str(seconds)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_the_second_process_is_refused_and_told_who_has_it(other, tmp_path):
    process = other()
    with pytest.raises(BusyError, match=rf"train is at work there \(process {process.pid}, since 20") as caught:
        hold(tmp_path, "export", patience=0.1).__enter__()
    assert caught.value.exit_code == EXIT_BAD_RECIPE
    found = holder(tmp_path)
    assert found is not None and found.pid == process.pid


def test_a_killed_process_holds_nothing_though_its_file_is_there(other, tmp_path):
    process = other()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (tmp_path / LOCK).exists()
    assert holder(tmp_path) is None
    with hold(tmp_path, "train"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_one_process_may_hold_it_twice_and_a_fork_of_it_may_not(tmp_path):
    with hold(tmp_path, "train"):
        with hold(tmp_path, "export"):
            pass
        assert (tmp_path / LOCK).exists()
        assert holder(tmp_path) is None  # nobody else
        child = os.fork()
        if child == 0:
            try:
                with hold(tmp_path, "export", patience=0):
                    os._exit(1)
            except BusyError:
                os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
    assert list(tmp_path.iterdir()) == []


def test_waiting_is_said_and_ends_with_the_other(other, tmp_path, capsys):
    other(0.5)
    began = time.monotonic()
    with hold(tmp_path, "train", patience=None):
        assert 0.1 < time.monotonic() - began < 20
    assert capsys.readouterr().err.count("waiting: ") == 1


def test_a_file_system_without_locks_is_told_of(tmp_path, monkeypatch, capsys):
    def refuse(stream, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with hold(tmp_path, "train"):
        assert f"the file system of {tmp_path} knows no locks" in capsys.readouterr().err


def test_a_link_in_the_place_of_the_lock_is_not_written_through(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).symlink_to(tmp_path / "precious")
    with pytest.raises(RecipeError, match="cannot be written"):
        hold(tmp_path / "run", "train").__enter__()
    assert (tmp_path / "precious").read_text() == "mine"


def test_a_lock_whose_file_went_with_its_holder_is_taken_anew(tmp_path, monkeypatch):
    is_free, ended = lock._is_free, []

    def ends_meanwhile(stream, file, **look):
        if not ended:  # between opening the file and locking it
            ended.append(file)
            file.unlink()
        return is_free(stream, file, **look)

    monkeypatch.setattr(lock, "_is_free", ends_meanwhile)
    with hold(tmp_path, "train"):
        assert (tmp_path / LOCK).exists()
