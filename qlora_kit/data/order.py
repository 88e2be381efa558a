"""In which order an epoch reads its rows, from a seed and the epoch's number alone."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np

from qlora_kit.data.packing import Packing
from qlora_kit.data.tokens import Ints
from qlora_kit.schema.data import Batching
from qlora_kit.schema.trainer import TrainerConfig

SamplerOrder = Callable[[int], Ints]  # number of an epoch -> the items that it reads, in order

MOST_SIZES = 8  # of rows of several: layers are recorded for each, which takes a second and memory
SIZE_STEP = 64  # tokens: what kernels take at a time
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
    if in_one_row and padding_share(batching, trainer, lengths, processes) >= WORTH:
        return row_sizes(batching, trainer, lengths, processes)[-1]
    return max(
        int(padded.max()) for padded, _ in _batches_of_a_run(batching, trainer, lengths, processes, is_largest=True)
    )


def row_sizes(batching: Batching, trainer: TrainerConfig, lengths: Ints, processes: int = 1) -> tuple[int, ...]:
    """Tokens that rows of several are filled up to, from the smallest on: few, and each for as many batches.

    Args:
        lengths: `[N]`, tokens of each row.
    """
    of_a_run = _batches_of_a_run(batching, trainer, lengths, processes)
    tokens = np.concatenate([real for _, real in of_a_run])
    shares = np.arange(1, MOST_SIZES + 1) / MOST_SIZES
    sizes = np.quantile(tokens, shares, method="higher")
    return tuple(sorted({filled(int(size), ()) for size in sizes}))


def padding_share(batching: Batching, trainer: TrainerConfig, lengths: Ints, processes: int = 1) -> float:
    """How much of all tokens is padding where the rows of each batch are padded to its longest.

    Args:
        lengths: `[N]`, tokens of each row.
    """
    order = epoch_order(batching, lengths, len(lengths), trainer.batch_size * processes, trainer.seed)
    padded, real = _batches(lengths[order(0)], trainer.batch_size)
    return 1 - float(real.sum() / padded.sum())


def filled(tokens: int, sizes: Sequence[int]) -> int:
    """Tokens of the row that so many are filled up to: the next of the sizes, or a whole number of steps."""
    return next((size for size in sizes if size >= tokens), -(-tokens // SIZE_STEP) * SIZE_STEP)


def _batches_of_a_run(
    batching: Batching, trainer: TrainerConfig, lengths: Ints, processes: int, *, is_largest: bool = False
) -> Iterator[tuple[Ints, Ints]]:
    """What `_batches` gives, epoch by epoch as far as a run goes.

    Args:
        is_largest: no further epoch than the one that has a padded batch as large as any can be.
    """
    order = epoch_order(batching, lengths, len(lengths), trainer.batch_size * processes, trainer.seed)
    steps = trainer.steps(len(lengths), processes)
    left, epoch = steps * trainer.gradient_accumulation * trainer.batch_size * processes, 0
    while left > 0:
        found = _batches(lengths[order(epoch)[:left]], trainer.batch_size)
        yield found
        if is_largest and found[0].max() >= trainer.batch_size * lengths.max():
            return
        left, epoch = left - len(lengths), epoch + 1


def _batches(lengths: Ints, rows: int) -> tuple[Ints, Ints]:
    """Tokens of batches of rows of these lengths, read in this order: `[batches]` with padding, and without."""
    starts = np.arange(0, len(lengths), rows)
    padded = np.maximum.reduceat(lengths, starts) * np.minimum(rows, len(lengths) - starts)
    return padded, np.add.reduceat(lengths, starts)
