"""A histogram on the terminal."""

from itertools import pairwise

from rich.text import Text

from qlora_kit.data.audit.length_counts import LengthCounts

WIDTH = 40  # characters of the longest bar


def histogram(lengths: LengthCounts, *, mark: str = "█") -> list[Text]:
    """One line a bin: its lengths, a bar, and its rows."""
    most = max(lengths.counts)
    ranges = [f"{first:,}-{end - 1:,}" if end - first > 1 else f"{first:,}" for first, end in pairwise(lengths.edges)]
    width = max(map(len, ranges))
    lines = []
    for span, count in zip(ranges, lengths.counts, strict=True):
        bar = mark * max(1, round(count / most * WIDTH)) if count else ""
        lines.append(Text(f"{span:>{width}}  ").append(bar, style="green").append(f" {count:,}" if count else ""))
    return lines
