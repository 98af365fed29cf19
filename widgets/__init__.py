"""Widgets and charts of trtlab, imported as trtlab.widgets; nothing in trtlab imports them."""

from .charts import bars, schedule
from .engine_layers import EngineLayers
from .kv_blocks import KVBlocks
from .scale_explorer import ScaleExplorer

__all__ = ["EngineLayers", "KVBlocks", "ScaleExplorer", "bars", "schedule"]
