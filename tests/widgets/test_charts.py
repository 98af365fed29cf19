"""Still charts: bars to scale, and requests by steps, as SVG and as text."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
from trtlab.widgets import bars, schedule
from trtlab.widgets.charts import LOOKS, READS, REQUESTS, STEP, WAITS, WIDTH, WRITES

from trtlab.runtime.events import StepEvent, Work

SVG = "{http://www.w3.org/2000/svg}"


def marks(chart):
    """Left end, middle line and length of each bar or dashes in a row, by colour."""
    return {
        path.get("stroke"): [
            tuple(map(float, run)) for run in re.findall(r"M([\d.]+) ([\d.]+)h([\d.]+)", path.get("d"))
        ]
        for path in list(ElementTree.fromstring(chart.svg).iter(f"{SVG}path"))[1:]  # without the ground
    }


def crosses(chart):
    """x of the crosses of each run."""
    texts = ElementTree.fromstring(chart.svg).iter(f"{SVG}text")
    return [list(map(int, text.get("x").split())) for text in texts if set(text.text or "") == {"×"}]


def words(chart):
    return ["".join(text.itertext()) for text in ElementTree.fromstring(chart.svg).iter(f"{SVG}text")]


def event(step, work=(), waiting=()):
    return StepEvent(step, 0.0, 1.0, work, (), (), (), waiting, (), 0, 0, 0)


def test_bars_have_one_scale_and_their_numbers():
    chart = bars({"before": [4.0, 1.0], "after": [2.0, 0.5]}, ["loud & clear", "quiet"])
    before, after = marks(chart).values()
    lengths = [length for _, _, length in (*before, *after)]
    assert [length / lengths[0] for length in lengths] == pytest.approx([1, 0.25, 0.5, 0.125], rel=0.01)  # whole pixels
    assert [y for _, y, _ in sorted(before + after, key=lambda bar: bar[1])] == [40, 60, 86, 106]
    assert words(chart) == ["█ before\u2003█ after", "4.00", "1.00", "2.00", "0.50", "loud & clear", "quiet"]
    assert [line.split()[:2] for line in repr(chart).splitlines()] == [
        ["before", "after"], ["loud", "&"], ["quiet", "━━━━"]
    ]  # fmt: skip
    assert chart._repr_svg_() == chart.svg


def test_a_schedule_has_a_line_for_each_request_and_a_column_for_each_step():
    events = [
        event(5, work=(Work(1, 0, 7, True),), waiting=(2,)),
        event(6, work=(Work(1, 7, 1, True),), waiting=(2,)),
        event(7, work=(Work(2, 0, 3, True), Work(1, 8, 1, True, wasted=True))),
    ]
    chart = schedule(events)
    assert repr(chart) == "1 █▪×\n2 ··█"
    drawn = {
        colour: [((x - REQUESTS) / STEP, (length + 1) / STEP) for x, _, length in runs]
        for colour, runs in marks(chart).items()
    }
    assert drawn == {LOOKS[WAITS]: [(0, 2)], LOOKS[READS]: [(0, 1), (2, 1)], LOOKS[WRITES]: [(1, 1)]}
    assert [[(x - REQUESTS) / STEP for x in run] for run in crosses(chart)] == [[pytest.approx(2.5, abs=0.5 / STEP)]]
    assert len({line for _, line, _ in marks(chart)[LOOKS[READS]]}) == 2
    legend, *labels = words(chart)
    assert all(what in legend for what in LOOKS)
    assert labels == ["×", "request 1", "request 2", "step", "5"]


def test_a_request_that_has_ended_leaves_its_columns_empty():
    chart = schedule([event(0, work=(Work(1, 0, 2, True), Work(2, 0, 2, True))), event(1, work=(Work(2, 2, 1, True),))])
    assert repr(chart) == "1 █\n2 █▪"


def test_many_steps_fit_the_width_of_the_chart():
    chart = schedule([event(step, work=(Work(1, step, 1, True),)) for step in range(300)])
    ((left, _, length),) = marks(chart)[LOOKS[WRITES]]
    assert left == REQUESTS
    assert WIDTH - 3 < left + length <= WIDTH
