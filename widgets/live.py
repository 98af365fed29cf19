"""Parts that all widgets share: a figure in a page, and a view for pages without a kernel."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import anywidget
import plotly.graph_objects as go
from ipywidgets import HBox, Label, VBox, Widget, widget_serialization
from plotly.offline import get_plotlyjs
from traitlets import Dict, Instance, Unicode

from trtlab.card import Card, html


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


class FigureState(Widget):  # type: ignore[misc]  # ipywidgets has no types
    """The figure that a page shows, whole, and plotly's JavaScript.

    It is a plain widget beside LiveFigure. A page that needs more than two seconds to load an anywidget drops all
    messages to it from then on, without a word: a figure that came in messages stayed empty, one that had been drawn
    did not change again. A plain widget takes every message, however late its view is.
    """

    figure = Dict().tag(sync=True)
    plotly = Unicode().tag(sync=True)


class LiveFigure(anywidget.AnyWidget):
    """Shows a plotly figure in a page, as wide as its place, and reports clicks."""

    _esm = Path(__file__).parent / "figure.js"
    state = Instance(FigureState).tag(sync=True, **widget_serialization)

    def __init__(self, figure: go.Figure, clicked: Callable[[int, int], None]) -> None:
        """Show a figure.

        Args:
            figure: The first picture.
            clicked: Called after a click with the index of the trace and that of the point in it.
        """
        super().__init__(state=FigureState(figure=figure.to_plotly_json(), plotly=get_plotlyjs()))
        self.on_msg(lambda _, place, __: clicked(*place))

    def draw(self, figure: go.Figure) -> None:
        """Show this figure from now on."""
        self.state.figure = figure.to_plotly_json()


def labelled(label: str, *controls: Any) -> HBox:
    """A label in a column of fixed width, and its controls."""
    return HBox([Label(label, layout={"width": "90px"}), *controls])
