"""A widget that reports the width of its place in the page; plotly's own widget does not notice when it changes."""

from __future__ import annotations

import anywidget
import traitlets

SCRIPT = """
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
    """An invisible widget; observe ``width``, in pixels, which is 0 until a page shows it."""

    _esm = SCRIPT
    width = traitlets.Int(0).tag(sync=True)
