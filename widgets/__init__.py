"""Widgets of trtlab, imported as trtlab.widgets; nothing in trtlab imports them."""

from .engine_layers import EngineLayers

__all__ = ["EngineLayers"]
