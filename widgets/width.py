"""How wide a page lets a dashboard be: plotly's widget neither asks when it is drawn out of sight nor ever again."""

from __future__ import annotations

import anywidget
import traitlets

ASK = """
function render({model, el}) {
    const watch = new ResizeObserver(() => {
        if (el.clientWidth > 0 && el.clientWidth !== model.get("width")) {
            model.set("width", el.clientWidth);
            model.save_changes();
        }
    });
    watch.observe(el);
    return () => watch.disconnect();
}
export default {render};
"""


class Width(anywidget.AnyWidget):
    """Shows nothing; observe ``width``, in pixels, 0 until a page has shown it."""

    _esm = ASK
    width = traitlets.Int(0).tag(sync=True)
