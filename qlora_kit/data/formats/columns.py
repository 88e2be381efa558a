"""Which column of a row holds which of our fields, and the format that a row's columns speak of."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from qlora_kit.data.formats.bad_rows import BadRowError, listed
from qlora_kit.data.formats.guesses import guessed_columns, is_one_turn, refuse_preference
from qlora_kit.schema.data import RowFormat

_CHAT_FIELDS = ("tools", "system", "chat_template_kwargs")
REQUIRED: Mapping[RowFormat, tuple[str, ...]] = {
    RowFormat.messages: ("messages",),
    RowFormat.sharegpt: ("messages",),
    RowFormat.alpaca: ("instruction", "output"),
    RowFormat.prompt_completion: ("prompt", "completion"),
    RowFormat.text: ("text",),
}
OPTIONAL: Mapping[RowFormat, tuple[str, ...]] = {
    RowFormat.messages: _CHAT_FIELDS,
    RowFormat.sharegpt: _CHAT_FIELDS,
    RowFormat.alpaca: ("input", "history", *_CHAT_FIELDS),
    RowFormat.prompt_completion: _CHAT_FIELDS,
    RowFormat.text: (),
}
_LISTS_OF_TURNS = ("messages", "conversations", "conversation")
_WORDS = {
    RowFormat.messages: "messages",
    RowFormat.sharegpt: "conversations",
    RowFormat.alpaca: "instruction/output",
    RowFormat.prompt_completion: "prompt/completion",
    RowFormat.text: "text",
}


@dataclass(frozen=True)
class Columns:
    """Where the fields of one format stand in a row.

    Attributes:
        renamed: our field -> their column; a dotted path reaches into nested objects.
    """

    format: RowFormat
    renamed: Mapping[str, str]

    @cached_property
    def read(self) -> frozenset[str]:
        """Columns that are read wherever they occur, but for the list of turns under a name of its own."""
        fields = [field for field in (*REQUIRED[self.format], *OPTIONAL[self.format]) if not self._is_list_field(field)]
        names = [self.renamed.get(field, field) for field in fields]
        return frozenset(names) | {name.partition(".")[0] for name in names}

    def name(self, row: Mapping[str, object], field: str) -> str:
        """The column that holds a field."""
        if self._is_list_field(field):
            first = ("messages",) if self.format is RowFormat.messages else ("conversations",)
            return next((name for name in (*first, *_LISTS_OF_TURNS) if name in row), first[0])
        return self.renamed.get(field, field)

    def value(self, row: Mapping[str, object], field: str) -> object:
        """What the column holds; None where the row has none."""
        return _at(row, self.name(row, field))

    def require(self, row: Mapping[str, object]) -> None:
        """Refuse a row that lacks a column its format cannot do without.

        Raises:
            BadRowError: naming what is missing, what is there, and a line that may mend it.
        """
        missing = [field for field in REQUIRED[self.format] if not has_column(row, self.name(row, field))]
        if missing:
            said = [
                f"no {field}" + (f" (data.columns says '{self.renamed[field]}')" if field in self.renamed else "")
                for field in missing
            ]
            fix = "" if any(field in self.renamed for field in missing) else self._fix(row, missing)
            raise BadRowError(f"{' and '.join(said)}; the row has {listed(row)}", fix)

    def _fix(self, row: Mapping[str, object], missing: list[str]) -> str:
        """Another format that the row is of, or columns that hold what is missing; empty where neither can be told."""
        other = next((known for known in REQUIRED if known is not self.format and _fits(row, known, {})), None)
        if other is not None:
            return f"data.format={other.name}"
        if guessed := guessed_columns(row, missing):
            return guessed
        pair = guessed_columns(row, REQUIRED[RowFormat.prompt_completion])
        return f"data.format={RowFormat.prompt_completion.name} {pair}" if pair else ""

    def unused(self, row: Mapping[str, object]) -> set[str]:
        """Columns that carry nothing that is read."""
        unused = row.keys() - self.read
        for field in REQUIRED[self.format]:
            if self._is_list_field(field):
                unused.discard(self.name(row, field))
        return unused

    def _is_list_field(self, field: str) -> bool:
        return field == "messages" and field not in self.renamed


def recognize(row: Mapping[str, object], renamed: Mapping[str, str] | None = None) -> RowFormat:
    """The format that the columns of a row speak of.

    Args:
        renamed: our field -> their column, as `data.columns` says; a format whose columns it names comes first.

    Raises:
        BadRowError: columns of no format, or of several; with the line to paste.
    """
    columns = renamed or {}
    refuse_preference(row, columns)
    found = [row_format for row_format in REQUIRED if _fits(row, row_format, columns)]
    by_name = [row_format for row_format in found if columns.keys() & set(REQUIRED[row_format])]
    found = by_name or found
    if len(found) > 1:
        words = " and ".join(_WORDS[row_format] for row_format in found)
        raise BadRowError(
            f"the row has both {words}, so say which is meant; the row has {listed(row)}",
            f"data.format={found[0].name}",
        )
    if found:
        return found[0]
    for row_format, fields in REQUIRED.items():
        if any(has_column(row, Columns(row_format, columns).name(row, field)) for field in fields):
            return row_format
    if is_one_turn(row):
        raise BadRowError(
            f"one turn of a conversation, where a row holds all of them as a list under messages; it has {listed(row)}"
        )
    guesses = (guessed_columns(row, REQUIRED[known]) for known in (RowFormat.prompt_completion, RowFormat.text))
    raise BadRowError(
        f"none of {', '.join(_WORDS.values())}; the row has {listed(row)}", next(filter(None, guesses), "")
    )


def _fits(row: Mapping[str, object], row_format: RowFormat, renamed: Mapping[str, str]) -> bool:
    columns = Columns(row_format, renamed)
    if any(columns.value(row, field) is None for field in REQUIRED[row_format]):
        return False
    if row_format not in (RowFormat.messages, RowFormat.sharegpt):
        return True
    # Both are one list under one of three names; the keys of its first entry tell them apart.
    name = columns.name(row, "messages")
    turns = columns.value(row, "messages")
    first = turns[0] if isinstance(turns, list) and turns else None
    speaks_sharegpt = "from" in first if isinstance(first, dict) else name in ("conversations", "conversation")
    return speaks_sharegpt is (row_format is RowFormat.sharegpt)


def has_column(row: Mapping[str, object], name: str) -> bool:
    """Whether a row has a column; a dotted path reaches into nested objects."""
    if name in row or "." not in name:
        return name in row
    first, _, rest = name.partition(".")
    inner = row.get(first)
    return isinstance(inner, dict) and has_column(inner, rest)


def _at(row: Mapping[str, object], name: str) -> object:
    if name in row or "." not in name:
        return row.get(name)
    first, _, rest = name.partition(".")
    inner = row.get(first)
    return _at(inner, rest) if isinstance(inner, dict) else None
