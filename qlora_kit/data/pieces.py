"""A piece of a source -> tokens and masks as arrays, here or in worker processes, in order and in bounded memory."""

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import chain, islice
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from qlora_kit.core.errors import RecipeError, RunError
from qlora_kit.data.audit.oddities import oddities
from qlora_kit.data.conversation import HASH_BYTES, Conversation
from qlora_kit.data.encode import EncodedRow, Encoder
from qlora_kit.data.formats.bad_rows import BadRowError
from qlora_kit.data.formats.reader import RowReader
from qlora_kit.data.sources.source import Chunk, parse
from qlora_kit.data.tokens import REASONING_DROPPED, TEXT_DROPPED, BadRow, Ids, Ints, Mask

Number = TypeVar("Number", bound=np.generic)

PIECES_WORTH_PROCESSES = 8  # starting a process costs about as much as tokenizing this many pieces


@dataclass(frozen=True)
class Reading:
    """How the rows of one file become conversations."""

    file: str
    reader: RowReader


@dataclass(frozen=True)
class EncodedPiece:
    """N rows of one file, one after another; see `RowTable` for the arrays.

    Attributes:
        notes: name, detail and line of each `RowNote`.
    """

    file: int
    ids: Ids
    trained: Mask
    lengths: Ints
    turn_starts: npt.NDArray[np.int32]
    turn_counts: Ints
    lines: Ints
    hashes: npt.NDArray[np.uint8]
    oddities: npt.NDArray[np.uint32]
    bad: tuple[BadRow, ...]
    notes: tuple[tuple[str, str, int], ...]
    unused_columns: frozenset[str]
    records: int
    bytes: int


def encoded_pieces(
    pieces: Iterator[Chunk], encoder: Encoder, readings: Sequence[Reading], processes: int | None
) -> Iterator[EncodedPiece]:
    """Tokenize pieces in their order; processes are started only where there is enough to do.

    Args:
        readings: by `Chunk.file`.
        processes: at most this many; None for one each CPU that this process may use.

    Raises:
        RunError: a worker process died.
    """
    first = list(islice(pieces, PIECES_WORTH_PROCESSES))
    count = processes or len(os.sched_getaffinity(0))
    if count == 1 or len(first) < PIECES_WORTH_PROCESSES:
        for piece in chain(first, pieces):
            yield encode_piece(piece, encoder, readings)
        return
    try:
        yield from _in_processes(chain(first, pieces), encoder, readings, count)
    except BrokenProcessPool as error:
        raise RunError(
            "a process that tokenizes rows was killed, perhaps for want of memory", fix="data.processes=1"
        ) from error


def encode_piece(piece: Chunk, encoder: Encoder, readings: Sequence[Reading]) -> EncodedPiece:
    """Parse, read, render and tokenize one piece; a row that cannot be used is named and left out."""
    file, reader = readings[piece.file].file, readings[piece.file].reader
    bad: list[BadRow] = []
    unused: set[str] = set()
    conversations: list[Conversation] = []
    for line, record in zip(piece.lines, piece.records, strict=True):
        try:
            row = parse(record)
            conversations.append(reader.conversation(row, file, line))
            unused |= reader.unused(row)
        except BadRowError as error:
            bad.append(BadRow(file, line, str(error), error.fix))
    kept: list[tuple[Conversation, EncodedRow]] = []
    for conversation, row_or_error in zip(conversations, encoder.rows(conversations), strict=True):
        if isinstance(row_or_error, RecipeError):
            problem = row_or_error.problems[0]
            bad.append(BadRow(file, conversation.line, problem.what, problem.fix))
        elif not row_or_error.trained.any():
            bad.append(BadRow(file, conversation.line, "no token of this row would be trained"))
        else:
            kept.append((conversation, row_or_error))
    bad.sort(key=lambda row: row.line)
    return _as_arrays(piece, kept, tuple(bad), frozenset(unused))


def _as_arrays(
    piece: Chunk, kept: Sequence[tuple[Conversation, EncodedRow]], bad: tuple[BadRow, ...], unused: frozenset[str]
) -> EncodedPiece:
    rows = [row for _, row in kept]
    hashes = b"".join(conversation.content_hash() for conversation, _ in kept)
    return EncodedPiece(
        file=piece.file,
        ids=_joined([row.ids for row in rows], np.uint32),
        trained=_joined([row.trained for row in rows], np.bool_),
        lengths=np.array([len(row.ids) for row in rows], dtype=np.int64),
        turn_starts=_joined([row.turn_starts for row in rows], np.int32),
        turn_counts=np.array([len(row.turn_starts) for row in rows], dtype=np.int64),
        lines=np.array([conversation.line for conversation, _ in kept], dtype=np.int64),
        hashes=np.frombuffer(hashes, dtype=np.uint8).reshape(len(rows), HASH_BYTES),
        oddities=np.array([_bits(conversation, row) for conversation, row in kept], dtype=np.uint32),
        bad=bad,
        notes=tuple([(*note, conversation.line) for conversation, row in kept for note in row.notes]),
        unused_columns=unused,
        records=len(piece.records),
        bytes=sum(len(record) + 1 for record in piece.records if isinstance(record, bytes)),
    )


def _bits(conversation: Conversation, row: EncodedRow) -> int:
    texts = (text for message in conversation.messages for text in (message.content, message.reasoning) if text)
    left_out = (REASONING_DROPPED if row.dropped_reasoning else 0) | (TEXT_DROPPED if row.dropped_text else 0)
    return int(oddities(texts)) | left_out


def _joined(arrays: Sequence[npt.NDArray[Number]], dtype: type[Number]) -> npt.NDArray[Number]:
    return np.concatenate(arrays) if arrays else np.zeros(0, dtype=dtype)


def _in_processes(
    pieces: Iterator[Chunk], encoder: Encoder, readings: Sequence[Reading], count: int
) -> Iterator[EncodedPiece]:
    # A forked copy of a process that runs torch's threads may hang, so each one starts anew.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(count, context, initializer=_start, initargs=(encoder, tuple(readings)))
    waiting: deque[Future[EncodedPiece]] = deque()
    try:
        for piece in pieces:
            waiting.append(pool.submit(_work, piece))
            if len(waiting) > 2 * count + 1:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


_of_this_process: Mapping[str, object] = {}


def _start(encoder: Encoder, readings: tuple[Reading, ...]) -> None:
    """What a worker process keeps between pieces."""
    global _of_this_process
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _of_this_process = {"encoder": encoder, "readings": readings}
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that was killed cannot tell its workers to stop, and they would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(piece: Chunk) -> EncodedPiece:
    encoder, readings = _of_this_process["encoder"], _of_this_process["readings"]
    assert isinstance(encoder, Encoder) and isinstance(readings, tuple)
    return encode_piece(piece, encoder, readings)
