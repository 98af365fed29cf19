"""All kinds of input by name."""

from __future__ import annotations

from functools import cache

from . import configs, folders, pickles, tensors, tokenizers
from .kinds import Kind


@cache
def all_kinds() -> dict[str, Kind]:
    """Every kind, in the order in which they run."""
    return {
        **configs.kinds(),
        **tensors.kinds(),
        **pickles.kinds(),
        **folders.kinds(),
        **tokenizers.kinds(),
    }
