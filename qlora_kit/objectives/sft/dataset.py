"""Token rows as the Dataset that TRL asks for: numbers of rows or bins, read from the store when a batch needs them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from datasets import Dataset

from qlora_kit.data.packing import Packing
from qlora_kit.data.tokens import Ints, TokenRows, TokenStore
from qlora_kit.objectives.sft.collate import IGNORED_LABEL, Feature, feature

NOTHING_TRAINED = -1  # an item that fills a batch and adds nothing to a loss


class _Reader:
    """Reads items from the store; pickled, and so hashed by `datasets`, without the store's tokens."""

    def __init__(self, rows: TokenRows, packing: Packing | None) -> None:
        self.rows = rows
        self.packing = packing

    def __call__(self, batch: dict[str, list[int]]) -> dict[str, list[Ints]]:
        items = [self._item(index) for index in batch["item"]]
        return {name: [item[name] for item in items] for name in ("input_ids", "labels", "lengths")}

    def _item(self, index: int) -> Feature:
        if index == NOTHING_TRAINED:
            filler = feature(self.rows, [0])
            return {**filler, "labels": np.full_like(filler["labels"], IGNORED_LABEL)}
        return feature(self.rows, [index] if self.packing is None else self.packing.bin(index))

    def __reduce__(self) -> "tuple[Callable[..., _Reader], tuple[Path, Ints, Ints, Ints, Ints, Packing | None]]":
        rows = self.rows
        return _reopened, (rows.store.folder, rows.rows, rows.heads, rows.begins, rows.ends, self.packing)


def _reopened(folder: Path, rows: Ints, heads: Ints, begins: Ints, ends: Ints, packing: Packing | None) -> _Reader:
    return _Reader(TokenRows(TokenStore(folder), rows, heads, begins, ends), packing)


def training_dataset(rows: TokenRows, packing: Packing | None = None, multiple: int = 1) -> Dataset:
    """One item for each row, or for each bin of a packing; an item is what `feature` gives.

    Args:
        multiple: the number of items is made one of it, by items in which nothing is trained. Without this, several
            processes that share the rows of an evaluation would count the first ones twice.
    """
    count = len(rows) if packing is None else len(packing)
    items = np.full(-(-count // multiple) * multiple, NOTHING_TRAINED, dtype=np.int64)
    items[:count] = np.arange(count)
    return Dataset.from_dict({"item": items}).with_transform(_Reader(rows, packing))
