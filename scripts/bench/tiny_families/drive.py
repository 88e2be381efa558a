"""One command line of the kit in a process of its own, forked from one that holds the libraries already."""

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

LIMIT = 1800  # seconds of one command


@dataclass(frozen=True)
class Done:
    """A command that ended.

    Attributes:
        exit: its exit code; negative where a signal ended it.
        said: what it printed.
    """

    exit: int
    said: str

    @property
    def lines(self) -> list[str]:
        """The printed lines, those of a progress bar one by one."""
        return self.said.replace("\r", "\n").splitlines()

    @property
    def errors(self) -> list[str]:
        """The first line of each error."""
        return [line.removeprefix("error: ") for line in self.lines if line.startswith("error: ")]

    @property
    def has_traceback(self) -> bool:
        """Whether an exception got through."""
        return "Traceback (most recent call last)" in self.said


def preload() -> None:
    """Import what every command needs."""
    import bitsandbytes  # noqa: F401
    import datasets  # noqa: F401
    import gptqmodel  # noqa: F401
    import llmcompressor  # noqa: F401
    import torch
    import trl  # noqa: F401

    import qlora_kit.cli.export
    import qlora_kit.cli.plan
    import qlora_kit.cli.train
    import qlora_kit.formats.wished
    import qlora_kit.pipelines.export
    import qlora_kit.pipelines.plan
    import qlora_kit.pipelines.train  # noqa: F401

    torch.set_num_threads(1)


def kit(words: list[str], log: Path) -> Done:
    """Run `qlora-kit` with these words in the folder of a log file."""

    def run() -> int:
        from qlora_kit.cli.verbs import main

        sys.argv = ["qlora-kit", *words]
        return main(words)

    return forked(run, log)


def forked(run: Callable[[], int], log: Path) -> Done:
    """Run a function in a child whose folder and output are those of a log file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        os._exit(_in_child(run, log))
    began = time.monotonic()
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() - began > LIMIT:
            os.killpg(child, signal.SIGKILL)
        time.sleep(0.05)
    return Done(os.waitstatus_to_exitcode(ended[1]), log.read_text(encoding="utf-8", errors="replace"))


def _in_child(run: Callable[[], int], log: Path) -> int:
    code = 1
    try:
        os.setsid()
        os.chdir(log.parent)
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        code = run()
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return code


def write_rows(path: Path) -> None:
    """Write forty short conversations."""
    verbs = ["turn on", "dim", "read", "lock", "open"]
    things = ["the lamp", "the news", "the door", "the light", "the window"]

    def rows() -> Iterator[str]:
        for number in range(40):
            wish = f"{verbs[number % 5]} {things[number // 5 % 5]}"
            asked = {"role": "user", "content": f"Please {wish}, request number {number}."}
            told = {"role": "assistant", "content": f"Done: I did {wish} for request {number}. Anything else?"}
            yield json.dumps({"messages": [asked, told]}) + "\n"

    path.write_text("".join(rows()), encoding="utf-8")
