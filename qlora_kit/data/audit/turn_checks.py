"""Findings about special tokens: how rows begin, how answers end, and what should not stand inside them."""

from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import numpy as np

from qlora_kit.core.units import counted
from qlora_kit.data.audit.finding import Finding, Level, places
from qlora_kit.data.audit.special_tokens import SpecialTokens
from qlora_kit.data.audit.token_scan import Scan, Tally
from qlora_kit.data.tokens import Ints, TokenRows
from qlora_kit.schema.data import TrainOn

SEEN_IN_TEXT = "special_token_in_text"
RARE = 0.01  # of answers: fewer end this way by accident
OFTEN, OFTEN_AT_LEAST = 0.05, 20  # of answers: more hold a token because the template writes it there
MANY_UNKNOWN = 0.001  # of tokens

OTHER_TEMPLATE = "model.chat_template=<a Jinja file that {}>"


@dataclass(frozen=True)
class Turns:
    """What the checks of one set of rows look at; `spell` shows any token as text."""

    rows: TokenRows
    scan: Scan
    special: SpecialTokens
    train_on: TrainOn
    spell: Callable[[int], str]

    def at(self, rows: list[Ints]) -> tuple[tuple[str, ...], int]:
        """The first places of some rows, and how many rows there are."""
        found = np.concatenate(rows) if rows else np.zeros(0, dtype=np.int64)
        return places(found, self.rows.place), len(found)

    def first(self, tally: Tally, token: int) -> tuple[str, ...]:
        """The first places where a token was counted."""
        return places(tally.rows.get(token, []), self.rows.place)


def turn_findings(turns: Turns, noted: AbstractSet[str] = frozenset()) -> Iterator[Finding]:
    """Every finding about special tokens.

    Args:
        noted: names of findings that reading the rows gave; a token seen in a text is not told again by its count.
    """
    yield from _beginnings(turns)
    yield from _ends(turns)
    yield from _stops(turns)
    yield from _inside(turns, is_noted=SEEN_IN_TEXT in noted)
    yield from _padding_token(turns)
    yield from _unknown(turns)


def _beginnings(turns: Turns) -> Iterator[Finding]:
    special = turns.special
    bos = special.name(special.bos)
    where, count = turns.at(turns.scan.double_bos)
    if count:
        fix = f"take {bos} out of the rows, or {OTHER_TEMPLATE.format('writes it once')}"
        yield Finding(
            Level.error,
            "double_bos",
            f"{counted(count, 'row begins', 'rows begin')} with {bos} twice",
            where,
            count,
            fix,
        )
    where, count = turns.at(turns.scan.missing_bos)
    if count:
        what = f"{counted(count, 'row does', 'rows do')} not begin with {bos}, which the model has always seen first"
        yield Finding(
            Level.error, "missing_bos", what, where, count, OTHER_TEMPLATE.format("begins with {{ bos_token }}")
        )
    where, count = turns.at(turns.scan.later_bos)
    if count:
        what = f"{counted(count, 'row holds', 'rows hold')} {bos} in the middle, where the template writes none"
        yield Finding(Level.warning, "bos_inside_row", what, where, count, f"take {bos} out of the rows")


def _ends(turns: Turns) -> Iterator[Finding]:
    scan, eos = turns.scan, turns.special.name(turns.special.eos)
    if not scan.unclosed.total:
        return
    where, rows = turns.at(scan.unclosed_rows)
    token = scan.unclosed.commonest
    seen = turns.spell(token) if token is not None else ""
    if not scan.closed.total:
        what = (
            f"no answer ends with a special token, so the model would never learn to stop; what ends them is {seen}, "
            f"in {scan.unclosed.counts.get(token or 0, 0)} of {scan.runs}"
        )
        fix = f"{OTHER_TEMPLATE.format(f'ends an answer with {eos}')}, or data.overflow=drop where rows were cut"
        yield Finding(Level.error, "never_stops", what, where, rows, fix)
        return
    what = (
        f"{counted(rows, 'row holds', 'rows hold')} trained text that no end-of-turn token closes, which teaches the "
        f"model to break off; most often it ends with {seen}"
    )
    yield Finding(Level.warning, "answer_not_closed", what, where, rows, "data.overflow=drop or split_turns")


def _stops(turns: Turns) -> Iterator[Finding]:
    scan, special = turns.scan, turns.special
    known = ", ".join(special.name(token) for token in sorted(special.stops)) or "none"
    for token, count in sorted(scan.closed.counts.items()):
        if token not in special.stops and count >= RARE * scan.runs:
            what = (
                f"{count:,} of {counted(scan.runs, 'answer ends', 'answers end')} with {special.name(token)}, which "
                f"does not end generation "
                f"(what does: {known}), so servers would write on"
            )
            fix = f"add {token} to eos_token_id in the base's generation_config.json"
            where = turns.first(scan.closed, token)
            yield Finding(Level.warning, "stop_not_in_generation_config", what, where, count, fix)


def _inside(turns: Turns, *, is_noted: bool) -> Iterator[Finding]:
    scan, special = turns.scan, turns.special
    if turns.train_on is not TrainOn.everything:
        for token, count in sorted(scan.inside.counts.items()):
            if token in (special.pad, special.unk) and token not in special.stops:
                continue
            if _is_foreign(turns, token, count):
                name = special.name(token)
                often = counted(count, "time")
                what = (
                    f"{name} stands inside an answer, before its end, {often}: the model would learn to write it there"
                )
                where = turns.first(scan.inside, token)
                fix = f"take {name} out of the rows' text"
                yield Finding(Level.warning, "special_token_inside_answer", what, where, count, fix)
    where, count = turns.at(scan.extra_closings)
    if count and not is_noted:
        name = special.name(special.closing)
        what = f"{counted(count, 'row holds', 'rows hold')} more {name} than turns, so it stands in the text"
        yield Finding(Level.warning, SEEN_IN_TEXT, what, where, count, f"take {name} out of the rows' text")


def _is_foreign(turns: Turns, token: int, count: int) -> bool:
    """Whether a token inside answers comes from their text rather than from the template."""
    scan, special = turns.scan, turns.special
    if token not in special.written:
        return True
    if token == scan.closed.commonest:
        return True
    turning = {special.bos, special.opening, special.closing, *special.stops}
    # Templates with channels or tool calls open and close several parts in one answer, in many rows.
    return token in turning and count < max(OFTEN * scan.runs, OFTEN_AT_LEAST)


def _padding_token(turns: Turns) -> Iterator[Finding]:
    special, scan = turns.special, turns.scan
    if special.pad is None:
        return
    name = special.name(special.pad)
    if special.pad in (special.eos, scan.closed.commonest):
        what = (
            f"{name} both ends a turn and pads; harmless here, where padding is masked by its place and not by its id"
        )
        yield Finding(Level.note, "pad_is_eos", what)
    elif count := scan.inside.counts.get(special.pad, 0):
        where = turns.first(scan.inside, special.pad)
        what = f"the pad token {name} stands inside an answer {counted(count, 'time')}"
        yield Finding(Level.warning, "pad_inside_answer", what, where, count, f"take {name} out of the rows' text")


def _unknown(turns: Turns) -> Iterator[Finding]:
    special, scan = turns.special, turns.scan
    if special.unk is None or special.unk in (special.bos, special.eos, special.pad):
        return
    count = scan.everywhere.counts.get(special.unk, 0)
    if count:
        share = count / max(1, int(turns.rows.lengths[scan.indices].sum()))
        unknown = f"{counted(count, 'token is', 'tokens are')} {special.name(special.unk)} ({share:.2%})"
        what = f"{unknown}: characters that the tokenizer cannot write"
        level = Level.warning if share > MANY_UNKNOWN else Level.note
        fix = "replace those characters, or use a base whose tokenizer knows them"
        yield Finding(level, "unknown_tokens", what, turns.first(scan.everywhere, special.unk), count, fix)
