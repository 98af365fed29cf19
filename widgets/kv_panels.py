"""The constant parts of the KV pool's picture: panels, axes, legend, and the look of each trace."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

CLEAR, FREE, EDGE, LINE, HATCH = "rgba(0,0,0,0)", "#F4F4F4", "#B8B8B8", "#000000", "#8A8A8A"
USED, COMPUTED = "#6E8CA8", "#B0763B"
MAP = ("map", "in use", "shared", "cached", "labels", "frame")
LOWER = ("used", "kept", "free", "cursor of blocks", "computed", "reused", "preempted", "cursor of tokens")
TRACES = MAP + LOWER
BARS = ("used", "kept", "free", "computed", "reused")  # the traces whose bars are steps
TOP, BOTTOM = 98, 46
UNUSED = "zoom pan select lasso zoomin zoomout autoscale".split()  # tools whose buttons would cover the title

Props = dict[str, Any]


def still() -> go.Figure:
    """All panels, axes and traces without the changing properties; the traces are TRACES."""
    figure = make_subplots(rows=3, cols=1)
    for row, traces in enumerate((_still_map(), _still_history(), _still_tokens()), 1):
        for trace in traces:
            figure.add_trace(trace, row, 1)
    figure.update_layout(
        template="plotly_white",
        title={"x": 0.01, "xanchor": "left", "y": 1, "yanchor": "top", "pad": {"t": 12}},
        font={"size": 12},
        autosize=True,
        barmode="stack",
        hovermode="closest",
        margin={"l": 62, "r": 20, "t": TOP, "b": BOTTOM},
        modebar={"remove": UNUSED},
        legend={"orientation": "h", "x": -0.02, "yanchor": "bottom", "font": {"size": 11}, "itemclick": False,
                "itemdoubleclick": False, "traceorder": "normal"},
    )  # fmt: skip
    figure.update_xaxes(showgrid=False, zeroline=False, fixedrange=True)
    figure.update_yaxes(fixedrange=True, zeroline=False)
    figure.update_xaxes(showticklabels=False, row=1)
    figure.update_yaxes(showgrid=False, title=_small("first block"), row=1)
    figure.update_yaxes(rangemode="tozero", nticks=4, row=2)
    figure.update_yaxes(rangemode="tozero", nticks=4, row=3)
    figure.update_xaxes(tickformat=",d", row=2, showticklabels=False)
    figure.update_xaxes(tickformat=",d", row=3, title=_small("step"))
    return figure


def _still_map() -> list[go.Bar | go.Scatter]:
    frames = go.Bar(
        name="map",
        width=0.92,
        marker={"color": FREE, "line": {"color": EDGE, "width": 1}},
        hovertemplate="%{hovertext}<extra></extra>",
        showlegend=False,
    )
    used = go.Bar(name="in use", width=0.88)
    stripes = {"shape": "/", "size": 12, "solidity": 0.5, "bgcolor": CLEAR}
    shared = go.Bar(name="shared", width=0.88, marker={"color": CLEAR, "pattern": stripes, "line": {"color": LINE}})
    cached = go.Bar(name="cached", width=0.88, marker=_hatched())
    labels = go.Scatter(mode="text", textfont={"size": 12, "color": "#000000"})
    return [
        frames,
        *(trace.update(hoverinfo="skip", showlegend=False) for trace in (used, shared, cached, labels, _line(2.5))),
    ]


def _still_history() -> list[go.Bar | go.Scatter]:
    looks = {
        "in use": {"color": USED},
        "cached for reuse": _hatched(),
        "free": {"color": FREE},
    }
    bars = [
        go.Bar(name=name, marker=look, hovertemplate=f"%{{hovertext}}: %{{y}} {name}<extra></extra>")
        for name, look in looks.items()
    ]
    return [*bars, _line(1.5)]


def _still_tokens() -> list[go.Bar | go.Scatter]:
    reused = {
        "color": "#FFFFFF",
        "pattern": {"shape": "x", "fgcolor": COMPUTED, "size": 6},
        "line": {"color": COMPUTED},
    }
    bars = [
        go.Bar(name=name, marker=look, hovertemplate=f"%{{hovertext}}: %{{y}} {name}<extra></extra>")
        for name, look in (("tokens computed", {"color": COMPUTED}), ("tokens reused", reused))
    ]
    marks = go.Scatter(
        name="a request was preempted",
        mode="markers",
        marker={"symbol": "triangle-down", "size": 10, "color": LINE},
        hovertemplate="%{hovertext}<extra></extra>",
        cliponaxis=False,
    )
    return [*bars, marks, _line(1.5)]


def _line(width: float) -> go.Scatter:
    look = {"color": LINE, "width": width}
    return go.Scatter(mode="lines", line=look, hoverinfo="skip", showlegend=False, cliponaxis=False)


def _hatched() -> Props:
    return {
        "color": "#FFFFFF",
        "pattern": {"shape": "/", "fgcolor": HATCH, "size": 6, "solidity": 0.25},
        "line": {"color": EDGE, "width": 1},
    }


def _small(text: str) -> Props:
    return {"text": text, "font": {"size": 11}, "standoff": 4}
