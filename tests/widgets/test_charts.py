"""Still charts: bars to scale, and requests by steps, as SVG and as text."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest
from trtlab.widgets import bars, schedule

from trtlab.runtime.events import StepEvent, Work

SVG = "{http://www.w3.org/2000/svg}"


def boxes(chart):
    """Left edge, upper edge, width and colour of each box, without the ground."""
    rects = list(ElementTree.fromstring(chart.svg).iter(f"{SVG}rect"))[1:]
    return [(float(r.get("x")), float(r.get("y")), float(r.get("width")), r.get("fill")) for r in rects]


def words(chart):
    return [text.text for text in ElementTree.fromstring(chart.svg).iter(f"{SVG}text")]


def event(step, work=(), waiting=()):
    return StepEvent(step, 0.0, 1.0, work, (), (), (), waiting, (), 0, 0, 0)


def test_bars_have_one_scale_and_their_numbers():
    chart = bars({"before": [4.0, 1.0], "after": [2.0, 0.5]}, ["loud & clear", "quiet"])
    in_legend, drawn = boxes(chart)[:2], boxes(chart)[2:]
    widths = [width for _, _, width, _ in drawn]
    assert [width / widths[0] for width in widths] == pytest.approx(
        [1, 0.5, 0.25, 0.125], rel=0.01
    )  # tenths of a pixel
    assert [colour for *_, colour in drawn] == 2 * [colour for *_, colour in in_legend]
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
    places = [(x, y) for x, y, _, _ in boxes(chart)]
    assert len(places) == 4 + 6
    lines = sorted({y for _, y in places[4:]})
    assert len(lines) == 2
    assert [len([y for _, y in places[4:] if y == line]) for line in lines] == [3, 3]
    assert {"request 1", "request 2", "waits", "is computed for nothing", "5"} <= set(words(chart))


def test_a_request_that_has_ended_leaves_its_columns_empty():
    chart = schedule([event(0, work=(Work(1, 0, 2, True), Work(2, 0, 2, True))), event(1, work=(Work(2, 2, 1, True),))])
    assert repr(chart) == "1 █\n2 █▪"


def test_many_steps_fit_the_width_of_the_chart():
    chart = schedule([event(step, work=(Work(1, step, 1, True),)) for step in range(300)])
    assert max(x + width for x, _, width, _ in boxes(chart)) <= 760
