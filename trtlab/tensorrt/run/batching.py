"""Turns a step into runs of one profile each, and a run into a plan's input tensors. Knows slots, not requests.

A run covers a range of neighbouring slots, so that a view of the cache needs no copy. An idle row in the range attends
to one key (a softmax over no key gives NaN, which would spread) and writes past the end, where the cache layer drops
the write.
"""

from __future__ import annotations

from collections import abc
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from trtlab.errors import EngineError, RequestError
from trtlab.parallel.step_inputs import Chunk, StepInputs
from trtlab.tensorrt import bindings as io
from trtlab.tensorrt.bindings import Bindings, Profile


@dataclass(frozen=True)
class Run:
    """One call of a profile.

    ``pieces[row]`` are the new tokens of slot ``first + row``, None for an idle row. ``wanted`` is the number of logits
    per row. ``results`` gives for each wanted row of logits (place in the step's result, row, token).
    """

    profile: str
    first: int
    pieces: tuple[Chunk | None, ...]
    wanted: int
    results: tuple[tuple[int, int, int], ...]

    @property
    def tokens(self) -> int:
        """Tokens per row; shorter rows use the first ones."""
        return max(len(piece.token_ids) for piece in self.pieces if piece is not None)


def check_step(step: StepInputs, slots: int, capacity: int, held: Sequence[int]) -> None:
    """Refuse a step that would overflow a slot or a profile.

    Without this check the cache layer would drop a write past its end without an error, and the text would be wrong.

    Args:
        step: The step to run.
        slots: The plan's ``max_batch_size``.
        capacity: The plan's ``max_seq_len``.
        held: Cached tokens of each slot.

    Raises:
        EngineError: for a slot that the plan does not have.
        RequestError: for a slot without room for the new tokens.
    """
    numbers = [chunk.slot for chunk in step.chunks]
    assert len(set(numbers)) == len(numbers), f"a slot has two chunks in one step: {numbers}"
    for chunk in step.chunks:
        if not 0 <= chunk.slot < slots:
            raise EngineError(
                f"slot {chunk.slot} is beyond the plan's batch",
                expected=f"0 to {slots - 1}",
                remedy="build with a larger max_batch_size",
            )
        end = chunk.past + len(chunk.token_ids)
        if end > capacity:
            raise RequestError(
                f"slot {chunk.slot} is full: it holds {chunk.past} tokens and gets {len(chunk.token_ids)} more",
                expected=f"max_seq_len {capacity}",
                remedy="build with a larger max_seq_len",
            )
        assert len(chunk.token_ids) > 0, f"chunk without tokens: {chunk}"
        assert chunk.past <= held[chunk.slot], f"{chunk} follows tokens that are not cached: {held[chunk.slot]} are"


def runs_of(step: StepInputs, context: Profile) -> list[Run]:
    """Split a step into one generation run of all single tokens, and context runs for each longer chunk."""
    places, total = [], 0  # where each chunk's rows begin in the step's result
    for chunk in step.chunks:
        places.append(total)
        total += len(chunk.token_ids) if step.every_token else 1
    singles = [i for i, chunk in enumerate(step.chunks) if len(chunk.token_ids) == 1]
    runs = [generation_run(step.chunks, singles, places)] if singles else []
    for i, chunk in enumerate(step.chunks):
        if len(chunk.token_ids) > 1:
            runs.extend(context_runs(chunk, places[i], step.every_token, context))
    return runs


def generation_run(chunks: Sequence[Chunk], singles: Sequence[int], places: Sequence[int]) -> Run:
    """A run of one token for each chunk in ``singles``, over the range of their slots."""
    by_slot = {chunks[i].slot: i for i in singles}
    first, last = min(by_slot), max(by_slot)
    pieces = tuple(chunks[by_slot[slot]] if slot in by_slot else None for slot in range(first, last + 1))
    results = tuple((places[i], slot - first, 0) for slot, i in by_slot.items())
    return Run("generation", first, pieces, 1, results)


def context_runs(chunk: Chunk, place: int, every_token: bool, context: Profile) -> list[Run]:
    """Runs for the pieces of a longer chunk: as long as the profile allows, by tokens or by rows of logits."""
    longest = context.wanted.max if every_token else context.tokens.max
    runs = []
    for start in range(0, len(chunk.token_ids), longest):
        ids = chunk.token_ids[start : start + longest]
        piece = Chunk(chunk.slot, chunk.past + start, ids)
        if every_token:
            results = tuple((place + start + token, 0, token) for token in range(len(ids)))
        else:
            is_last = start + len(ids) == len(chunk.token_ids)
            results = ((place, 0, len(ids) - 1),) if is_last else ()
        runs.append(Run("context", chunk.slot, (piece,), max(1, len(results)), results))
    return runs


def input_tensors(run: Run, capacity: int) -> dict[str, torch.Tensor]:
    """All inputs of a plan but the caches, on the CPU, by the names in ``bindings``."""
    batch, tokens = len(run.pieces), run.tokens
    ids = torch.zeros(batch, tokens, dtype=torch.int32)
    positions = torch.zeros(batch, tokens, dtype=torch.int32)
    starts = torch.full((batch,), capacity, dtype=torch.int32)
    for row, piece in enumerate(run.pieces):
        if piece is not None:
            length = len(piece.token_ids)
            ids[row, :length] = torch.tensor(piece.token_ids, dtype=torch.int32)
            positions[row, :length] = torch.arange(piece.past, piece.past + length, dtype=torch.int32)
            starts[row] = piece.past
    wanted = torch.zeros(batch, run.wanted, dtype=torch.int32)
    for place, (_, row, token) in enumerate(run.results):
        wanted[row, place if run.profile == "context" else 0] = token
    # A token attends to every key up to its own position; an idle row, at position 0, only to the first key.
    mask = torch.arange(capacity) <= positions[:, None, :, None]  # [batch, 1, tokens, capacity]
    return {
        io.INPUT_IDS: ids,
        io.POSITION_IDS: positions,
        io.WRITE_INDICES: starts,
        io.MASK: mask,
        io.LAST_TOKENS: wanted,
    }


def cache_masks(run: Run, capacity: int) -> dict[str, torch.Tensor]:
    """For a quantized cache: the cached keys, and the keys of its own run, that each token attends to.

    Every token attends to itself, also in an idle row, so that no softmax is over no key.
    """
    past = torch.tensor([0 if piece is None else piece.past for piece in run.pieces])[:, None, None, None]
    cached = (torch.arange(capacity) < past).expand(-1, 1, run.tokens, -1)  # [batch, 1, tokens, capacity]
    new = torch.ones(run.tokens, run.tokens, dtype=torch.bool).tril()
    return {io.CACHED_MASK: cached, io.NEW_MASK: new.expand(len(run.pieces), 1, -1, -1)}


def plan_inputs(run: Run, table: Bindings, capacity: int) -> dict[str, torch.Tensor]:
    """The inputs that a plan with these bindings has, but caches and another stage's hidden states; on the CPU."""
    tensors = input_tensors(run, capacity)
    if table.updates:
        tensors |= cache_masks(run, capacity)
    return {binding.name: tensors[binding.name] for binding in table.inputs if binding.name in tensors}


def write_updates(
    run: Run, table: Bindings, outputs: abc.Mapping[str, torch.Tensor], caches: abc.Mapping[str, torch.Tensor]
) -> None:
    """Write the new tokens ``[batch, kv_heads, tokens, head_size]`` into a quantized cache.

    ``caches`` are the run's rows of each cache. Nothing is written for padding and idle rows.
    """
    if not table.updates:
        return
    places = [
        (row, token, piece.past + token)
        for row, piece in enumerate(run.pieces)
        if piece
        for token in range(len(piece.token_ids))
    ]
    device = next(iter(caches.values())).device
    rows, tokens, positions = torch.tensor(places, device=device).unbind(1)
    for update, cache in table.updates.items():  # by bytes, which every device can index
        target, source = caches[cache].view(torch.uint8), outputs[update].view(torch.uint8)
        target[rows, :, positions] = source[rows, :, tokens]
