"""Token stores written by hand, as `qlora_kit.data.tokens` reads them."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from qlora_kit.data.summary import DataSummary, LongRowCounts, SourceSummary, SplitSummary
from qlora_kit.data.tokens import META_FILE, ROWS_FILE, TOKENS_FILE, TRAINED_FILE, TokenRows, TokenStore

Row = tuple[Sequence[int], Sequence[bool]]


def stored_rows(
    folder: Path,
    rows: Sequence[Row],
    *,
    hashes: object = None,
    oddities: Sequence[int] | None = None,
    bad_rows: Sequence[dict[str, object]] = (),
) -> TokenRows:
    """A folder with these ids and masks, opened; rows differ in their hashes unless `hashes` [N, 16] says otherwise."""
    folder.mkdir()
    lengths = [len(ids) for ids, _ in rows]
    np.array([token for ids, _ in rows for token in ids], dtype=np.uint32).tofile(folder / TOKENS_FILE)
    np.array([flag for _, trained in rows for flag in trained], dtype=np.bool_).tofile(folder / TRAINED_FILE)
    if hashes is None:
        hashes = np.random.default_rng(len(folder.name)).integers(0, 256, (len(rows), 16))
    np.savez(
        folder / ROWS_FILE,
        starts=np.cumsum([0, *lengths], dtype=np.int64),
        turn_starts=np.zeros(0, dtype=np.int32),
        turn_offsets=np.zeros(len(rows) + 1, dtype=np.int64),
        files=np.zeros(len(rows), dtype=np.int32),
        lines=np.arange(1, len(rows) + 1),
        hashes=np.asarray(hashes, dtype=np.uint8),
        oddities=np.asarray(oddities if oddities is not None else [0] * len(rows), dtype=np.uint32),
    )
    meta = {
        "files": [{"path": f"{folder.name}.jsonl", "source": folder.name, "sha256": "00", "format": "messages"}],
        "bad_rows": list(bad_rows),
        "bad_row_counts": {folder.name: len(bad_rows)},
    }
    (folder / META_FILE).write_text(json.dumps(meta), encoding="utf-8")
    return TokenRows.whole(TokenStore(folder), np.arange(len(rows)))


def summary_of(rows: TokenRows, max_tokens: int = 100, long_rows: LongRowCounts | None = None) -> SplitSummary:
    """The numbers of some rows."""
    tokens = int(rows.lengths.sum())
    trained = sum(sum(row.trained) for row in rows)
    name = rows.store.files[0].source
    bad = rows.store.bad_row_counts[name]
    source = SourceSummary(name, {"a": "00"}, ["messages"], len(rows), bad, tokens, trained, trained / tokens)
    longest = max(rows.lengths.tolist())
    return SplitSummary(
        len(rows), tokens, trained, trained / tokens, longest, max_tokens, long_rows or LongRowCounts(), [source], []
    )


class StoredData:
    """Rows as `prepare` returns them."""

    def __init__(
        self, train: TokenRows, held_out: TokenRows | None = None, long_rows: LongRowCounts | None = None
    ) -> None:
        self.train = train
        self.held_out = held_out
        self.summary = DataSummary(
            summary_of(train, long_rows=long_rows), summary_of(held_out) if held_out is not None else None
        )
