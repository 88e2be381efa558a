"""`qlora-kit chat`: talk to a run's adapter or to any export."""

import argparse
import os
from typing import NoReturn

from qlora_kit.core.errors import EXIT_OK, RecipeError
from qlora_kit.core.shell import read_hydra_text
from qlora_kit.runs.directory import refuse_empty


class _Parser(argparse.ArgumentParser):
    """Tells a wrong line as the other verbs do."""

    def error(self, message: str) -> NoReturn:
        raise RecipeError(message, "the command line", "qlora-kit chat --help")


def run(arguments: list[str]) -> int:
    """Chat until the input ends; returns the exit code."""
    parser = _Parser(
        prog="qlora-kit chat",
        description="Talk to a run's adapter or to any export; an empty line or Ctrl-D ends it.",
        epilog="examples: qlora-kit chat latest | qlora-kit chat outputs/my_run/2026-01-31_12-00-00/exports/gptq_4bit",
    )
    parser.add_argument("place", nargs="*", help="a run directory, a folder of exports/, or latest; run=DIR as well")
    parser.add_argument("--message", help="answer one message and stop")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="longest answer (default 256)")
    if not {"-h", "--help"}.isdisjoint(arguments):
        parser.print_help()
        return EXIT_OK
    chosen = parser.parse_args(arguments)
    if chosen.max_new_tokens < 1:
        what = f"--max-new-tokens must be at least 1, got {chosen.max_new_tokens}"
        raise RecipeError(what, "the command line", "--max-new-tokens 256")

    from qlora_kit.pipelines.chat import chat, refuse_several_places

    places = [_place(word) for word in chosen.place]
    refuse_several_places(places)
    chat(places[0] if places else "latest", chosen.message, chosen.max_new_tokens)
    return EXIT_OK


def _place(word: str) -> str:
    """A place as it stands, or behind `run=` as the other verbs take it."""
    if not word.startswith("run=") or os.path.lexists(word):
        return word
    place = read_hydra_text(word.removeprefix("run="))
    refuse_empty("run", place)
    return place
