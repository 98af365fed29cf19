"""Still charts: bars to scale, and requests by steps, as SVG and as text."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
from trtlab.widgets import bars, schedule
from trtlab.widgets.charts import CROSS, LOOKS, READS, WAITS, WRITES

from trtlab.runtime.events import StepEvent, Work

SVG = "{http://www.w3.org/2000/svg}"


def boxes(chart):
    """Width and colour of each bar, those of the legend first."""
    return [(float(r.get("width")), r.get("fill")) for r in ElementTree.fromstring(chart.svg).iter(f"{SVG}rect")]


def marks(chart):
    """Left edge, line and length in steps of each run of dashes by its colour, that of the legend first."""
    found = {}
    for path in list(ElementTree.fromstring(chart.svg).iter(f"{SVG}path"))[1:]:  # without the ground
        dash = float((path.get("stroke-dasharray") or "14 1").split()[0]) + 1
        runs = re.findall(r"M([\d.]+) ([\d.]+)(?:h([\d.]+))?", path.get("d"))
        found.setdefault(path.get("stroke"), []).extend(
            (float(x), float(y), round((float(length or 0) + 1) / dash)) for x, y, length in runs
        )
    return found


def words(chart):
    return [text.text for text in ElementTree.fromstring(chart.svg).iter(f"{SVG}text")]


def event(step, work=(), waiting=()):
    return StepEvent(step, 0.0, 1.0, work, (), (), (), waiting, (), 0, 0, 0)


def test_bars_have_one_scale_and_their_numbers():
    chart = bars({"before": [4.0, 1.0], "after": [2.0, 0.5]}, ["loud & clear", "quiet"])
    in_legend, drawn = boxes(chart)[:2], boxes(chart)[2:]
    widths = [width for width, _ in drawn]
    assert [width / widths[0] for width in widths] == pytest.approx(
        [1, 0.5, 0.25, 0.125], rel=0.01
    )  # tenths of a pixel
    assert [colour for _, colour in drawn] == 2 * [colour for _, colour in in_legend]
    assert words(chart) == ["before", "after", "loud & clear", "4.00", "2.00", "quiet", "1.00", "0.50"]
    assert repr(chart).splitlines()[1].split()[0] == "quiet"
    assert chart._repr_svg_() == chart.svg


def test_a_schedule_has_a_line_for_each_request_and_a_column_for_each_step():
    events = [
        event(5, work=(Work(1, 0, 7, True),), waiting=(2,)),
        event(6, work=(Work(1, 7, 1, True),), waiting=(2,)),
        event(7, work=(Work(2, 0, 3, True), Work(1, 8, 1, True, wasted=True))),
    ]
    chart = schedule(events)
    assert repr(chart) == "1 █▪×\n2 ░░█"
    drawn = {colour: [(place - 150) / 15 for place, *_ in runs[1:]] for colour, runs in marks(chart).items()}
    assert drawn == {LOOKS[WAITS]: [0], LOOKS[READS]: [0, 2], LOOKS[WRITES]: [1], CROSS: [2.5]}
    assert [length for *_, length in marks(chart)[LOOKS[WAITS]]] == [1, 2]
    assert len({line for _, line, _ in marks(chart)[LOOKS[READS]][1:]}) == 2
    assert {"request 1", "request 2", "waits", "is computed for nothing", "5"} <= set(words(chart))


def test_a_request_that_has_ended_leaves_its_columns_empty():
    chart = schedule([event(0, work=(Work(1, 0, 2, True), Work(2, 0, 2, True))), event(1, work=(Work(2, 2, 1, True),))])
    assert repr(chart) == "1 █\n2 █▪"


def test_many_steps_fit_the_width_of_the_chart():
    chart = schedule([event(step, work=(Work(1, step, 1, True),)) for step in range(300)])
    ((left, _, length),) = marks(chart)[LOOKS[WRITES]][1:]
    assert (left, length) == (150, 300)
    ground, *drawn = map(float, re.findall(r"h([\d.]+)", chart.svg))
    assert left + max(drawn) <= ground
