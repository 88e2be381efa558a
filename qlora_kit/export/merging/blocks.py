"""Finished rows of one tensor: the base's values, rounded where they were in training, plus the adapter's update."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qlora_kit.adapter.expert_updates import StackUpdate
from qlora_kit.adapter.updates import LowRank, Update
from qlora_kit.core.errors import RunError
from qlora_kit.export.merging.packed import PackedWeight
from qlora_kit.export.merging.plan import Piece, block_spans
from qlora_kit.export.merging.rounded import Rounding, read_stored, taken_out
from qlora_kit.export.merging.stacks import RoundedStacks
from qlora_kit.weights.torch_rows import read_rows, read_whole

if TYPE_CHECKING:
    from torch import Tensor

SLICE = 1 << 17  # values that are merged at once on a CPU; their float32 copy stays in a core's own cache


@dataclass(frozen=True)
class Block:
    """Rows as they are written, on the CPU, and whether the adapter changed a value of them."""

    values: "Tensor"
    changed: bool


def merge_rows(
    piece: Piece,
    update: Update | StackUpdate | None,
    rounding: Rounding,
    start: int,
    stop: int,
    room: "Tensor | None" = None,
) -> Block:
    """Rows start..stop of a tensor that can be merged row by row.

    Args:
        room: bytes to read the rows into; where the block ends up in them, they are the caller's to use again.
    Raises:
        RunError: the source ends early, or a merged value is not finite.
    """
    import torch

    stored = read_rows(piece.source, start, stop, room)
    if update is not None:
        return _added(piece, stored.to(rounding.device), update, start)
    if piece.replaced and not bool(stored.isfinite().all()):
        raise not_finite_error(piece)
    if piece.dtype == piece.source.dtype:
        return Block(stored, changed=False)
    return Block(stored.to(torch.bfloat16), changed=False)


def merge_whole(piece: Piece, rounding: Rounding, room: "Tensor", stacks: RoundedStacks) -> Iterator[tuple[int, Block]]:
    """A tensor that has to be read whole: to be rounded, unpacked, or freed of what an initialization took out.

    Args:
        room: as for `merge_rows`, of at least BLOCK values in 16 bit.
        stacks: of experts, where it is a part of one.
    Returns:
        Its blocks, those of `block_spans`, with the first row of each; one is done with when the next is asked for.
    Raises:
        RunError: the source ends early, or a merged value is not finite.
    """
    update = piece.update
    if piece.rounds and piece.stack:
        loaded = update.load(rounding.device) if update else None
        for start, stop in block_spans(piece.shape):
            yield start, _added(piece, stacks.rows(piece.stack, start, stop), loaded, start)
        return
    is_plain = not piece.state and not piece.flipped and not (update and update.init)
    if piece.rounds and is_plain and rounding.packs(piece.shape):
        yield from _merge_packed(piece, rounding, room)
        return
    merged = _merge_unpacked(piece, rounding)
    for start, stop in block_spans(piece.shape):
        yield start, Block(merged.values[start:stop], merged.changed)


def _merge_unpacked(piece: Piece, rounding: Rounding) -> Block:
    import torch

    if piece.state:
        weight = read_stored(piece.source, piece.state, rounding.device)
    elif piece.rounds and piece.flipped:
        weight = rounding.exact(read_whole(piece.source).t().contiguous()).t().contiguous()
    elif piece.rounds:
        weight = rounding.exact(read_whole(piece.source))
    else:
        weight = read_whole(piece.source).to(rounding.device).float()
    if piece.update is None:
        return Block(weight.to(torch.bfloat16).cpu(), changed=False)
    update = piece.update.load(rounding.device)
    if piece.update.init:
        return _added(piece, _as_started(piece, weight, rounding), update, before=weight)
    return _added(piece, weight, update)


def _merge_packed(piece: Piece, rounding: Rounding, room: "Tensor") -> Iterator[tuple[int, Block]]:
    """Twice over the rows, so that they lie in a core's cache both times: to round them, and to add the update."""
    import torch

    spans = list(block_spans(piece.shape))
    needed = max(stop - start for start, stop in spans) * piece.source.row_bytes
    room = room if len(room) >= needed else torch.empty(needed, dtype=torch.uint8)
    weight = rounding.packed((read_rows(piece.source, *span, room) for span in spans), piece.shape)
    update = piece.update.load(rounding.device) if piece.update else None
    for start, stop in spans:
        shape = (stop - start, piece.shape[1])
        values = room.view(torch.bfloat16)[: math.prod(shape)].view(shape)
        yield start, _added(piece, weight.rows(start, stop), update, start, values=values)


def _as_started(piece: Piece, weight: "Tensor", rounding: Rounding) -> "Tensor":
    """The weight that was left when the initialization had taken its factors out of the one met in training."""
    update = piece.update
    assert isinstance(update, LowRank)  # the caller's condition
    if piece.state:
        met = weight
    elif piece.met_rounded:
        met = rounding.met(read_whole(piece.source))
    else:
        met = rounding.unrounded(read_whole(piece.source))
    taken = taken_out(met, update.rank, update.init)
    if update.init == "olora":
        taken *= update.scaling
    if piece.state or piece.rounds:
        return rounding.round_trip((met - taken).cpu())  # peft rounds what is left again
    return weight - taken


def _added(
    piece: Piece,
    weight: "Tensor | PackedWeight",
    update: Update | StackUpdate | None,
    start: int = 0,
    before: "Tensor | None" = None,
    values: "Tensor | None" = None,
) -> Block:
    """The sum, in `values` if given; 16-bit rows on a CPU are overwritten, which spares a second block."""
    import torch

    step = len(weight) if weight.is_cuda else max(1, SLICE // weight.shape[1])
    if not isinstance(weight, PackedWeight) and weight.dtype == torch.bfloat16 and not weight.is_cuda:
        values = weight
    if values is None:
        values = torch.empty(weight.shape, dtype=torch.bfloat16)
    changed, unpacked = False, isinstance(weight, PackedWeight)
    for first in range(0, len(weight), step):
        rows = slice(first, first + step)
        part = weight[rows]
        if update is None:
            values[rows] = part
            continue
        # What was unpacked just now is nobody else's, and is needed no more once a change was found.
        sums = part if unpacked and changed else part.to(torch.float32, copy=True)
        update.add(sums, start + first)
        if not bool(sums.sum().isfinite()):
            raise not_finite_error(piece)
        if not changed:
            old = part if before is None else before[rows]
            changed = not torch.equal(sums.to("cpu", torch.bfloat16), old.to("cpu", torch.bfloat16))
        values[rows] = sums  # rounds to the nearest, on a GPU while it is copied
    return Block(values, changed)


def not_finite_error(piece: Piece) -> RunError:
    """The error for a tensor whose merged values are no numbers."""
    where = str(piece.source.file)
    return RunError(
        f"{piece.name} is not finite when merged: {piece.source.file.name} is damaged, or the adapter has diverged",
        where=where,
        fix="fetch the base again, or export an earlier checkpoint",
    )
