"""The picture of a quantization's study: errors and scales of all linears, numbers of one linear, bits of the caches.

The properties that a control can change are separate from the constant ones, because plotly spends most of its time on
the constant ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from trtlab.card import size
from trtlab.model.blocks import LAYER_SITES, LM_HEAD
from trtlab.quantize.study import BINS, CHANNELS, LinearStudy, Study, Trial

LINEARS = tuple(LAYER_SITES)  # in execution order; the head has a place of its own behind the last layer
# Okabe and Ito's palette, which colour-blind readers can distinguish; the hover text also names the linears.
PALETTE = ("#0072B2", "#56B4E9", "#E69F00", "#D55E00", "#009E73")
COLOURS = {part: PALETTE[place % len(PALETTE)] for place, part in enumerate(LINEARS)} | {LM_HEAD.part: "#F0E442"}
BEFORE, AFTER = "#7F7F7F", "#CC79A7"
PLACES = len(LINEARS) + 1  # of a layer on the axis, with a gap
SHARES = [2 * place / (BINS - 1) - 1 for place in range(BINS)]
PIXELS = (150, 120, 90)  # of the rows of panels: the whole picture and its controls fit a laptop's window
ABOVE, BELOW, GAP = 72, 44, 58  # all panels, and between their rows, in pixels
UNUSED = "zoom pan select lasso zoomin zoomout autoscale".split()  # tools whose buttons would cover the heading
CURVE = "largest |x| by channel"
TITLES = {
    "error": "signal over noise of each linear's output, dB (click a bar to exclude its linear, or to take it back)",
    "scale": "scales to the original: least, median, largest",
    "caches": "bits of eight that the KV cache uses (V hatched)",
}


@dataclass(frozen=True)
class Moving:
    """The properties that controls change: one dict for each trace, the summary, and the heading of one linear."""

    traces: tuple[dict[str, Any], ...]
    words: str
    heading: str


def figure(study: Study, alpha: float | None, scales: str, excluded: frozenset[str], shown: str) -> go.Figure:
    """The picture of a study with one setting of its controls.

    Number and order of the traces are the same for all settings of one study. The first traces are the error bars, one
    for each entry of ``kinds``; the index of a point in them is its layer.

    Args:
        study: All trials.
        alpha: The alpha of the linears, None for the searched one.
        scales: The granularity of the caches' scales.
        excluded: The full names of the linears that are not quantized.
        shown: The full name of the linear whose numbers are drawn before and after.
    """
    figure = _still(study)
    change(figure, moving(study, alpha, scales, excluded, shown))
    return figure


def moving(study: Study, alpha: float | None, scales: str, excluded: frozenset[str], shown: str) -> Moving:
    """The properties of the figure that depend on the settings; the arguments are those of ``figure``."""
    trials = [linear.trials[alpha] for linear in study.linears]
    traces: list[dict[str, Any]] = []
    heading = ""
    if study.linears:
        traces += _errors(study, trials, excluded, shown)
        traces.append(_scales(study, trials, excluded))
        one = next(linear for linear in study.linears if linear.name == shown)
        traces += [{"y": y} for pair in _numbers(one, one.trials[alpha]) for y in pair]
        heading = f"<b>{short(shown)}</b>, {_panels(study)[0]}"
        traces += [{}] * len(kinds(study))  # the legend's
    if study.caches:
        for bits in ([row.k_bits for row in study.caches[scales]], [row.v_bits for row in study.caches[scales]]):
            traces.append({"y": bits, "text": ["" if number is None else f"{number:.1f}" for number in bits]})
    return Moving(tuple(traces), _words(study, trials, excluded), heading)


def kinds(study: Study) -> tuple[str, ...]:
    """The linears that a layer may have, and the head where the study has one."""
    return (*LINEARS, *(linear.linear for linear in study.linears if linear.layer is None))


def change(figure: go.Figure, new: Moving, old: Moving | None = None) -> None:
    """Set a figure's properties to ``new``; those that are equal in ``old`` are not touched."""
    assert len(figure.data) == len(new.traces), (len(figure.data), len(new.traces))
    befores: Sequence[dict[str, Any]] = old.traces if old else [{}] * len(new.traces)
    changes = [
        {name: value for name, value in now.items() if name not in before or before[name] != value}
        for now, before in zip(new.traces, befores, strict=True)
    ]
    for trace, values in zip(figure.data, changes, strict=True):
        for name, value in values.items():
            trace[name] = value
    if new.heading:
        figure.layout.annotations[1].text = new.heading  # 0 is the heading of the errors


def short(name: str) -> str:
    """A linear's name without its prefix: ``layers.3.mlp.proj``."""
    return name.removeprefix("transformer.")


def _words(study: Study, trials: Sequence[Trial], excluded: frozenset[str]) -> str:
    if not study.linears:
        return "INT8 KV cache"
    kept = [trial.row for trial in trials if trial.row.name not in excluded]
    worst = min(kept, key=lambda row: row.snr_db, default=None)
    parts = [f"{size(sum(row.bytes_saved for row in kept))} saved"]
    parts.append(f"most noise in {short(worst.name)}, {worst.snr_db:.1f} dB" if worst else "no linear is quantized")
    parts += [f"{len(excluded)} of {len(trials)} excluded"] * bool(excluded)
    return " · ".join(parts)


def _errors(study: Study, trials: Sequence[Trial], excluded: frozenset[str], shown: str) -> list[dict[str, Any]]:
    """The bars of each kind of linear, the marks of the recipe as quantized, and the signs above the bars."""
    tops = [_finite(trial.row.snr_db) for trial in trials]
    is_excluded = [linear.name in excluded for linear in study.linears]
    bars: list[dict[str, Any]] = []
    for kind in kinds(study):
        mine = [i for i, linear in enumerate(study.linears) if linear.linear == kind]
        bars.append(
            {
                "y": [tops[i] for i in mine],
                "marker.color": ["#FFFFFF" if is_excluded[i] else COLOURS[kind] for i in mine],
                "hovertext": [_hover(trials[i], is_excluded[i]) for i in mine],
            }
        )
    signs = [f"{'✕' * out}{'▼' * (s.name == shown)}" for s, out in zip(study.linears, is_excluded, strict=True)]
    used = [_finite(linear.trials[study.quant.smoothquant_val].row.snr_db) for linear in study.linears]
    return [*bars, {"y": used}, {"y": [max(pair) for pair in zip(tops, used, strict=True)], "text": signs}]


def _finite(snr_db: float) -> float:
    return snr_db if math.isfinite(snr_db) else 0.0


def _hover(trial: Trial, excluded: bool) -> str:
    row = trial.row
    lines = [f"<b>{short(row.name)}</b>", f"{row.snr_db:.1f} dB, {size(row.bytes_saved)} saved"]
    if row.alpha is not None:
        lines.append(f"alpha {row.alpha:.2f}")
    if row.outliers_before is not None and row.outliers_after is not None:
        lines.append(f"outliers {row.outliers_before:.1f}x, now {row.outliers_after:.1f}x")
    return "<br>".join([*lines, "excluded: not quantized"] if excluded else lines)


def _scales(study: Study, trials: Sequence[Trial], excluded: frozenset[str]) -> dict[str, Any]:
    rows = [trial.row for trial in trials]
    return {
        "y": [row.scale_median for row in rows],
        "error_y.array": [row.scale_max - row.scale_median for row in rows],
        "error_y.arrayminus": [row.scale_median - row.scale_min for row in rows],
        "marker.symbol": ["circle-open" if linear.name in excluded else "circle" for linear in study.linears],
    }


def _numbers(one: LinearStudy, trial: Trial) -> list[tuple[list[float | None], list[float | None]]]:
    """The numbers before and after quantization, for each panel."""
    before, after = one.before, trial.after
    pairs = [
        (before.channels, after.channels),
        (before.activations, after.activations),
        (before.weights, after.weights),
    ]
    return [([y or None for y in old], [y or None for y in new]) for old, new in pairs if old and new]


def _panels(study: Study) -> list[str]:
    observed = study.linears[0].before.activations is not None
    return [*([CURVE, "inputs"] if observed else []), "weights"]


def _still(study: Study) -> go.Figure:
    """All panels, axes and traces without the changing properties."""
    rows = _rows(study)
    figure = _subplots(rows)
    if study.linears:
        _still_linears(figure, study)
        _still_numbers(figure, study)
        _still_legend(figure, study)
    if study.caches:
        _still_caches(figure, study, len(rows), 6 // len(rows[-1]) * (len(rows[-1]) - 1) + 1)
    figure.update_layout(
        template="plotly_white",
        font={"size": 12},
        height=_height(rows),
        autosize=True,
        barmode="group" if not study.linears else "overlay",
        bargap=0.3,
        hovermode="closest",
        margin={"l": 60, "r": 20, "t": ABOVE, "b": BELOW},
        modebar={"remove": UNUSED},
        legend={
            "orientation": "h",
            "x": -0.06,
            "font": {"size": 11},
            "y": 1 + 28 / (_height(rows) - ABOVE - BELOW),
            "yanchor": "bottom",
            "itemclick": False,
            "itemdoubleclick": False,
        },
    )
    figure.update_annotations(font={"size": 12})
    for note in figure.layout.annotations:
        if note.text in (TITLES["error"], CURVE):
            note.update(x=0, xanchor="left")
    return figure


def _rows(study: Study) -> list[list[str]]:
    """The panels: errors; numbers of one linear, which move with alpha; scales and caches."""
    caches = ["caches"] if study.caches else []
    return [["error"], _panels(study), ["scale", *caches]] if study.linears else [caches]


def _height(rows: Sequence[Sequence[str]]) -> int:
    return sum(PIXELS[: len(rows)]) + GAP * (len(rows) - 1) + ABOVE + BELOW


def _subplots(rows: Sequence[Sequence[str]]) -> go.Figure:
    specs: list[list[Any]] = []
    for panels in rows:
        span = 6 // len(panels)
        specs.append([{"colspan": span} if place % span == 0 else None for place in range(6)])
    return make_subplots(
        rows=len(rows),
        cols=6,
        specs=specs,
        subplot_titles=[TITLES.get(panel, panel) for panels in rows for panel in panels],
        row_heights=PIXELS[: len(rows)],
        vertical_spacing=GAP / (_height(rows) - ABOVE - BELOW) if len(rows) > 1 else 0,
        horizontal_spacing=0.055,
    )


def _still_linears(figure: go.Figure, study: Study) -> None:
    layers = 1 + max((linear.layer for linear in study.linears if linear.layer is not None), default=-1)
    places = {linear.name: _place(linear, layers) for linear in study.linears}
    for kind in kinds(study):
        x = [places[linear.name] for linear in study.linears if linear.linear == kind]
        look = {"color": COLOURS[kind], "width": 1.5}
        bars = go.Bar(name=kind, x=x, width=0.9, marker_line=look, showlegend=False)
        figure.add_trace(bars.update(hovertemplate="%{hovertext}<extra></extra>"), 1, 1)
    x = list(places.values())
    line = {"symbol": "line-ew", "size": 9, "line": {"width": 2, "color": "#000000"}}
    figure.add_trace(go.Scatter(name="as quantized", mode="markers", x=x, marker=line, hoverinfo="skip"), 1, 1)
    signs = go.Scatter(mode="text", x=x, textposition="top center", showlegend=False, hoverinfo="skip")
    figure.add_trace(signs, 1, 1)
    scales = go.Scatter(
        mode="markers",
        x=x,
        error_y={"type": "data", "symmetric": False, "color": BEFORE, "thickness": 1, "width": 2},
        marker={"size": 7, "color": [COLOURS[linear.linear] for linear in study.linears]},
        text=list(map(short, places)),
        hovertemplate="<b>%{text}</b><br>median scale %{y:.2e}<extra></extra>",
        showlegend=False,
    )
    figure.add_trace(scales, 3, 1)
    rows = [trial.row for linear in study.linears for trial in linear.trials.values()]
    figure.update_yaxes({"range": [0, max(_finite(row.snr_db) for row in rows) * 1.2], "title": _small("dB")}, row=1)
    low, high = math.log10(min(row.scale_min for row in rows)), math.log10(max(row.scale_max for row in rows))
    figure.update_yaxes(
        {"type": "log", "range": [low - 0.1, high + 0.1], "dtick": 1, "tickformat": ".0e"}, row=3, col=1
    )
    head = [linear.linear for linear in study.linears if linear.layer is None]
    for row, most in ((1, 16), (3, 8)):
        figure.update_xaxes(
            tickvals=[layer * PLACES + (len(LINEARS) - 1) / 2 for layer in range(layers + len(head))],
            ticktext=[*(f"layer {layer}" if layers <= most else str(layer) for layer in range(layers)), *head],
            range=[-1, (layers + len(head)) * PLACES - 1],
            showgrid=False,
            zeroline=False,
            row=row,
            col=1,
        )


def _place(linear: LinearStudy, layers: int) -> float:
    """A linear's place on the axis; the head stands behind ``layers`` layers."""
    if linear.layer is None:
        return layers * PLACES + (len(LINEARS) - 1) / 2
    return linear.layer * PLACES + LINEARS.index(linear.linear)


def _still_legend(figure: go.Figure, study: Study) -> None:
    """Traces for the legend alone: the sign of a bar's trace would have the look of its first bar, excluded or not."""
    for kind in kinds(study):
        sign = go.Bar(name=kind, x=[None], y=[None], marker_color=COLOURS[kind], hoverinfo="skip", legendrank=1)
        figure.add_trace(sign, 1, 1)


def _still_caches(figure: go.Figure, study: Study, row: int, column: int) -> None:
    layers = [cache.layer for cache in next(iter(study.caches.values()))]
    beside = [{"offset": side, "width": 0.38} if study.linears else {} for side in (-0.4, 0.0)]
    for name, shape, place in zip(("K", "V"), ("", "/"), beside, strict=True):
        bars = go.Bar(
            name=f"{name} cache", x=layers, textposition="outside", cliponaxis=False, showlegend=False, **place
        )
        bars.update(marker={"color": COLOURS["attention.dense"], "pattern": {"shape": shape}})
        figure.add_trace(bars.update(hovertemplate="layer %{x}: %{y:.2f} bits<extra></extra>"), row, column)
    ticks = {"tickvals": layers, "ticktext": [f"layer {n}" if len(layers) <= 8 else str(n) for n in layers]}
    figure.update_xaxes(ticks, row=row, col=column)
    figure.update_yaxes({"range": [0, 10.5], "tickvals": [0, 4, 8]}, row=row, col=column)


def _still_numbers(figure: go.Figure, study: Study) -> None:
    panels = _panels(study)
    for place, panel in enumerate(panels):
        column = place * 6 // len(panels) + 1
        curve = panel == CURVE
        for name, colour, dash in (("before", BEFORE, "dot"), ("after", AFTER, "solid")):
            line = {"color": colour, "width": 2, "shape": "linear" if curve else "hvh", "dash": dash}
            x = list(range(CHANNELS)) if curve else SHARES
            trace = go.Scatter(name=name, mode="lines", x=x, line=line, legendgroup=name, hoverinfo="skip")
            figure.add_trace(trace.update(showlegend=place == 0), 2, column)
        if curve:
            figure.update_xaxes(
                {"showticklabels": False, "title": _small("channels, the loudest first")}, row=2, col=column
            )
            figure.update_yaxes({"type": "log", "title": _small("times the median"), "dtick": 1}, row=2, col=column)
        else:
            figure.update_xaxes({"title": _small("share of the range"), "range": [-1.05, 1.05]}, row=2, col=column)
            figure.update_yaxes({"type": "log", "range": [-4.5, 0], "tickformat": ".0e", "dtick": 2}, row=2, col=column)


def _small(text: str) -> dict[str, Any]:
    return {"text": text, "font": {"size": 11}, "standoff": 4}
