"""In which order an epoch reads its rows, from a seed and the epoch's number alone."""

from collections.abc import Callable
from functools import partial

import numpy as np

from qlora_kit.data.packing import Packing
from qlora_kit.data.tokens import Ints
from qlora_kit.schema.data import Batching
from qlora_kit.schema.trainer import TrainerConfig

SamplerOrder = Callable[[int], Ints]  # number of an epoch -> the items that it reads, in order

SIZES_BITS = 5  # rows of several have at most 16 sizes between one power of two and the next: kernels meet few shapes
WORTH = 0.05  # of the tokens that are padding, from where on rows lie one after another
GROUPS_IN_A_POOL = 50  # rows are sorted by length inside pools, so that batches still differ from epoch to epoch


def shuffled(count: int, seed: int, epoch: int) -> Ints:
    """`[count]` int64, every index once."""
    return np.random.default_rng((seed, epoch)).permutation(count)


def by_length(lengths: Ints, group: int, seed: int, epoch: int) -> Ints:
    """`[N]` int64, every index once, so that each `group` in a row have about the same length.

    The longest row is in the first group, so that a batch that does not fit into memory ends the run at its start; the
    rows that fill no group come last.

    Args:
        lengths: `[N]`, tokens of each row.
        group: rows that are computed at one time, on all devices together.
    """
    draw = np.random.default_rng((seed, epoch))
    order = draw.permutation(len(lengths))
    grouped = len(order) - len(order) % group
    if grouped == 0:
        return order
    longest = int(np.argmax(lengths[order]))
    order[[0, longest]] = order[[longest, 0]]
    pool = GROUPS_IN_A_POOL * group
    for start in range(0, grouped, pool):
        part = order[start : min(start + pool, grouped)]
        part[:] = part[np.argsort(-lengths[part], kind="stable")]
    groups = order[:grouped].reshape(-1, group)
    groups[1:] = draw.permutation(groups[1:])
    return order


def epoch_order(batching: Batching, lengths: Ints, items: int, group: int, seed: int) -> SamplerOrder:
    """The order that a recipe asks for.

    Args:
        lengths: `[N]`, tokens of each row.
        items: rows, or bins of a packing.
        group: rows that are computed at one time, on all devices together.
    """
    if batching is Batching.by_length:
        return partial(by_length, lengths, group, seed)
    return partial(shuffled, items, seed)


def tokens_at_once(
    batching: Batching,
    trainer: TrainerConfig,
    lengths: Ints,
    packing: Packing | None,
    processes: int = 1,
    *,
    in_one_row: bool = False,
) -> int:
    """Tokens of the largest forward pass of a run on one device, padding included.

    Args:
        lengths: `[N]`, tokens of each row.
        packing: of the rows, where they are packed.
        in_one_row: the rows of a batch lie one after another, where padding them would be `WORTH` it.
    """
    if packing is not None:
        return trainer.batch_size * packing.capacity
    together = in_one_row and padding_share(batching, trainer, lengths, processes) >= WORTH
    order = epoch_order(batching, lengths, len(lengths), trainer.batch_size * processes, trainer.seed)
    steps = trainer.steps(len(lengths), processes)
    left, largest, epoch = steps * trainer.gradient_accumulation * trainer.batch_size * processes, 0, 0
    while left > 0 and largest < trainer.batch_size * int(lengths.max()):
        padded, real = _batches(lengths[order(epoch)[:left]], trainer.batch_size)
        largest = max(largest, filled(int(real.max())) if together else int(padded.max()))
        left, epoch = left - len(lengths), epoch + 1
    return largest


def padding_share(batching: Batching, trainer: TrainerConfig, lengths: Ints, processes: int = 1) -> float:
    """How much of all tokens is padding where the rows of each batch are padded to its longest.

    Args:
        lengths: `[N]`, tokens of each row.
    """
    order = epoch_order(batching, lengths, len(lengths), trainer.batch_size * processes, trainer.seed)
    padded, real = _batches(lengths[order(0)], trainer.batch_size)
    return 1 - float(real.sum() / padded.sum())


def filled(tokens: int) -> int:
    """Tokens of the row that so many are filled up to, where several lie in it: a sixteenth more at the most."""
    step = 1 << max(0, (tokens - 1).bit_length() - SIZES_BITS)
    return -(-tokens // step) * step


def _batches(lengths: Ints, rows: int) -> tuple[Ints, Ints]:
    """Tokens of batches of rows of these lengths, read in this order: `[batches]` with padding, and without."""
    starts = np.arange(0, len(lengths), rows)
    padded = np.maximum.reduceat(lengths, starts) * np.minimum(rows, len(lengths) - starts)
    return padded, np.add.reduceat(lengths, starts)
