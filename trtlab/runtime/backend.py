"""What a session needs of whatever runs its steps."""

from __future__ import annotations

from dataclasses import dataclass

from trtlab.parallel.ranks import RankGroup
from trtlab.runtime.pool_size import PoolSize


@dataclass(frozen=True)
class Backend:
    """``name`` is torch, tensorrt or interpreter; ``pool`` is the KV pool that ``ranks`` hold together."""

    name: str
    pool: PoolSize
    ranks: RankGroup
