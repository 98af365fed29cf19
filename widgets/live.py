"""What the dashboards share: one live figure that survives a page reload, and a still view where no kernel answers."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import plotly.graph_objects as go
from ipywidgets import VBox

from trtlab.display.card import Card
from trtlab.display.render import html


class Dashboard:
    """A VBox of controls under ``view``, with a repr and a still view of its own; put ``view`` into other widgets.

    A page without a kernel (GitHub, nbconvert) shows ``card()``, which holds what the picture shows.
    """

    view: VBox

    def card(self) -> Card:
        """What a reader sees where the widget cannot run."""
        raise NotImplementedError

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        live: dict[str, Any] = self.view._repr_mimebundle_(**options)
        return {**live, "text/plain": repr(self), "text/html": html(self.card())}


def show_in(live: go.FigureWidget, figure: go.Figure) -> None:
    """Put a figure's data and layout into a live one with as many traces, which keep their callbacks."""
    assert len(live.data) == len(figure.data), (len(live.data), len(figure.data))
    with live.batch_update():
        for trace, new in zip(live.data, figure.data, strict=True):
            trace.update(new.to_plotly_json(), overwrite=True)
        live.layout.update(figure.layout.to_plotly_json(), overwrite=True)
    remember(live)


def remember(live: go.FigureWidget) -> None:
    """Keep what a figure shows now: else the kernel's model keeps what it was made with, for a reloaded page."""
    with live.hold_sync():  # plotly 7.1
        live._widget_data = deepcopy(live._data)
        live._widget_layout = deepcopy(live._layout_obj._props)
