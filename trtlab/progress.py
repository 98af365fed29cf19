"""The progress bar: bytes or steps, in a terminal or a notebook; short operations show none."""

from __future__ import annotations

import os
import sys
from typing import Any

PATIENCE_S = 0.7  # a shorter operation shows no bar


def progress(label: str, total: int, *, unit: str = "B") -> Any:
    """A tqdm bar of ``total`` units, a context manager with ``update(n)``.

    It prints nothing when stderr is a file (outside a notebook) or when tqdm's TQDM_DISABLE is set.
    """
    from tqdm.auto import tqdm

    notebook = sys.modules.get("tqdm.notebook")  # tqdm imports it only in a notebook; importing it here costs 0.4 s
    silent = not (notebook and issubclass(tqdm, notebook.tqdm_notebook)) and not sys.stderr.isatty()
    silent = silent or bool(os.environ.get("TQDM_DISABLE"))
    return tqdm(
        total=total, desc=label, unit=unit, unit_scale=unit == "B", delay=PATIENCE_S, leave=False, disable=silent
    )
