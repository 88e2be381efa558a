"""The page of `qlora-kit inspect`: what was found in the rows, and the rows themselves, token by token."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup

from qlora_kit.core.units import counted, human_count
from qlora_kit.data.audit.audit import Audit, PackedBins
from qlora_kit.data.audit.finding import Level
from qlora_kit.data.audit.length_counts import QUANTILES, LengthCounts
from qlora_kit.data.audit.shown_tokens import ShownRow
from qlora_kit.data.summary import DataSummary, SourceSummary
from qlora_kit.report.page import Number, Table, render

WIDTH, HEIGHT = 1000, 160  # of a drawing, which is stretched to the page
MOST_LABELS = 7


@dataclass(frozen=True)
class InspectPage:
    """What the page shows.

    Attributes:
        name: of the recipe.
        files: whose rows they are.
        rows: the first training rows.
    """

    name: str
    files: Sequence[str]
    summary: DataSummary
    audit: Audit
    rows: Sequence[ShownRow]


@dataclass(frozen=True)
class Tick:
    """A length below the histogram, and its place as a share of the width."""

    share: str
    length: str


@dataclass(frozen=True)
class LengthChart:
    """The histogram of row lengths.

    Attributes:
        quantiles: in words.
        limit: label of the longest row allowed; empty where there is no limit.
        limit_style: where the label stands; at the right where it is empty.
    """

    drawing: Markup
    ticks: Sequence[Tick]
    quantiles: str
    limit: str = ""
    limit_style: str = ""


def inspect_page(content: InspectPage) -> str:
    """The whole page as HTML."""
    audit = content.audit
    return render(
        "inspect_page.html.jinja",
        page=content,
        verdict=verdict(audit),
        numbers=_numbers(content),
        lengths=_lengths(audit.lengths, audit.capacity),
        sources=_sources(content.summary),
        tokens=_tokens(audit),
        bins=_bins(audit.packing) if audit.packing is not None else "",
    )


def verdict(audit: Audit) -> str:
    """One sentence: how many findings of each level there are."""
    counts = [(level, sum(finding.level is level for finding in audit.findings)) for level in Level]
    named = [counted(count, level.name, f"{level.name}s") for level, count in counts if count]
    if not audit.has_errors:
        named.insert(0, "No errors")
    return ", ".join(named) + ("; training would not start." if audit.has_errors else ".")


def _numbers(content: InspectPage) -> list[Number]:
    summary, lengths = content.summary, content.audit.lengths
    train, held_out = summary.train, summary.held_out
    return [
        Number("Training rows", f"{train.rows:,}"),
        Number("Training tokens", human_count(train.tokens)),
        Number("Trained tokens", f"{train.trained_share:.1%}"),
        Number("Median row", f"{lengths.quantiles[QUANTILES.index(0.5)]:,}", "tokens"),
        Number("Longest row", f"{train.longest_row:,}", "tokens"),
        Number("Held-out rows", f"{held_out.rows:,}" if held_out is not None else "none"),
    ]


def _lengths(lengths: LengthCounts, capacity: int | None) -> LengthChart:
    bins, most = len(lengths.counts), max(lengths.counts)
    step = WIDTH / bins
    drawn = []
    for index, (count, (first, end)) in enumerate(zip(lengths.counts, pairwise(lengths.edges), strict=True)):
        height = max(2.0, count / max(1, most) * (HEIGHT - 4)) if count else 0.0
        box = Markup('<rect class="bar" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"><title>{}</title></rect>')
        title = f"{first} to {end - 1} tokens: {counted(count, 'row')}"
        drawn.append(box.format((index + 0.06) * step, HEIGHT - height, step * 0.88, height, title))
    base = Markup('<path class="base" d="M0 {}H{}" vector-effect="non-scaling-stroke"/>').format(HEIGHT, WIDTH)
    line, label, style = _limit(lengths.edges, capacity)
    every = -(-(bins + 1) // MOST_LABELS)
    ticks = [index for index in range(0, bins + 1, every) if index == 0 or bins - index >= every * 0.6] + [bins]
    named = ", ".join(
        f"{share:.0%} up to {length:,}" for share, length in zip(QUANTILES, lengths.quantiles, strict=True)
    )
    return LengthChart(
        _drawing("Histogram of row lengths", HEIGHT, [*drawn, base, line]),
        [Tick(f"{index / bins:.2%}", f"{lengths.edges[index]:,}") for index in ticks],
        named,
        label,
        style,
    )


def _limit(edges: Sequence[int], capacity: int | None) -> tuple[Markup, str, str]:
    """The line of the longest row allowed, its label, and where the label stands."""
    if capacity is None:
        return Markup(""), "", ""
    bins = len(edges) - 1
    if capacity >= edges[-1]:
        return Markup(""), f"max_tokens {capacity:,} lies beyond →", ""
    at = next((index for index, (first, end) in enumerate(pairwise(edges)) if first <= capacity < end), 0)
    share = (at + (capacity - edges[at]) / (edges[at + 1] - edges[at])) / bins
    x = min(max(share, 0.0), 1.0) * WIDTH
    line = Markup('<path class="limit" d="M{:.1f} 0V{}" vector-effect="non-scaling-stroke"/>').format(x, HEIGHT)
    side = f"right:{1 - share:.2%}" if share > 0.5 else f"left:{share:.2%};right:auto"
    return line, f"max_tokens {capacity:,}", side


def _bins(packing: PackedBins) -> Markup:
    """Bins as lines, and the rows in them as blocks."""
    height = 100 / max(1, len(packing.drawn))
    tall = height * 0.82
    row = Markup('<rect class="row-{}" x="{:.2f}" y="{:.2f}" width="{:.2f}" height="{:.2f}"><title>{}</title></rect>')
    drawn = []
    for index, lengths in enumerate(packing.drawn):
        y, at = index * height, 0.0
        box = Markup('<rect class="bin" x="0" y="{:.2f}" width="{}" height="{:.2f}"/>')
        drawn.append(box.format(y, WIDTH, tall))
        for number, length in enumerate(lengths):
            width = length / packing.capacity * WIDTH
            drawn.append(row.format("ab"[number % 2], at, y, width, tall, counted(length, "token")))
            at += width
    return _drawing("Bins and the rows in them", 100, drawn)


def _drawing(label: str, height: int, drawn: Sequence[Markup]) -> Markup:
    """A drawing that is stretched to its box; the label is for readers that do not see it."""
    whole = Markup('<svg viewBox="0 0 {} {}" preserveAspectRatio="none" role="img" aria-label="{}">{}</svg>')
    return whole.format(WIDTH, height, label, Markup("").join(drawn))


def _sources(summary: DataSummary) -> Table:
    splits = [("train", summary.train), ("held out", summary.held_out)]
    rows = [_source(name, source) for name, split in splits if split is not None for source in split.sources]
    columns = ("split", "source", "format", "rows", "tokens", "trained", "skipped rows")
    return Table(columns, rows, numbers=(3, 4, 5, 6))


def _source(split: str, source: SourceSummary) -> list[str]:
    return [
        split,
        source.name,
        ", ".join(source.formats),
        f"{source.rows:,}",
        f"{source.tokens:,}",
        f"{source.trained_share:.1%}",
        f"{source.bad_rows:,}",
    ]


def _tokens(audit: Audit) -> Table:
    rows = [(fact.part, fact.token, "" if fact.id is None else str(fact.id), fact.said) for fact in audit.tokens]
    return Table(("part", "token", "id", "in these rows"), rows, numbers=(2,))
