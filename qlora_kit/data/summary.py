"""What was read, kept, cut and dropped, in numbers: data.json of a run."""

from dataclasses import dataclass

from qlora_kit.data.tokens import BadRow


@dataclass(frozen=True)
class SourceSummary:
    """One source after cutting and dropping; tokens are counted without padding.

    Attributes:
        sha256: of each file's bytes, by path.
        bad_rows: rows that could not be read and were skipped.
    """

    name: str
    sha256: dict[str, str]
    formats: list[str]
    rows: int
    bad_rows: int
    tokens: int
    trained_tokens: int
    trained_share: float


@dataclass(frozen=True)
class LongRowCounts:
    """What became of rows longer than `data.max_tokens`, and of rows left without a loss token.

    Attributes:
        longer: rows that were longer.
        dropped: of these, rows taken out.
        cut: of these, rows that lost tokens.
        pieces: rows that came out of splitting.
        untrained: rows dropped because no loss token was left.
    """

    longer: int = 0
    dropped: int = 0
    cut: int = 0
    pieces: int = 0
    untrained: int = 0


@dataclass(frozen=True)
class SplitSummary:
    """Training or held-out rows in numbers.

    Attributes:
        skipped: rows that could not be read, the first `MOST_BAD_ROWS_KEPT` of them.
    """

    rows: int
    tokens: int
    trained_tokens: int
    trained_share: float
    longest_row: int
    max_tokens: int
    long_rows: LongRowCounts
    sources: list[SourceSummary]
    skipped: list[BadRow]


@dataclass(frozen=True)
class DataSummary:
    """Both splits of a run; JSON through `dataclasses.asdict`."""

    train: SplitSummary
    held_out: SplitSummary | None
