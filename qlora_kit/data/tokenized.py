"""Named sources -> one store of tokenized rows, from the cache where it was made before."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass, field
from datetime import date
from hashlib import sha256
from itertools import chain, islice
from pathlib import Path
from typing import TypeVar

from qlora_kit.core.console.bar import BYTES, Bar, bar
from qlora_kit.core.errors import Problem, RecipeError
from qlora_kit.data.conversation import Conversation
from qlora_kit.data.encode import Encoder
from qlora_kit.data.formats.absent import absent, absent_problem
from qlora_kit.data.formats.bad_rows import BadRowError
from qlora_kit.data.formats.columns import REQUIRED
from qlora_kit.data.formats.reader import RowReader, recognize
from qlora_kit.data.pieces import Reading, encoded_pieces
from qlora_kit.data.problems import told_once
from qlora_kit.data.sources.source import Chunk, Source, open_source, parse
from qlora_kit.data.store import StoreWriter, stored
from qlora_kit.data.tokens import Ints, StoredFile, TokenStore
from qlora_kit.schema.data import DataConfig, RowFormat, SourceConfig, TrainOn

VERSION = 3  # raised when the same rows would come out as other tokens or masks
ROWS_IN_A_PIECE = 512
EVAL_FILE = "data.eval_file"
ALWAYS_THERE = frozenset(field for fields in REQUIRED.values() for field in fields)
T = TypeVar("T")
R = TypeVar("R")
WITHOUT_TURNS = (TrainOn.last, TrainOn.chosen, TrainOn.completion)


@dataclass(frozen=True)
class NamedSource:
    """A source of a split: its name, where it is, the setting that says so, and how many of its first rows to read."""

    name: str
    config: SourceConfig
    setting: str
    limit: int | None


@dataclass
class Tokenized:
    """A split's sources, opened and tokenized; the rows themselves can be read again."""

    store: TokenStore
    opened: list["_Opened"]
    unused_columns: dict[str, set[str]] = field(default_factory=dict)

    def is_recognized(self, source: str) -> bool:
        """Whether the format of a source was told from its rows."""
        return any(opened.named.name == source and opened.is_recognized for opened in self.opened)

    def conversations(self, rows: Ints) -> list[Conversation]:
        """Stored rows as conversations, read again from their files, in the order given."""
        table = self.store.table
        wanted = {(int(table.files[row]), int(table.lines[row])): place for place, row in enumerate(rows)}
        found: dict[int, Conversation] = {}
        first = 0
        for opened in self.opened:
            for piece in opened.pieces() if len(found) < len(wanted) else ():
                for line, record in zip(piece.lines, piece.records, strict=True):
                    place = wanted.get((first + piece.file, line))
                    if place is not None:
                        file = opened.source.files[piece.file]
                        found[place] = opened.reader.conversation(parse(record), file, line)
                if len(found) == len(wanted):
                    break
            first += len(opened.source.files)
        return [found[place] for place in range(len(rows))]


@dataclass(frozen=True)
class _Opened:
    """A source, how its rows are read, and whether that was told from them."""

    named: NamedSource
    source: Source
    reader: RowReader
    is_recognized: bool

    def pieces(self) -> Iterator[Chunk]:
        """Its pieces, up to the limit of rows."""
        return _limited(self.source.pieces(ROWS_IN_A_PIECE), self.named.limit)


def tokenized(sources: list[NamedSource], config: DataConfig, encoder: Encoder) -> Tokenized:
    """Tokenize every row of some sources, or take them from the cache.

    Raises:
        RecipeError: a source cannot be opened, or holds no row of a known format.
    """
    opened = _opened(sources, config, encoder)
    unused: dict[str, set[str]] = {}

    def fill(writer: StoreWriter) -> list[StoredFile]:
        return _fill(writer, opened, encoder, config.processes, unused)

    return Tokenized(stored(_key(opened, encoder), fill, cache=config.cache), opened, unused)


def _opened(sources: list[NamedSource], config: DataConfig, encoder: Encoder) -> list[_Opened]:
    found = _each(sources, lambda named: (named, open_source(named.name, named.config, named.setting)))
    _refuse_absent_columns(found, config)
    return _each(found, lambda one: _open(*one, config, encoder))


def _each(things: Iterable[T], do: Callable[[T], R]) -> list[R]:
    """What becomes of each; the problems of all of them together."""
    done: list[R] = []
    problems: list[Problem] = []
    for thing in things:
        try:
            done.append(do(thing))
        except RecipeError as error:
            problems.extend(error.problems)
    if problems:
        raise RecipeError(problems)
    return done


def _refuse_absent_columns(found: Sequence[tuple[NamedSource, Source]], config: DataConfig) -> None:
    """Refuse names in `data.columns` that match no column of a split, before the rows are read as something else."""
    firsts: dict[str, object] = {}

    def rows() -> Iterator[Mapping[str, object]]:
        for named, source in found:
            is_first = True
            for piece in _limited(source.pieces(ROWS_IN_A_PIECE), named.limit):
                for record in piece.records:
                    with suppress(BadRowError):
                        row = parse(record)
                        firsts.update(row if is_first else {})
                        is_first = False
                        yield row

    columns = config.columns
    if all(named.setting == EVAL_FILE for named, _ in found):
        # a mix has sources of several shapes, and held-out rows may do without what is optional in training rows
        columns = {} if config.sources else {field: name for field, name in columns.items() if field in ALWAYS_THERE}
    missing = absent(rows(), columns)
    if missing and firsts:
        files = ", ".join(file for _, source in found for file in source.files)
        raise RecipeError([absent_problem(missing, config.columns, files, firsts)])


def _open(named: NamedSource, source: Source, config: DataConfig, encoder: Encoder) -> _Opened:
    wanted = named.config.format if named.config.format is not RowFormat.auto else config.format
    known = _recognized(source, named.limit, config.columns) if wanted is RowFormat.auto else wanted
    if known is RowFormat.text and config.train_on in WITHOUT_TURNS:
        raise RecipeError(
            f"data.train_on={config.train_on.name}, but the rows of {named.name} are plain text without turns",
            where=named.setting,
            fix="data.train_on=everything",
        )
    if encoder.template is None and config.apply_chat_template and known is not RowFormat.text:
        raise RecipeError(
            "the model has no chat template",
            where="model.chat_template",
            fix="model.chat_template=<a Jinja file> or data.apply_chat_template=false",
        )
    joint = encoder.template.joint if encoder.template is not None and config.apply_chat_template else "\n"
    renamed = dict(config.columns), dict(config.roles)
    reader = RowReader(known, *renamed, config.apply_chat_template, config.train_on, joint)
    return _Opened(named, source, reader, wanted is RowFormat.auto)


def _recognized(source: Source, limit: int | None, columns: Mapping[str, str]) -> RowFormat:
    """The format of the first row that has one.

    Raises:
        RecipeError: no row of the first piece has; one problem for each.
    """
    problems = []
    for piece in islice(_limited(source.pieces(ROWS_IN_A_PIECE), limit), 1):
        for line, record in zip(piece.lines, piece.records, strict=True):
            try:
                return recognize(parse(record), columns)
            except BadRowError as error:
                problems.append(Problem(str(error), f"{source.files[piece.file]}:{line}", error.fix))
    if problems:
        is_whole = limit is None and len(problems) < ROWS_IN_A_PIECE
        raise RecipeError(told_once(problems, among="" if is_whole else f"of the first {len(problems)}"))
    raise RecipeError(
        f"{', '.join(source.files)} holds no rows",
        fix='one JSON object a line, such as {"prompt": "...", "completion": "..."}',
    )


def _limited(pieces: Iterator[Chunk], limit: int | None) -> Iterator[Chunk]:
    left = limit
    for piece in pieces:
        if left is None:
            yield piece
            continue
        if left <= 0:
            return
        yield Chunk(piece.file, piece.lines[:left], piece.records[:left])
        left -= len(piece.lines)


def _key(opened: list[_Opened], encoder: Encoder) -> dict[str, object]:
    template = encoder.template
    return {
        "version": VERSION,
        "sources": [
            [source.named.name, source.source.sha256(), repr(source.reader), source.named.limit] for source in opened
        ],
        "tokenizer": sha256(encoder.tokenizer_json.encode()).hexdigest(),
        "template": [template.source, sorted(template.special.items())] if template else None,
        "ids": [sorted(encoder.special_ids), encoder.bos, encoder.eos, encoder.train_on.name],
        # a template that writes today's date gives other tokens tomorrow
        "day": date.today().isoformat() if template is not None and template.uses_today else None,
    }


def _fill(
    writer: StoreWriter,
    opened: list[_Opened],
    encoder: Encoder,
    processes: int | None,
    unused: dict[str, set[str]],
) -> list[StoredFile]:
    files: list[StoredFile] = []
    readings: list[Reading] = []
    all_pieces: list[Iterator[Chunk]] = []
    for source in opened:
        hashes = source.source.sha256()
        all_pieces.append(_renumbered(source.pieces(), len(files)))
        for file in source.source.files:
            files.append(StoredFile(file, source.named.name, hashes[file], source.reader.format.name))
            readings.append(Reading(file, source.reader))
    with ExitStack() as stack:
        one = stack.enter_context(_progress(files))
        for piece in encoded_pieces(chain.from_iterable(all_pieces), encoder, readings, processes):
            writer.add(piece)
            if piece.unused_columns:
                unused.setdefault(files[piece.file].source, set()).update(piece.unused_columns)
            one.advance(piece.bytes if one.unit == BYTES else piece.records)
    return files


def _renumbered(pieces: Iterator[Chunk], first: int) -> Iterator[Chunk]:
    for piece in pieces:
        yield Chunk(piece.file + first, piece.lines, piece.records)


def _progress(files: list[StoredFile]) -> AbstractContextManager[Bar]:
    """A bar over bytes where the files are plain text, whose sizes are known; else over rows."""
    paths = [Path(file.path) for file in files]
    if all(path.suffix in (".jsonl", ".ndjson") and path.is_file() for path in paths):
        size = sum(path.stat().st_size for path in paths)
        return bar("tokenize", size, BYTES, after=2)
    return bar("tokenize", None, "row", after=2)
