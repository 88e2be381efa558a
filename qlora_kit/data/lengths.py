"""What becomes of a row longer than `data.max_tokens`: cut only as the recipe says, and all of it counted."""

from collections.abc import Iterable
from itertools import pairwise

import numpy as np

from qlora_kit.core.errors import RecipeError
from qlora_kit.core.units import counted
from qlora_kit.data.summary import LongRowCounts
from qlora_kit.data.tokens import Ints, TokenRows
from qlora_kit.schema.data import Overflow

MOST_LINES_NAMED = 20
Cut = tuple[int, int, int]  # head, begin, end: what is left of a row


def truncate_or_drop(
    rows: TokenRows, max_tokens: int, policy: Overflow, bos: int | None
) -> tuple[TokenRows, LongRowCounts]:
    """Rows of at most `max_tokens` tokens, each with a loss token, and what was done to get there.

    `truncate_prompt` takes tokens from the left, between the beginning-of-text token and the first loss token. In
    `split_turns` every piece begins with what stands before the first user turn; a turn that is too long for itself is
    left out.

    Args:
        bos: the beginning-of-text id, kept in front when the prompt is cut.

    Raises:
        RecipeError: there are longer rows and the policy is `error`, or no row is left.
    """
    long = np.flatnonzero(rows.lengths > max_tokens)
    if len(long) and policy is Overflow.error:
        raise _too_long(rows, long, max_tokens)
    fitted, dropped, cut, pieces = rows, 0, 0, 0
    if len(long):
        left = {int(index): _left(rows, int(index), max_tokens, policy, bos) for index in long}
        dropped = sum(not cuts for cuts in left.values())
        cut = len(left) - dropped
        pieces = sum(map(len, left.values())) if policy is Overflow.split_turns else 0
        fitted = _with_cuts(rows, left)
    is_trained = fitted.trained_counts > 0
    untrained = int((~is_trained).sum())
    if untrained:
        fitted = fitted.select(np.flatnonzero(is_trained))
    if not len(fitted):
        raise RecipeError(
            f"every row is longer than data.max_tokens={max_tokens}, so none is left",
            where=rows.place(0),
            fix=f"data.max_tokens={int(rows.lengths.max())}",
        )
    return fitted, LongRowCounts(len(long), dropped, cut, pieces, untrained)


def describe_long_rows(counts: LongRowCounts, name: str, policy: Overflow, max_tokens: int) -> list[str]:
    """Lines for the user: one for each thing that happened to the rows of a split."""
    lines = []
    if counts.dropped:
        lines.append(f"{name}: dropped {counted(counts.dropped, 'row')} longer than data.max_tokens={max_tokens}")
    if counts.cut and policy is Overflow.split_turns:
        lines.append(
            f"{name}: split {counted(counts.cut, 'row')} longer than data.max_tokens={max_tokens} into {counts.pieces}"
        )
    elif counts.cut:
        part = "end" if policy is Overflow.truncate_end else "prompt"
        lines.append(f"{name}: cut the {part} of {counted(counts.cut, 'row')} to data.max_tokens={max_tokens}")
    if counts.untrained:
        lines.append(f"{name}: dropped {counted(counts.untrained, 'row')} that had no loss token left")
    return lines


def _left(rows: TokenRows, index: int, limit: int, policy: Overflow, bos: int | None) -> list[Cut]:
    """What is kept of a long row: nothing, one piece, or several."""
    if policy is Overflow.truncate_end:
        return [(0, 0, limit)]
    if policy is Overflow.truncate_prompt:
        ids, trained = rows.arrays(index)
        head = 1 if bos is not None and ids[0] == bos else 0
        begin = len(ids) - limit + head
        return [(head, begin, len(ids))] if begin <= int(trained.argmax()) else []
    if policy is Overflow.split_turns:
        return _split(rows, index, limit)
    return []


def _split(rows: TokenRows, index: int, limit: int) -> list[Cut]:
    table, row = rows.store.table, int(rows.rows[index])
    places = table.turn_starts[table.turn_offsets[row] : table.turn_offsets[row + 1]].tolist()
    if not places:
        return []
    head = places[0]
    borders = [*places, int(rows.lengths[index])]
    pieces: list[Cut] = []
    for begin, end in pairwise(borders):
        if pieces and pieces[-1][2] == begin and head + end - pieces[-1][1] <= limit:
            pieces[-1] = (head, pieces[-1][1], end)
        elif head + end - begin <= limit:
            pieces.append((head, begin, end))
    return pieces


def _with_cuts(rows: TokenRows, left: dict[int, list[Cut]]) -> TokenRows:
    """The rows in their order, long ones replaced by what is left of them."""
    short = np.setdiff1d(np.arange(len(rows)), np.fromiter(left, np.int64, len(left)))
    cuts = [(index, *cut) for index, kept in left.items() for cut in kept]
    at, heads, begins, ends = np.array(cuts, dtype=np.int64).reshape(-1, 4).T
    order = np.argsort(np.concatenate((short, at)), kind="stable")

    def merged(of_short: Ints, of_cut: Ints) -> Ints:
        return np.concatenate((of_short, of_cut))[order]

    return TokenRows(
        rows.store,
        merged(rows.rows[short], rows.rows[at]),
        merged(rows.heads[short], heads),
        merged(rows.begins[short], begins),
        merged(rows.ends[short], ends),
    )


def _too_long(rows: TokenRows, long: Ints, max_tokens: int) -> RecipeError:
    longest = int(rows.lengths.max())
    files = sorted({rows.place(int(index)).rpartition(":")[0] for index in long[:MOST_LINES_NAMED]})
    lines = (int(rows.store.table.lines[rows.rows[index]]) for index in long)
    return RecipeError(
        f"{len(long):,} of {counted(len(rows), 'row')} {'is' if len(long) == 1 else 'are'} longer than "
        f"data.max_tokens={max_tokens}; "
        f"the longest has {longest} tokens",
        where=f"{', '.join(files)}, {named_lines(lines, len(long))}",
        fix=f"data.max_tokens={longest} or data.overflow=drop (or truncate_end, truncate_prompt, split_turns)",
    )


def named_lines(lines: Iterable[int], count: int) -> str:
    """The first `MOST_LINES_NAMED` line numbers, and how many more there are."""
    first = [str(line) for line, _ in zip(lines, range(MOST_LINES_NAMED), strict=False)]
    more = f" and {count - len(first)} more" if count > len(first) else ""
    return f"line{'s' if count > 1 else ''} {', '.join(first)}{more}"
