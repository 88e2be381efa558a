"""Line charts as inline SVG: axes with round ticks, hover titles, colors from the page's style."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from qlora_kit.report.page import text

Point = tuple[float, float]
FONT = 12  # px, as run_page.css sets it in charts
LETTER = 0.6  # width of a letter by its height; monospaced fonts have 0.55 to 0.61
MOST_POINTS = 200  # of a line; more are drawn as means of neighbors
MANTISSAS = (1.0, 2.0, 5.0, 10.0)
WIDE, SLIM = 1104.0, 372.0  # px that the page gives a drawing on a desk and on a phone
SLIM_HEIGHT = 260.0  # px that it has at most on a phone
LOG_RANGE = 40  # a curve whose highest value is this many times its lowest is drawn on a log scale


@dataclass(frozen=True)
class Figure:
    """A drawing made twice, for a wide page and for a phone, so that its text keeps its size.

    Attributes:
        key: marks as drawings, and what they stand for.
    """

    title: str
    key: Sequence[tuple[Markup, str]]
    wide: Markup
    slim: Markup
    caption: str


def tick_text(value: float) -> str:
    """A tick as short as it can be: 0, 0.002, 5e-5, 20,000."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}" if value == 0 or abs(value) >= 1e-3 else scientific(value)


def scientific(value: float) -> str:
    """A small number by its power of ten: 2e-4, 1.5e-5."""
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


@dataclass(frozen=True)
class Axis:
    """How values of an axis are written: at ticks, and in full in a hover title."""

    tick: Callable[[float], str] = tick_text
    value: Callable[[float], str] = tick_text
    log: bool = False


@dataclass(frozen=True)
class Scale:
    """From values between `low` and `high` to pixels between `start` and `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """The pixel of a value; one outside the range lies on its border."""
        low, high, inside = self.low, self.high, min(max(value, self.low), self.high)
        if self.log:
            low, high, inside = math.log10(low), math.log10(high), math.log10(inside)
        return self.start + (inside - low) / (high - low) * (self.end - self.start)


@dataclass(frozen=True)
class Frame:
    """A drawing's size and the scales of its two axes, in pixels of the drawing."""

    width: float
    height: float
    x: Scale
    y: Scale
    x_ticks: Sequence[float]
    y_ticks: Sequence[float]


@dataclass(frozen=True)
class Group:
    """Neighboring points of a line as one: mean, lowest and highest value."""

    x: float
    first: float
    last: float
    mean: float
    low: float
    high: float


def ticks(low: float, high: float, count: int, least: float = 0.0) -> list[float]:
    """Round numbers, 1, 2 or 5 times a power of ten apart, that span `low` to `high` in at most `count` steps.

    Args:
        least: the smallest step between two, such as 1 for what is counted.
    """
    if high <= low:
        high = low + (abs(low) or 1.0)
    raw = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(raw))
    steps = [mantissa * power for mantissa in MANTISSAS]
    step = max(least, next((step for step in steps if math.ceil(high / step) - math.floor(low / step) <= count), 0.0))
    step = step or 2 * steps[-1]
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{index * step:.12g}") for index in range(first, last + 1)]


def inner_ticks(low: float, high: float, count: int, least: float = 0.0) -> list[float]:
    """Those of `ticks` that lie inside, for an axis that ends where its values do."""
    return [tick for tick in ticks(low, high, count, least) if low <= tick <= high]


def log_ticks(low: float, high: float, count: int) -> list[float]:
    """Powers of ten that span `low` to `high`, every n-th where there would be more than `count` steps."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    last = max(last, first + 1)
    every = -(-(last - first) // max(1, count))
    last += -(last - first) % every
    return [10.0**exponent for exponent in range(first, last + 1, every)]


def two_sizes(
    title: str,
    draw: Callable[[tuple[float, float]], Markup],
    height: float,
    key: Sequence[tuple[Markup, str]],
    caption: str,
) -> Figure:
    """A figure of a drawing that takes its size in pixels; `height` is that on a wide page."""
    return Figure(title, key, draw((WIDE, height)), draw((SLIM, min(height, SLIM_HEIGHT))), caption)


def frame(
    across: tuple[float, float],
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
    size: tuple[float, float],
    x: Axis,
    y: Axis,
) -> Frame:
    """Scales that leave room for the text of the ticks.

    Args:
        across: lowest and highest value of x; y reaches from its first tick to its last.
    """
    width, height = size
    left = max(len(y.tick(tick)) for tick in y_ticks) * LETTER * FONT + 10
    right = max((len(x.tick(tick)) * LETTER * FONT / 2 + 2 for tick in x_ticks[-1:]), default=0.0)
    x_scale = Scale(*across, left, width - max(12.0, right), x.log)
    y_scale = Scale(y_ticks[0], y_ticks[-1], height - 42, 10, y.log)
    return Frame(width, height, x_scale, y_scale, list(x_ticks), list(y_ticks))


def svg(inside: Frame, label: str, drawn: Sequence[Markup]) -> Markup:
    """A drawing that fills the width of its box; the label is for readers that do not see it."""
    whole = Markup('<svg viewBox="0 0 {:g} {:g}" role="img" aria-label="{}">{}</svg>')
    return whole.format(inside.width, inside.height, text(label), Markup("").join(drawn))


def axes(inside: Frame, x: Axis, y: Axis, x_name: str) -> Markup:
    """Grid lines, the texts of the ticks, and the name of the axis below."""
    bottom = inside.y.start
    across = Markup('<path class="{}" d="M{:.1f} {:.1f}H{:.1f}"/>')
    said = Markup('<text class="tick {}" x="{:.1f}" y="{:.1f}">{}</text>')
    parts = []
    for tick in inside.y_ticks:
        at = inside.y.at(tick)
        parts.append(across.format("base" if at == bottom else "grid", inside.x.start, at, inside.x.end))
        parts.append(said.format("end", inside.x.start - 7, at + 4, text(y.tick(tick))))
    parts += [said.format("middle", inside.x.at(tick), bottom + 18, text(x.tick(tick))) for tick in inside.x_ticks]
    parts.append(said.format("end", inside.x.end, bottom + 36, text(x_name)))
    return Markup("").join(parts)


def line_chart(
    name: str,
    line: Sequence[Point],
    size: tuple[float, float],
    y: Axis,
    dots: Sequence[Point] = (),
    dots_name: str = "",
) -> Markup:
    """Values over steps as a line, and a second kind of value as dots.

    Args:
        name: of the line's values, for its hover titles and for readers that do not see it.
        line: finite values by step, in the order of the steps; at least one here or in `dots`.
        size: width and height in pixels of the drawing.
    """
    points = [*line, *dots]
    last = max(1.0, *(step for step, _ in points))
    x_ticks = inner_ticks(0, last, min(8, int(size[0] / 80)), least=1)
    values = [value for _, value in points]
    y_ticks = log_ticks(min(values), max(values), 5) if y.log else ticks(min(0.0, *values), max(values), 5)
    inside = frame((0.0, last), x_ticks, y_ticks, size, Axis(), y)
    groups = thinned(line)
    parts = [axes(inside, Axis(), y, "step"), _band(inside, groups), _line(inside, groups)]
    parts += [_hover(inside, groups, index, name, y) for index in range(len(groups))]
    parts += [_dot(inside, point, f"{dots_name} {y.value(point[1])}") for point in dots]
    return svg(inside, f"{name} over steps", parts)


def thinned(line: Sequence[Point], most: int = MOST_POINTS) -> list[Group]:
    """At most `most` groups of equally many neighbors, the last one smaller."""
    each = -(-len(line) // most) or 1
    groups = []
    for start in range(0, len(line), each):
        steps, values = zip(*line[start : start + each], strict=True)
        middle = (steps[0] + steps[-1]) / 2
        groups.append(Group(middle, steps[0], steps[-1], math.fsum(values) / len(values), min(values), max(values)))
    return groups


def _band(inside: Frame, groups: Sequence[Group]) -> Markup:
    if all(group.first == group.last for group in groups):
        return Markup("")
    above = [f"{inside.x.at(group.x):.1f} {inside.y.at(group.high):.1f}" for group in groups]
    below = [f"{inside.x.at(group.x):.1f} {inside.y.at(group.low):.1f}" for group in reversed(groups)]
    return Markup('<path class="band" d="M{}Z"/>').format("L".join([*above, *below]))


def _line(inside: Frame, groups: Sequence[Group]) -> Markup:
    if len(groups) == 1:
        return _dot(inside, (groups[0].x, groups[0].mean), "", "c1")
    points = [f"{inside.x.at(group.x):.1f} {inside.y.at(group.mean):.1f}" for group in groups]
    return Markup('<path class="line c1" d="M{}"/>').format("L".join(points)) if points else Markup("")


def _hover(inside: Frame, groups: Sequence[Group], index: int, name: str, y: Axis) -> Markup:
    """An unseen strip around a point of the line, wide enough to be hit, that tells its values."""
    group = groups[index]
    at = inside.x.at(group.x)
    before = inside.x.at(groups[index - 1].x) if index else at - 8
    after = inside.x.at(groups[index + 1].x) if index + 1 < len(groups) else at + 8
    start, end = max((before + at) / 2, inside.x.start), min((at + after) / 2, inside.x.end)
    if group.first == group.last:
        title = f"step {group.first:,.0f}: {name} {y.value(group.mean)}"
    else:
        span = f"{y.value(group.low)} to {y.value(group.high)}"
        title = f"steps {group.first:,.0f} to {group.last:,.0f}: mean {name} {y.value(group.mean)}, {span}"
    top = inside.y.end
    strip = Markup('<rect class="hit" x="{:.1f}" y="{:g}" width="{:.1f}" height="{:g}"><title>{}</title></rect>')
    return strip.format(start, top, max(0.1, end - start), inside.y.start - top, text(title))


def _dot(inside: Frame, point: Point, title: str, color: str = "c2") -> Markup:
    told = Markup("<title>{}</title>").format(text(f"step {point[0]:,.0f}: {title}")) if title else ""
    x, y = inside.x.at(point[0]), inside.y.at(point[1])
    drawn = Markup('<path class="dot {}" d="M{:.1f} {:.1f}l6 6l-6 6l-6 -6Z">{}</path>')
    return drawn.format(color, x, y - 6, told)
