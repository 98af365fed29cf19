"""The one progress bar: it shows bytes or steps, in a terminal or a notebook, once something has taken a while."""

from __future__ import annotations

import sys
from typing import Any

from tqdm.auto import tqdm
from tqdm.notebook import tqdm_notebook

PATIENCE_S = 0.7  # what is done sooner shows no bar


def progress(label: str, total: int, *, unit: str = "B") -> Any:
    """A tqdm bar of ``total`` units, a context manager with ``update(n)``; silent where output goes to a file."""
    silent = not issubclass(tqdm, tqdm_notebook) and not sys.stderr.isatty()
    return tqdm(
        total=total, desc=label, unit=unit, unit_scale=unit == "B", delay=PATIENCE_S, leave=False, disable=silent
    )
