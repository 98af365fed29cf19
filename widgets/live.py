"""Parts that all widgets share: a live figure that survives a page reload, and a view for pages without a kernel."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from typing import Any

import plotly.graph_objects as go
from ipywidgets import HBox, Label, VBox

from trtlab.card import Card, html

from .width import Width


class Dashboard:
    """Base class of the widgets: ``view`` holds controls and picture, and can be put into other widgets.

    A page without a kernel (GitHub, nbconvert) shows ``card()``, which has the content of the picture as tables.
    """

    view: VBox

    def card(self) -> Card:
        """The card that a page without a kernel shows."""
        raise NotImplementedError

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        live: dict[str, Any] = self.view._repr_mimebundle_(**options)
        return {**live, "text/plain": repr(self), "text/html": html(self.card())}


class LiveFigure(go.FigureWidget):  # type: ignore[misc]  # plotly has no types
    """A FigureWidget that keeps its state over a page reload, and can move marks without a redraw."""

    def get_state(self, key: Any = None, drop_defaults: bool = False) -> dict[str, Any]:
        """The present state of the figure; FigureWidget would send the state at its creation."""
        state: dict[str, Any] = super().get_state(key, drop_defaults)
        if "_layout_obj" in vars(self):  # __init__ has finished
            for name, now in (("_widget_data", self._data), ("_widget_layout", self._layout_obj._props)):
                if name in state:
                    state[name] = self.trait_metadata(name, "to_json")(deepcopy(now), self)
        return state

    def move(self, numbers: Sequence[Mapping[str, Any]]) -> None:
        """Set numbers of the traces without a check; the browser moves the marks and redraws nothing else.

        It is twice as fast as ``batch_update``, which checks every number in Python and redraws all panels and texts.

        Args:
            numbers: For each trace its new values by property name; a dot leads to an inner property.
        """
        changes = {place: dict(new) for place, new in enumerate(numbers) if new}
        for place, new in changes.items():
            for name, value in new.items():
                *outer, last = name.split(".")
                functools.reduce(lambda inner, key: inner.setdefault(key, {}), outer, self._data[place])[last] = value
        frame = {"duration": 0, "redraw": False}
        options = {"transition": {"duration": 0}, "frame": frame, "mode": "immediate"}
        self._send_animate_msg(list(changes.values()), {}, list(changes), options)


def show_in(live: LiveFigure, figure: go.Figure) -> None:
    """Copy data and layout of ``figure`` into a live figure with the same number of traces, which keep callbacks."""
    assert len(live.data) == len(figure.data), (len(live.data), len(figure.data))
    with live.batch_update():
        for trace, new in zip(live.data, figure.data, strict=True):
            trace.update(new.to_plotly_json(), overwrite=True)
        live.layout.update(figure.layout.to_plotly_json(), overwrite=True)


def fitted(live: LiveFigure, lock: AbstractContextManager[Any] | None = None) -> Width:
    """An invisible widget that keeps a figure as wide as the page; show it next to the figure.

    It holds ``lock`` while it sets the width.
    """
    width = Width()

    def fit(_: object) -> None:
        with lock or nullcontext():
            live.layout.width = width.width

    width.observe(fit, "width")
    return width


def labelled(label: str, *controls: Any) -> HBox:
    """A label in a column of fixed width, and its controls."""
    return HBox([Label(label, layout={"width": "90px"}), *controls])
