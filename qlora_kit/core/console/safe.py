"""The terminal as rich draws on it, safe for text of strangers."""

from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, HighlighterType, JustifyMethod, OverflowMethod, RenderableType
from rich.segment import Segment
from rich.style import Style
from rich.text import Text

from qlora_kit.core.terminal import printable


class SafeConsole(Console):
    """A console whose texts cannot act on the terminal; its own styles and controls still do.

    Brackets in a text are brackets, not rich's markup.
    """

    def render_str(
        self,
        text: str,
        *,
        style: str | Style = "",
        justify: JustifyMethod | None = None,
        overflow: OverflowMethod | None = None,
        emoji: bool | None = None,  # noqa: ARG002  # none is wanted, nor is markup
        markup: bool | None = None,  # noqa: ARG002
        highlight: bool | None = None,
        highlighter: HighlighterType | None = None,
    ) -> Text:
        """The text as it is; see rich."""
        return super().render_str(
            text,
            style=style,
            justify=justify,
            overflow=overflow,
            emoji=False,
            markup=False,
            highlight=highlight,
            highlighter=highlighter,
        )

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """What is drawn, each control character of a text as its picture."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)
