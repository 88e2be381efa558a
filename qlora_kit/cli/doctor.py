"""`qlora-kit doctor`: whether this machine is ready."""

import textwrap
from collections.abc import Iterator, Sequence

from qlora_kit.core.console.lines import show
from qlora_kit.core.errors import EXIT_OK, EXIT_RUN_FAILED

WIDTH = 80  # columns of a terminal as it opens

HELP = """usage: qlora-kit doctor

Checks Python, packages, devices and write access; exit code 1 when something needed is missing."""


def run(arguments: list[str]) -> int:
    """Print the checks; returns the exit code."""
    if arguments and arguments[0] in ("-h", "--help"):
        print(HELP)
        return EXIT_OK
    from qlora_kit.pipelines.doctor import Health, diagnose

    checks = diagnose()
    rows = [(check.name, check.health.value, check.value, check.fix) for check in checks]
    show("qlora-kit doctor")
    for line in table_lines([("check", "status", "details", ""), *rows]):
        show(line)
    return EXIT_RUN_FAILED if any(check.health is Health.failed for check in checks) else EXIT_OK


def table_lines(rows: Sequence[tuple[str, str, str, str]]) -> Iterator[str]:
    """Name, status and details in columns, the details wrapped; a fix on a line of its own, whole, to be pasted."""
    first, second = (max(len(row[column]) for row in rows) + 2 for column in (0, 1))
    for name, status, details, fix in rows:
        start = f"{name:<{first}}{status:<{second}}"
        inside = " " * len(start)
        yield from textwrap.wrap(details, WIDTH, initial_indent=start, subsequent_indent=inside) or [start.rstrip()]
        if fix:
            yield f"{' ' * first}fix  {fix}"
