"""Curves of a run: loss, learning rate, gradient norm, throughput and memory over steps."""

import math
from collections.abc import Callable, Mapping, Sequence

from qlora_kit.core.units import counted, human_bytes
from qlora_kit.report.charts import LOG_RANGE, MOST_POINTS, Axis, Point, line_chart, scientific, tick_text
from qlora_kit.report.page import text

WIDE, SLIM = 1104.0, 372.0  # px that the page gives a drawing on a desk and on a phone
HALF = 460.0


def curves(metrics: Sequence[Mapping[str, float]]) -> str:
    """Figures of what was logged; empty where nothing was."""
    drawn = [_loss(metrics)]
    small = [
        _learning_rate(series(metrics, "learning_rate")),
        _small("Gradient norm", "gradient norm", series(metrics, "grad_norm"), Axis(tick_text, _precise)),
        _small("Throughput, tokens/s", "tokens/s", series(metrics, "tokens_per_second"), Axis(tick_text, _whole)),
        _memory(series(metrics, "peak_memory_bytes")),
    ]
    if any(small):
        drawn.append(f'<div class="pair">{"".join(small)}</div>')
    return "\n".join(part for part in drawn if part)


def series(metrics: Sequence[Mapping[str, float]], key: str) -> list[Point]:
    """Finite values of a metric by step."""
    return [(row["step"], row[key]) for row in metrics if key in row and math.isfinite(row[key])]


def two_sizes(draw: Callable[[tuple[float, float]], str], height: float) -> str:
    """A drawing made twice, for a wide page and for a phone, so that its text keeps its size."""
    return f'<div class="wide">{draw((WIDE, height))}</div><div class="slim">{draw((SLIM, min(height, 260.0)))}</div>'


def _loss(metrics: Sequence[Mapping[str, float]]) -> str:
    line, dots = series(metrics, "loss"), series(metrics, "eval_loss")
    if not line and not dots:
        return ""
    values = [value for _, value in (*line, *dots)]
    log = min(values) > 0 and max(values) / min(values) > LOG_RANGE
    axis = Axis(tick_text, _precise, log)

    def draw(size: tuple[float, float]) -> str:
        return line_chart("training loss", line, size, axis, dots, "held-out loss")

    key = '<span><svg viewBox="0 0 22 12"><path class="line c1" d="M0 6H22"/></svg>training</span>' if line else ""
    if dots:
        key += '<span><svg viewBox="0 0 12 12"><path class="dot c2" d="M6 0l6 6l-6 6l-6 -6Z"/></svg>held out</span>'
    said = [f"Loss of the trained tokens in nats{', on a log scale' if log else ''}."]
    if len(line) > MOST_POINTS:
        each = -(-len(line) // MOST_POINTS)
        said.append(f"A point is the mean of {each} logged steps, the band reaches from the lowest to the highest.")
    if dots:
        said.append(f"Held out: {_precise(dots[-1][1])} at step {dots[-1][0]:,.0f}.")
    caption = f"<figcaption>{text(' '.join(said))}</figcaption>"
    return f'<figure><h3>Loss</h3><div class="key">{key}</div>{two_sizes(draw, 320.0)}{caption}</figure>'


def _small(title: str, name: str, line: Sequence[Point], axis: Axis) -> str:
    if not line:
        return ""
    drawn = line_chart(name, line, (HALF, 220.0), axis)
    return f"<figure><h3>{text(title)}</h3>{drawn}</figure>"


def _learning_rate(line: Sequence[Point]) -> str:
    peak = max((value for _, value in line), default=0.0)
    return _small("Learning rate", "learning rate", line, Axis(_precise if peak >= 1e-3 else scientific, _precise))


def _memory(line: Sequence[Point]) -> str:
    """Ticks are in one unit, so that they are round."""
    most = max((value for _, value in line), default=0.0)
    divisor, unit = (1e9, "GB") if most >= 2e9 else (1e6, "MB")
    scaled = [(step, value / divisor) for step, value in line]
    axis = Axis(tick_text, lambda value: human_bytes(value * divisor))
    return _small(f"Peak memory so far, {unit}", "peak memory", scaled, axis)


def _precise(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def _whole(value: float) -> str:
    return counted(round(value), "token/s", "tokens/s")
