"""The table of verbs, and the one place where errors become messages and exit codes."""

import errno
import importlib
import os
import platform
import sys
import traceback
from dataclasses import dataclass

from qlora_kit import __version__
from qlora_kit.cli.line import EVERYWHERE
from qlora_kit.core.console.lines import NOTICE, is_verbose, log
from qlora_kit.core.console.session import session
from qlora_kit.core.errors import (
    EXIT_BAD_RECIPE,
    EXIT_OK,
    EXIT_RUN_FAILED,
    KitError,
    Problem,
    StoppedError,
    is_panic,
)
from qlora_kit.core.quiet import quiet_loggers
from qlora_kit.core.signals import Interrupt, came_of_interrupt
from qlora_kit.core.streams import unfailing_streams

# Rights, file systems that are read-only, files where folders are wanted: nothing that a traceback would explain
_OF_THE_PLACE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EMFILE)


@dataclass(frozen=True)
class Verb:
    """A word after `qlora-kit`: the module whose `run(arguments)` does it, and what it does."""

    module: str
    summary: str


VERBS = {
    "train": Verb("qlora_kit.cli.train", "Fine-tune a quantized base with LoRA."),
    "export": Verb("qlora_kit.cli.export", "Write files for llama.cpp, Ollama, vLLM and more, of a run or of a base."),
    "eval": Verb("qlora_kit.cli.eval", "Score every export, and what it was made from, on held-out rows."),
    "plan": Verb("qlora_kit.cli.plan", "Memory by part and steps of a recipe, without loading a weight."),
    "inspect": Verb("qlora_kit.cli.inspect", "Show rendered rows with the loss tokens marked."),
    "report": Verb("qlora_kit.cli.report", "Write the page of a run or base: curves, rows, how good each file is."),
    "chat": Verb("qlora_kit.cli.chat", "Talk to a run's adapter or to any export."),
    "recipes": Verb(
        "qlora_kit.cli.recipes", "List, show, validate, compare and copy recipes; families and their exports."
    ),
    "doctor": Verb("qlora_kit.cli.doctor", "Check Python, packages, devices and write access."),
}


def usage() -> str:
    """The page of `qlora-kit --help`."""
    lines = ["usage: qlora-kit VERB [arguments]", "", "Verbs:"]
    lines += [f"  {name:<9} {verb.summary}" for name, verb in VERBS.items()]
    lines += ["", "With any verb:", *(f"  {flag:<9} {what}" for flag, what in EVERYWHERE.items())]
    lines += ["", "More of a verb:  qlora-kit VERB --help", "First step:      qlora-kit recipes list"]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run one command line; returns its exit code."""
    with unfailing_streams() as output:
        code = _main(sys.argv[1:] if arguments is None else arguments)
        if output is None:
            return code
        output.let_go()
        if output.error is not None:
            log.error(f"the output cannot be written: {output.error.strerror or output.error}")
            return code or EXIT_RUN_FAILED
        return code


def _main(line: list[str]) -> int:
    words, flags = [word for word in line if word not in EVERYWHERE], EVERYWHERE.keys() & set(line)
    if len(flags) > 1:
        log.error(f"{' and '.join(EVERYWHERE)} are both given\n  fix      leave one of them out")
        return EXIT_BAD_RECIPE
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return EXIT_OK if words else EXIT_BAD_RECIPE
    if words[0] == "--version":
        print(__version__)
        return EXIT_OK
    if words[0] not in VERBS:
        import difflib

        near = difflib.get_close_matches(words[0], VERBS, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        log.error(f"there is no verb '{words[0]}'{hint}\n  fix      qlora-kit {near[0] if near else '--help'}")
        return EXIT_BAD_RECIPE
    with session(quiet="--quiet" in flags, verbose="--verbose" in flags):
        return run_verb(VERBS[words[0]], words[1:])


def run_verb(verb: Verb, arguments: list[str]) -> int:
    """Run a verb and turn its errors into a message and an exit code."""
    debug = "debug=true" in arguments or is_verbose()
    if not is_verbose():
        quiet_loggers()
    log.debug(f"qlora-kit {__version__}, Python {platform.python_version()}, process {os.getpid()}")
    # Threads that wait asleep instead of spinning: on two busy cores this was 2.4 times faster.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    interrupt = Interrupt()
    try:
        with interrupt.listening():
            code: int = importlib.import_module(verb.module).run(arguments)
        return code
    except BrokenPipeError:
        return EXIT_OK
    except BaseException as error:
        if not isinstance(error, (Exception, KeyboardInterrupt)) and not is_panic(error):
            raise
        if debug and not isinstance(error, KeyboardInterrupt):
            log.log(NOTICE, traceback.format_exc())
        return _told(error, is_stopped=interrupt.heard or came_of_interrupt(error))


def _told(error: BaseException, *, is_stopped: bool) -> int:
    """Say what ended a verb; returns the exit code.

    Args:
        is_stopped: whether Ctrl-C is behind the error, whatever a library made of it.
    """
    if is_stopped and not isinstance(error, StoppedError):
        log.log(NOTICE, "stopped")
        return EXIT_RUN_FAILED
    if isinstance(error, KitError):
        for problem in error.problems:
            if isinstance(error, StoppedError):
                log.log(NOTICE, _stop(problem))
            else:
                log.error(str(problem))
        return error.exit_code
    log.critical(str(_unforeseen(error)))  # also where it is not the first of several processes that fails
    return EXIT_RUN_FAILED


def _stop(problem: Problem) -> str:
    """A stop that was asked for: nothing is to be mended, and the line goes on."""
    return f"{problem.what}\n  to go on  {problem.fix}" if problem.fix else problem.what


def _unforeseen(error: BaseException) -> Problem:
    from pathlib import Path

    from qlora_kit.core.files import is_disk_full

    name = error.filename if isinstance(error, OSError) and isinstance(error.filename, str) else None
    if is_disk_full(error, Path.cwd()):
        fix = "make room; a run that was training goes on with qlora-kit train resume=latest"
        return Problem(f"the disk that holds {name or Path.cwd()} is full", fix=fix)
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return Problem(f"a file's name is too long for its disk: {error.filename}")
    if name is not None and isinstance(error, OSError) and error.errno in _OF_THE_PLACE:
        return Problem(f"{name}: {error.strerror}")
    if isinstance(error, MemoryError) or "can't start new thread" in str(error):
        what = "the system gives this process no more " + ("memory" if isinstance(error, MemoryError) else "threads")
        return Problem(f"{what} (ulimit -a shows the limits of this shell)", fix="ulimit -v unlimited")
    return Problem(f"{type(error).__name__}: {error}", fix="add debug=true to see where")
