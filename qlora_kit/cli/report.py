"""`qlora-kit report`: the page of a run, or of the exports of a base."""

import difflib
from pathlib import Path

from qlora_kit.cli.line import meant_place, parse_line
from qlora_kit.core.console.lines import show
from qlora_kit.core.errors import EXIT_OK, RecipeError
from qlora_kit.core.files import typed_path
from qlora_kit.core.shell import override, shell_line

HELP = """usage: qlora-kit report [run=DIR|latest] [base=DIR|latest] [out=FILE.html]

Writes one HTML file about a run: curves, rows, how close each exported file is to the trained model, size against KL,
commands to serve, and what it takes to make the run again. It needs no network, loads no weight, and says what a run
lacks: one that was stopped has a page too. run= is the newest run unless given; out= is report.html in its directory.
base= instead of run= is for exports of a base model: their folder, or what export was given as base=.

Examples:
  qlora-kit report
  qlora-kit report run=latest out=report.html
  qlora-kit report run=outputs/my_run/2026-01-31_12-00-00
  qlora-kit report base=models/my_base"""

OWN = ("run", "base", "out", "debug")


def run(arguments: list[str]) -> int:
    """Write the page; returns the exit code."""
    for word in arguments:
        key = word.split("=", 1)[0]
        if not word.startswith("-") and ("=" not in word or key not in OWN):
            near = difflib.get_close_matches(key, OWN, n=1)
            rest = word.partition("=")[2]
            if "=" not in word:
                meant = meant_place(word, "run", finished=None)
            else:
                meant = shell_line([override(near[0], rest)]) if near else ""
            what = f"report knows run=, base= and out=, but not '{word}'"
            raise RecipeError(what, "the command line", meant or "qlora-kit report --help")
    line = parse_line(arguments)
    if line.wants_help:
        print(HELP)
        return EXIT_OK
    out = _out(line.value("out"))

    name, base = line.value("run"), line.value("base")
    if name is not None and base is not None:
        what = f"run={name} and base={base} are both set; one page is of a trained run or of a base"
        raise RecipeError(what, "the command line", f"run={name}, or base={base}, not both")

    from qlora_kit.pipelines.report import report, report_base

    page = report("latest" if name is None else name, out) if base is None else report_base(base, out)
    show(f"page: {page}")
    return EXIT_OK


def _out(name: str | None) -> Path | None:
    if name is None:
        return None
    if Path(name).suffix not in (".html", ".htm"):
        raise RecipeError(f"out must name an HTML file, got {name or 'nothing'}", "the command line", "out=report.html")
    return typed_path(name)
