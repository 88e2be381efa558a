"""`qlora-kit inspect`: rows as the model will see them, and what is wrong with them. Needs no weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from qlora_kit.core.console.lines import log
from qlora_kit.core.console.safe import SafeConsole
from qlora_kit.core.units import counted, human_count
from qlora_kit.data.audit.audit import Audit
from qlora_kit.data.audit.finding import Finding, Level
from qlora_kit.data.audit.shown_tokens import shown_row
from qlora_kit.data.summary import DataSummary, SplitSummary
from qlora_kit.data.tokens import TokenRow, TokenRows
from qlora_kit.model.source import locate_tokenizer
from qlora_kit.model.tokenizer import load_tokenizer
from qlora_kit.report.histogram import histogram
from qlora_kit.report.inspect_page import InspectPage, inspect_page
from qlora_kit.report.page import write_page
from qlora_kit.schema.root import TrainRecipe
from qlora_kit.training.rows import audit_of, packing_of, rows_that_fit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TRAINED_STYLE = "bold green"
LEVEL_STYLES = {Level.error: "bold red", Level.warning: "yellow", Level.note: "dim"}
OPENING, CLOSING = "[[", "]]"
MOST_TOKENS_ON_PAGE = 1500  # of one row


@dataclass(frozen=True)
class Inspected:
    """What is shown: the training rows, both splits in numbers, and what was found in them."""

    name: str
    train: TokenRows
    summary: DataSummary
    audit: Audit
    tokenizer: "PreTrainedTokenizerFast"


def inspect(recipe: TrainRecipe, name: str, rows: int, page: Path | None = None) -> Audit:
    """Show the training rows of a recipe as its model will see them, and return what was found in them.

    Args:
        name: of what is shown, for the page.
        rows: how many are shown whole.
    Raises:
        RecipeError: the rows or the tokenizer cannot be used, or the page's place is taken by another file.
    """
    log.info("inspect: reading the tokenizer and the rows")
    base = locate_tokenizer(recipe.model)
    tokenizer = load_tokenizer(base, recipe.model.chat_template)
    data = rows_that_fit(recipe, base, tokenizer)
    audit = audit_of(recipe, data, packing_of(recipe.data, data), base, tokenizer)
    print_inspection(Inspected(name, data.train, data.summary, audit, tokenizer), rows, page)
    return audit


def print_inspection(shown: Inspected, rows: int, page: Path | None = None, console: Console | None = None) -> None:
    """Print the first rows, their lengths, the sources and the findings on standard output, and write a page.

    Loss tokens are bold green on a terminal and stand between [[ and ]] elsewhere.

    Raises:
        RecipeError: the page's place is taken by another file.
    """
    console = console or SafeConsole()
    _print_rows(shown.train[:rows], shown.tokenizer, console)
    _print_lengths(shown.audit, console)
    console.print(_sources(shown.summary))
    console.print()
    for finding in shown.audit.findings:
        _print_finding(finding, console)
    if page is not None:
        write_page(page, _page(shown, rows))
        console.print(Text(f"page: {page}"), soft_wrap=True)


def marked_text(row: TokenRow, tokenizer: "PreTrainedTokenizerFast", *, with_brackets: bool) -> Text:
    """A row as text, its loss tokens styled, and bracketed too where a style would not show."""
    text = Text()
    for is_trained, run in groupby(zip(row.input_ids, row.trained, strict=True), key=lambda pair: pair[1]):
        ids = [token for token, _ in run]
        piece = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if is_trained and with_brackets:
            piece = f"{OPENING}{piece}{CLOSING}"
        text.append(piece, style=TRAINED_STYLE if is_trained else None)
    return text


def _print_rows(rows: Sequence[TokenRow], tokenizer: "PreTrainedTokenizerFast", console: Console) -> None:
    for row in rows:
        trained = sum(row.trained)
        console.print(
            Text(
                f"{row.file}:{row.line}  {counted(len(row.input_ids), 'token')}, {trained:,} trained",
                style="bold",
            )
        )
        console.print(marked_text(row, tokenizer, with_brackets=not console.is_terminal), soft_wrap=True)
        console.print()
    how = TRAINED_STYLE if console.is_terminal else f"{OPENING} {CLOSING}"
    console.print(
        Text(f"loss tokens are marked with {how}; padding is added to each batch and never trained"), soft_wrap=True
    )
    console.print()


def _print_lengths(audit: Audit, console: Console) -> None:
    allowed = f", at most {audit.capacity:,} allowed" if audit.capacity is not None else ""
    console.print(Text(f"training rows by tokens{allowed}", style="bold"))
    for line in histogram(audit.lengths, mark="#" if console.options.ascii_only else "█"):
        console.print(line, soft_wrap=True)
    console.print()


def _sources(summary: DataSummary) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("split", "source"):
        table.add_column(name, no_wrap=True)
    for name in ("rows", "tokens", "loss tokens", "longest", "skipped"):
        table.add_column(name, justify="right", no_wrap=True)
    for split, part in (("train", summary.train), ("held out", summary.held_out)):
        if part is not None:
            _add_sources(table, split, part)
    return table


def _add_sources(table: Table, split: str, part: SplitSummary) -> None:
    longest, is_one = f"{part.longest_row:,}", len(part.sources) == 1
    for source in part.sources:
        numbers = (f"{source.rows:,}", human_count(source.tokens), f"{source.trained_share:.1%}")
        table.add_row(split, Text(source.name), *numbers, longest if is_one else "", f"{source.bad_rows:,}")
    if not is_one:
        skipped = sum(source.bad_rows for source in part.sources)
        numbers = (f"{part.rows:,}", human_count(part.tokens), f"{part.trained_share:.1%}")
        table.add_row(split, "all", *numbers, longest, f"{skipped:,}", style="bold")


def _print_finding(finding: Finding, console: Console) -> None:
    line = Text.assemble((f"{finding.level.value:<8}", LEVEL_STYLES[finding.level]), finding.what)
    console.print(line, soft_wrap=True)
    for name, value in (("at", ", ".join(finding.places)), (finding.remedy, finding.fix)):
        if value:
            console.print(Text(f"        {name:<4}{value}"), soft_wrap=True)


def _page(shown: Inspected, rows: int) -> str:
    sources = [source for split in (shown.summary.train, shown.summary.held_out) if split for source in split.sources]
    files = list(dict.fromkeys(name for source in sources for name in source.sha256))
    taken_apart = [shown_row(row, shown.tokenizer, MOST_TOKENS_ON_PAGE) for row in shown.train[:rows]]
    return inspect_page(InspectPage(shown.name, files, shown.summary, shown.audit, taken_apart))
