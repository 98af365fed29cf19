"""Turns a step into runs of one profile each, and a run into the tensors a plan is fed. Knows slots, not requests.

A run covers a range of neighbouring slots, so that a view of the cache needs no copy. A row in the range that has
nothing to do sees one key (a softmax over none gives NaN, which would spread) and writes past the end, where the
cache layer drops it.
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
    """One call of a profile: ``pieces[row]`` are the new tokens of slot ``first + row``, None for an idle row.

    ``rows`` says for each wanted row of logits where it belongs: (place in the step's result, row, token).
    """

    profile: str
    first: int
    pieces: tuple[Chunk | None, ...]
    wanted: int
    results: tuple[tuple[int, int, int], ...]

    @property
    def tokens(self) -> int:
        """Tokens a row, of which shorter rows use the first."""
        return max(len(piece.token_ids) for piece in self.pieces if piece is not None)


def check_step(step: StepInputs, slots: int, capacity: int, held: Sequence[int]) -> None:
    """Refuse what would overflow a slot or a profile; ``held`` counts the tokens that each slot holds.

    The cache layer drops a write past its end in silence, and the text would merely become wrong.
    """
    taken = [chunk.slot for chunk in step.chunks]
    assert len(set(taken)) == len(taken), taken
    for chunk in step.chunks:
        if not 0 <= chunk.slot < slots:
            raise EngineError(
                f"slot {chunk.slot} lies beyond the plan's batch",
                expected=f"0 to {slots - 1}",
                remedy="build with a larger max_batch_size",
            )
        end = chunk.past + len(chunk.token_ids)
        if end > capacity:
            raise RequestError(
                f"slot {chunk.slot} is full: it holds {chunk.past} tokens and {len(chunk.token_ids)} more are to come",
                expected=f"max_seq_len {capacity}",
                remedy="build with a larger max_seq_len",
            )
        assert len(chunk.token_ids) > 0, chunk
        assert chunk.past <= held[chunk.slot], (chunk, held[chunk.slot])


def runs_of(step: StepInputs, context: Profile) -> list[Run]:
    """All single tokens in one generation run, then each longer chunk by itself, in pieces that the profile takes."""
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
    """One token for each of ``singles``, over the range of their slots."""
    by_slot = {chunks[i].slot: i for i in singles}
    first, last = min(by_slot), max(by_slot)
    pieces = tuple(chunks[by_slot[slot]] if slot in by_slot else None for slot in range(first, last + 1))
    results = tuple((places[i], slot - first, 0) for slot, i in by_slot.items())
    return Run("generation", first, pieces, 1, results)


def context_runs(chunk: Chunk, place: int, every_token: bool, context: Profile) -> list[Run]:
    """A prompt, or a part of one, in pieces; with ``every_token`` no longer than the rows of logits a run can give."""
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
    """Everything a plan reads but the caches, on the CPU, by the names of ``bindings``."""
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
    # A token sees every key up to its own position; an idle row, at position 0, sees the first key alone.
    mask = torch.arange(capacity) <= positions[:, None, :, None]  # [batch, 1, tokens, capacity]
    return {
        io.INPUT_IDS: ids,
        io.POSITION_IDS: positions,
        io.WRITE_INDICES: starts,
        io.MASK: mask,
        io.LAST_TOKENS: wanted,
    }


def cache_masks(run: Run, capacity: int) -> dict[str, torch.Tensor]:
    """For a quantized cache: which cached keys, and which keys of its own run, each token sees.

    Every token sees itself, an idle row's too, so that no softmax is over none.
    """
    past = torch.tensor([0 if piece is None else piece.past for piece in run.pieces])[:, None, None, None]
    cached = (torch.arange(capacity) < past).expand(-1, 1, run.tokens, -1)  # [batch, 1, tokens, capacity]
    new = torch.ones(run.tokens, run.tokens, dtype=torch.bool).tril()
    return {io.CACHED_MASK: cached, io.NEW_MASK: new.expand(len(run.pieces), 1, -1, -1)}


def plan_inputs(run: Run, table: Bindings, capacity: int) -> dict[str, torch.Tensor]:
    """Everything that a plan of this table reads but caches and another stage's hidden states, on the CPU."""
    tensors = input_tensors(run, capacity)
    if table.updates:
        tensors |= cache_masks(run, capacity)
    return {binding.name: tensors[binding.name] for binding in table.inputs if binding.name in tensors}


def write_updates(
    run: Run, table: Bindings, outputs: abc.Mapping[str, torch.Tensor], caches: abc.Mapping[str, torch.Tensor]
) -> None:
    """Put the new tokens of a quantized cache, ``[batch, kv_heads, tokens, head_size]``, at their places.

    ``caches`` are the rows of the run. Padding and idle rows leave no trace.
    """
    if not table.updates:
        return
    found = [(row, token, piece.past + token) for row, piece in enumerate(run.pieces) if piece for token in _own(piece)]
    device = next(iter(caches.values())).device
    rows, tokens, positions = torch.tensor(found, device=device).unbind(1)
    for update, cache in table.updates.items():  # by bytes, which every device can index
        target, source = caches[cache].view(torch.uint8), outputs[update].view(torch.uint8)
        target[rows, :, positions] = source[rows, :, tokens]


def _own(piece: Chunk) -> range:
    return range(len(piece.token_ids))
