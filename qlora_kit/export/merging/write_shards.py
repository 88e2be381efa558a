"""Writes the merged tensors, file by file, a few rows at a time.

Threads read and merge blocks; the calling thread writes them in order. At most a handful of blocks is in memory.
"""

import json
import os
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from io import RawIOBase
from pathlib import Path
from threading import BoundedSemaphore

from qlora_kit.core.files import write_json
from qlora_kit.export.merging.blocks import Block, merge_rows, merge_whole
from qlora_kit.export.merging.plan import Piece, Plan, row_spans
from qlora_kit.export.merging.read_base import INDEX, torch_dtype
from qlora_kit.export.merging.rounded import Rounding

BLOCK = 1 << 19  # values that are read, merged and written at once; their float32 copy stays in a core's cache
WRITE_BYTES = 1 << 19  # of one write: with 8 MB at a time Linux 6 looks for large pages, and takes ten times as long
MOST_WORKERS = 4
WHOLE_AT_ONCE = 2  # whole tensors in work; each takes about five times its size in 16 bit


@dataclass(frozen=True)
class Written:
    """One tensor as it was written: whether the adapter changed a value of it, and the CRC-32 of its bytes."""

    name: str
    changed: bool
    checksum: int


def write_shards(plan: Plan, rounding: Rounding, out: Path, wrote: Callable[[int], object]) -> list[Written]:
    """Write every file of the plan, and the index where there are several.

    Args:
        wrote: called after each block with its number of bytes.
    Raises:
        RunError: a source ends early, or a merged value is not finite.
    """
    import torch

    workers = min(MOST_WORKERS, os.cpu_count() or 1)
    threads = torch.get_num_threads()
    # The blocks are small: threads within an operation cost more than they bring beside the threads here.
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(workers) as pool:
            ahead = _Ahead(pool, workers + 1, rounding)
            written = [
                tensor
                for name, pieces in plan.shards.items()
                for tensor in _write_file(out / name, pieces, ahead, wrote)
            ]
    finally:
        torch.set_num_threads(threads)
    if len(plan.shards) > 1:
        where = {piece.name: name for name, pieces in plan.shards.items() for piece in pieces}
        write_json(out / INDEX, {"metadata": {"total_size": plan.size}, "weight_map": where})
    return written


def _write_file(path: Path, pieces: Sequence[Piece], ahead: "_Ahead", wrote: Callable[[int], object]) -> list[Written]:
    changed = {piece.name: piece.replaced for piece in pieces}
    checksums = dict.fromkeys(changed, 0)
    with path.open("wb", buffering=0) as stream:
        _put(stream, memoryview(_header(pieces)))
        for piece, block in ahead.blocks(pieces):
            data = block.values.reshape(-1).view(torch_dtype("U8")).numpy().data
            _put(stream, data)
            checksums[piece.name] = zlib.crc32(data, checksums[piece.name])
            changed[piece.name] |= block.changed
            wrote(len(data))
    return [Written(name, changed[name], checksums[name]) for name in changed]


def _header(pieces: Sequence[Piece]) -> bytes:
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for piece in pieces:
        end = begin + piece.size
        table[piece.name] = {"dtype": piece.dtype, "shape": list(piece.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the values begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text


def _put(stream: RawIOBase, data: memoryview) -> None:
    while data:
        data = data[stream.write(data[:WRITE_BYTES]) or 0 :]


class _Ahead:
    """Merges blocks on threads, a few ahead of the writer, and gives them in order."""

    def __init__(self, pool: ThreadPoolExecutor, depth: int, rounding: Rounding) -> None:
        self._pool = pool
        self._depth = depth
        self._rounding = rounding
        self._whole = BoundedSemaphore(WHOLE_AT_ONCE)

    def blocks(self, pieces: Sequence[Piece]) -> Iterator[tuple[Piece, Block]]:
        waiting: deque[tuple[Piece, Future[Block]]] = deque()
        try:
            for piece, task in self._tasks(pieces):
                waiting.append((piece, self._pool.submit(task)))
                if len(waiting) > self._depth:
                    piece, block = waiting.popleft()
                    yield piece, block.result()
            while waiting:
                piece, block = waiting.popleft()
                yield piece, block.result()
        finally:
            for _, block in waiting:
                block.cancel()

    def _tasks(self, pieces: Sequence[Piece]) -> Iterator[tuple[Piece, Callable[[], Block]]]:
        for piece in pieces:
            if piece.whole:
                yield piece, partial(self._merge_whole, piece)
                continue
            update = piece.update.load(self._rounding.device) if piece.update else None
            for start, stop in row_spans(piece.source, BLOCK):
                yield piece, partial(merge_rows, piece, update, self._rounding, start, stop)

    def _merge_whole(self, piece: Piece) -> Block:
        with self._whole:
            return merge_whole(piece, self._rounding)
