"""What the command line says of an error that nobody foresaw."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from qlora_kit.cli.verbs import Verb, main, run_verb
from qlora_kit.core.console.session import session
from qlora_kit.core.errors import RecipeError, StoppedError
from qlora_kit.core.shell import shell_line


@pytest.fixture
def failing(monkeypatch):
    """A verb that raises what it is given."""

    def make(error):
        module = ModuleType("a_failing_verb")

        def run(arguments):
            if callable(error):
                return error()
            raise error

        vars(module)["run"] = run
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


def interrupted_import(error):
    """Ctrl-C while a library imports lazily, which makes an error of its own of it."""

    def doing():
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        except KeyboardInterrupt:
            pass
        raise error

    return doing


@pytest.mark.parametrize(
    "error", [ModuleNotFoundError("Could not import module 'AutoModel'"), RecipeError("this model cannot be trained")]
)
def test_a_stop_that_a_library_made_an_error_of_is_a_stop(failing, capsys, error):
    assert run_verb(failing(interrupted_import(error)), []) == 1
    assert capsys.readouterr().err == "stopped\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_error_that_was_raised_from_a_stop_is_a_stop(failing, capsys):
    error = RecipeError("cannot load this model")
    error.__cause__ = ImportError("numpy")
    error.__cause__.__context__ = KeyboardInterrupt()
    assert run_verb(failing(error), []) == 1
    assert capsys.readouterr().err == "stopped\n"


def test_what_a_stop_left_to_say_is_said(failing, capsys):
    error = StoppedError("stopped at step 3 of 8; the checkpoint is saved", fix="qlora-kit train resume=outputs/a/1")
    error.__context__ = KeyboardInterrupt()
    assert run_verb(failing(error), []) == 1
    said = capsys.readouterr().err
    assert said == f"{error.problems[0].what}\n  to go on  qlora-kit train resume=outputs/a/1\n"


def test_a_stop_while_the_command_line_itself_is_imported(tmp_path):
    # The command line's own modules, as if Ctrl-C came while they are read.
    (tmp_path / "argv.py").write_text(
        "import sys\n"
        "class Stopped:\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'qlora_kit.cli.verbs': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Stopped())\n"
        "from qlora_kit.__main__ import main\n"
        "raise SystemExit(main())\n"
    )
    done = subprocess.run([sys.executable, tmp_path / "argv.py"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "stopped\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
@pytest.mark.parametrize("words", [["recipes", "list"], ["--help"], ["train", "--help"]])
def test_output_that_cannot_be_written_is_said(words):
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "qlora_kit", *words]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "error: the output cannot be written: No space left on device\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_what_cannot_be_said_ends_no_work():
    with Path("/dev/full").open("w") as full:
        code = (
            "from qlora_kit.core import streams; from qlora_kit.core.console.lines import log\n"
            "from qlora_kit.core.console.bar import each\n"
            "with streams.unfailing_streams():\n"
            "    log.info('a' * 100_000)\n"
            "    list(each(range(3), 'a', 'b'))\n"
            "    print('done')\n"
        )
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, stderr=full, stdout=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "done\n")


def test_a_reader_that_went_away_ends_the_output_alone():
    command = f"{sys.executable} -m qlora_kit recipes list | head -0; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("0\n", "")


def test_a_name_that_is_too_long_is_called_by_its_name(failing, capsys):
    error = OSError(errno.ENAMETOOLONG, "File name too long", "x" * 300)
    assert run_verb(failing(error), []) == 1
    assert capsys.readouterr().err == f"error: a file's name is too long for its disk: {'x' * 300}\n"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE"])
@pytest.mark.parametrize(
    ("words", "doing"),
    [
        (["train", "experiment=x"], "a training"),
        (["train", "resume=latest"], "a training"),
        (["train", "-m", "lora.r=4,8"], "a training"),
        (["export", "run=latest"], "an export"),
        (["eval", "run=latest"], "an evaluation"),
    ],
)
def test_several_processes_are_refused_before_anything_is_read(tmp_path, monkeypatch, capsys, name, words, doing):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(name, "2")
    assert main(words) == 2
    said = capsys.readouterr().err
    assert f"{name}=2: a launcher started several processes, and {doing} is one process on one GPU" in said
    assert f"fix      {shell_line(['qlora-kit', *words])}" in said
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv(name, "1")
    assert main([words[0], "--help"]) == 0
    assert main(words) == 2
    assert name not in capsys.readouterr().err


def test_of_several_processes_that_are_refused_only_the_first_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert main(["train", "experiment=x"]) == 2
    assert capsys.readouterr() == ("", "")


def test_an_error_of_one_process_alone_is_told_by_it(failing, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    with session():
        assert run_verb(failing(RuntimeError("odd")), []) == 1
    assert capsys.readouterr().err.startswith("error: RuntimeError: odd\n")
