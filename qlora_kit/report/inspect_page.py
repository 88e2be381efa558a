"""The page of `qlora-kit inspect`: what was found in the rows, and the rows themselves, token by token."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from qlora_kit import __version__
from qlora_kit.core.shell import is_line
from qlora_kit.core.units import counted, human_count
from qlora_kit.data.audit.audit import Audit, PackedBins
from qlora_kit.data.audit.finding import Finding, Level
from qlora_kit.data.audit.length_counts import QUANTILES, LengthCounts
from qlora_kit.data.audit.shown_tokens import ShownRow, ShownToken
from qlora_kit.data.summary import DataSummary, SourceSummary
from qlora_kit.report.page import page, table, text

STYLE = "inspect_page.css"
WIDTH, HEIGHT = 1000, 160  # of a drawing, which is stretched to the page
MOST_LABELS = 7
WORDS = {Level.error: "Error", Level.warning: "Warning", Level.note: "Note"}
# A line may break before a space, as it would if the space were one.
VISIBLE = {" ": "<wbr><i>·</i>", "\n": "<i>↵</i>\n", "\t": "<i>→</i>\t", "\r": "<i>␍</i>"}


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


def inspect_page(content: InspectPage) -> str:
    """The whole page as HTML."""
    audit = content.audit
    parts = [
        _header(content),
        _section("Findings", _findings(audit.findings)),
        _section("Lengths", _lengths(audit.lengths, audit.capacity)),
        _section("Sources", _sources(content.summary)),
        _section("Special tokens", _tokens(audit)),
        _section("Batches", _batches(audit)),
        _section("Rows", _rows(content.rows)),
        f"<footer>Written by qlora-kit {text(__version__)}. This file needs no network.</footer>",
    ]
    return page(f"{content.name}: rows as the model sees them", "\n".join(part for part in parts if part), STYLE)


def _section(title: str, inner: str) -> str:
    return f"<section>\n<h2>{text(title)}</h2>\n{inner}\n</section>" if inner else ""


def _header(content: InspectPage) -> str:
    summary, audit = content.summary, content.audit
    train, held_out = summary.train, summary.held_out
    numbers = [
        ("Training rows", f"{train.rows:,}", ""),
        ("Training tokens", human_count(train.tokens), ""),
        ("Trained tokens", f"{train.trained_share:.1%}", ""),
        ("Median row", f"{audit.lengths.quantiles[QUANTILES.index(0.5)]:,}", "tokens"),
        ("Longest row", f"{train.longest_row:,}", "tokens"),
        ("Held-out rows", f"{held_out.rows:,}" if held_out is not None else "none", ""),
    ]
    shown = "".join(
        f"<div><dt>{text(name)}</dt><dd>{text(value)}{f' <small>{unit}</small>' if unit else ''}</dd></div>"
        for name, value, unit in numbers
    )
    files = ", ".join(f"<code>{text(name)}</code>" for name in content.files)
    return (
        f'<header>\n<p class="eyebrow">qlora-kit inspect</p>\n<h1>{text(content.name).replace("_", "_<wbr>")}</h1>\n'
        f'<p class="lead">{text(verdict(audit))}</p>\n<p class="soft">{files}</p>\n'
        f'<dl class="numbers">{shown}</dl>\n</header>'
    )


def verdict(audit: Audit) -> str:
    """One sentence: how many findings of each level there are."""
    counts = [(level, sum(finding.level is level for finding in audit.findings)) for level in Level]
    named = [counted(count, level.name, f"{level.name}s") for level, count in counts if count]
    if not audit.has_errors:
        named.insert(0, "No errors")
    return ", ".join(named) + ("; training would not start." if audit.has_errors else ".")


def _findings(findings: Iterable[Finding]) -> str:
    items = "".join(_finding(found) for found in findings)
    return f'<ol class="findings">{items}</ol>' if items else "<p>Nothing to report.</p>"


def _finding(found: Finding) -> str:
    lines = [f"<p>{text(found.what[:1].upper() + found.what[1:])}</p>"]
    if found.places:
        places = ", ".join(f"<code>{text(place)}</code>" for place in found.places)
        lines.append(f'<p class="where">{places}</p>')
    if found.fix:
        # A line is shown as one to paste; advice is words.
        remedy = f"Fix: <code>{text(found.fix)}</code>" if is_line(found.fix) else f"Do: {text(found.fix)}"
        lines.append(f'<p class="fix">{remedy}</p>')
    badge = f'<span class="badge {found.level.name}">{WORDS[found.level]}</span>'
    return f'<li data-finding="{text(found.name)}">{badge}<div>{"".join(lines)}</div></li>'


def _lengths(lengths: LengthCounts, capacity: int | None) -> str:
    bins, most = len(lengths.counts), max(lengths.counts)
    step = WIDTH / bins
    bars = []
    for index, (count, (first, end)) in enumerate(zip(lengths.counts, pairwise(lengths.edges), strict=True)):
        height = max(2.0, count / max(1, most) * (HEIGHT - 4)) if count else 0.0
        title = f"{first} to {end - 1} tokens: {counted(count, 'row')}"
        bars.append(
            f'<rect class="bar" x="{(index + 0.06) * step:.1f}" y="{HEIGHT - height:.1f}" '
            f'width="{step * 0.88:.1f}" height="{height:.1f}"><title>{text(title)}</title></rect>'
        )
    line, label = _limit(lengths.edges, capacity)
    every = -(-(bins + 1) // MOST_LABELS)
    ticks = [index for index in range(0, bins + 1, every) if index == 0 or bins - index >= every * 0.6] + [bins]
    marks = "".join(f'<span style="left:{index / bins:.2%}">{lengths.edges[index]:,}</span>' for index in ticks)
    named = ", ".join(
        f"{share:.0%} up to {length:,}" for share, length in zip(QUANTILES, lengths.quantiles, strict=True)
    )
    return (
        f'<figure><div class="chart">{label}<svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" role="img" '
        f'aria-label="Histogram of row lengths">{"".join(bars)}<path class="base" d="M0 {HEIGHT}H{WIDTH}" '
        f'vector-effect="non-scaling-stroke"/>{line}</svg><div class="axis">{marks}</div></div>'
        f"<figcaption>Training rows by tokens; the scale grows with the length. Of the rows, {text(named)} tokens."
        "</figcaption></figure>"
    )


def _limit(edges: Sequence[int], capacity: int | None) -> tuple[str, str]:
    """The line of the longest row allowed, and its label."""
    if capacity is None:
        return "", ""
    bins = len(edges) - 1
    if capacity >= edges[-1]:
        return "", f'<span class="limit-label">max_tokens {capacity:,} lies beyond →</span>'
    at = next((index for index, (first, end) in enumerate(pairwise(edges)) if first <= capacity < end), 0)
    share = (at + (capacity - edges[at]) / (edges[at + 1] - edges[at])) / bins
    x = min(max(share, 0.0), 1.0) * WIDTH
    line = f'<path class="limit" d="M{x:.1f} 0V{HEIGHT}" vector-effect="non-scaling-stroke"/>'
    side = f"right:{1 - share:.2%}" if share > 0.5 else f"left:{share:.2%};right:auto"
    return line, f'<span class="limit-label" style="{side}">max_tokens {capacity:,}</span>'


def _sources(summary: DataSummary) -> str:
    splits = [("train", summary.train), ("held out", summary.held_out)]
    rows = [_source(name, source) for name, split in splits if split is not None for source in split.sources]
    columns = ("split", "source", "format", "rows", "tokens", "trained", "skipped rows")
    return table(columns, rows, numbers=(3, 4, 5, 6))


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


def _tokens(audit: Audit) -> str:
    rows = [(fact.part, fact.token, "" if fact.id is None else str(fact.id), fact.said) for fact in audit.tokens]
    return table(("part", "token", "id", "in these rows"), rows, numbers=(2,))


def _batches(audit: Audit) -> str:
    parts = []
    if audit.packing is not None:
        parts.append(_packing(audit.packing))
    elif audit.padding is not None:
        waste = audit.padding
        parts.append(
            f"<p>In batches of {counted(waste.batch_size, 'row')}, {waste.random:.1%} of the tokens would be "
            f"padding with rows in random order, {waste.by_length:.1%} with rows grouped by length.</p>"
        )
    return "\n".join(parts)


def _packing(packing: PackedBins) -> str:
    shown = len(packing.drawn)
    height = 100 / max(1, shown)
    drawn = []
    for index, lengths in enumerate(packing.drawn):
        y, at = index * height, 0.0
        tall = height * 0.82
        drawn.append(f'<rect class="bin" x="0" y="{y:.2f}" width="{WIDTH}" height="{tall:.2f}"/>')
        for number, length in enumerate(lengths):
            width = length / packing.capacity * WIDTH
            drawn.append(
                f'<rect class="row-{"ab"[number % 2]}" x="{at:.2f}" y="{y:.2f}" '
                f'width="{width:.2f}" height="{tall:.2f}">'
                f"<title>{counted(length, 'token')}</title></rect>"
            )
            at += width
    return (
        f"<p>Packing fills {packing.efficiency:.1%} of {counted(packing.bins, 'bin')} of "
        f'{packing.capacity:,} tokens.</p>\n<figure class="bins"><svg viewBox="0 0 {WIDTH} 100" '
        f'preserveAspectRatio="none" role="img" aria-label="Bins and the rows in them">{"".join(drawn)}</svg>'
        f"<figcaption>{shown:,} of the bins, one a line, fullest first; each block is a row, the rest is empty."
        "</figcaption></figure>"
    )


def _rows(rows: Sequence[ShownRow]) -> str:
    if not rows:
        return ""
    key = (
        '<div class="key"><span><span class="t trained">trained</span> the loss sees it</span>'
        '<span><span class="t special">special</span> steers the model</span>'
        "<span>· space, ↵ line break, → tab</span>"
        '<label><input type="checkbox" id="ids"> show token ids</label></div>'
    )
    return f'<div class="with-ids">{key}{"".join(_row(row) for row in rows)}</div>'


def _row(row: ShownRow) -> str:
    spans = "".join(_token(token, index) for index, token in enumerate(row.tokens))
    rest = row.length - len(row.tokens)
    more = f'<p class="soft">… and {counted(rest, "token")} more</p>' if rest else ""
    head = f"{text(row.place)} <small>{counted(row.length, 'token')}, {row.trained:,} trained</small>"
    return f'<article class="row"><h3>{head}</h3><div class="tokens">{spans}</div>{more}</article>'


def _token(token: ShownToken, position: int) -> str:
    kinds = "t" + " trained" * token.is_trained + " special" * token.is_special
    shown = "".join(VISIBLE.get(character) or text(character) for character in token.text) or "<i>⋯</i>"
    end = "\n" * shown.endswith("\n")  # the id stays on the line of its token
    identity = f'<span class="id" aria-hidden="true">{token.id}</span>'
    title = f"id {token.id}, position {position}"
    return f'<span class="{kinds}" title="{title}">{shown.removesuffix(end)}{identity}{end}</span>'
