"""Attention over blocks against torch's own over contiguous K and V, and what is written, copied and read back."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from trtlab.model.quantized_weights import KvScales
from trtlab.model.rope import RotaryTable
from trtlab.model.scales import FLOAT8, ToOriginal
from trtlab.ops.paged import BlockTables, NewTokens, PackedBatch, PagedCache
from trtlab.ops.quantized_linear import decode_cache, encode_cache

CPU = torch.device("cpu")
SIZE = 8  # head size
LONGEST = 64


def rotary():
    return RotaryTable(torch.ones(LONGEST, SIZE), torch.zeros(LONGEST, SIZE))


def scales_of(dtype, kv_heads, kind):
    def scale(base):
        step = 1.0 if dtype == FLOAT8 else 0.02
        return ToOriginal(base * step * (1 + torch.arange(kv_heads if kind == "per_head" else 1) / 4))

    keys = scale(1.0)
    return KvScales(dtype, keys, keys if kind == "merged" else scale(1.7))


class Case:
    """Sequences in shuffled blocks beside the same K and V laid out plainly."""

    def __init__(self, sequences, block, heads=4, kv_heads=2, scales=None, layers=2, seed=0):
        dice = torch.Generator().manual_seed(seed)
        count = [-(-(past + length) // block) for past, length in sequences]
        shuffled = torch.randperm(sum(count) + 2, generator=dice).tolist()
        self.slots = torch.randperm(len(sequences) + 1, generator=dice).tolist()[: len(sequences)]
        self.tables = BlockTables(len(sequences) + 1, max(count) + 1, block)
        self.cache = PagedCache(
            layers=layers,
            kv_heads=kv_heads,
            num_blocks=sum(count) + 2,
            tokens_per_block=block,
            head_size=SIZE,
            dtype=torch.float32,
            device=CPU,
            scales=[scales] * layers if scales else (),
        )
        if scales is None:  # what nobody has written must reach nobody: 0 x NaN would
            self.cache.keys.fill_(torch.nan)
            self.cache.values.fill_(torch.nan)
        for slot, blocks in zip(self.slots, count, strict=True):
            self.tables.write(slot, 0, [shuffled.pop() for _ in range(blocks)])
        ends = [past + length for past, length in sequences]
        self.k = [torch.randn(layers, end, kv_heads, SIZE, generator=dice) for end in ends]
        self.v = [torch.randn(layers, end, kv_heads, SIZE, generator=dice) for end in ends]
        self.q = [torch.randn(layers, length, heads, SIZE, generator=dice) for _, length in sequences]
        self.sequences, self.scales, self.layers = sequences, scales, layers

    def batch(self, spans):
        new = [NewTokens(slot, past, length) for slot, (past, length) in zip(self.slots, spans, strict=True)]
        return PackedBatch([s for s in new if s.length], rotary(), self.tables, CPU)

    def write(self, layer, spans):
        batch = self.batch(spans)
        k, v = (
            torch.cat([rows[layer, past : past + n] for rows, (past, n) in zip(whole, spans, strict=True)])
            for whole in (self.k, self.v)
        )
        self.cache.write(layer, batch.places, k, v)
        return batch

    def run(self, layer):
        """The past is written in one step, longer ones and short ones mixed, then the new tokens are."""
        for i, (past, _) in enumerate(self.sequences):
            spans = [(0, past if j == i else 0) for j in range(len(self.sequences))]
            if past:
                self.write(layer, spans)
        batch = self.write(layer, self.sequences)
        return batch.attend(self.cache, layer, torch.cat([q[layer] for q in self.q]))

    def stored(self, x, side):
        """What the cache gives back for ``[tokens, kv_heads, head_size]``, as ``[1, kv_heads, tokens, head_size]``."""
        if self.scales is None:
            return x.transpose(0, 1)[None]
        scale = getattr(self.scales, side)
        kept = encode_cache(x, scale, self.scales.dtype)
        return decode_cache(kept.transpose(0, 1)[None], scale, torch.float32)

    def expected(self, layer):
        rows = []
        for (past, length), q, k, v in zip(self.sequences, self.q, self.k, self.v, strict=True):
            seen = torch.arange(past + length) <= torch.arange(past, past + length)[:, None]
            out = F.scaled_dot_product_attention(
                q[layer].transpose(0, 1)[None],
                self.stored(k[layer], "keys"),
                self.stored(v[layer], "values"),
                attn_mask=seen,
                enable_gqa=True,
            )
            rows.append(out[0].transpose(0, 1).flatten(1))
        return torch.cat(rows)

    def check(self):
        for layer in range(self.layers):
            torch.testing.assert_close(self.run(layer), self.expected(layer), atol=2e-6, rtol=1e-5)


def sequences(singles, longer):
    return [(past, 1) for past in singles] + longer


@settings(max_examples=30)
@given(
    st.lists(st.integers(0, 40), max_size=4),
    st.lists(st.tuples(st.integers(0, 30), st.integers(2, 20)), max_size=3),
    st.sampled_from([1, 2, 5, 8, 16, 64]),
    st.sampled_from([(4, 2), (4, 4), (6, 1), (2, 2)]),
    st.integers(0, 99),
)
def test_attention_over_shuffled_blocks_is_attention_over_whole_rows(singles, longer, block, heads, seed):
    if singles or longer:
        Case(sequences(singles, longer), block, *heads, seed=seed).check()


@pytest.mark.parametrize("kind", ["merged", "split", "per_head"])
@pytest.mark.parametrize("dtype", [torch.int8, FLOAT8], ids=["int8", "fp8"])
@pytest.mark.parametrize("block", [1, 4, 32])
def test_eight_bit_blocks_stand_for_what_an_eight_bit_row_stands_for(dtype, kind, block):
    Case(sequences([0, 9, 33], [(0, 7), (12, 5)]), block, scales=scales_of(dtype, 2, kind)).check()


def test_one_sequence_in_neighbouring_blocks_is_read_without_a_copy():
    case = Case([(20, 1)], 8)
    case.tables.write(case.slots[0], 0, [1, 2, 3])
    case.check()
    batch = case.batch(case.sequences)
    keys, _ = case.cache.read(0, batch._parts[0]._blocks, 1, 21)
    assert keys.untyped_storage().data_ptr() == case.cache.keys.untyped_storage().data_ptr()


def test_blocks_that_do_not_follow_each_other_are_not_taken_for_a_run():
    case = Case([(28, 3)], 8)
    for blocks in ([0, 2, 1, 3], [3, 2, 1, 0], [1, 3, 2, 4]):
        case.tables.write(case.slots[0], 0, blocks)
        case.check()


def test_sequences_may_read_the_same_blocks():
    case = Case([(16, 1), (16, 1), (16, 3)], 8)
    first = case.tables.row(case.slots[0], 2)
    for slot in case.slots[1:]:
        case.tables.write(slot, 0, first)
    case.k[1][:, :16] = case.k[2][:, :16] = case.k[0][:, :16]
    case.v[1][:, :16] = case.v[2][:, :16] = case.v[0][:, :16]
    case.check()


@pytest.mark.parametrize("scales", [None, scales_of(torch.int8, 2, "split"), scales_of(FLOAT8, 2, "merged")])
def test_a_copied_block_holds_every_layer_of_its_source_and_touches_no_other(scales):
    case = Case([(9, 6)], 4, scales=scales)
    for layer in range(case.layers):
        case.run(layer)
    keys, values = case.cache.keys.clone(), case.cache.values.clone()
    first, second, third, *_ = case.tables.row(case.slots[0], 4)
    case.cache.copy([(first, second), (second, third)])
    for before, after in ((keys, case.cache.keys), (values, case.cache.values)):
        before, after = before.float().nan_to_num(), after.float().nan_to_num()
        assert torch.equal(after[:, :, third], before[:, :, first]), "one after another"
        assert torch.equal(after[:, :, second], before[:, :, first])
        others = [block for block in range(before.shape[2]) if block not in (second, third)]
        assert torch.equal(after[:, :, others], before[:, :, others])


def test_a_copy_can_be_written_without_changing_its_source():
    case = Case([(10, 1)], 4)
    case.check()
    last = case.tables.row(case.slots[0], 3)[-1]
    spare = next(block for block in range(5) if block not in case.tables.row(case.slots[0], 3))
    before = case.cache.keys[:, :, last].clone()
    case.cache.copy([(last, spare)])
    case.tables.write(case.slots[0], 2, [spare])
    case.k[0][:, 10] += 1
    for layer in range(case.layers):
        batch = case.write(layer, [(10, 1)])
        out = batch.attend(case.cache, layer, case.q[0][layer])
        torch.testing.assert_close(out, case.expected(layer), atol=2e-6, rtol=1e-5)
    assert torch.equal(case.cache.keys[:, :, last].nan_to_num(), before.nan_to_num())


def test_rows_of_a_packed_batch_are_known_by_slot_position_and_block():
    tables = BlockTables(3, 4, 4)
    tables.write(0, 0, [7, 2])
    tables.write(2, 0, [5])
    tables.write(2, 1, [1])
    assert tables.row(0, 2) == [7, 2] and tables.row(2, 2) == [5, 1] and tables.row(1, 1) == [0]
    batch = PackedBatch([NewTokens(0, 6, 1), NewTokens(2, 3, 3)], rotary(), tables, CPU)
    assert batch.positions.tolist() == [6, 3, 4, 5]
    assert batch.places.tolist() == [2 * 4 + 2, 5 * 4 + 3, 1 * 4 + 0, 1 * 4 + 1]
    assert batch.last.tolist() == [0, 3]
    assert PackedBatch([NewTokens(0, 6, 1)], rotary(), tables, CPU).last is None
    with pytest.raises(AssertionError, match="single tokens must come first"):
        PackedBatch([NewTokens(2, 3, 3), NewTokens(0, 6, 1)], rotary(), tables, CPU)


def test_slots_apart_lie_one_after_another():
    whole = BlockTables.apart(3, 10)
    assert [whole.row(slot, 1) for slot in range(3)] == [[0], [1], [2]] and whole.tokens_per_block == 10
    parts = BlockTables.apart(2, 10, 4)
    assert [parts.row(slot, 3) for slot in range(2)] == [[0, 1, 2], [3, 4, 5]] and parts.run([0, 1], 3) == slice(0, 6)
    assert parts.rows.tolist() == [[0, 1, 2], [3, 4, 5]] and [parts.place(1, at) for at in (3, 4, 5)] == [15, 16, 17]


@given(
    st.lists(st.lists(st.integers(0, 12), min_size=3, max_size=3), min_size=1, max_size=3),
    st.integers(1, 3),
    st.booleans(),
)
def test_a_run_of_neighbours_is_found_exactly_when_the_blocks_are_neighbours(rows, count, neighbours):
    tables = BlockTables(5, 3, 4)
    slots = list(range(len(rows)))[::-1] if len(rows) > 2 else list(range(len(rows)))
    if neighbours:
        rows = [[2 + place * count + index for index in range(count)] for place in range(len(rows))]
    for slot, row in zip(slots, rows, strict=True):
        tables.write(slot, 0, row)
    flat = [block for row in rows for block in row[:count]]
    expected = slice(flat[0], flat[0] + len(flat)) if flat == list(range(flat[0], flat[0] + len(flat))) else None
    assert tables.run(slots, count) == expected
    assert tables.of(slots, count).flatten().tolist() == flat
    assert expected is not None or not neighbours


def test_many_sequences_in_neighbouring_blocks_are_read_without_a_copy():
    case = Case([(20, 1), (23, 1)], 8)
    for place, slot in enumerate(case.slots):
        case.tables.write(slot, 0, [3 * place, 3 * place + 1, 3 * place + 2])
    case.check()
    assert case.batch(case.sequences)._parts[0]._blocks == slice(0, 6)


def test_what_is_read_is_what_was_written_up_to_the_length():
    case = Case([(10, 1)], 4)
    case.run(0)
    keys, values = case.cache.read(0, torch.tensor(case.tables.row(case.slots[0], 3)), 1, 11)
    assert keys.shape == (1, 2, 11, SIZE)
    assert torch.equal(keys[0].transpose(0, 1), case.k[0][0]) and torch.equal(values[0].transpose(0, 1), case.v[0][0])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux alone tells what is resident")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pool_takes_memory_as_its_blocks_are_written(dtype):
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    before, size = resident(), 4 * 2 * 64 * 2048 * 128 * dtype.itemsize  # of K, and of V: 0.5 or 0.25 GB
    cache = PagedCache(
        layers=4, kv_heads=2, num_blocks=64, tokens_per_block=2048, head_size=128, dtype=dtype, device=CPU
    )
    assert cache.keys.nbytes == cache.values.nbytes == size
    assert resident() - before < size / 8
    assert not cache.keys[:, :, 5].any()
    cache.values.fill_(1)
    assert resident() - before > size / 2
