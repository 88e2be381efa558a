"""`qlora-kit inspect`: rows as the model will see them, with the trained tokens marked. Needs no weights."""

from itertools import groupby
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from qlora_kit.core.units import human_count
from qlora_kit.data.prepare import FileSummary, prepare
from qlora_kit.data.render import TokenRow
from qlora_kit.schema.data import DataConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TRAINED_STYLE = "bold green"
OPENING, CLOSING = "[[", "]]"


def inspect(
    config: DataConfig, tokenizer: "PreTrainedTokenizerFast", rows: int, console: Console | None = None
) -> None:
    """Print the first rendered rows and the counts of both files on standard output.

    Trained tokens are bold green on a terminal and stand between [[ and ]] elsewhere.

    Raises:
        RecipeError: a file or a row cannot be used.
    """
    console = console or Console()
    data = prepare(config, tokenizer)
    for row in data.train[:rows]:
        trained = sum(row.trained)
        console.print(Text(f"{row.file}:{row.line}  {len(row.input_ids)} tokens, {trained} trained", style="bold"))
        console.print(marked_text(row, tokenizer, with_brackets=not console.is_terminal), soft_wrap=True)
        console.print()
    how = "bold green" if console.is_terminal else f"{OPENING} {CLOSING}"
    console.print(Text(f"trained tokens are marked with {how}; padding is added to each batch and never trained"))
    for name, summary in (("train", data.summary.train), ("held out", data.summary.held_out)):
        if summary is not None:
            console.print(Text(counts(name, summary)), soft_wrap=True)


def marked_text(row: TokenRow, tokenizer: "PreTrainedTokenizerFast", *, with_brackets: bool) -> Text:
    """A row as text, its trained tokens styled, and bracketed too where a style would not show."""
    text = Text()
    for is_trained, run in groupby(zip(row.input_ids, row.trained, strict=True), key=lambda pair: pair[1]):
        ids = [token for token, _ in run]
        piece = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if is_trained and with_brackets:
            piece = f"{OPENING}{piece}{CLOSING}"
        text.append(piece, style=TRAINED_STYLE if is_trained else None)
    return text


def counts(name: str, summary: FileSummary) -> str:
    """One line of numbers for a file of rows."""
    dropped = f" ({summary.dropped_rows} dropped)" if summary.dropped_rows else ""
    return (
        f"{name:<8}  {summary.file}: {summary.rows} rows{dropped}, {human_count(summary.tokens)} tokens, "
        f"{summary.trained_share:.1%} trained, longest row {summary.longest_row} tokens"
    )
