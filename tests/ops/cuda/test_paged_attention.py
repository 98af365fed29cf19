"""Paged attention on CUDA against a plain loop over gathered K and V in float64."""

from dataclasses import dataclass, replace

import pytest
import torch

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
GARBAGE = 2**30  # what stands in a table behind a sequence's blocks
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
F32, F16, BF16, I8, F8 = torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.float8_e4m3fn


@dataclass
class Case:
    """The arguments of one call; ``pasts`` and ``news`` on the host too."""

    q: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    tables: torch.Tensor
    pasts: list[int]
    news: list[int]
    key_scale: torch.Tensor | None = None
    value_scale: torch.Tensor | None = None

    @property
    def starts(self):
        return [sum(self.news[:i]) for i in range(len(self.news) + 1)]

    @property
    def longest(self):
        return max(past + new for past, new in zip(self.pasts, self.news, strict=True))

    def run(self, **changes):
        from trtlab.ops.cuda.paged_attention import paged_attention

        pasts, starts = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in (self.pasts, self.starts))
        arguments = {"longest": self.longest, "most": max(self.news), **changes}
        scales = {"key_scale": self.key_scale, "value_scale": self.value_scale}
        return paged_attention(self.q, self.keys, self.values, self.tables, pasts, starts, **arguments, **scales)

    def reference(self):
        keys, values = (self.gathered(pool) for pool in (self.keys, self.values))
        rows = []
        for sequence, (past, new, start) in enumerate(zip(self.pasts, self.news, self.starts, strict=False)):
            key, value = (meant(x[sequence], s) for x, s in ((keys, self.key_scale), (values, self.value_scale)))
            q = self.q[start : start + new].double().transpose(0, 1)  # [heads, new, head_size]
            group = q.shape[0] // key.shape[0]
            scores = q @ key.repeat_interleave(group, 0).mT * q.shape[-1] ** -0.5  # [heads, new, length]
            later = torch.arange(past + new, device=DEVICE) > torch.arange(past, past + new, device=DEVICE)[:, None]
            mixed = scores.masked_fill(later, -torch.inf).softmax(-1) @ value.repeat_interleave(group, 0)
            rows.append(mixed.transpose(0, 1).flatten(1))
        return torch.cat(rows)

    def gathered(self, pool):
        """Per sequence ``[kv_heads, length, head_size]``, a block after the other."""
        block, found = pool.shape[2], []
        for row, past, new in zip(self.tables.tolist(), self.pasts, self.news, strict=True):
            blocks = row[: -(-(past + new) // block)]
            found.append(torch.cat([pool[:, i] for i in blocks], 1)[:, : past + new])
        return found

    def check(self, **changes):
        got = self.run(**changes)
        assert got.dtype == self.q.dtype
        tolerance = TOLERANCE[self.q.dtype] if self.keys.element_size() > 1 else 3e-2
        torch.testing.assert_close(got.double(), self.reference(), atol=tolerance, rtol=tolerance)


def meant(stored, scale):
    return stored.double() if scale is None else stored.double() * scale.double().view(-1, 1, 1)


def case(pasts, news, heads=8, kv_heads=2, head_size=64, block=32, dtype=BF16, pool=None, scales=0, seed=0):
    """Shuffled blocks with spare ones between them; whatever no sequence wrote is NaN, or 127 in int8."""
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-(past + new) // block) for past, new in zip(pasts, news, strict=True)]
    total = sum(counts) + 3
    free = torch.randperm(total, generator=generator).tolist()
    tables = torch.full((len(pasts), max(counts) + 2), GARBAGE, dtype=torch.int32)
    pools = torch.full((2, kv_heads, total, block, head_size), torch.nan)
    for sequence, count in enumerate(counts):
        for i in range(count):
            tables[sequence, i] = number = free.pop()
            filled = min(block, pasts[sequence] + news[sequence] - i * block)
            pools[:, :, number, :filled] = torch.randn(2, kv_heads, filled, head_size, generator=generator)
    pool = pool or dtype
    if pool == I8:
        pools = (pools * 40).nan_to_num(127).clamp(-128, 127).round()
    keys, values = pools.to(pool).to(DEVICE)
    q = 2 * torch.randn(sum(news), heads, head_size, generator=generator)  # some weights stand out
    unit = 0.025 if pool == I8 else 0.7
    key_scale, value_scale = (
        unit * (0.5 + torch.rand(scales, generator=generator)).to(DEVICE) if scales else None for _ in range(2)
    )
    return Case(q.to(dtype).to(DEVICE), keys, values, tables.to(DEVICE), pasts, news, key_scale, value_scale)


SHAPES = [
    (F32, 4, 4, 64),
    (F32, 8, 2, 128),
    (F16, 8, 4, 96),
    (F16, 6, 2, 40),
    (BF16, 32, 8, 128),
    (BF16, 8, 1, 32),
    (BF16, 2, 2, 256),
]
LENGTHS = [1, 2, 31, 32, 33, 64, 65, 100, 127, 128, 500, 1000, 1023, 1025, 2000, 3333]


@pytest.mark.parametrize(("dtype", "heads", "kv_heads", "head_size"), SHAPES)
@pytest.mark.parametrize("batch", [1, 5, 16])
def test_decoding_equals_the_loop(dtype, heads, kv_heads, head_size, batch):
    pasts = [length - 1 for length in LENGTHS[-batch:]]
    case(pasts, [1] * batch, heads, kv_heads, head_size, dtype=dtype, seed=batch).check()


@pytest.mark.parametrize(("dtype", "heads", "kv_heads", "head_size"), SHAPES)
def test_prefill_and_mixed_batches_equal_the_loop(dtype, heads, kv_heads, head_size):
    def check(pasts, news):
        case(pasts, news, heads, kv_heads, head_size, dtype=dtype).check()

    check([0], [200])
    check([0, 0, 0], [1, 33, 129])
    check([700, 64, 1], [50, 64, 130])
    check([0, 999, 31, 5, 2000], [70, 1, 1, 3, 1])
    check([100, 7, 1500], [3, 1, 2])


@pytest.mark.parametrize("pool", [I8, F8])
@pytest.mark.parametrize("scales", [1, 4])
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_eight_bit_pools_equal_the_loop(pool, scales, dtype):
    case([0, 700, 1999], [1, 1, 1], 16, 4, 128, dtype=dtype, pool=pool, scales=scales).check()
    case([0, 300, 64], [100, 1, 37], 16, 4, 128, dtype=dtype, pool=pool, scales=scales).check()


@pytest.mark.parametrize(("dtype", "pool"), [(F32, F16), (F32, BF16), (BF16, F32), (BF16, F16)])
def test_the_pool_may_have_another_float_type(dtype, pool):
    case([0, 700], [1, 1], dtype=dtype, pool=pool).check()
    case([0, 300], [40, 10], dtype=dtype, pool=pool).check()


@pytest.mark.parametrize("block", [1, 5, 16, 48, 64, 128])
def test_any_number_of_tokens_a_block(block):
    case([0, 47, 700], [1, 1, 1], block=block).check()
    case([0, 47, 300], [100, 1, 37], block=block).check()


@pytest.mark.parametrize("splits", [1, 2, 7, 128])
def test_the_number_of_splits_changes_nothing(splits):
    from trtlab.ops.cuda.launch_shape import launch_shape

    for made in (case([0, 63, 64, 3000], [1, 1, 1, 1]), case([0, 200, 2500, 700], [130, 1, 20, 100])):
        plan = launch_shape(made.q, made.keys, len(made.pasts), made.longest, max(made.news))
        made.check(plan=replace(plan, splits=splits))


def test_sequences_may_share_blocks():
    made = case([499, 699, 31], [1, 1, 1])
    made.tables[1, :10] = made.tables[0, :10]
    made.check()


def test_queries_may_be_part_of_a_fused_projection():
    made = case([0, 77, 900], [1, 30, 1], heads=8, kv_heads=2, head_size=64)
    fused = torch.full((made.q.shape[0], 12, 64), torch.nan, dtype=made.q.dtype, device=DEVICE)
    fused[:, :8] = made.q
    replace(made, q=fused[:, :8]).check()


def test_a_sequence_may_have_no_new_token():
    case([40, 10, 0], [1, 0, 1]).check()
    case([40, 10, 0], [33, 0, 1]).check()


def test_a_wrong_longest_costs_only_time():
    for longest in (1, 100_000):
        case([0, 1500], [1, 1]).check(longest=longest)


def test_a_graph_stays_right_when_sequences_grow():
    from trtlab.ops.cuda.paged_attention import paged_attention

    made = case([1500, 600], [1, 1])
    pasts, starts = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in ([3, 0], [0, 1, 2]))

    def step():
        return paged_attention(made.q, made.keys, made.values, made.tables, pasts, starts, longest=4096, most=1)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for grown in ([10, 300], [1500, 600]):
        pasts.copy_(torch.tensor(grown, dtype=torch.int32))
        graph.replay()
        expected = replace(made, pasts=grown).reference()
        torch.testing.assert_close(out.double(), expected, atol=3e-2, rtol=3e-2)


def test_offsets_beyond_32_bits():
    if torch.cuda.get_device_properties(0).total_memory < 12 * 2**30:
        pytest.skip("needs 12 GiB of GPU memory")
    made = case([70, 45], [1, 1], 2, 2, 128, 128, pool=I8, scales=1)
    blocks = 2**31 // (128 * 128) + 8  # each head's part alone passes 2^31 elements
    keys, values = (torch.empty(2, blocks, 128, 128, dtype=I8, device=DEVICE) for _ in range(2))
    first = blocks - made.keys.shape[1]
    keys[:, first:], values[:, first:] = made.keys, made.values
    tables = torch.where(made.tables == GARBAGE, GARBAGE, made.tables + first)
    torch.testing.assert_close(replace(made, keys=keys, values=values, tables=tables).run(), made.run())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("what", ["q", "keys"])
@pytest.mark.parametrize(("past", "new"), [(0, 1), (0, 5), (70, 45), (3000, 1)])
def test_where_the_softmax_is_nan_the_result_is_nan(past, new, what, bad):
    made = case([past, 12], [new, 1], 4, 2, 64, dtype=F32)
    if what == "q":
        made.q[:new, :2] = bad
    else:
        made.keys[0, made.tables[0, : -(-(past + new) // 32)].long()] = bad
    got, expected = made.run(), made.reference()
    assert expected.isnan().any() and not expected.isnan().all()
    torch.testing.assert_close(got.double(), expected, atol=2e-5, rtol=2e-5, equal_nan=True)
