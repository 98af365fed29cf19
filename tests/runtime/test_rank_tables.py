"""A rank's block tables and the order of chunks: what a step says by value, and what a rank makes of it."""

from __future__ import annotations

import pickle

import torch
from hypothesis import given
from hypothesis import strategies as st

from trtlab.parallel.step_inputs import Chunk, StepInputs
from trtlab.runtime.rank_tables import RankTables, in_step_order, singles_first

CHAINS = st.lists(st.integers(0, 20), min_size=1, max_size=6, unique=True).map(tuple)


@given(st.lists(st.dictionaries(st.integers(0, 2), CHAINS, min_size=1), max_size=8))
def test_tables_hold_the_blocks_of_the_last_step_that_named_the_slot(steps):
    own = RankTables(3, 12, 2)
    for blocks in steps:
        tables = own.update([Chunk(slot, 0, (1,), chain) for slot, chain in blocks.items()])
        for slot, chain in blocks.items():
            assert tables.row(slot, len(chain)) == list(chain) == tables.rows[slot, : len(chain)].tolist()


def test_only_blocks_that_differ_are_written(monkeypatch):
    own, written = RankTables(1, 12, 2), []
    monkeypatch.setattr(own.tables, "write", lambda slot, index, blocks: written.append((index, blocks)))
    chain = (4, 7, 9)
    for blocks in (chain, chain, (4, 7, 9), (4, 7, 9, 2), (4, 3, 9, 2), (4, 3)):
        own.update([Chunk(0, 0, (1,), blocks)])
    assert [entry for entry in written if entry[1]] == [(0, (4, 7, 9)), (3, (2,)), (1, (3, 9, 2))]


@given(st.lists(st.integers(1, 3), min_size=1, max_size=6), st.booleans())
def test_logits_come_back_in_the_order_of_the_step(lengths, every_token):
    chunks = [Chunk(slot, 0, tuple(range(slot * 10, slot * 10 + n))) for slot, n in enumerate(lengths)]
    order, packed = singles_first(chunks)
    assert [len(chunk.token_ids) > 1 for chunk in packed] == sorted(n > 1 for n in lengths)
    rows = [token for chunk in packed for token in (chunk.token_ids if every_token else chunk.token_ids[-1:])]
    logits = in_step_order(torch.tensor(rows)[:, None].float(), order, packed, every_token)
    expected = [token for chunk in chunks for token in (chunk.token_ids if every_token else chunk.token_ids[-1:])]
    assert logits[:, 0].tolist() == expected


def test_a_step_is_a_value_that_another_process_can_be_sent():
    step = StepInputs((Chunk(1, 2, (3, 4), (5, 6)),), every_token=True)
    assert pickle.loads(pickle.dumps(step)) == step and hash(step) == hash(step)
