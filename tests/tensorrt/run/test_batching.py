"""A step becomes runs that a profile takes, and every logit finds its place."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trtlab.config.build import BuildConfig
from trtlab.errors import EngineError, RequestError
from trtlab.parallel.step_inputs import Chunk, StepInputs
from trtlab.tensorrt import bindings as io
from trtlab.tensorrt.bindings import profiles
from trtlab.tensorrt.run.batching import check_step, input_tensors, runs_of

BUILD = BuildConfig(max_batch_size=6, max_input_len=7, max_seq_len=20, max_num_tokens=9)
CONTEXT, GENERATION = profiles(BUILD)

chunks = st.lists(
    st.builds(Chunk, st.integers(0, 5), st.integers(0, 8), st.lists(st.integers(1, 90), min_size=1, max_size=12)),
    min_size=1,
    unique_by=lambda chunk: chunk.slot,
)


@given(chunks=chunks, every_token=st.booleans())
def test_each_result_comes_from_the_token_it_belongs_to(chunks, every_token):
    expected = [
        (chunk.slot, chunk.past + i, token)
        for chunk in chunks
        for i, token in enumerate(chunk.token_ids)
        if every_token or i == len(chunk.token_ids) - 1
    ]
    rows = {}
    for run in runs_of(StepInputs(chunks, every_token), CONTEXT):
        tensors = input_tensors(run, 20)
        for number, (place, row, token) in enumerate(run.results):
            column = number if run.profile == "context" else 0
            assert tensors[io.LAST_TOKENS][row, column] == token
            position, value = tensors[io.POSITION_IDS][row, token], tensors[io.INPUT_IDS][row, token]
            assert place not in rows
            rows[place] = (run.first + row, int(position), int(value))
    assert [rows[place] for place in range(len(rows))] == expected


@given(chunks=chunks, every_token=st.booleans())
def test_every_run_fits_its_profile_and_every_token_runs_once(chunks, every_token):
    runs = runs_of(StepInputs(chunks, every_token), CONTEXT)
    for run in runs:
        profile = CONTEXT if run.profile == "context" else GENERATION
        assert len(run.pieces) in profile.batch
        assert run.tokens in profile.tokens
        assert run.wanted in profile.wanted
    ran = [
        (piece.slot, piece.past + i, token)
        for run in runs
        for piece in run.pieces
        if piece is not None
        for i, token in enumerate(piece.token_ids)
    ]
    wanted = [(c.slot, c.past + i, token) for c in chunks for i, token in enumerate(c.token_ids)]
    assert sorted(ran) == sorted(wanted)


@given(chunks=chunks)
def test_a_token_sees_its_past_and_itself_and_an_idle_row_one_key(chunks):
    for run in runs_of(StepInputs(chunks), CONTEXT):
        tensors = input_tensors(run, 20)
        assert tensors[io.MASK].any(-1).all()
        for row, piece in enumerate(run.pieces):
            seen = tensors[io.MASK][row, 0].sum(-1).tolist()
            if piece is None:
                assert seen == [1] * run.tokens
                assert tensors[io.WRITE_INDICES][row] == 20  # past the end, where the cache layer drops it
            else:
                assert seen[: len(piece.token_ids)] == [piece.past + i + 1 for i in range(len(piece.token_ids))]
                assert tensors[io.WRITE_INDICES][row] == piece.past


def test_single_tokens_share_one_run_over_the_range_of_their_slots():
    step = StepInputs([Chunk(4, 3, [7]), Chunk(1, 5, [8]), Chunk(2, 0, [1, 2, 3])])
    generation, context = runs_of(step, CONTEXT)
    assert (generation.profile, generation.first, len(generation.pieces)) == ("generation", 1, 4)
    assert generation.pieces[1:3] == (None, None)
    assert (context.profile, context.first, context.results) == ("context", 2, ((2, 0, 2),))
    assert input_tensors(generation, 20)[io.INPUT_IDS].tolist() == [[8], [0], [0], [7]]


def test_the_context_profile_is_bounded_by_tokens():
    assert CONTEXT.tokens.max == 7
    assert profiles(BuildConfig(max_input_len=64, max_num_tokens=16, max_seq_len=64))[0].tokens.max == 16
    assert CONTEXT.wanted.max <= io.MOST_WANTED


def test_what_would_overflow_is_refused():
    held = [0, 5]
    check_step(StepInputs([Chunk(1, 5, [1] * 15)]), 2, 20, held)
    with pytest.raises(RequestError, match=r"slot 1 is full: it holds 5 tokens and gets 16 more.*max_seq_len 20"):
        check_step(StepInputs([Chunk(1, 5, [1] * 16)]), 2, 20, held)
    with pytest.raises(EngineError, match="slot 2 is beyond the plan's batch"):
        check_step(StepInputs([Chunk(2, 0, [1])]), 2, 20, held)
    with pytest.raises(AssertionError):
        check_step(StepInputs([Chunk(0, 4, [1])]), 2, 20, held)  # four tokens that nobody wrote
    with pytest.raises(AssertionError):
        check_step(StepInputs([Chunk(0, 0, [1]), Chunk(0, 0, [1])]), 2, 20, held)


def test_input_tensors_have_the_declared_types():
    (run,) = runs_of(StepInputs([Chunk(0, 0, [1, 2])]), CONTEXT)
    tensors = input_tensors(run, 20)
    assert tensors.pop(io.MASK).dtype == torch.bool
    assert {tensor.dtype for tensor in tensors.values()} == {torch.int32}
