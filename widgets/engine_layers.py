"""The widget EngineLayers: bars for the layers that TensorRT compiles, by weight bytes, FLOP or number of layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import plotly.graph_objects as go
from ipywidgets import HTML, IntSlider, ToggleButtons, VBox

from trtlab.card import Card, Table, bar, count, html, size
from trtlab.config.calls import public
from trtlab.engine import Engine
from trtlab.tensorrt.bindings import profiles
from trtlab.tensorrt.read.interpreter import LayerTable

from .layer_groups import GROUPINGS, MEASURES, groups, known
from .live import Dashboard, LiveFigure, labelled

LISTED = 10  # layers of a selection that are listed, at most
# Okabe and Ito's palette, which colour-blind readers can distinguish; legend and table also name the precisions.
COLOURS = {"bfloat16": "#0072B2", "float16": "#009E73", "float32": "#E69F00", "int8": "#CC79A7", "int4": "#D55E00"}
OTHER_COLOUR = "#7F7F7F"


def figure(
    table: LayerTable, measure: str = "weight bytes", by: str = "part", selected: str = "", step: str = ""
) -> go.Figure:
    """The picture: one bar for each group, split by precision.

    The traces are one for each precision of the whole table, so that their number does not change, then the labels.
    The index of a point in a trace is the index of its group in ``groups``.

    Args:
        table: All layers of an engine's rank.
        measure: The length of the bars, a key of MEASURES.
        by: What a bar stands for, a key of GROUPINGS.
        selected: The name of the bar that is marked as selected.
        step: Words for the title that say which step the FLOP belong to.
    """
    shown = groups(table, measure, by)
    scale = MEASURES[measure]
    totals = {name: sum(map(scale.of, rows)) for name, rows in shown.items()}
    whole, longest = sum(totals.values()), max(totals.values(), default=1)
    factor, unit = scale.unit(longest)
    places = list(range(len(shown)))
    traces: list[Any] = [
        go.Bar(
            name=precision,
            orientation="h",
            y=places,
            x=[sum(scale.of(row) for row in rows if row.precision == precision) / factor for rows in shown.values()],
            marker={
                "color": COLOURS.get(precision, OTHER_COLOUR),
                "opacity": [1.0 if name == selected else 0.55 for name in shown],
            },
            hoverinfo="none",
        )
        for precision in sorted({row.precision for row in table})
    ]
    labels = go.Scatter(
        mode="text",
        y=places,
        x=[total / factor for total in totals.values()],
        text=[f" {scale.text(total)} · {_share(total / whole)}" for total in totals.values()],
        textposition="middle right",
        cliponaxis=False,
        hoverinfo="none",
        showlegend=False,
    )
    title = " ".join(filter(None, (scale.text(whole), scale.title, f"by {by}")))
    title += f", in {step}" if step and measure == "FLOP" else ""
    layout = _layout(title, [_mark(name, selected) for name in shown], longest / factor)
    layout["xaxis"]["title"] = {"text": f"{scale.axis}, {unit}" if unit else scale.axis, "font": {"size": 13}}
    return go.Figure([*traces, labels], layout)


def _layout(title: str, names: list[str], longest: float) -> dict[str, Any]:
    thickness = 26 if len(names) <= 24 else 18
    return {
        "template": "plotly_white",
        "title": {"text": title, "x": 0.01, "xanchor": "left", "y": 1, "yanchor": "top", "pad": {"t": 12}},
        "font": {"size": 13},
        "barmode": "stack",
        "bargap": 0.25,
        "hovermode": "y",  # a click anywhere on the bar's line counts, because a bar can be very short
        "height": 130 + thickness * max(2, len(names)),
        "autosize": True,
        "margin": {"l": 170, "r": 20, "t": 66, "b": 56},
        "legend": {
            "orientation": "h",
            "x": 0,
            "y": 1,
            "yanchor": "bottom",
            "title": {"text": "precision ", "font": {"size": 13}},
        },
        "xaxis": {"range": [0, longest * 1.3], "fixedrange": True},  # room for the labels
        "yaxis": {
            "tickmode": "array",
            "tickvals": list(range(len(names))),
            "ticktext": names,
            "range": [max(2, len(names)) - 0.5, -0.5],
            "fixedrange": True,
            "showgrid": False,
            "zeroline": False,
        },
    }


def _mark(name: str, selected: str) -> str:
    return f"<b>▶ {name}</b> " if name == selected else f"{name} "


def _share(share: float) -> str:
    return f"{share:.0%}" if share >= 0.005 else "< 1%"


@public
class EngineLayers(Dashboard):
    """Shows the layers of one rank of an engine as bars; a click selects a bar, ``selection`` holds its layers.

    The controls are ``measure``, ``by``, ``step`` and ``amount`` (rows of a generation step or tokens of a context
    step, within the plan's profiles); set their ``value`` in the page or from Python.
    """

    def __init__(self, engine: Engine, rank: int = 0) -> None:
        self._emission = engine.emission(rank)
        context, generation = profiles(self._emission.build)
        self._most = {"generation": generation.batch.max, "context": context.tokens.max}
        self.measure = _buttons(list(MEASURES))
        self.by = _buttons(list(GROUPINGS))
        self.step = _buttons(list(self._most))
        self.amount = IntSlider(1, 1, generation.batch.max, continuous_update=False)
        self._table = self._emission.table()
        self._selected = next(iter(groups(self._table)))
        self.figure = self._figure()
        self._live = LiveFigure(self.figure, self._click)
        self._details = HTML()
        lines = [
            labelled("bars show", self.measure),
            labelled("grouped by", self.by),
            labelled("for a step of", self.step, self.amount),
        ]
        self.view = VBox([*lines, self._live, self._details])
        self._details.add_class("jp-RenderedHTMLCommon")
        self._details.value = self._details_html()
        self._observe()

    @property
    def table(self) -> LayerTable:
        """All layers, with the FLOP of the selected step."""
        return self._table

    @property
    def selected(self) -> str:
        """The name of the selected bar."""
        return self._selected

    @property
    def selection(self) -> LayerTable:
        """The layers of the selected bar, in execution order."""
        return LayerTable(groups(self._table, self.measure.value, self.by.value)[self._selected])

    def select(self, name: str) -> None:
        """Select a bar, as a click does. Raises ConfigError if no bar has that name."""
        shown = groups(self._table, self.measure.value, self.by.value)
        known("bar", shown, name)
        self._selected = name
        self._show()

    def card(self) -> Card:
        """See Dashboard: the bars, and the layers of the selected bar."""
        measure, by = self.measure.value, self.by.value
        shown, amount = groups(self._table, measure, by), MEASURES[measure].of
        longest = max(sum(map(amount, rows)) for rows in shown.values())
        bars = tuple(
            (name, *_sums(LayerTable(rows)), bar(sum(map(amount, rows)) / longest)) for name, rows in shown.items()
        )
        return Card(
            f"EngineLayers · {len(self._table)} layers · {self._step_words()}",
            tables=(Table((by, " layers", " weights", " FLOP", measure), bars), self._selection_table()),
        )

    def __repr__(self) -> str:
        return (
            f"EngineLayers({len(self._table)} layers, {self.measure.value} by {self.by.value}, {self._step_words()}, "
            f"selected {self._selected}: {len(self.selection)} layers)"
        )

    def _observe(self) -> None:
        self.measure.observe(self._regroup, "value")
        self.by.observe(self._regroup, "value")
        self.step.observe(self._resize, "value")
        self.amount.observe(self._recount, "value")
        self._resize()

    def _regroup(self, _: object = None) -> None:
        """Show other bars; the selected one stays selected if it still exists, else the first one is selected."""
        shown = groups(self._table, self.measure.value, self.by.value)
        if self._selected not in shown:
            self._selected = next(iter(shown))
        self._show()

    def _resize(self, _: object = None) -> None:
        """Set the bound of ``amount`` to that of the selected step's profile."""
        self.amount.description = {"generation": "rows", "context": "tokens"}[self.step.value]
        self.amount.max = self._most[self.step.value]
        self.amount.value = min(self.amount.value, self.amount.max)
        self._recount()

    def _recount(self, _: object = None) -> None:
        number = self.amount.value
        generation = self.step.value == "generation"
        self._table = self._emission.table(batch=number) if generation else self._emission.table(tokens=number)
        self._show()

    def _click(self, _: int, point: int) -> None:
        self.select(list(groups(self._table, self.measure.value, self.by.value))[point])

    def _show(self) -> None:
        self.figure = self._figure()
        self._live.draw(self.figure)
        self._details.value = self._details_html()

    def _figure(self) -> go.Figure:
        return figure(self._table, self.measure.value, self.by.value, self._selected, self._step_words())

    def _details_html(self) -> str:
        table = self._selection_table()
        return html(Card(table.caption, tables=(replace(table, caption=""),)))

    def _selection_table(self) -> Table:
        return selection_table(self._selected, self.selection, self.measure.value)

    def _step_words(self) -> str:
        number = self.amount.value
        if self.step.value == "generation":
            return f"a generation step of {number} {'row' if number == 1 else 'rows'}"
        return f"a context step of {number} {'token' if number == 1 else 'tokens'}"


def selection_table(name: str, rows: LayerTable, measure: str = "weight bytes") -> Table:
    """The selected layers, the largest by ``measure`` first, equal ones in execution order."""
    amount = MEASURES[measure].of
    largest = sorted(rows, key=lambda row: -amount(row))[:LISTED]
    layers, weights, flops = _sums(rows)
    listed = tuple(
        (row.name, row.kind, row.precision, str(list(row.shape)), size(row.weight_bytes), count(row.flops))
        for row in largest
    )
    if len(rows) > len(largest):
        listed += ((f"and {len(rows) - len(largest)} more", "", "", "", "", ""),)
    caption = f"{name}: {layers} layers, {weights} of weights, {flops} FLOP"
    return Table(("layer", "kind", "precision", "result", " weights", " FLOP"), listed, caption)


def _sums(rows: LayerTable) -> tuple[str, str, str]:
    """Number, weight bytes and FLOP of some layers, as text."""
    return str(len(rows)), size(rows.weight_bytes), count(rows.flops)


def _buttons(options: list[str]) -> ToggleButtons:
    buttons = ToggleButtons(options=options)
    buttons.style.button_width = "auto"
    return buttons
