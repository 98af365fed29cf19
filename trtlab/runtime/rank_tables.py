"""Packs the chunks of a step for a rank: keeps its block tables, and puts single tokens before longer chunks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trtlab.ops.paged import BlockTables
from trtlab.parallel.step_inputs import Chunk


class RankTables:
    """The block tables in a rank's memory, updated with the blocks of each step."""

    def __init__(self, slots: int, capacity: int, tokens_per_block: int) -> None:
        self.tables = BlockTables(slots, -(-capacity // tokens_per_block), tokens_per_block)
        self._written: list[tuple[int, ...]] = [()] * slots

    def update(self, chunks: Sequence[Chunk]) -> BlockTables:
        """Write the blocks that differ from those of the last step."""
        for slot, _, _, blocks in chunks:
            written = self._written[slot]
            if blocks is not written:  # most steps get the same tuple object as the step before
                same = next((i for i, (a, b) in enumerate(zip(written, blocks, strict=False)) if a != b), len(written))
                self.tables.write(slot, same, blocks[same:])
                self._written[slot] = blocks
        return self.tables


def singles_first(chunks: Sequence[Chunk]) -> tuple[list[int] | None, Sequence[Chunk]]:
    """Put the chunks of one token before the longer ones.

    Returns:
        The old index of each chunk, None when the order is right already; and the chunks in the new order.
    """
    longer = [len(chunk.token_ids) > 1 for chunk in chunks]
    if True not in longer or longer == sorted(longer):
        return None, chunks
    order = sorted(range(len(chunks)), key=longer.__getitem__)
    return order, [chunks[i] for i in order]


def in_step_order(logits: Tensor, order: Sequence[int] | None, chunks: Sequence[Chunk], every_token: bool) -> Tensor:
    """Put the logits of reordered chunks back in the order of the step.

    Args:
        logits: Rows in the order of ``chunks``: one per chunk, or with ``every_token`` one per token.
        order: The first result of ``singles_first``.
        chunks: The second result of ``singles_first``.
        every_token: Whether each token has a row.
    """
    if order is None:
        return logits
    if not every_token:
        return logits[torch.tensor(order, device=logits.device).argsort()]
    parts = torch.split(logits, [len(chunk.token_ids) for chunk in chunks])
    return torch.cat([parts[order.index(i)] for i in range(len(order))])
