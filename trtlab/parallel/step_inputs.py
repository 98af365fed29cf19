"""The inputs of one step, as sent to every rank. Values only: they never change, and can go to another process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Chunk(NamedTuple):
    """New tokens of one request; they follow ``past`` tokens that are cached already.

    ``blocks`` are the request's blocks of the pool in the order of its tokens, the new tokens included. A TensorRT
    plan ignores them, because its cache has one row per slot.
    """

    slot: int
    past: int
    token_ids: tuple[int, ...]
    blocks: tuple[int, ...] = ()


@dataclass(frozen=True)
class StepInputs:
    """One step, with at most one chunk per slot. ``every_token`` asks for the logits of all rows, not of the last."""

    chunks: tuple[Chunk, ...]
    every_token: bool = False
