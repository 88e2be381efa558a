"""Tables on the terminal."""

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from qlora_kit.core.console import SafeConsole
from qlora_kit.core.say import show


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
