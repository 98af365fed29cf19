"""The backend of a session: its name, its KV pool, and the ranks that run its steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trtlab.parallel.ranks import RankGroup
from trtlab.runtime.pool_size import PoolSize


@dataclass(frozen=True)
class Backend:
    """What runs a session's steps.

    ``name`` is torch, tensorrt or interpreter; ``pool`` is the KV pool whose memory the ``ranks`` hold together on
    ``device``.
    """

    name: str
    pool: PoolSize
    ranks: RankGroup
    device: torch.device
