"""What the command line says of an error that nobody foresaw."""

import errno
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

from qlora_kit.cli.verbs import Verb, main, run_verb
from qlora_kit.core.shell import shell_line


@pytest.fixture
def failing(monkeypatch):
    """A verb that raises what it is given."""

    def make(error):
        module = ModuleType("a_failing_verb")

        def run(arguments):
            raise error

        module.run = run
        monkeypatch.setitem(sys.modules, module.__name__, module)
        return Verb(module.__name__, "fails")

    return make


def test_an_unforeseen_error_is_one_line_and_a_way_to_see_more(failing, capsys):
    assert run_verb(failing(RuntimeError("odd")), []) == 1
    assert capsys.readouterr().err == "error: RuntimeError: odd\n  do       add debug=true to see where\n"


def test_a_panic_of_a_compiled_library_is_an_error_as_any_other(failing, capsys):
    panic = type("PanicException", (BaseException,), {})  # as PyO3's, which a library cannot be made to show here
    assert run_verb(failing(panic("index out of bounds")), []) == 1
    assert capsys.readouterr().err.startswith("error: PanicException: index out of bounds\n")
    with pytest.raises(GeneratorExit):
        run_verb(failing(GeneratorExit()), [])


def test_debug_shows_the_traceback(failing, capsys):
    assert run_verb(failing(RuntimeError("odd")), ["debug=true"]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "free"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 10**9),
        (RuntimeError("SafetensorError: No space left on device (os error 28)"), 10**9),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 835200 vs 835088"), 0),
    ],
)
def test_a_full_disk_is_called_by_its_name(failing, capsys, monkeypatch, error, free):
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: type(usage)(usage.total, usage.used, free))
    assert run_verb(failing(error), []) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: the disk that holds {Path.cwd()} is full\n  do       make room")
    assert "qlora-kit train resume=latest" in said


def test_another_error_on_a_full_disk_is_not_called_one(failing, capsys, monkeypatch):
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: type(usage)(usage.total, usage.used, 0))
    assert run_verb(failing(RuntimeError("odd")), []) == 1
    assert capsys.readouterr().err.startswith("error: RuntimeError: odd")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/big/x"), "the disk that holds /big/x is full\n"),
        (OSError("189648 requested and 0 written"), f"the disk that holds {Path.cwd()} is full\n"),
        (PermissionError(errno.EACCES, "Permission denied", "/no/x"), "/no/x: Permission denied\n"),
        (OSError(errno.EROFS, "Read-only file system", "/cd/x"), "/cd/x: Read-only file system\n"),
        (RuntimeError("can't start new thread"), "the system gives this process no more threads (ulimit -a"),
        (MemoryError(), "the system gives this process no more memory (ulimit -a"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_the_system_refuses_is_said_in_its_words(failing, capsys, error, said):
    assert run_verb(failing(error), []) == 1
    assert capsys.readouterr().err.startswith(f"error: {said}")


def test_the_users_own_stop_is_not_an_error_of_the_kit(failing, capsys):
    assert run_verb(failing(KeyboardInterrupt()), []) == 1
    assert capsys.readouterr().err == "stopped\n"


def test_a_name_that_is_too_long_is_called_by_its_name(failing, capsys):
    error = OSError(errno.ENAMETOOLONG, "File name too long", "x" * 300)
    assert run_verb(failing(error), []) == 1
    assert capsys.readouterr().err == f"error: a file's name is too long for its disk: {'x' * 300}\n"


@pytest.mark.parametrize("name", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE"])
@pytest.mark.parametrize("words", [["experiment=x"], ["resume=latest"], ["-m", "lora.r=4,8"]])
def test_several_processes_are_refused_before_anything_is_read(tmp_path, monkeypatch, capsys, name, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(name, "2")
    assert main(["train", *words]) == 2
    said = capsys.readouterr().err
    assert f"{name}=2: a launcher started several processes, and a training is one process on one GPU" in said
    assert f"fix      {shell_line(['qlora-kit', 'train', *words])}" in said
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv(name, "1")
    assert main(["train", "--help"]) == 0
    assert main(["train", *words]) == 2
    assert name not in capsys.readouterr().err
