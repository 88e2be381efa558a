"""A scatter plot of named points, whose labels touch neither each other nor a point."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from markupsafe import Markup

from qlora_kit.report.charts import FONT, LETTER, Axis, Frame, axes, frame, inner_ticks, log_ticks, svg, ticks
from qlora_kit.report.page import text

RADIUS = 6.0  # px of a mark
TALL = FONT + 4.0  # px of a label
GAP = 9.0  # px from a point's middle to its label
GROWTH = 70.0  # px by which a drawing grows when its labels do not fit
MOST_HEIGHT = 3000.0
MOST_TRIED = 150  # free places of which one without a crossing line is sought
# Shapes differ as well as colors: drawn around the middle with a radius of about 6.
MARKS = (
    "m-5.5 0a5.5 5.5 0 1 0 11 0a5.5 5.5 0 1 0 -11 0Z",
    "m-5 -5h10v10h-10Z",
    "m0 -6l6 11h-12Z",
    "m0 -6.5l6.5 6.5l-6.5 6.5l-6.5 -6.5Z",
    "m0 6l6 -11h-12Z",
    "m-2 -6h4v4h4v4h-4v4h-4v-4h-4v-4h4Z",
)


@dataclass(frozen=True)
class Mark:
    """One point.

    Attributes:
        kind: index of its shape and color; they repeat after six.
        title: said when hovered.
        hollow: drawn as an outline.
    """

    name: str
    x: float
    y: float
    kind: int
    title: str
    hollow: bool = False


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels of the drawing."""

    left: float
    top: float
    width: float
    height: float

    def meets(self, other: "Box") -> bool:
        """Whether the two share any area."""
        return (
            self.left < other.left + other.width
            and other.left < self.left + self.width
            and self.top < other.top + other.height
            and other.top < self.top + self.height
        )


@dataclass(frozen=True)
class Label:
    """A placed label, and the line to its point where it stands apart."""

    name: str
    box: Box
    leader: tuple[float, float, float, float] | None


def mark_svg(kind: int, x: float, y: float, *, hollow: bool = False, title: str = "") -> Markup:
    """The mark of a kind around a pixel."""
    told = Markup("<title>{}</title>").format(text(title)) if title else ""
    shape = kind % len(MARKS)
    mark = Markup('<path class="mark c{}{}" d="M{:.1f} {:.1f}{}">{}</path>')
    return mark.format(shape + 1, " hollow" * hollow, x, y, MARKS[shape], told)


def scatter(
    label: str,
    marks: Sequence[Mark],
    size: tuple[float, float],
    x: Axis,
    y: Axis,
    x_name: str,
    limit: float | None = None,
) -> Markup:
    """Points with their names beside them; the drawing grows where the names need more room.

    Args:
        marks: with finite values, at least one; with `y.log`, a value of 0 lies on the lower border.
        size: width and least height in pixels of the drawing.
        limit: a value of y that gets a dashed line.
    """
    width, height = size
    while True:
        inside = _frame(marks, (width, height), x, y, limit)
        points = [(mark.name, inside.x.at(mark.x), inside.y.at(mark.y)) for mark in marks]
        line = None if limit is None else inside.y.at(limit)
        placed = place_labels(points, inside, line)
        if len(placed) == len(marks) or height > MOST_HEIGHT:
            break
        height += GROWTH
    parts = [axes(inside, x, y, x_name)]
    if line is not None:
        limit_line = Markup('<path class="limit" d="M{:.1f} {:.1f}H{:.1f}"/>')
        parts.append(limit_line.format(inside.x.start, line, inside.x.end))
    for one in placed:
        if one.leader is not None:
            parts.append(Markup('<path class="leader" d="M{:.1f} {:.1f}L{:.1f} {:.1f}"/>').format(*one.leader))
        name = Markup('<text class="name" x="{:.1f}" y="{:.1f}">{}</text>')
        parts.append(name.format(one.box.left, one.box.top + FONT, text(one.name)))
    for mark in marks:
        parts.append(
            mark_svg(mark.kind, inside.x.at(mark.x), inside.y.at(mark.y), hollow=mark.hollow, title=mark.title)
        )
    return svg(inside, label, parts)


def _frame(marks: Sequence[Mark], size: tuple[float, float], x: Axis, y: Axis, limit: float | None) -> Frame:
    values = [mark.y for mark in marks] + ([] if limit is None else [limit])
    above_zero = [value for value in values if value > 0] or [1.0]
    y_ticks = log_ticks(min(above_zero), max(above_zero), 6) if y.log else ticks(0, max(values), 5)
    least, most = min(mark.x for mark in marks), max(mark.x for mark in marks)
    margin = 0.06 * (most - least) or 0.2 * most or 1.0
    across = max(0.0, least - margin), most + margin
    return frame(across, inner_ticks(*across, max(3, int(size[0] / 110))), y_ticks, size, x, y)


def place_labels(points: Sequence[tuple[str, float, float]], inside: Frame, line: float | None = None) -> list[Label]:
    """A place for the name of each point, near it where there is room; names for which there is none are left out.

    No label meets another label, a point or the line across. Where there is room for it, a line that leads from a
    point to its label meets neither labels nor points that lie apart.

    Args:
        points: name and pixel of each.
        line: height in pixels of a line across that stays free.
    """
    dots = [_around(x, y) for _, x, y in points]
    across = [] if line is None else [Box(inside.x.start, line - 1, inside.x.end - inside.x.start, 2)]
    labels: list[Label] = []
    leaders: list[Box] = []
    for name, x, y in sorted(points, key=lambda point: point[2]):
        boxes = [label.box for label in labels]
        solid = [*dots, *across, *boxes]
        places = _places(len(name) * LETTER * FONT + 4, x, y, inside)
        free = list(islice((place for place in places if not any(map(place.meets, solid))), MOST_TRIED))
        hindering = [*boxes, *(dot for dot in dots if not dot.meets(_around(x, y)))]
        place = next((place for place in free if _is_clear(place, x, y, hindering, leaders)), None) or next(
            iter(free), None
        )
        if place is not None:
            label = Label(name, place, _leader(place, x, y))
            labels.append(label)
            leaders += _along(label.leader) if label.leader else []
    return labels


def _is_clear(place: Box, x: float, y: float, hindering: Sequence[Box], leaders: Sequence[Box]) -> bool:
    """Whether a label lies on no leading line, and its own line on nothing."""
    leader = _leader(place, x, y)
    drawn = _along(leader) if leader else []
    return not any(place.meets(piece) for piece in leaders) and not any(
        box.meets(piece) for box in hindering for piece in drawn
    )


def _around(x: float, y: float) -> Box:
    """What a mark takes, with a little air."""
    return Box(x - RADIUS - 1, y - RADIUS - 1, 2 * RADIUS + 2, 2 * RADIUS + 2)


def _places(width: float, x: float, y: float, inside: Frame) -> Iterator[Box]:
    """Places for a label: beside the point, then everywhere else, nearest first."""
    middle = y - TALL / 2
    near = [
        (x + GAP, middle),
        (x - GAP - width, middle),
        (x - width / 2, y - GAP - TALL),
        (x - width / 2, y + GAP),
        (x + GAP * 0.7, y - GAP - TALL * 0.6),
        (x + GAP * 0.7, y + GAP - TALL * 0.4),
        (x - GAP * 0.7 - width, y - GAP - TALL * 0.6),
        (x - GAP * 0.7 - width, y + GAP - TALL * 0.4),
    ]
    left, right, top, bottom = inside.x.start + 2, inside.width - 1, 1.0, inside.y.start - 2
    rows = [top + step * TALL / 2 for step in range(int((bottom - top) / TALL * 2))]
    columns = [left + step * 16.0 for step in range(int(max(0.0, right - left) / 16))]
    far = sorted(
        ((column, row) for column in columns for row in rows),
        key=lambda place: math.hypot(place[0] + width / 2 - x, 3 * (place[1] + TALL / 2 - y)),
    )
    for column, row in [*near, *far]:
        if left <= column and column + width <= right and top <= row and row + TALL <= bottom:
            yield Box(column, row, width, TALL)


def _leader(box: Box, x: float, y: float) -> tuple[float, float, float, float] | None:
    """The line from a point to the nearest spot of its label's border; none for a label at its side."""
    to_x = min(max(x, box.left), box.left + box.width)
    to_y = min(max(y, box.top + 3), box.top + box.height - 3)
    distance = math.hypot(to_x - x, to_y - y)
    if distance <= GAP + 6:
        return None
    start = RADIUS + 1
    return x + (to_x - x) * start / distance, y + (to_y - y) * start / distance, to_x, to_y


def _along(leader: tuple[float, float, float, float]) -> list[Box]:
    """Small boxes that cover a line but for its end at the label."""
    x, y, to_x, to_y = leader
    count = max(2, int(math.hypot(to_x - x, to_y - y) / 5))
    shares = [index / count for index in range(count)]
    return [Box(x + (to_x - x) * share - 1, y + (to_y - y) * share - 1, 2, 2) for share in shares]
