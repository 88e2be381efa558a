"""Curves of a run: loss, learning rate, gradient norm, throughput and memory over steps."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from qlora_kit.core.units import counted, human_bytes
from qlora_kit.report.charts import (
    LOG_RANGE,
    MOST_POINTS,
    Axis,
    Figure,
    Point,
    line_chart,
    scientific,
    tick_text,
    two_sizes,
)

HALF = 460.0  # px of a drawing beside another
LINE = Markup('<svg viewBox="0 0 22 12"><path class="line c1" d="M0 6H22"/></svg>')
DOT = Markup('<svg viewBox="0 0 12 12"><path class="dot c2" d="M6 0l6 6l-6 6l-6 -6Z"/></svg>')


@dataclass(frozen=True)
class Curve:
    """A drawing beside others, without a key."""

    title: str
    drawing: Markup


@dataclass(frozen=True)
class Curves:
    """What was logged over steps."""

    loss: Figure | None
    others: Sequence[Curve]

    def __bool__(self) -> bool:
        return self.loss is not None or bool(self.others)


def curves(metrics: Sequence[Mapping[str, float]]) -> Curves:
    """Figures of what was logged."""
    others = [
        _learning_rate(series(metrics, "learning_rate")),
        _curve("Gradient norm", "gradient norm", series(metrics, "grad_norm"), Axis(tick_text, _precise)),
        _curve("Throughput, tokens/s", "tokens/s", series(metrics, "tokens_per_second"), Axis(tick_text, _whole)),
        _memory(series(metrics, "peak_memory_bytes")),
    ]
    return Curves(_loss(metrics), [one for one in others if one is not None])


def series(metrics: Sequence[Mapping[str, float]], key: str) -> list[Point]:
    """Finite values of a metric by step."""
    return [(row["step"], row[key]) for row in metrics if key in row and math.isfinite(row[key])]


def _loss(metrics: Sequence[Mapping[str, float]]) -> Figure | None:
    line, dots = series(metrics, "loss"), series(metrics, "eval_loss")
    if not line and not dots:
        return None
    values = [value for _, value in (*line, *dots)]
    log = min(values) > 0 and max(values) / min(values) > LOG_RANGE
    axis = Axis(tick_text, _precise, log)

    def draw(size: tuple[float, float]) -> Markup:
        return line_chart("training loss", line, size, axis, dots, "held-out loss")

    key = ([(LINE, "training")] if line else []) + ([(DOT, "held out")] if dots else [])
    said = [f"Loss of the trained tokens in nats{', on a log scale' if log else ''}."]
    if len(line) > MOST_POINTS:
        each = -(-len(line) // MOST_POINTS)
        said.append(f"A point is the mean of {each} logged steps, the band reaches from the lowest to the highest.")
    if dots:
        said.append(f"Held out: {_precise(dots[-1][1])} at step {dots[-1][0]:,.0f}.")
    return two_sizes("Loss", draw, 320.0, key, " ".join(said))


def _curve(title: str, name: str, line: Sequence[Point], axis: Axis) -> Curve | None:
    return Curve(title, line_chart(name, line, (HALF, 220.0), axis)) if line else None


def _learning_rate(line: Sequence[Point]) -> Curve | None:
    peak = max((value for _, value in line), default=0.0)
    return _curve("Learning rate", "learning rate", line, Axis(_precise if peak >= 1e-3 else scientific, _precise))


def _memory(line: Sequence[Point]) -> Curve | None:
    """Ticks are in one unit, so that they are round."""
    most = max((value for _, value in line), default=0.0)
    divisor, unit = (1e9, "GB") if most >= 2e9 else (1e6, "MB")
    scaled = [(step, value / divisor) for step, value in line]
    axis = Axis(tick_text, lambda value: human_bytes(value * divisor))
    return _curve(f"Peak memory so far, {unit}", "peak memory", scaled, axis)


def _precise(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def _whole(value: float) -> str:
    return counted(round(value), "token/s", "tokens/s")
