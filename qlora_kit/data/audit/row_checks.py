"""Findings about rows as wholes: repeats, leaks, odd text, scripts, and what was left out on the way."""

from collections.abc import Iterator
from itertools import islice

import numpy as np

from qlora_kit.core.units import counted
from qlora_kit.data.audit.finding import MOST_PLACES, Finding, Level, places
from qlora_kit.data.audit.near_duplicates import LEAST_OVERLAP, NearDuplicates, content_keys
from qlora_kit.data.audit.oddities import FLAWS, SCRIPTS, WORDS, Oddity
from qlora_kit.data.audit.special_tokens import SpecialTokens
from qlora_kit.data.audit.token_scan import Scan
from qlora_kit.data.summary import LongRowCounts, SplitSummary
from qlora_kit.data.tokens import REASONING_DROPPED, TEXT_DROPPED, Ints, TokenRows
from qlora_kit.schema.data import TrainOn

MANY_REPEATS = 0.01  # of the rows
MOST_TRAINED, LEAST_TRAINED = 0.95, 0.01  # of the tokens
MAJORITY = 0.99  # of the rows: a script that so many have is expected of the rest
MANY_LEFT_OUT = 0.01  # of the rows
ANY_SCRIPT = sum(SCRIPTS)
GRAVE = Oddity.CONTROL | Oddity.REPLACEMENT | Oddity.MOJIBAKE

# What a chat template can leave out of an assistant turn: name of the finding, the loss in words, what to do.
LEFT_OUT = {
    REASONING_DROPPED: (
        "reasoning_left_out",
        "reasoning of an assistant turn, which the chat template leaves out, so it is not learned",
        "write it into the content as the model does, <think>...</think>; if only earlier turns lose it, train_on=last",
    ),
    TEXT_DROPPED: (
        "text_left_out",
        "text beside tool calls, which the chat template leaves out, so it is not learned",
        "give the text a turn of its own, or model.chat_template=<a Jinja file that writes it>",
    ),
}


def repeats(train: TokenRows) -> Iterator[Finding]:
    """Training rows that say exactly what an earlier one says."""
    rows = _stored_once(train)
    keys = content_keys(train)[rows]
    order = np.argsort(keys, kind="stable")
    same = np.append(False, keys[order][1:] == keys[order][:-1])
    count = int(same.sum())
    if count:
        first = np.maximum.accumulate(np.where(same, 0, np.arange(len(order))))
        pairs = np.stack((rows[order[first[same]]], rows[order[same]]), axis=1)
        share = count / len(rows)
        what = f"{counted(count, 'row repeats', 'rows repeat')} an earlier row exactly ({share:.1%})"
        level = Level.warning if share >= MANY_REPEATS else Level.note
        where = _pairs(pairs[np.argsort(pairs[:, 1])], train, train)
        yield Finding(level, "duplicates", what, where, count, "keep one of each, unless they are meant to weigh more")


def leaks(train: TokenRows, held_out: TokenRows) -> Iterator[Finding]:
    """Held-out rows that are training rows too."""
    ours, theirs = content_keys(train), content_keys(held_out)
    rows = _stored_once(held_out)
    rows = rows[np.isin(theirs[rows], ours)]
    if len(rows):
        order = np.argsort(ours, kind="stable")
        known = order[np.searchsorted(ours[order], theirs[rows[:MOST_PLACES]])]
        where = _pairs(np.stack((known, rows[:MOST_PLACES]), axis=1), train, held_out)
        are = counted(len(rows), "held-out row is a training row", "held-out rows are training rows")
        what = f"{are} too, so the held-out loss would flatter the model"
        yield Finding(Level.error, "held_out_leak", what, where, len(rows), "take them out of data.eval_file")


def near_repeats(train: TokenRows, held_out: TokenRows | None, near: NearDuplicates) -> Iterator[Finding]:
    """Training rows that say almost what another says, and held-out rows that do."""
    count = len(near.pairs)
    is_sample = near.train_rows < len(np.unique(content_keys(train)))
    compared = f" of {near.train_rows:,} that were compared, evenly spread" if is_sample else ""
    if count:
        share = count / near.train_rows
        say = counted(count, "row says", "rows say")
        what = f"{say} almost what an earlier row says: overlap {LEAST_OVERLAP:.0%} or more ({share:.1%}{compared})"
        level = Level.warning if share >= MANY_REPEATS else Level.note
        where = _pairs(near.pairs, train, train)
        yield Finding(
            level, "near_duplicates", what, where, count, "keep one of each, unless they are meant to weigh more"
        )
    count = len(near.leaks)
    if held_out is not None and count:
        say = counted(count, "held-out row says", "held-out rows say")
        what = (
            f"{say} almost what a training row says (of {near.held_out_rows:,} compared; overlap {LEAST_OVERLAP:.0%} "
            "or more), so the held-out loss would flatter the model"
        )
        where = _pairs(near.leaks, train, held_out)
        yield Finding(
            Level.warning, "near_leak", what, where, count, "hold out whole topics or sources, not single rows"
        )


def trained_shares(rows: TokenRows, scan: Scan, special: SpecialTokens, train_on: TrainOn) -> Iterator[Finding]:
    """Rows without a loss token, and a share of loss tokens that no chat has."""
    none = scan.indices[scan.trained == 0]
    if len(none):
        where = places(none, rows.place)
        what = f"{counted(len(none), 'row has', 'rows have')} no loss token"
        yield Finding(Level.error, "no_loss_token", what, where, len(none), "data.train_on=assistant, or take them out")
    share = int(scan.trained.sum()) / max(1, int(rows.lengths[scan.indices].sum()))
    if 0 < share < LEAST_TRAINED:
        what = f"only {share:.2%} of the tokens are loss tokens, so most of the work teaches nothing"
        yield Finding(Level.warning, "little_is_trained", what, fix="data.overflow=truncate_prompt, or shorter prompts")
    if share > MOST_TRAINED and train_on is TrainOn.assistant and _is_chat(scan, special):
        what = f"{share:.1%} of the tokens are loss tokens, so prompts are too short to be real; are the roles swapped?"
        yield Finding(Level.warning, "nearly_all_is_trained", what, fix="data.roles={<your role>: user}")


def rows_left_out(name: str, rows: TokenRows, summary: SplitSummary) -> Iterator[Finding]:
    """Rows that were cut, split or dropped for their length, or skipped because they could not be read."""
    counts: LongRowCounts = summary.long_rows
    before = summary.rows + counts.dropped + counts.untrained
    whole = rows.store.lengths
    is_cut = rows.lengths < whole[rows.rows]
    fates = [
        ("rows_dropped", counts.dropped, "were dropped"),
        ("rows_cut", 0 if counts.pieces else counts.cut, "lost tokens"),
        ("rows_split", counts.cut if counts.pieces else 0, f"were split between turns, into {counts.pieces:,}"),
    ]
    for finding, count, fate in fates:
        if count:
            level = Level.warning if count > MANY_LEFT_OUT * before and finding != "rows_split" else Level.note
            what = f"{name} rows longer than {summary.max_tokens:,} tokens that {fate}: {count:,}"
            fix = f"data.max_tokens={whole.max()} keeps every row whole" if finding != "rows_split" else ""
            where = places(np.flatnonzero(is_cut), rows.place) if finding != "rows_dropped" else ()
            yield Finding(level, finding, what, where, count, fix)
    if counts.untrained:
        what = f"{name} rows dropped because no loss token was left: {counts.untrained:,}"
        fix = "data.max_tokens=<more>, or data.overflow=truncate_prompt"
        yield Finding(Level.warning, "rows_left_untrained", what, (), counts.untrained, fix)


def skipped(rows: TokenRows) -> Iterator[Finding]:
    """Rows that could not be read."""
    count = sum(rows.store.bad_row_counts.values())
    if count:
        bad = rows.store.bad_rows[:MOST_PLACES]
        reason = f": {bad[0].why}" if bad else ""
        what = f"{counted(count, 'row')} could not be read and {'was' if count == 1 else 'were'} skipped{reason}"
        where = tuple(f"{row.file}:{row.line}" for row in bad)
        yield Finding(Level.warning, "rows_skipped", what, where, count, "mend them; data.on_bad_row=error names each")


def odd_texts(rows: TokenRows) -> Iterator[Finding]:
    """One finding for each flaw that `oddities` marks."""
    chosen = _stored_once(rows)
    bits = rows.store.table.oddities[rows.rows[chosen]]
    for flaw in FLAWS:
        found = chosen[(bits & flaw) > 0]
        if len(found):
            level = Level.warning if flaw & GRAVE else Level.note
            what = f"{counted(len(found), 'row holds', 'rows hold')} {WORDS[flaw]} ({len(found) / len(chosen):.1%})"
            name = f"text_{(flaw.name or '').lower()}"
            yield Finding(level, name, what, places(found, rows.place), len(found), "mend the rows' text")
    for bit, (name, lost, fix) in LEFT_OUT.items():
        found = chosen[(bits & bit) > 0]
        if len(found):
            what = f"{counted(len(found), 'row loses', 'rows lose')} {lost}"
            yield Finding(Level.warning, name, what, places(found, rows.place), len(found), fix)


def script_shares(rows: TokenRows) -> dict[str, float]:
    """Share of the rows with letters that are written in each script, the largest first."""
    bits = rows.store.table.oddities[rows.rows[_stored_once(rows)]]
    written = int((bits & ANY_SCRIPT > 0).sum())
    shares = {WORDS[script]: float((bits & script > 0).sum()) / written for script in SCRIPTS if written}
    return dict(sorted(((name, share) for name, share in shares.items() if share), key=lambda item: -item[1]))


def scripts(rows: TokenRows) -> Iterator[Finding]:
    """The scripts of the rows, and rows without the script that nearly all others have."""
    shares = script_shares(rows)
    if len(shares) < 2:
        return
    shown = ", ".join(f"{name} {share:.1%}" for name, share in islice(shares.items(), 5))
    yield Finding(Level.note, "scripts", f"rows by script, where it is a tenth of the letters: {shown}")
    name, share = next(iter(shares.items()))
    if share >= MAJORITY:
        majority = next(script for script in SCRIPTS if WORDS[script] == name)
        chosen = _stored_once(rows)
        bits = rows.store.table.oddities[rows.rows[chosen]]
        other = chosen[(bits & ANY_SCRIPT > 0) & (bits & majority == 0)]
        if len(other):
            what = f"{counted(len(other), 'row is', 'rows are')} not in {name}, as {share:.1%} of the rows are"
            where = places(other, rows.place)
            yield Finding(Level.warning, "other_script", what, where, len(other), "look whether they belong here")


def _is_chat(scan: Scan, special: SpecialTokens) -> bool:
    lone = {special.eos, special.bos if special.adds_bos else None}
    return any(token in scan.everywhere.counts for token in special.frames if token not in lone)


def _stored_once(rows: TokenRows) -> Ints:
    """One index for each stored row, the first of its pieces, in order."""
    return np.sort(np.unique(rows.rows, return_index=True)[1])


def _pairs(pairs: Ints, first: TokenRows, second: TokenRows) -> tuple[str, ...]:
    """Places of pairs of rows, the later one first."""
    return tuple(f"{second.place(int(b))} = {first.place(int(a))}" for a, b in pairs[:MOST_PLACES].tolist())
