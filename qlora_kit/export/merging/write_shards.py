"""Writes the merged tensors, file by file, a few rows at a time.

Each thread takes the next rows, reads, merges and writes them, so that they stay in its core's cache and its memory is
used again; fresh memory for each block, or a thread of its own for the writing, takes longer than the sums.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from threading import BoundedSemaphore, Lock
from typing import TYPE_CHECKING

from xxhash import xxh3_64_digest, xxh3_64_intdigest

from qlora_kit.adapter.expert_updates import StackUpdate
from qlora_kit.adapter.updates import Update
from qlora_kit.core.files import write_json
from qlora_kit.export.merging.blocks import Block, merge_rows, merge_whole
from qlora_kit.export.merging.plan import BLOCK, Piece, Plan, block_spans
from qlora_kit.export.merging.rounded import Rounding
from qlora_kit.export.merging.stacks import RoundedStacks
from qlora_kit.weights.headers import BYTES, INDEX
from qlora_kit.weights.torch_rows import dtype_of_stored

if TYPE_CHECKING:
    from torch import Tensor

WRITE_BYTES = 1 << 19  # of one write: with 8 MB at a time Linux 6 looks for large pages, and takes ten times as long
MOST_WORKERS = 4
WHOLE_AT_ONCE = 2  # whole tensors in work; each takes up to five times its size in 16 bit


@dataclass(frozen=True)
class Written:
    """One tensor as it was written: whether the adapter changed a value of it, and the checksum of its bytes.

    The checksum is the 64-bit XXH3 over the XXH3s of its spans of rows, of BLOCK values each.
    """

    name: str
    changed: bool
    checksum: int


def write_shards(
    plan: Plan,
    rounding: Rounding,
    out: Path,
    wrote: Callable[[int], object],
    finished: Mapping[str, list[Written]] | None = None,
    record: Callable[[str, list[Written]], object] = lambda _name, _tensors: None,
) -> list[Written]:
    """Write every file of the plan, and the index where there are several.

    Args:
        wrote: called after each block with its number of bytes, by one thread at a time.
        finished: the tensors of the files that are there from an earlier call, by the file's name.
        record: called with each file that is complete.
    Raises:
        RunError: a source ends early, or a merged value is not finite.
    """
    import torch

    workers = min(MOST_WORKERS, os.cpu_count() or 1)
    threads = torch.get_num_threads()
    written = dict(finished or {})
    stacks = RoundedStacks(rounding)
    # The blocks are small: threads within an operation cost more than they bring beside the threads here.
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(workers) as pool:
            for name, pieces in plan.shards.items():
                if name in written:
                    wrote(sum(piece.size for piece in pieces))
                    continue
                written[name] = _write_file(out / name, pieces, rounding, wrote, pool, stacks)
                record(name, written[name])
    finally:
        torch.set_num_threads(threads)
    if len(plan.shards) > 1:
        where = {piece.name: name for name, pieces in plan.shards.items() for piece in pieces}
        write_json(out / INDEX, {"metadata": {"total_size": plan.size}, "weight_map": where})
    return [tensor for name in plan.shards for tensor in written[name]]


def checksums(path: Path, pieces: Sequence[Piece]) -> dict[str, int] | None:
    """The checksum of each tensor of a file as it lies there; None where the file is not one of these pieces."""
    header = shard_header(pieces)
    if not path.is_file() or path.stat().st_size != len(header) + sum(piece.size for piece in pieces):
        return None
    with path.open("rb") as stream:
        if stream.read(len(header)) != header:
            return None
        return {
            piece.name: _combined([xxh3_64_digest(stream.read(size)) for _, _, size in _spans(piece)])
            for piece in pieces
        }


def shard_header(pieces: Sequence[Piece]) -> bytes:
    """Length and table of tensors, as a safetensors file begins."""
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for piece in pieces:
        end = begin + piece.size
        table[piece.name] = {"dtype": piece.dtype, "shape": list(piece.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the values begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text


def _write_file(
    path: Path,
    pieces: Sequence[Piece],
    rounding: Rounding,
    wrote: Callable[[int], object],
    pool: ThreadPoolExecutor,
    stacks: RoundedStacks,
) -> list[Written]:
    with path.open("wb", buffering=0) as stream:
        shard = _Shard(stream.fileno(), pieces, rounding, wrote, stacks)
        # As many as the pool may have; those that it has no thread for find no work left.
        at_work: list[Future[None]] = [pool.submit(shard.work) for _ in range(MOST_WORKERS)]
        try:
            for thread in at_work:
                thread.result()
        finally:
            shard.stop()
            wait(at_work)  # before the file is closed under them
    return shard.written()


def _spans(piece: Piece) -> Iterator[tuple[int, int, int]]:
    """First row, next row and bytes of each span as it is written."""
    for start, stop in block_spans(piece.shape):
        yield start, stop, (stop - start) * _row_bytes(piece)


def _row_bytes(piece: Piece) -> int:
    """Bytes of a row as it is written; a scalar is one row."""
    return piece.size // max(1, piece.shape[0] if piece.shape else 1)


def _combined(digests: Sequence[bytes]) -> int:
    return xxh3_64_intdigest(b"".join(digests))


@dataclass(frozen=True)
class _Task:
    """Rows start..stop of a piece, and where in the file it begins; the whole piece where `piece.whole`."""

    piece: Piece
    offset: int
    start: int
    stop: int
    update: Update | StackUpdate | None


class _Shard:
    """One file in work, by several threads."""

    def __init__(
        self,
        file: int,
        pieces: Sequence[Piece],
        rounding: Rounding,
        wrote: Callable[[int], object],
        stacks: RoundedStacks,
    ) -> None:
        self._file = file
        self._pieces = pieces
        self._rounding = rounding
        self._stacks = stacks
        self._wrote = wrote
        self._digests: dict[str, dict[int, bytes]] = {piece.name: {} for piece in pieces}
        self._changed = {piece.name for piece in pieces if piece.replaced}
        self._tasks = self._all_tasks()
        self._next = Lock()
        self._writing = Lock()
        self._whole = BoundedSemaphore(WHOLE_AT_ONCE)
        self._stopped = False

    def work(self) -> None:
        """Take task after task until there is none."""
        import torch

        room = torch.empty(BLOCK * BYTES["BF16"], dtype=torch.uint8)
        try:
            while task := self._take():
                if task.piece.whole:
                    with self._whole:
                        for start, block in merge_whole(task.piece, self._rounding, room, self._stacks):
                            self._keep(task, start, block)
                else:
                    room = self._room_for(task, room)
                    rows = task.start, task.stop
                    self._keep(task, task.start, merge_rows(task.piece, task.update, self._rounding, *rows, room))
        finally:
            self.stop()  # an error in one thread ends the others

    def stop(self) -> None:
        """Hand out no more tasks."""
        self._stopped = True

    def written(self) -> list[Written]:
        """What became of each tensor."""
        return [
            Written(name, name in self._changed, _combined([found[start] for start in sorted(found)]))
            for name, found in self._digests.items()
        ]

    def _take(self) -> _Task | None:
        with self._next:
            return None if self._stopped else next(self._tasks, None)

    def _all_tasks(self) -> Iterator[_Task]:
        header = shard_header(self._pieces)
        self._put(memoryview(header), 0)
        offset = len(header)
        for piece in self._pieces:
            if piece.whole:
                yield _Task(piece, offset, 0, piece.shape[0], None)
            else:
                update = piece.update.load(self._rounding.device) if piece.update else None
                for start, stop in block_spans(piece.shape):
                    yield _Task(piece, offset, start, stop, update)
            offset += piece.size

    @staticmethod
    def _room_for(task: _Task, room: "Tensor") -> "Tensor":
        """The same memory, or as much as a row takes that is longer than a block."""
        import torch

        needed = (task.stop - task.start) * task.piece.source.row_bytes
        return room if needed <= len(room) else torch.empty(needed, dtype=torch.uint8)

    def _keep(self, task: _Task, start: int, block: Block) -> None:
        """Write the block that begins with row `start` of its tensor, and note its checksum."""
        piece = task.piece
        data = block.values.reshape(-1).view(dtype_of_stored("U8")).numpy().data
        self._digests[piece.name][start] = xxh3_64_digest(data)
        with self._writing:
            self._put(data, task.offset + start * _row_bytes(piece))
            if block.changed:
                self._changed.add(piece.name)
            self._wrote(len(data))

    def _put(self, data: memoryview, offset: int) -> None:
        while data:
            count = os.pwrite(self._file, data[:WRITE_BYTES], offset)
            data, offset = data[count:], offset + count
