"""Executes the notebooks and stores their outputs for comparison: ``python notebooks/refresh.py [names]``.

It stores no widget state, no timing and no paths of this machine. It refuses a notebook above 60 KB, and a notebook
with a cell that was not executed, because nbval compares nothing in such a cell.
"""

from __future__ import annotations

import sys
from pathlib import Path

import conftest  # noqa: F401 - sets the environment that the kernel inherits
import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
LIMIT_BYTES = 60_000
WIDGET = "application/vnd.jupyter.widget-view+json"


def refresh(path: Path) -> None:
    """Run one notebook from its own folder and store its outputs in it."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(HERE)}},
    )
    client.execute()
    notebook.metadata.pop("widgets", None)
    notebook.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata["language_info"] = {"name": "python"}
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        for output in cell.get("outputs", []):
            output.get("data", {}).pop(WIDGET, None)
    text = nbformat.writes(notebook) + "\n"
    check(path, notebook, text)
    path.write_text(text, encoding="utf-8")
    print(f"{path.name}: {len(text.encode()):,} bytes")


def check(path: Path, notebook: nbformat.NotebookNode, text: str) -> None:
    """Exit when the notebook is too large, contains a path of this machine, or has a cell that was not executed."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    skipped = [cell for cell in code if cell.execution_count is None]
    if skipped:
        raise SystemExit(f"{path.name}: a cell was not executed: {skipped[0].source[:60]!r}")
    if str(HERE.parent) in text:
        raise SystemExit(f"{path.name}: the path {HERE.parent} of this machine is in it")
    if len(text.encode()) > LIMIT_BYTES:
        raise SystemExit(f"{path.name}: {len(text.encode()):,} bytes; expected at most {LIMIT_BYTES:,}")


if __name__ == "__main__":
    for name in sys.argv[1:] or sorted(p.name for p in HERE.glob("[0-9]*.ipynb")):
        refresh(HERE / name)
