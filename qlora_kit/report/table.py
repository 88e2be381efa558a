"""Tables on the terminal."""

import io
from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from qlora_kit.core.console.lines import log_result, show
from qlora_kit.core.console.safe import SafeConsole


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table on standard output; the first column is left-aligned, the others right-aligned."""
    show(title)
    table = Table(box=None, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    console = SafeConsole()
    widest = table.__rich_measure__(console, console.options.update(width=400)).maximum
    SafeConsole(width=max(console.width, widest)).print(table)
    plain = io.StringIO()
    SafeConsole(file=plain, width=widest).print(table)
    log_result(plain.getvalue().rstrip("\n"))
