"""The terminal as rich draws on it, safe for text of strangers."""

from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from qlora_kit.core.terminal import printable


class SafeConsole(Console):
    """A console whose texts cannot act on the terminal; its own styles and controls still do."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """What is drawn, each control character of a text as its picture."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)
