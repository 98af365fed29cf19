"""What the ranks that pack tokens share: a rank's own block tables, and single tokens before longer chunks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trtlab.ops.paged import BlockTables
from trtlab.parallel.step_inputs import Chunk


class RankTables:
    """The block tables in a rank's memory, kept up with the blocks that each step names."""

    def __init__(self, slots: int, capacity: int, tokens_per_block: int) -> None:
        self.tables = BlockTables(slots, -(-capacity // tokens_per_block), tokens_per_block)
        self._written: list[tuple[int, ...]] = [()] * slots

    def update(self, chunks: Sequence[Chunk]) -> BlockTables:
        """Write the blocks that differ from the last step's; most steps name the very tuples of the step before."""
        for slot, _, _, blocks in chunks:
            written = self._written[slot]
            if blocks is not written:
                same = next((i for i, (a, b) in enumerate(zip(written, blocks, strict=False)) if a != b), len(written))
                self.tables.write(slot, same, blocks[same:])
                self._written[slot] = blocks
        return self.tables


def singles_first(chunks: Sequence[Chunk]) -> tuple[list[int] | None, Sequence[Chunk]]:
    """Chunks of one token, then the longer ones, and where each stood before; None when they stood so."""
    longer = [len(chunk.token_ids) > 1 for chunk in chunks]
    if True not in longer or longer == sorted(longer):
        return None, chunks
    order = sorted(range(len(chunks)), key=longer.__getitem__)
    return order, [chunks[i] for i in order]


def in_step_order(logits: Tensor, order: Sequence[int] | None, chunks: Sequence[Chunk], every_token: bool) -> Tensor:
    """The logits of reordered chunks in the order that the step had; arguments as ``singles_first`` gave them."""
    if order is None:
        return logits
    if not every_token:
        return logits[torch.tensor(order, device=logits.device).argsort()]
    parts = torch.split(logits, [len(chunk.token_ids) for chunk in chunks])
    return torch.cat([parts[order.index(i)] for i in range(len(order))])
