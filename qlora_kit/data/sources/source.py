"""Sources of rows -> pieces of raw records, in bounded memory, whatever the files are and however large."""

from collections.abc import Iterator
from dataclasses import dataclass

from qlora_kit.core.errors import RecipeError
from qlora_kit.data.sources.compressed import DAMAGE
from qlora_kit.data.sources.paths import parts_of
from qlora_kit.data.sources.readers import TextFile
from qlora_kit.data.sources.records import BadRecord, Part, Record, parse
from qlora_kit.schema.data import SourceConfig

__all__ = ["BadRecord", "Chunk", "Record", "Source", "open_source", "parse"]

PIECE_BYTES = 1 << 22


@dataclass(frozen=True)
class Chunk:
    """Some rows of one file, in order.

    Attributes:
        file: index into `Source.files`.
        lines: where each row starts; line number, or row number in files without lines, from 1.
        records: what `parse` takes.
    """

    file: int
    lines: tuple[int, ...]
    records: tuple[Record, ...]


@dataclass(frozen=True)
class Source:
    """One source of rows: files that are read one after another."""

    name: str
    parts: tuple[Part, ...]

    @property
    def files(self) -> tuple[str, ...]:
        """Its files, as errors name them."""
        return tuple(part.name for part in self.parts)

    def remarks(self) -> dict[str, str]:
        """How files are read whose names do not say so, by file."""
        said = {part.name: part.remark for part in self.parts if isinstance(part, TextFile)}
        return {name: remark for name, remark in said.items() if remark}

    def sha256(self) -> dict[str, str]:
        """Hash of each file, by name; in hex."""
        return {part.name: part.sha256() for part in self.parts}

    def pieces(self, rows: int = 512) -> Iterator[Chunk]:
        """Rows in order, at most `rows` a piece, and fewer where they are long.

        Raises:
            RecipeError: a file is damaged so that its rows cannot be told apart.
        """
        for index, part in enumerate(self.parts):
            try:
                yield from _pieces(index, part, rows)
            except DAMAGE as error:
                raise RecipeError(f"{part.name} cannot be read whole: {error}") from error


def open_source(name: str, config: SourceConfig, setting: str) -> Source:
    """Find what a source of the recipe reads, without reading it.

    Args:
        setting: where its path was set, such as `data.train_file` or `data.sources.chat.path`.

    Raises:
        RecipeError: nothing is there, it is empty, or it is of a kind that is not read.
    """
    return Source(name, tuple(parts_of(config, setting)))


def _pieces(index: int, part: Part, rows: int) -> Iterator[Chunk]:
    lines: list[int] = []
    records: list[Record] = []
    held = 0
    for line, record, size in part.entries(rows):
        lines.append(line)
        records.append(record)
        held += size
        if len(lines) >= rows or held >= PIECE_BYTES:
            yield Chunk(index, tuple(lines), tuple(records))
            lines, records, held = [], [], 0
    if lines:
        yield Chunk(index, tuple(lines), tuple(records))
