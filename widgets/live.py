"""What the dashboards share: one live figure that survives a page reload, and a still view where no kernel answers."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from typing import Any

import plotly.graph_objects as go
from ipywidgets import VBox

from trtlab.card import Card, html

from .width import Width


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


class LiveFigure(go.FigureWidget):  # type: ignore[misc]  # plotly has no types
    """A FigureWidget that a reloaded page finds as it is now, and whose numbers can move without a new drawing."""

    def get_state(self, key: Any = None, drop_defaults: bool = False) -> dict[str, Any]:
        """What a page asks for: what the figure shows, where FigureWidget would tell what it was made with."""
        state: dict[str, Any] = super().get_state(key, drop_defaults)
        if "_layout_obj" in vars(self):  # it is made
            for name, now in (("_widget_data", self._data), ("_widget_layout", self._layout_obj._props)):
                if name in state:
                    state[name] = self.trait_metadata(name, "to_json")(deepcopy(now), self)
        return state

    def move(self, numbers: Sequence[Mapping[str, Any]]) -> None:
        """Give each trace new numbers, which are taken as they are: the browser moves marks, and draws nothing anew.

        A name is a property of the trace, inner ones with a dot. Twice as fast as ``batch_update``, which checks every
        number here and draws every panel and word there.
        """
        moved = {place: dict(new) for place, new in enumerate(numbers) if new}
        for place, new in moved.items():
            for name, value in new.items():
                *outer, last = name.split(".")
                functools.reduce(lambda inner, key: inner.setdefault(key, {}), outer, self._data[place])[last] = value
        frame = {"duration": 0, "redraw": False}
        options = {"transition": {"duration": 0}, "frame": frame, "mode": "immediate"}
        self._send_animate_msg(list(moved.values()), {}, list(moved), options)


def show_in(live: LiveFigure, figure: go.Figure) -> None:
    """Put a figure's data and layout into a live one with as many traces, which keep their callbacks."""
    assert len(live.data) == len(figure.data), (len(live.data), len(figure.data))
    with live.batch_update():
        for trace, new in zip(live.data, figure.data, strict=True):
            trace.update(new.to_plotly_json(), overwrite=True)
        live.layout.update(figure.layout.to_plotly_json(), overwrite=True)


def fitted(live: LiveFigure, lock: AbstractContextManager[Any] | None = None) -> Width:
    """A widget that keeps a figure as wide as the page, holding ``lock`` while it does; put it beside the figure."""
    width = Width()

    def fit(_: object) -> None:
        with lock or nullcontext():
            live.layout.width = width.width

    width.observe(fit, "width")
    return width
