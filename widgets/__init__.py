"""Widgets of trtlab, imported as trtlab.widgets; nothing in trtlab imports them."""

from .engine_layers import EngineLayers
from .kv_blocks import KVBlocks
from .scale_explorer import ScaleExplorer

__all__ = ["EngineLayers", "KVBlocks", "ScaleExplorer"]
