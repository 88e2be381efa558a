"""In which order an epoch reads its rows, from a seed and the epoch's number alone."""

import numpy as np

from qlora_kit.data.tokens import Ints

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
