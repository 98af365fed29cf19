"""The one progress bar: it shows bytes or steps, in a terminal or a notebook, once something has taken a while."""

from __future__ import annotations

import os
import sys
from typing import Any

PATIENCE_S = 0.7  # what is done sooner shows no bar


def progress(label: str, total: int, *, unit: str = "B") -> Any:
    """A tqdm bar of ``total`` units, a context manager with ``update(n)``.

    Silent where output goes to a file, and where tqdm's own TQDM_DISABLE asks for it.
    """
    from tqdm.auto import tqdm

    notebook = sys.modules.get("tqdm.notebook")  # tqdm itself imports it in a notebook alone: it costs 0.4 s
    silent = not (notebook and issubclass(tqdm, notebook.tqdm_notebook)) and not sys.stderr.isatty()
    silent = silent or bool(os.environ.get("TQDM_DISABLE"))
    return tqdm(
        total=total, desc=label, unit=unit, unit_scale=unit == "B", delay=PATIENCE_S, leave=False, disable=silent
    )
