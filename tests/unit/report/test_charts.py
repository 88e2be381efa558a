"""Charts: round ticks, points where the numbers say, labels that never touch, text that cannot act."""

import random
import re
from xml.etree import ElementTree

import pytest

from qlora_kit.report.charts import (
    FONT,
    Axis,
    Scale,
    frame,
    inner_ticks,
    line_chart,
    log_ticks,
    scientific,
    thinned,
    tick_text,
    ticks,
)
from qlora_kit.report.run_page_scatter import MARKS, RADIUS, Mark, place_labels, scatter

NASTY = '<script>alert("x")</script>&\x00'
SIZE = (500.0, 240.0)


def of_class(svg, name):
    return [one for one in ElementTree.fromstring(svg).iter() if name in one.get("class", "").split()]


def numbers(path):
    return [float(number) for number in re.findall(r"-?\d+\.?\d*", path)]


@pytest.mark.parametrize(
    ("low", "high", "count", "expected"),
    [
        (0, 64, 8, [0, 10, 20, 30, 40, 50, 60, 70]),
        (0, 0.002, 5, [0, 0.0005, 0.001, 0.0015, 0.002]),
        (94, 272, 5, [50, 100, 150, 200, 250, 300]),
        (0, 0, 5, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (3, 3, 3, [3, 4, 5, 6]),
    ],
)
def test_ticks_are_round_and_span_the_values(low, high, count, expected):
    assert ticks(low, high, count) == pytest.approx(expected)


def test_ticks_of_anything_span_it_in_few_steps():
    draw = random.Random(0)
    for _ in range(2000):
        low = draw.choice([0.0, draw.uniform(-10, 10) * 10 ** draw.randint(-6, 9)])
        high = low + draw.uniform(1e-3, 10) * 10 ** draw.randint(-3, 9)
        found = ticks(low, high, 5)
        slack = 1e-6 * (high - low) + 1e-11 * abs(high)
        assert found[0] <= low + slack
        assert found[-1] >= high - slack
        assert 2 <= len(found) <= 6


def test_steps_are_never_split():
    assert inner_ticks(0, 2, 8, least=1) == [0, 1, 2]
    assert inner_ticks(0, 64, 8) == [0, 10, 20, 30, 40, 50, 60]


@pytest.mark.parametrize(
    ("low", "high", "count", "powers"),
    [
        (0.006, 4.5, 5, [-3, -2, -1, 0, 1]),
        (1e-3, 1e-3, 5, [-3, -2]),
        (2e-7, 0.3, 4, [-7, -5, -3, -1, 1]),
    ],
)
def test_log_ticks_are_powers_of_ten(low, high, count, powers):
    assert log_ticks(low, high, count) == pytest.approx([10.0**power for power in powers])


def test_ticks_are_written_short():
    assert [tick_text(value) for value in (0, 0.002, 5e-5, 20000, 1.5, 2e-4)] == [
        "0",
        "0.002",
        "5e-5",
        "20,000",
        "1.5",
        "2e-4",
    ]
    assert scientific(1.5e-4) == "1.5e-4"


def test_scales_map_ends_to_ends_and_decades_evenly():
    assert Scale(0, 10, 100, 200).at(2.5) == 125
    assert Scale(0, 10, 100, 200).at(99) == 200
    log = Scale(0.001, 10, 400, 0, log=True)
    assert [log.at(value) for value in (0.001, 0.01, 1, 10)] == pytest.approx([400, 300, 100, 0])
    assert log.at(0) == 400


def test_a_line_passes_where_its_values_say():
    svg = line_chart("loss", [(0, 0.0), (5, 4.0), (10, 2.0)], SIZE, Axis())
    x1, y1, x2, y2, x3, y3 = numbers(of_class(svg, "line")[0].get("d"))
    assert x2 - x1 == pytest.approx(x3 - x2, abs=0.2)
    assert y1 - y2 == pytest.approx(2 * (y1 - y3), abs=0.2)
    assert y1 == numbers(of_class(svg, "base")[0].get("d"))[1]  # 0 lies on the axis


def test_every_point_tells_its_step_and_value_when_hovered():
    svg = line_chart("loss", [(1, 0.5), (2, 0.25)], SIZE, Axis(), [(2, 0.3)], "held-out loss")
    titles = [one.text for one in ElementTree.fromstring(svg).iter("title")]
    assert titles == ["step 1: loss 0.5", "step 2: loss 0.25", "step 2: held-out loss 0.3"]
    first, second = of_class(svg, "hit")
    assert float(first.get("x")) + float(first.get("width")) == pytest.approx(float(second.get("x")), abs=0.15)


@pytest.mark.parametrize("values", [[(1, 2.0)], [(1, 0.0), (2, 0.0)], [(7, 3e-9)], [(1, 5e12), (2, 1e-3)]])
def test_odd_values_are_drawn_inside(values):
    for log in (False, all(value > 0 for _, value in values)):
        svg = line_chart("x", values, SIZE, Axis(log=log))
        for one in [*of_class(svg, "line"), *of_class(svg, "dot")]:
            assert all(-20 <= number <= SIZE[0] for number in numbers(one.get("d")))


def test_dots_alone_make_a_chart():
    svg = line_chart("x", [], SIZE, Axis(), [(3, 1.0)], "held out")
    assert len(of_class(svg, "dot")) == 1
    assert not of_class(svg, "line")


def test_many_points_become_means_with_a_band():
    line = [(step, float(step % 2)) for step in range(1, 1001)]
    groups = thinned(line, most=200)
    assert len(groups) == 200
    assert [groups[0].first, groups[0].last, groups[-1].last] == [1, 5, 1000]
    assert groups[0].mean == pytest.approx(0.6)
    assert (groups[0].low, groups[0].high) == (0, 1)
    assert thinned(line[:7], most=5)[-1] == thinned(line[6:7])[0]
    svg = line_chart("x", line, SIZE, Axis())
    assert len(of_class(svg, "band")) == 1
    assert "steps 1 to 5: mean x 0.6, 0 to 1" in svg
    assert not of_class(line_chart("x", line[:200], SIZE, Axis()), "band")


def test_names_cannot_act():
    svg = line_chart(NASTY, [(1, 1.0)], SIZE, Axis(value=lambda value: NASTY))
    svg += scatter(NASTY, [Mark(NASTY, 1, 1, 0, NASTY)], SIZE, Axis(), Axis(), NASTY)
    assert "<script" not in svg
    assert "\x00" not in svg


def marks_of(draw, count):
    names = ["".join(draw.choices("abcdefgh_", k=draw.randint(3, 22))) for _ in range(count)]
    # Clusters, as files of one size with nearly the same loss make them.
    homes = [(draw.uniform(90, 300), 10 ** draw.uniform(-6, 0)) for _ in range(3)]
    spots = [(x + draw.gauss(0, 8), y * 10 ** draw.gauss(0, 0.2)) for x, y in draw.choices(homes, k=count)]
    return [Mark(name, x, y, index, name) for index, (name, (x, y)) in enumerate(zip(names, spots, strict=True))]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("width", [1072.0, 372.0])
def test_labels_touch_nothing(seed, width):
    draw = random.Random(seed)
    marks = marks_of(draw, draw.choice([1, 4, 15, 24]))
    svg = scatter("plot", marks, (width, 260.0), Axis(), Axis(log=True), "size", limit=0.05)
    labels = [
        (one.text, float(one.get("x")), float(one.get("y")) - FONT, len(one.text) * 0.6 * FONT)
        for one in of_class(svg, "name")
    ]
    assert sorted(name for name, *_ in labels) == sorted(mark.name for mark in marks)
    dots = [numbers(one.get("d"))[:2] for one in of_class(svg, "mark")]
    limit = numbers(of_class(svg, "limit")[0].get("d"))[1]
    for index, (_, x, y, wide) in enumerate(labels):
        assert x >= 0
        assert x + wide <= width
        assert not y < limit < y + FONT
        for _, other_x, other_y, other_wide in labels[:index]:
            assert x + wide <= other_x or other_x + other_wide <= x or abs(y - other_y) >= FONT
        for dot_x, dot_y in dots:
            outside = dot_x + RADIUS <= x or x + wide <= dot_x - RADIUS
            assert outside or dot_y + RADIUS <= y or y + FONT <= dot_y - RADIUS


def test_a_lone_label_stands_beside_its_point_without_a_line():
    inside = frame((0, 10), [0, 10], [0, 10], (500, 300), Axis(), Axis())
    (label,) = place_labels([("gguf", 200.0, 100.0)], inside)
    assert label.leader is None
    assert (label.box.left - 200, label.box.top + label.box.height / 2) == (9, 100)


def test_a_label_moved_away_has_a_line_that_meets_no_other_label():
    inside = frame((0, 10), [0, 10], [0, 10], (500, 300), Axis(), Axis())
    spots = [(200.0 + 5 * (index % 2), 100.0 + 6 * index) for index in range(6)]
    labels = place_labels([(f"file_{index}", x, y) for index, (x, y) in enumerate(spots)], inside)
    assert len(labels) == 6
    led = [label for label in labels if label.leader]
    assert led
    for label in led:
        assert label.leader is not None
        x, y, to_x, to_y = label.leader
        for share in (0.2, 0.5, 0.8):
            at = x + (to_x - x) * share, y + (to_y - y) * share
            for other in labels:
                if other is not label:
                    box = other.box
                    assert not (box.left < at[0] < box.left + box.width and box.top < at[1] < box.top + box.height)


def test_a_plot_grows_until_its_labels_fit():
    marks = [Mark(f"a_rather_long_name_{index:02}", 1, 1, 0, "") for index in range(12)]
    svg = scatter("plot", marks, (372.0, 120.0), Axis(), Axis(log=True), "size")
    assert float(ElementTree.fromstring(svg).attrib["viewBox"].split()[3]) > 120
    assert len(of_class(svg, "name")) == 12


def test_marks_differ_in_shape_and_rejected_ones_are_hollow():
    marks = [Mark(f"m{index}", index + 1, 0.1, index, "", hollow=index == 2) for index in range(6)]
    drawn = of_class(scatter("plot", marks, SIZE, Axis(), Axis(log=True), "size"), "mark")
    assert len({re.sub(r"^M[\d.]+ [\d.]+", "", one.get("d")) for one in drawn}) == len(MARKS) == 6
    assert ["hollow" in one.get("class") for one in drawn] == [False, False, True, False, False, False]


def test_a_value_of_zero_lies_on_the_border_of_a_log_plot():
    svg = scatter("plot", [Mark("a", 1, 0.0, 0, ""), Mark("b", 2, 0.01, 0, "")], SIZE, Axis(), Axis(log=True), "size")
    lowest = numbers(of_class(svg, "base")[0].get("d"))[1]
    assert [numbers(one.get("d"))[1] == lowest for one in of_class(svg, "mark")] == [True, True]
