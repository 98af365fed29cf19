"""All kinds of input by name; each is made when it is asked for."""

from __future__ import annotations

import importlib
from functools import cache

from .kinds import Kind

FILES = {
    "configs": ("config", "params", "checkpoint", "engine", "index", "report"),
    "tensors": ("safetensors",),
    "pickles": ("pickle",),
    "folders": ("folder",),
    "tokenizers": ("tokenizer",),
    "gguf": ("gguf",),
    "templates": ("template",),
}
KINDS = tuple(kind for kinds in FILES.values() for kind in kinds)  # in the order in which they run


@cache
def find_kind(name: str) -> Kind:
    """The kind of this name; those of ``faults`` are not among ``KINDS``, for their cases fail."""
    file = next((file for file, kinds in FILES.items() if name in kinds), "faults")
    kinds: dict[str, Kind] = importlib.import_module(f".{file}", __package__).kinds()
    return kinds[name]
