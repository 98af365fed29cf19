"""The shipped notebooks in a real JupyterLab: each runs to its end, and each of its pictures is drawn.

With TRTLAB_NOTEBOOKS=folder they also run cell by cell, and in a page that is eight times slower; screenshots of the
whole notebooks go into the folder.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import nbformat
import pytest

pytestmark = [pytest.mark.browser, pytest.mark.slow]
NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("[0-9]*.ipynb"))
SCREENSHOTS = os.environ.get("TRTLAB_NOTEBOOKS", "")
WIDGETS = re.compile(r"\b(EngineLayers|KVBlocks|ScaleExplorer)\(")
QUICK, SLOW = 1, 8
WAYS = [
    pytest.param(False, QUICK, id="all at once"),
    *([
        pytest.param(True, QUICK, id="cell by cell"),
        pytest.param(False, SLOW, id="all at once, slowly"),
        pytest.param(True, SLOW, id="cell by cell, slowly"),
    ] if SCREENSHOTS else []),
]  # fmt: skip
# Scrolls to a cell, because JupyterLab draws what is visible, and waits until its picture is drawn: it has traces with
# marks, and is as wide as its place. Returns what it saw last.
PICTURE = """async number => {
    const notebook = jupyterapp.shell.currentWidget.content, cell = notebook.widgets[number];
    const deadline = performance.now() + 30000;
    let seen;
    do {
        await notebook.scrollToItem(number, 'start');
        await new Promise(resolve => setTimeout(resolve, 200));
        const plot = cell.node.querySelector('.js-plotly-plot');
        seen = plot && {
            traces: plot.data?.length ?? 0,
            marks: plot.querySelectorAll('.point, .js-line').length,
            width: plot.querySelector('.main-svg')?.getBoundingClientRect().width ?? 0,
            place: plot.closest('.jp-OutputArea-output').clientWidth,
        };
        const fits = seen && seen.width > seen.place - 30 && seen.width <= seen.place;
        if (fits && seen.traces && seen.marks > 10) return {...seen, isWhole: true};
    } while (performance.now() < deadline);
    return {...seen, isWhole: false};
}"""
# The number of cells in each line of each table that an output holds.
TABLES = """() => jupyterapp.shell.currentWidget.content.widgets.flatMap(cell => (
    [...cell.node.querySelectorAll('.jp-OutputArea table')].map(table => [...table.rows].map(row => row.cells.length))
))"""
SCROLL = "top => { document.querySelector('.jp-WindowedPanel-outer').scrollTop = top; }"


@pytest.mark.parametrize(("one_by_one", "slower"), WAYS)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_shipped_notebook_runs_and_draws_its_pictures(open_notebook, path, one_by_one, slower):
    page = open_notebook(path, run=True, one_by_one=one_by_one, slower=slower)
    cells = nbformat.read(path, as_version=4).cells
    for number, cell in enumerate(cells):
        if cell.cell_type == "code" and WIDGETS.search(cell.source):
            picture = page.evaluate(PICTURE, number)
            print(path.stem, picture)
            assert picture["isWhole"], f"{path.name}: the picture of {cell.source!r} is not drawn: {picture}"
    if SCREENSHOTS:
        save_screenshots(page, f"{path.stem}{', cell by cell' * one_by_one}{', slowly' * (slower > 1)}")
    text = page.inner_text(".jp-Notebook")
    assert "Error displaying widget" not in text
    assert "Loading widget" not in text


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_shipped_notebook_shows_its_saved_outputs(open_notebook, path):
    page = open_notebook(path, run=False)
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    last = max(i for i, cell in enumerate(cells) if cell.outputs)
    for number in range(last + 1):  # JupyterLab draws a cell when it becomes visible
        page.evaluate(
            """number => {
                const cells = jupyterapp.shell.currentWidget.content.widgets.filter(cell => cell.model.type === 'code');
                cells[number].node.scrollIntoView();
            }""",
            number,
        )
        html = "".join(output.get("data", {}).get("text/html", "") for output in cells[number].outputs)
        page.wait_for_function(
            """([number, tables]) => {
                const cells = jupyterapp.shell.currentWidget.content.widgets.filter(cell => cell.model.type === 'code');
                return cells[number].node.querySelectorAll('.jp-OutputArea table').length === tables;
            }""",
            arg=[number, html.count("<table>")],
        )
    tables = page.evaluate(TABLES)
    assert all(len(set(widths)) == 1 for widths in tables), "a line of a table has not as many cells as the others"
    text = page.inner_text(".jp-Notebook")
    assert "Error displaying widget" not in text
    assert "Loading widget" not in text


def save_screenshots(page, name):
    """Save the whole notebook, window by window."""
    folder = Path(SCREENSHOTS)
    folder.mkdir(parents=True, exist_ok=True)
    step, height = page.evaluate("""() => {
        const {clientHeight, scrollHeight} = document.querySelector('.jp-WindowedPanel-outer');
        return [clientHeight, scrollHeight];
    }""")
    for number in range(-(-height // step) - 1):  # the last window is the empty space below the last cell
        page.evaluate(SCROLL, number * step)
        page.wait_for_timeout(500)
        page.screenshot(path=folder / f"{name} {number:02}.png")
