"""Widgets of trtlab, imported as trtlab.widgets; nothing in trtlab imports them."""

from .engine_layers import EngineLayers
from .scale_explorer import ScaleExplorer

__all__ = ["EngineLayers", "ScaleExplorer"]
