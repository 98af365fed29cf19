"""The one progress bar: it shows bytes or steps, in a terminal or a notebook, once something has taken a while."""

from __future__ import annotations

from typing import Any

from tqdm.auto import tqdm

PATIENCE_S = 0.7  # what is done sooner shows no bar


def progress(label: str, total: int, *, unit: str = "B") -> Any:
    """A tqdm bar of ``total`` units, a context manager with ``update(n)``."""
    return tqdm(total=total, desc=label, unit=unit, unit_scale=unit == "B", delay=PATIENCE_S, leave=False)
