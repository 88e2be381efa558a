"""Which stored rows are trained on and which are held out: the mix of sources and the split, seeded and repeatable."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from qlora_kit.core.errors import RecipeError
from qlora_kit.core.units import counted
from qlora_kit.data.tokens import Ints, TokenStore
from qlora_kit.schema.data import SourceConfig


def mixed(store: TokenStore, sources: Mapping[str, SourceConfig], seed: int) -> Ints:
    """Rows of each source in the wanted numbers, in the order they were read.

    Weights are relative: the mix is as large as the scarcest source allows, and no row comes twice.

    Raises:
        RecipeError: a source has fewer rows than `rows` asks for, or some sources have weights and others not.
    """
    names = np.array([file.source for file in store.files])[store.table.files]
    available = {name: np.flatnonzero(names == name) for name in sources}
    wanted = _wanted({name: len(rows) for name, rows in available.items()}, sources)
    chosen = []
    for number, (name, rows) in enumerate(available.items()):
        if wanted[name] < len(rows):
            draw = np.random.default_rng([seed, number])
            rows = np.sort(draw.choice(rows, wanted[name], replace=False))
        chosen.append(rows)
    return np.sort(np.concatenate(chosen)) if chosen else np.zeros(0, dtype=np.int64)


def _wanted(available: Mapping[str, int], sources: Mapping[str, SourceConfig]) -> dict[str, int]:
    weights = {name: source.weight for name, source in sources.items() if source.weight is not None}
    if weights:
        total = sum(weights.values())
        size = min(available[name] * total / weight for name, weight in weights.items())
        return {name: round(size * weight / total) for name, weight in weights.items()}
    for name, source in sources.items():
        if source.rows is not None and source.rows > available[name]:
            raise RecipeError(
                f"source {name} has {counted(available[name], 'row')}, fewer than the {source.rows} that the "
                "mix asks for",
                where=f"data.sources.{name}.rows",
                fix=f"data.sources.{name}.rows={available[name]}",
            )
    return {name: source.rows or available[name] for name, source in sources.items()}


def held_out(
    store: TokenStore, rows: Ints, share: float | None, count: int | None, seed: int
) -> tuple[Ints, Ints, int]:
    """Training rows, held-out rows, and how many copies of held-out rows were left out of both.

    A row is held out by its content and the seed alone, so it stays held out when other rows come or go, and equal rows
    never end up on both sides. Both bounds together are a share of the rows, `count` of them at most.

    Args:
        share: of the different rows; at least one of them is held out.
        count: as many rows, or at most as many of the share.

    Raises:
        RecipeError: nothing would be left to train on.
    """
    order = _shuffled_hashes(store.table.hashes[rows], seed)
    values, first = np.unique(order, return_index=True)
    if share is not None:
        within = int((values < np.uint64(min(share * 2.0**64, 2.0**64 - 1))).sum())
        wanted = min(max(within, 1), count or len(values))
    else:
        wanted = count or 0
    chosen = values[:wanted]
    if len(chosen) == len(values):
        what = "data.eval_share" if share is not None else "data.eval_rows"
        raise RecipeError(
            f"{what}={share if share is not None else count} of "
            f"{counted(len(values), 'different row')} leaves no row to train on",
            where=what,
            fix="data.eval_share=null data.eval_rows=null",
        )
    is_chosen = np.isin(order, chosen)
    firsts = np.zeros(len(rows), dtype=np.bool_)
    firsts[first] = True
    out = rows[is_chosen & firsts]
    return rows[~is_chosen], out, int(is_chosen.sum()) - len(out)


def _shuffled_hashes(hashes: npt.NDArray[np.uint8], seed: int) -> npt.NDArray[np.uint64]:
    """A number for each content that the seed scatters evenly over 64 bits (the finalizer of splitmix64)."""
    halves = np.ascontiguousarray(hashes).view(np.uint64)
    with np.errstate(over="ignore"):
        mixed = halves[:, 0] ^ (halves[:, 1] * np.uint64(0x9E3779B97F4A7C15)) ^ np.uint64(seed * 2 + 1)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def shared_rows(train: TokenStore, train_rows: Ints, other: TokenStore, other_rows: Ints) -> list[tuple[int, int]]:
    """Pairs (row of `other`, first training row) that say the same."""
    mine = _shuffled_hashes(train.table.hashes[train_rows], 0)
    theirs = _shuffled_hashes(other.table.hashes[other_rows], 0)
    values, first = np.unique(mine, return_index=True)
    if len(values) == 0:
        return []
    places = np.minimum(np.searchsorted(values, theirs), len(values) - 1)
    found = np.flatnonzero(values[places] == theirs)
    return [(int(other_rows[index]), int(train_rows[first[places[index]]])) for index in found]
