"""How close each file is to what it was made from: table, plot of size against KL, samples."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from qlora_kit.core.units import human_bytes, human_seconds
from qlora_kit.core.verdict import Verdict
from qlora_kit.report.charts import Axis, Figure, scientific, tick_text, two_sizes
from qlora_kit.report.run_page_facts import THE_TRAINED, Artifact, Reference, Sample
from qlora_kit.report.run_page_scatter import MARKS, Mark, mark_svg, scatter

NONE = "-"


@dataclass(frozen=True)
class Cell:
    """A number or the head of a column of them, as it is written, and what stands small below it."""

    name: str
    below: str = ""
    is_chosen: bool = False


@dataclass(frozen=True)
class Badge:
    """A verdict: a class of the page's style, and words."""

    state: str
    said: str


@dataclass(frozen=True)
class Line:
    """The numbers of a file, or of the base or the adapter."""

    name: str
    cells: Sequence[Cell]
    badge: Badge | None = None


@dataclass(frozen=True)
class FileTable:
    """A line a file; `first` is the head of their names."""

    first: str
    heads: Sequence[Cell]
    lines: Sequence[Line]

    @property
    def has_badges(self) -> bool:
        """Whether there is a column of verdicts."""
        return any(line.badge is not None for line in self.lines)


@dataclass(frozen=True)
class Fidelity:
    """How close each file is to the reference; `remarks` are about single files."""

    table: FileTable
    remarks: Sequence[str]
    explanation: str


@dataclass(frozen=True)
class Answers:
    """A held-out prompt, and who said what."""

    prompt: str
    lines: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Column:
    """A column of numbers.

    Attributes:
        name: at its head, with `unit` below.
        value: of an artifact.
        write: a value as text.
        interval: the field whose interval is shown below the value.
    """

    name: str
    unit: str
    value: Callable[[Artifact], float | None]
    write: Callable[[float], str]
    interval: str = ""

    def cell(self, one: Artifact) -> Cell:
        """An artifact's value, and its interval below."""
        value = self.value(one)
        if value is None:
            return Cell(NONE)
        interval = one.intervals.get(self.interval)
        if interval is None:
            return Cell(self.write(value))
        low, high = (self.write(end) for end in interval)
        return Cell(self.write(value), f"{low.removesuffix('%')}..{high}")


def decimals(places: int, sign: str = "") -> Callable[[float], str]:
    """Numbers with so many places, in scientific form where they would be nearly lost."""

    def write(value: float) -> str:
        if not math.isfinite(value):
            return "not a number"
        if value == 0:
            return "0"
        is_tiny = abs(value) < 10.0 ** (1 - places) and places > 0
        return scientific(value) if is_tiny and not sign else f"{value:{sign}.{places}f}"

    return write


def _share(value: float) -> str:
    return f"{value:.1%}"


TO_REFERENCE = "to reference"
COLUMNS = (
    Column("size", "", lambda one: one.size_bytes, human_bytes),
    Column("mean KL", "nats", lambda one: one.mean_kl, decimals(5), "mean_kl"),
    Column("p99 KL", "nats", lambda one: one.p99_kl, decimals(4)),
    Column("same top", "token", lambda one: one.same_top, _share, "same_top"),
    Column("loss", "nats", lambda one: one.loss, decimals(4)),
    Column(TO_REFERENCE, "nats", lambda one: one.loss_change, decimals(4, "+"), "loss_change"),
    Column("task", "score", lambda one: one.task, _share, "task"),
    Column("stops", "by itself", lambda one: one.stops, _share, "stops"),
    Column("speed", "tokens/s", lambda one: one.tokens_per_second, decimals(0)),
    Column("made in", "", lambda one: one.seconds, human_seconds),
)


def fidelity(artifacts: Sequence[Artifact], reference: Reference = THE_TRAINED) -> Fidelity | None:
    """One line an artifact, without columns that nobody fills; None without artifacts."""
    if not artifacts:
        return None
    more = [_other(name) for name in dict.fromkeys(name for one in artifacts for name in one.others)]
    shown = [column for column in (*COLUMNS, *more) if any(column.value(one) is not None for one in artifacts)]
    lines = [Line(one.name, [column.cell(one) for column in shown], badge(one, reference)) for one in artifacts]
    table = FileTable("model or file", [Cell(_title(column, reference), column.unit) for column in shown], lines)
    return Fidelity(table, remarks(artifacts, reference), _explanation(artifacts, reference))


def _other(name: str) -> Column:
    return Column(name, "", lambda one: one.others.get(name), decimals(3))


def _title(column: Column, reference: Reference) -> str:
    return f"to {reference.name}" if column.name == TO_REFERENCE else column.name


# Classes of the page's style.
BADGES = {
    Verdict.accepted: "kept",
    Verdict.rejected: "rejected",
    Verdict.measured: "unknown",
    Verdict.not_measured: "warned",
}


def badge(one: Artifact, reference: Reference) -> Badge:
    """The state of an artifact."""
    if not one.is_export:
        return Badge("reference", reference.labels.get(one.name, one.name))
    found = one.verdict or Verdict.not_measured
    return Badge(BADGES[found], found.value)


def remarks(artifacts: Sequence[Artifact], reference: Reference = THE_TRAINED) -> list[str]:
    """A sentence for each file that is rejected or, beyond chance, fits held-out rows worse than the reference."""
    said = []
    for one in artifacts:
        if not one.is_export:
            continue
        if one.rejected and one.faults:
            said += [f"{one.name} is rejected: {fault.removesuffix('.')}." for fault in one.faults]
        elif one.rejected:
            kl = "" if one.mean_kl is None else f", {decimals(5)(one.mean_kl)},"
            bound = "its bound" if one.max_mean_kl is None else f"its bound, export.max_mean_kl={one.max_mean_kl:g}"
            said.append(f"{one.name} is rejected: its mean KL{kl} is above {bound}.")
        elif one.verdict is Verdict.not_measured:
            said.append(f"{one.name} is not measured: nothing tells how close it is to {reference.said}.")
        elif one.intervals.get("loss_change", (0.0, 0.0))[0] > 0:
            by = "" if one.loss_change is None else f" by {decimals(4)(one.loss_change)}"
            above = f"its loss is above the {reference.name}'s{by}"
            said.append(f"{one.name}: {above}, by more than the choice of rows explains.")
    return said


def _explanation(artifacts: Sequence[Artifact], reference: Reference) -> str:
    counts = sorted({one.positions for one in artifacts if one.positions})
    over = f"{' or '.join(f'{count:,}' for count in counts)} " if counts else ""
    states = {badge(one, reference).said for one in artifacts}
    said = [
        f"Compared with {reference.said}, over {over}{reference.unit}. KL and loss: lower is better. Same top: how "
        "often both hold the same token for the most likely."
    ]
    if any(one.intervals for one in artifacts):
        said.append("Below a number: its 95% interval, with the row as the unit.")
    if Verdict.accepted.value in states:
        said.append("Accepted: measured, and the mean KL is within export.max_mean_kl.")
    if Verdict.measured.value in states:
        said.append("Measured: export.max_mean_kl was not set, so no KL is too large.")
    return " ".join(said)


def size_against_kl(exports: Sequence[Artifact], reference: Reference = THE_TRAINED) -> Figure | None:
    """The plot of files by size and mean KL; None where no file has both."""
    drawn = [one for one in exports if _is_drawable(one)]
    if not drawn:
        return None
    kinds = {name: index for index, name in enumerate(sorted({one.format for one in drawn}))}
    divisor, unit = (1e9, "GB") if max(one.size_bytes or 0 for one in drawn) >= 2e9 else (1e6, "MB")
    marks = [_mark(one, kinds[one.format], divisor) for one in drawn]
    values = [one.mean_kl or 0.0 for one in drawn]
    bounds = {one.max_mean_kl for one in drawn if one.max_mean_kl is not None}
    limit = bounds.pop() if len(bounds) == 1 else None
    axis = Axis(tick_text, tick_text, log=max(values) > 0)

    def draw(size: tuple[float, float]) -> Markup:
        return scatter("Size against mean KL", marks, size, Axis(), axis, f"size, {unit}", limit)

    box = Markup('<svg viewBox="0 0 14 14">{}</svg>')
    key = [(box.format(mark_svg(kind, 7, 7)), name) for name, kind in kinds.items()]
    if any(one.rejected for one in drawn):
        hollow = Markup('<path class="mark hollow" d="M7 7{}"/>').format(MARKS[0])
        key.append((box.format(hollow), "hollow: rejected"))
    closer = "the trained model" if reference is THE_TRAINED else reference.said
    said = [f"Mean KL in nats, log scale: lower is closer to {closer}, further left is smaller."]
    if min(values) == 0 and axis.log:
        said.append("A KL of 0 lies on the lower border.")
    if limit is not None:
        said.append(f"Dashed: the bound, {limit:g}.")
    if left_out := [one.name for one in exports if not _is_drawable(one)]:
        said.append(f"Not drawn, for want of a finite KL: {', '.join(left_out)}.")
    return two_sizes("Size against KL", draw, 360.0, key, " ".join(said))


def _is_drawable(one: Artifact) -> bool:
    return one.size_bytes is not None and one.mean_kl is not None and math.isfinite(one.mean_kl)


def _mark(one: Artifact, kind: int, divisor: float) -> Mark:
    size, kl = one.size_bytes or 0.0, one.mean_kl or 0.0
    state = ", rejected" if one.rejected else ""
    title = f"{one.name}: {human_bytes(size)}, mean KL {kl:.3g}{state}"
    return Mark(one.name, size / divisor, kl, kind, title, hollow=one.rejected)


def samples(shown: Sequence[Sample], reference: Reference) -> list[Answers]:
    """Held-out prompts with the answer that was wanted and the answers that came."""
    return [Answers(sample.prompt, list(_lines(sample, reference))) for sample in shown]


def _lines(sample: Sample, reference: Reference) -> Iterator[tuple[str, str]]:
    if sample.expected:
        yield "wanted", sample.expected
    for answer, names in _by_answer(sample, reference).items():
        yield _names(names), answer


def _by_answer(sample: Sample, reference: Reference) -> dict[str, list[str]]:
    """Who gave each answer; files mostly say what the reference says."""
    found: dict[str, list[str]] = {}
    for name, answer in sample.answers:
        found.setdefault(answer, []).append(reference.labels.get(name, name))
    return found


def _names(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) < 4 else f"{names[0]}, and {len(names) - 1} more"
