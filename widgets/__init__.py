"""Widgets of trtlab, imported as trtlab.widgets; nothing in trtlab imports them."""

from . import quick_plotly  # noqa: F401  # before anything imports plotly
from .engine_layers import EngineLayers
from .kv_blocks import KVBlocks
from .scale_explorer import ScaleExplorer

__all__ = ["EngineLayers", "KVBlocks", "ScaleExplorer"]
