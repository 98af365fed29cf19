"""One step as every rank is sent it. Values only: nothing in it changes later, and it can go to another process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Chunk(NamedTuple):
    """New tokens of one request: they follow ``past`` tokens that its slot holds already.

    ``blocks`` are the request's blocks of the pool in the order of its tokens, the new ones included. A plan, whose
    cache has one row a slot, ignores them.
    """

    slot: int
    past: int
    token_ids: tuple[int, ...]
    blocks: tuple[int, ...] = ()


@dataclass(frozen=True)
class StepInputs:
    """One step: at most one chunk a slot. ``every_token`` asks for the logits of all rows, not of each last one."""

    chunks: tuple[Chunk, ...]
    every_token: bool = False
