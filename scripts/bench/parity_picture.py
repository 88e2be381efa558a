"""Draws loss curves as an SVG that is readable on light and dark pages."""

from typing import Any

WIDTH, HEIGHT, LEFT, BELOW, TOP = 860, 420, 56, 40, 34
COLORS = ("#888888", "#2a78d6", "#1a9a6c", "#d9662b", "#8a63d2")
SMOOTH = 5  # steps


def picture(runs: list[dict[str, Any]]) -> str:
    """The losses of the first seed by step, a mean over five steps, one curve for each engine."""
    curves = {run["engine"]: _smooth(run["losses"]) for run in runs if run["seed"] == min(one["seed"] for one in runs)}
    highest = max(max(curve) for curve in curves.values())
    lowest = min(min(curve) for curve in curves.values())
    steps = max(len(curve) for curve in curves.values())

    def place(step: int, loss: float) -> str:
        x = LEFT + (WIDTH - LEFT - 12) * step / max(steps - 1, 1)
        y = TOP + (HEIGHT - TOP - BELOW) * (highest - loss) / max(highest - lowest, 1e-9)
        return f"{x:.1f},{y:.1f}"

    lines = []
    for index, (name, curve) in enumerate(curves.items()):
        color = COLORS[index % len(COLORS)]
        points = " ".join(place(step, loss) for step, loss in enumerate(curve))
        # The first is drawn broad, so that the others are seen to lie on it.
        width = 5 if index == 0 else 1.4
        lines.append(f'<polyline fill="none" stroke="{color}" stroke-width="{width}" points="{points}"/>')
        lines.append(f'<rect x="{LEFT + 10 + index * 190}" y="10" width="18" height="5" fill="{color}"/>')
        lines.append(f'<text x="{LEFT + 34 + index * 190}" y="17">{name}</text>')
    for share in range(5):
        loss = lowest + (highest - lowest) * share / 4
        y = place(0, loss).split(",")[1]
        lines.append(f'<line x1="{LEFT}" x2="{WIDTH - 12}" y1="{y}" y2="{y}" stroke="#88888844"/>')
        lines.append(f'<text x="{LEFT - 8}" y="{float(y) + 4:.1f}" text-anchor="end">{loss:.2f}</text>')
        step = round((steps - 1) * share / 4)
        x = place(step, lowest).split(",")[0]
        lines.append(f'<text x="{x}" y="{HEIGHT - BELOW + 20}" text-anchor="middle">{step + 1}</text>')
    lines.append(
        f'<text x="{WIDTH / 2}" y="{HEIGHT - 6}" text-anchor="middle">step; training loss, mean of {SMOOTH}</text>'
    )
    style = "text{font:13px system-ui,sans-serif;fill:#777}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="Training loss by step and engine"><style>{style}</style>\n' + "\n".join(lines) + "\n</svg>\n"
    )


def _smooth(losses: list[float]) -> list[float]:
    return [
        sum(losses[max(0, step - SMOOTH + 1) : step + 1]) / len(losses[max(0, step - SMOOTH + 1) : step + 1])
        for step in range(len(losses))
    ]
