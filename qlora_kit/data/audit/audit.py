"""Audits of tokenized rows before a weight is loaded: what would teach the model something wrong, and what to know."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Protocol

from qlora_kit.core.console.lines import log
from qlora_kit.core.errors import Problem, RecipeError
from qlora_kit.core.units import counted
from qlora_kit.data.audit.finding import Finding, Level, by_level
from qlora_kit.data.audit.length_counts import LengthCounts, Padding, count_lengths, padding
from qlora_kit.data.audit.near_duplicates import near_duplicates
from qlora_kit.data.audit.noted import noted
from qlora_kit.data.audit.row_checks import (
    leaks,
    near_repeats,
    odd_texts,
    repeats,
    rows_left_out,
    script_shares,
    scripts,
    skipped,
    trained_shares,
)
from qlora_kit.data.audit.special_tokens import SpecialTokens, special_tokens
from qlora_kit.data.audit.token_scan import Scan, scan
from qlora_kit.data.audit.turn_checks import Turns, turn_findings
from qlora_kit.data.packing import Packing
from qlora_kit.data.summary import DataSummary, SplitSummary
from qlora_kit.data.tokens import TokenRows
from qlora_kit.schema.data import TrainOn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BINS_DRAWN = 12
TOLD_BY_READING = "rows_skipped"  # a finding that was said when the rows were read
MUCH_PADDING = 0.2  # of the tokens in a batch


class Prepared(Protocol):
    """Rows that are ready, as `prepare` returns them."""

    @property
    def train(self) -> TokenRows:
        """Training rows."""

    @property
    def held_out(self) -> TokenRows | None:
        """Held-out rows; none, or an empty view, where a recipe names none."""

    @property
    def summary(self) -> DataSummary:
        """Both in numbers."""


@dataclass(frozen=True)
class TokenFact:
    """A special token, its part, and what the rows say about it."""

    part: str
    token: str
    id: int | None
    said: str


@dataclass(frozen=True)
class PackedBins:
    """How well packing fills its bins, and the lengths of the rows in some of them, evenly spread."""

    capacity: int
    bins: int
    efficiency: float
    drawn: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Audit:
    """What was found in the rows; JSON through `dataclasses.asdict`.

    Attributes:
        findings: the gravest first.
        capacity: tokens of the longest row allowed.
        rows_read: training rows whose tokens were read; fewer than there are where there are too many tokens.
        scripts: share of the training rows in each script.
    """

    findings: tuple[Finding, ...]
    lengths: LengthCounts
    held_out_lengths: LengthCounts | None
    capacity: int | None
    rows_read: int
    tokens: tuple[TokenFact, ...]
    scripts: dict[str, float]
    padding: Padding | None
    packing: PackedBins | None

    @property
    def has_errors(self) -> bool:
        """Whether a run must not start."""
        return any(finding.level is Level.error for finding in self.findings)


def audit(
    data: Prepared,
    tokenizer: "PreTrainedTokenizerFast",
    capacity: int | None,
    stop_ids: frozenset[int],
    *,
    train_on: TrainOn = TrainOn.assistant,
    packing: Packing | None = None,
    batch_size: int | None = None,
) -> Audit:
    """Look at every row's tokens, hashes and marks.

    Args:
        capacity: tokens of the longest row allowed.
        stop_ids: where generation ends, as the generation config says.
        packing: of the training rows, if they are packed.
        batch_size: rows of a batch, to tell how much of it would be padding.
    """
    train, held_out = data.train, data.held_out or None
    turns = _turns(train, special_tokens(tokenizer, stop_ids), train_on, tokenizer)
    batch = padding(train.lengths, batch_size) if batch_size is not None else None
    known = {note.name for note in train.store.notes}
    findings = [
        *turn_findings(turns, known),
        *_row_findings(turns, held_out, data.summary.train),
        *_batch_findings(packing, batch),
    ]
    if held_out is not None:
        findings += _held_out_findings(data, _turns(held_out, turns.special, train_on, tokenizer), findings)
    return Audit(
        findings=by_level(findings),
        lengths=count_lengths(train.lengths),
        held_out_lengths=count_lengths(held_out.lengths) if held_out is not None else None,
        capacity=capacity,
        rows_read=len(turns.scan.indices),
        tokens=_facts(turns.special, turns.scan),
        scripts=script_shares(train),
        padding=batch,
        packing=_bins(train, packing) if packing is not None else None,
    )


def tell_warnings(audit: Audit) -> None:
    """Tell the user each warning on standard error, with what mends it."""
    for finding in audit.findings:
        if finding.level is Level.warning and finding.name != TOLD_BY_READING:
            where = f" ({', '.join(finding.places)})" if finding.places else ""
            fix = f"; {finding.remedy}: {finding.fix}" if finding.fix else ""
            log.warning(f"{finding.what}{where}{fix}")


def stop_on_errors(audit: Audit) -> None:
    """Stop where the rows would teach the model something wrong.

    Raises:
        RecipeError: with one problem for each finding that is an error.
    """
    errors = [finding for finding in audit.findings if finding.level is Level.error]
    if errors:
        raise RecipeError([Problem(found.what, ", ".join(found.places) or "data", found.fix) for found in errors])


def _turns(rows: TokenRows, special: SpecialTokens, train_on: TrainOn, tokenizer: "PreTrainedTokenizerFast") -> Turns:
    return Turns(rows, scan(rows, special), special, train_on, partial(_spelled, tokenizer))


def _row_findings(turns: Turns, held_out: TokenRows | None, summary: SplitSummary) -> Iterator[Finding]:
    train = turns.rows
    yield from trained_shares(train, turns.scan, turns.special, turns.train_on)
    if held_out is not None:
        yield from leaks(train, held_out)
    yield from repeats(train)
    yield from near_repeats(train, held_out, near_duplicates(train, held_out))
    yield from rows_left_out("training", train, summary)
    yield from skipped(train)
    yield from odd_texts(train)
    yield from noted(train)
    yield from scripts(train)
    if len(turns.scan.indices) < len(train):
        what = f"tokens were read in {len(turns.scan.indices):,} of {counted(len(train), 'row')}, evenly spread"
        yield Finding(Level.note, "sampled", what)


def _held_out_findings(data: Prepared, turns: Turns, of_train: Sequence[Finding]) -> Iterator[Finding]:
    """What is wrong with held-out rows, where training rows are not told off for the same already."""
    rows, summary = turns.rows, data.summary.held_out
    known = {finding.name for finding in of_train}
    noted_names = {note.name for note in rows.store.notes}
    found = [
        *turn_findings(turns, noted_names),
        *trained_shares(rows, turns.scan, turns.special, turns.train_on),
        *odd_texts(rows),
    ]
    for finding in found:
        if finding.level is not Level.note and finding.name not in known:
            yield replace(finding, what=f"held out: {finding.what}")
    if summary is not None:
        yield from rows_left_out("held-out", rows, summary)
    if rows.store is not data.train.store:
        yield from skipped(rows)
        yield from (replace(finding, what=f"held out: {finding.what}") for finding in noted(rows))


def _batch_findings(packing: Packing | None, batch: Padding | None) -> Iterator[Finding]:
    if packing is not None:
        bins = f"{counted(len(packing), 'bin')} of {counted(packing.capacity, 'token')}"
        what = f"packing fills {packing.efficiency:.1%} of {bins}"
        yield Finding(Level.note, "packing", what)
    elif batch is not None and batch.random > MUCH_PADDING:
        what = (
            f"batches of {counted(batch.batch_size, 'row')} in random order are {batch.random:.0%} padding, grouped by "
            f"length {batch.by_length:.0%}"
        )
        yield Finding(Level.note, "padding", what, (), 0, "data.batching=packed or by_length, unless it is set already")


def _bins(rows: TokenRows, packing: Packing) -> PackedBins:
    count = min(BINS_DRAWN, len(packing))
    some = [packing.bin(index * len(packing) // count) for index in range(count)]
    drawn = sorted((tuple(rows.lengths[one].tolist()) for one in some), key=sum, reverse=True)
    return PackedBins(packing.capacity, len(packing), packing.efficiency, tuple(drawn))


def _facts(special: SpecialTokens, found: Scan) -> tuple[TokenFact, ...]:
    rows, runs = len(found.indices), found.runs
    wrong = sum(len(part) for part in found.missing_bos)
    begins = f"put first by the tokenizer; {rows - wrong:,} of {counted(rows, 'row')} begin with it"
    closing = found.closed.commonest
    ends = found.closed.counts.get(closing, 0) if closing is not None else 0
    stops = "ends generation" if closing in special.stops else "does not end generation"
    is_harmless = special.pad is not None and special.pad in (special.eos, closing)
    return (
        TokenFact(
            "beginning of text",
            special.name(special.bos),
            special.bos,
            begins if special.adds_bos else "not added by the tokenizer",
        ),
        TokenFact(
            "end of turn",
            special.name(closing),
            closing,
            f"trained; closes {ends:,} of {counted(runs, 'answer')}; {stops}"
            if closing is not None
            else "no answer ends with one",
        ),
        TokenFact("end of text", special.name(special.eos), special.eos, "the tokenizer's own"),
        TokenFact(
            "padding",
            special.name(special.pad),
            special.pad,
            "also ends turns; harmless, padding is masked by its place" if is_harmless else "never trained",
        ),
        TokenFact(
            "unknown",
            special.name(special.unk),
            special.unk,
            f"{found.everywhere.counts.get(special.unk, 0):,} in the rows" if special.unk is not None else "",
        ),
    )


def _spelled(tokenizer: "PreTrainedTokenizerFast", token: int) -> str:
    return repr(tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False))
