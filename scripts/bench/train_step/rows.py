"""The rows of a step: random ids, every one trained, the same in every step and for every stack."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from train_step.runs import Batch

if TYPE_CHECKING:
    from qlora_kit.data.tokens import TokenRows

IDS = (300, 500)  # few enough that some steps suffice to learn which ones there are
MEAN, SHAPE, SHORTEST = 250, 0.8, 16  # of the lengths of short rows: lognormal, in tokens


def lengths_of(batch: Batch) -> list[int]:
    """Tokens of each row of one step; short rows are drawn until the next would not fit into the bins."""
    if not batch.packed:
        return [batch.seq_len] * batch.rows
    from qlora_kit.data.packing import pack

    draw = np.random.default_rng(0)
    lengths: list[int] = []
    while True:
        drawn = draw.lognormal(np.log(MEAN) - SHAPE**2 / 2, SHAPE)
        length = int(np.clip(round(drawn * batch.seq_len / 2048), min(SHORTEST, batch.seq_len), batch.seq_len))
        if len(pack(np.array([*lengths, length]), batch.seq_len)) > batch.rows:
            return lengths
        lengths.append(length)


def ids_of(lengths: Sequence[int]) -> list[npt.NDArray[np.int64]]:
    """Random ids of rows of these lengths."""
    draw = np.random.default_rng(1)
    return [draw.integers(*IDS, length) for length in lengths]


def stored(folder: Path, rows: Sequence[npt.NDArray[np.int64]]) -> "TokenRows":
    """The rows as qlora_kit's own preparation leaves them on disk."""
    from qlora_kit.data.tokens import META_FILE, ROWS_FILE, TOKENS_FILE, TRAINED_FILE, TokenRows, TokenStore

    folder.mkdir(parents=True)
    count, tokens = len(rows), np.concatenate(rows)
    tokens.astype(np.uint32).tofile(folder / TOKENS_FILE)
    np.ones(len(tokens), dtype=np.bool_).tofile(folder / TRAINED_FILE)
    np.savez(
        folder / ROWS_FILE,
        starts=np.cumsum([0, *(len(row) for row in rows)], dtype=np.int64),
        turn_starts=np.zeros(0, dtype=np.int32),
        turn_offsets=np.zeros(count + 1, dtype=np.int64),
        files=np.zeros(count, dtype=np.int32),
        lines=np.arange(1, count + 1),
        hashes=np.random.default_rng(2).integers(0, 256, (count, 16), dtype=np.uint8),
        oddities=np.zeros(count, dtype=np.uint32),
    )
    files = [{"path": "random.jsonl", "source": "random", "sha256": "00", "format": "messages"}]
    meta = {"files": files, "bad_rows": [], "bad_row_counts": {"random": 0}}
    (folder / META_FILE).write_text(json.dumps(meta), encoding="utf-8")
    return TokenRows.whole(TokenStore(folder), np.arange(count))
