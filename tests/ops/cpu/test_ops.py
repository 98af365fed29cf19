"""The compiled loops of a CPU against torch, one by one and as a whole op set."""

from __future__ import annotations

import os

import numba
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from trtlab import BuildConfig, Checkpoint, ConfigError, QuantConfig, SamplingParams, SessionConfig
from trtlab.model.quantized_weights import Float8Linear, Int4Float8Linear, Int8Linear, KvScales, WeightOnly
from trtlab.model.scales import FLOAT8, ToOriginal, ToQuantized, dequantize, pack_int4, to_float8
from trtlab.model.weights import Dense
from trtlab.ops.cpu import products as cpu_products
from trtlab.ops.cpu.ops import CpuPool, loops_on_torchs_threads
from trtlab.ops.cpu.weights import (
    FEW,
    FEW_OF_CACHED,
    LARGE,
    ArrangedDense,
    Looped,
    _looped_linear,
    array_of,
    cpu_weights,
    has_loops,
)
from trtlab.ops.paged import PagedCache
from trtlab.ops.quantized_linear import decode_cache, encode_cache, linear

pytestmark = pytest.mark.skipif(not has_loops(), reason="Numba has no wheel for this Python")


@pytest.fixture(scope="module", autouse=True)
def loops():
    return loops_on_torchs_threads()


def close(found, expected, bound=2e-6):
    """Equal to so many times the largest number: what the order of a sum decides."""
    expected = torch.as_tensor(expected)
    assert found.shape == tuple(expected.shape)
    assert np.abs(found - expected.numpy()).max() <= bound * max(1e-30, expected.abs().max().item())


# --- linear layers


def weight_only(bits, rows, width, groups, dice, prequant=False, bias=False):
    q = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (rows, width), generator=dice).to(torch.int8)
    scale = ToOriginal((torch.rand(rows, groups, generator=dice) + 0.5) / 2**bits)
    factor = torch.rand(width, generator=dice) + 0.5 if prequant else None
    added = torch.randn(rows, generator=dice) if bias else None
    return WeightOnly("w", pack_int4(q) if bits == 4 else q, scale, added, factor)


@settings(deadline=None, max_examples=60)
@given(
    bits=st.sampled_from([4, 8, 16]),
    rows=st.integers(1, 37),
    size=st.sampled_from([1, 16, 31, 64, 96, 640]),
    groups=st.integers(1, 3),
    tokens=st.sampled_from([1, 2, 3, 8, FEW]),
    extras=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_a_loop_gives_what_the_exact_product_gives(bits, rows, size, groups, tokens, extras, seed):
    dice = torch.Generator().manual_seed(seed)
    if bits == 16:
        bias = torch.randn(rows, generator=dice) if extras else None
        weight = Dense("w", torch.randn(rows, size * groups, generator=dice).bfloat16(), bias)
    else:
        weight = weight_only(bits, rows, size * groups, groups if bits == 4 else 1, dice, extras, extras)
    x = torch.randn(tokens, size * groups, generator=dice)
    looped = _looped_linear(weight)
    assert looped.shape == weight.shape == (rows, size * groups)
    assert looped.nbytes == weight.nbytes
    wide = (x.double() * weight.prequant if bits < 16 and extras else x.double()).abs()
    magnitude = linear(weight, torch.ones_like(x)).abs().max() + wide.max() * linear(weight, x).abs().max() + 1
    for found in (looped(x.numpy()), linear(looped, x).numpy()):  # of few tokens, of more
        assert np.abs(found - linear(weight, x).numpy()).max() < 1e-5 * magnitude


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [1, 6, 37])
@pytest.mark.parametrize("size", [1, 31, 64])
def test_widened_numbers_are_those_of_dequantize_bit_for_bit(loops, bits, rows, size):
    weight = weight_only(bits, rows, 3 * size, 3 if bits == 4 else 1, torch.Generator().manual_seed(size))
    looped, matrix = _looped_linear(weight), np.empty(weight.shape, np.float32)
    looped.widen(*looped.arrays, matrix)
    assert np.array_equal(matrix, dequantize(weight.integers, weight.scale.value).numpy())


@pytest.mark.parametrize("tokens", [1, 2, 5])
@pytest.mark.parametrize("bias", [None, torch.arange(6.0)])
def test_float8_products_are_those_of_torch(tokens, bias):
    dice = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, 64, generator=dice) * 3
    scales = ToOriginal(torch.tensor([0.01])), ToOriginal(torch.tensor([0.02]))
    numbers = to_float8(torch.randn(6, 64, generator=dice), scales[0])
    groups = weight_only(4, 6, 64, 2, dice, prequant=True)
    for weight in (Float8Linear("w", numbers, *scales, bias), Int4Float8Linear("w", groups, *scales, bias)):
        looped = _looped_linear(weight)
        assert looped.arrays[0].dtype == np.uint8
        assert np.allclose(looped(x.numpy()), linear(weight, x).numpy(), rtol=1e-5, atol=1e-5)
        assert isinstance(prepared(weight), Looped)


@pytest.mark.parametrize("tokens", [1, 3])
def test_large_inputs_meet_float8_weights_and_stay_finite(loops, tokens):
    stored = torch.full((2, 16), 0.5).to(FLOAT8).view(torch.uint8).numpy()
    out = np.empty((tokens, 2), np.float32)
    cpu_products.linear(np.full((tokens, 16), 1e4, np.float32), stored, np.ones(2, np.float32), out)
    assert np.allclose(out, 8e4)


@pytest.mark.parametrize("width", [16, 64])  # a loop, and vectors of 32
def test_four_bits_keep_every_integer(loops, width):
    q = torch.arange(-8, 8, dtype=torch.int8).repeat(3, width // 16)  # an odd number of rows, each with all values
    q[1] = q[1].roll(3)  # the other half of the first row's bytes
    out = np.empty((1, 3), np.float32)
    for column in range(width):
        x = np.zeros((1, width), np.float32)
        x[0, column] = 1
        cpu_products.linear_int4(x, pack_int4(q).view(torch.int8).numpy(), np.ones((3, 1), np.float32), out)
        assert out.tolist() == [q[:, column].tolist()]


@pytest.mark.parametrize(("groups", "shift"), [(1, 0.0), (12, 0.0), (6, 5.0)])
def test_products_from_four_bits_are_as_exact_as_float32_ones(loops, groups, shift):
    dice = torch.Generator().manual_seed(groups)
    weight = weight_only(4, 64, 768, groups, dice)
    x = torch.randn(1, 768, generator=dice) + shift  # inputs that do not cancel are the hard ones
    terms = dequantize(weight.integers, weight.scale.value).double() * x.double()
    found = torch.from_numpy(_looped_linear(weight)(x.numpy()))
    assert ((found - terms.sum(1)).abs() < 2e-6 * terms.abs().sum(1)).all()


@pytest.mark.parametrize("tokens", [1, 2, 5])
@pytest.mark.parametrize("width", [48, 1500])  # more than float32 sums exactly
@pytest.mark.parametrize("form", ["per token", "static", "ModelOpt's"])
def test_int8_products_are_torchs_bit_for_bit(tokens, width, form):
    dice = torch.Generator().manual_seed(width)
    q = torch.randint(-127, 128, (7, width), generator=dice).to(torch.int8)
    scale = ToOriginal(torch.rand(7, generator=dice) / 100)
    factor = torch.rand(width, generator=dice) + 0.5
    weight = {
        "per token": Int8Linear("w", q, scale, None, torch.arange(7.0), smoother=factor),
        "static": Int8Linear("w", q, scale, ToQuantized(torch.tensor([40.0]))),
        "ModelOpt's": Int8Linear("w", q, scale, ToOriginal(torch.tensor([0.02])), prequant=factor),
    }[form]
    looped = prepared(weight)
    assert isinstance(looped, Looped)
    x = torch.randn(tokens, width, generator=dice) * 2
    assert torch.equal(torch.from_numpy(looped(x.numpy())), linear(weight, x))


def test_a_token_that_is_not_finite_spoils_no_other_and_is_not_hidden(loops):
    q = torch.ones(3, 16, dtype=torch.int8)
    looped = _looped_linear(Int8Linear("w", q, ToOriginal(torch.ones(3))))
    x = np.ones((3, 16), np.float32)
    x[1, 5] = np.nan
    found = looped(x)
    assert np.isnan(found[1]).all()
    assert np.isfinite(found[[0, 2]]).all()


def test_loops_leave_torch_its_number_of_threads(loops):
    before = torch.get_num_threads()  # what conftest.py set, before Numba started threads of its own
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert loops_on_torchs_threads() is loops
            ours = min(threads, numba.config.NUMBA_NUM_THREADS)
            assert (torch.get_num_threads(), numba.get_num_threads()) == (threads, ours)
    finally:
        torch.set_num_threads(before)
        loops_on_torchs_threads()
    assert before == int(os.environ.get("TRTLAB_TEST_THREADS", "1"))


# --- weights as a CPU reads them


def model(**tensors):
    from trtlab.model.weights import Embedding, LayerWeights, ModelWeights, Norm

    norm = Norm("n", torch.ones(4).bfloat16(), 1e-5)
    parts = {name: tensors.get(name, Dense(name, torch.ones(4, 4))) for name in ("qkv", "dense", "fc", "gate", "proj")}
    layer = LayerWeights(
        norm, parts["qkv"], None, None, parts["dense"], norm, parts["fc"], parts["gate"], parts["proj"]
    )
    table = Embedding("e", torch.ones(8, 4).bfloat16())
    return ModelWeights(1, 1, (layer,), table, norm, Dense("h", torch.ones(8, 4).bfloat16()))


@pytest.fixture(autouse=True)
def small_cache(monkeypatch):
    """No machine decides what these tests see."""
    monkeypatch.setattr("trtlab.ops.cpu.weights.cache_bytes", lambda: 0)


def prepared(weight, **options):
    return cpu_weights(model(qkv=weight), **{"loops": True, **options}).layers[0].qkv


def test_what_bfloat16_holds_is_kept_in_two_bytes_and_nothing_else():
    exact = torch.randn(6, 4).bfloat16()
    for tensor in (exact, exact.float()):
        found = prepared(Dense("w", tensor))
        assert isinstance(found, Looped)
        assert found.source.weight.dtype == torch.bfloat16
        assert torch.equal(found.source.weight, exact)
    finer = exact.float()
    finer[-1, -1] += 2**-12 * finer[-1, -1]
    assert prepared(Dense("w", finer)).weight.dtype == torch.float32
    assert torch.equal(prepared(Dense("w", finer)).weight, finer)
    assert isinstance(prepared(Dense("w", finer), round_dense=True), Looped)


def test_what_a_cache_holds_serves_several_tokens_in_float32(monkeypatch):
    tensor = torch.randn(64, 32).bfloat16()
    x = torch.randn(5, 32)
    for cache, few, dtype in ((0, FEW, torch.bfloat16), (2**30, FEW_OF_CACHED, torch.float32)):
        monkeypatch.setattr("trtlab.ops.cpu.weights.cache_bytes", lambda cache=cache: cache)
        found = prepared(Dense("w", tensor))
        assert isinstance(found, Looped)
        assert (found.few, found.source.weight.dtype) == (few, dtype)
        assert torch.allclose(linear(found, x), F.linear(x, tensor.float()), atol=1e-5)
        assert np.allclose(found(x[:1].numpy()), F.linear(x[:1], tensor.float()), atol=1e-5)
    large = torch.randn(LARGE // 512, 512).bfloat16()
    assert prepared(Dense("w", large)).few == FEW


def test_half_precision_is_widened():
    tensor = torch.randn(6, 4).half()
    found = prepared(Dense("w", tensor))
    assert found.weight.dtype == torch.float32
    assert torch.equal(found.weight, tensor.float())


def test_large_float32_weights_take_the_layout_of_onednn():
    tensor = torch.randn(LARGE // 512, 512)
    found = prepared(Dense("w", tensor))
    assert isinstance(found, ArrangedDense)
    x = torch.randn(3, 512)
    assert torch.allclose(linear(found, x), F.linear(x, tensor), atol=1e-3)
    assert found.nbytes == tensor.nbytes


def test_without_loops_everything_is_float32_and_rounding_is_refused():
    plain = cpu_weights(model(qkv=Dense("w", torch.randn(6, 4).bfloat16())), loops=False)
    assert plain.layers[0].qkv.weight.dtype == plain.embedding.weight.dtype == torch.float32
    assert plain.final_norm.weight.dtype == torch.float32
    with pytest.raises(ConfigError, match="pip install numba"):
        cpu_weights(model(), loops=False, round_dense=True)


# --- the smaller loops


@settings(deadline=None, max_examples=30)
@given(rows=st.integers(1, 9), width=st.integers(1, 300), seed=st.integers(0, 2**16))
def test_rms_norm_and_silu_are_those_of_torch(loops, rows, width, seed):
    dice = torch.Generator().manual_seed(seed)
    x, gain = torch.randn(rows, width, generator=dice) * 3, torch.rand(width, generator=dice) * 4
    out = np.empty((rows, width), np.float32)
    loops.rms_norm(x.numpy(), gain.numpy(), 1e-5, out)
    close(out, F.rms_norm(x, (width,), gain, 1e-5))
    loops.silu(x.numpy(), out)
    close(out, F.silu(x))


def test_silu_holds_far_out(loops):
    x = torch.tensor([[-1e30, -200.0, -88.0, -20.0, -1e-20, 0.0, 1e-20, 20.0, 200.0, 1e30]])
    out = np.empty((1, 10), np.float32)
    loops.silu(x.numpy(), out)
    assert np.allclose(out, F.silu(x).numpy(), rtol=1e-6, atol=1e-30)


# --- attention over blocks


def attention_case(dtype, kind, heads, kv_heads, block, lengths, size=16, seed=0):
    """A pool with NaN in every place that no sequence owns, K and V laid out plainly, and the loop's result."""
    dice = torch.Generator().manual_seed(seed)
    counts = [-(-n // block) for n in lengths]
    order = torch.randperm(sum(counts) + 3, generator=dice).tolist()
    scales = None
    if dtype != torch.float32:
        one = torch.rand(kv_heads if kind == "per_head" else 1, generator=dice) * 0.02 + 0.01
        scales = KvScales(dtype, ToOriginal(one), ToOriginal(one * 1.5))
    cache = PagedCache(
        layers=1,
        kv_heads=kv_heads,
        num_blocks=len(order),
        tokens_per_block=block,
        head_size=size,
        dtype=torch.float32,
        device=torch.device("cpu"),
        scales=[scales] if scales else (),
    )
    if scales is None:
        cache.keys.fill_(torch.nan)
        cache.values.fill_(torch.nan)
    tables = np.zeros((len(lengths) + 1, max(counts)), np.int32)
    slots = torch.randperm(len(lengths) + 1, generator=dice)[: len(lengths)].to(torch.int32).numpy()
    plain = []
    for slot, n, count in zip(slots, lengths, counts, strict=True):
        blocks = [order.pop() for _ in range(count)]
        tables[slot, :count] = blocks
        k, v = torch.randn(2, n, kv_heads, size, generator=dice)
        places = torch.tensor([blocks[i // block] * block + i % block for i in range(n)])
        cache.write(0, places, k, v)
        if scales:
            k, v = (
                decode_cache(encode_cache(new, s, dtype)[None].transpose(1, 2), s, torch.float32)[0].transpose(0, 1)
                for new, s in ((k, scales.keys), (v, scales.values))
            )
        plain.append((k, v))
    q = torch.randn(len(lengths), heads, size, generator=dice)
    return cache, tables, slots, plain, q


@pytest.mark.parametrize(
    ("dtype", "kind"), [(torch.float32, ""), (torch.int8, "merged"), (torch.int8, "per_head"), (FLOAT8, "per_head")]
)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
def test_attention_reads_blocks_where_they_lie(loops, dtype, kind, heads, kv_heads):
    lengths = [1, 7, 8, 9, 40]
    cache, tables, slots, plain, q = attention_case(dtype, kind, heads, kv_heads, 8, lengths)
    pool, out = CpuPool(cache), np.empty(q.shape, np.float32)
    pasts = np.array(lengths, np.int32) - 1
    loops.attend(q.numpy(), *pool.layers[0], *pool.scales[0], tables, slots, pasts, out)
    for row, (k, v) in enumerate(plain):
        expected = F.scaled_dot_product_attention(
            q[row, :, None][None], k.transpose(0, 1)[None], v.transpose(0, 1)[None], enable_gqa=True
        )
        close(out[row], expected[0, :, 0], 2e-5 if dtype == torch.float32 else 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8, FLOAT8])
def test_what_is_stored_is_what_the_cache_writes(loops, dtype):
    cache, *_ = attention_case(dtype, "merged", 2, 2, 4, [3, 6])
    k = torch.randn(3, 2, 16)
    new, _ = cache.encoded(0, k, k)
    pool = torch.zeros_like(cache.keys[0])
    tables = np.array([[2, 0], [1, 3]], np.int32)
    slots, positions = np.array([1, 0, 0], np.int32), np.array([1, 6, 3], np.int32)
    loops.store(array_of(pool), tables, slots, positions, array_of(new))
    cache.keys.zero_()
    cache.write(0, torch.tensor([1 * 4 + 1, 0 * 4 + 2, 2 * 4 + 3]), k, k)
    assert torch.equal(pool.view(torch.uint8), cache.keys[0].view(torch.uint8))


def test_every_e4m3_number_is_read_as_it_is_meant(loops):
    stored = torch.arange(256, dtype=torch.uint8)
    meant = stored.view(FLOAT8).float()
    kept = ~meant.isnan()
    out = np.empty((1, 256), np.float32)
    cpu_products.linear(np.ones((1, 1), np.float32), stored[:, None].numpy(), np.ones(256, np.float32), out)
    assert torch.equal(torch.from_numpy(out[0])[kept], meant[kept])


# --- whole sessions


@pytest.mark.parametrize(
    "algorithm", [None, "W8A16", "W4A16", "W4A16_AWQ", "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN", "FP8"]
)
def test_a_session_gives_the_same_with_loops_and_without(random_model, monkeypatch, algorithm):
    checkpoint = Checkpoint.from_hugging_face(random_model(intermediate_size=128))
    ids = list(range(3, 23))
    if algorithm:
        quant = QuantConfig(quant_algo=algorithm, group_size=64)
        checkpoint = checkpoint.quantize(quant, calibration=[ids] if quant.reads_texts else None)
    found = []
    for loops in (True, False):
        monkeypatch.setattr("trtlab.runtime.torch_backend.has_loops", lambda loops=loops: loops)
        with checkpoint.build(BuildConfig(), plan=False).session(backend="torch", device="cpu") as session:
            tokens = session.generate([ids, ids[:3]], SamplingParams(max_new_tokens=12, logprobs=True))
            found.append((session.logits(ids), tokens))
    (with_loops, ours), (without, theirs) = found
    assert (with_loops - without).abs().max() < (1e-4 if algorithm in (None, "W8A16", "W4A16", "W4A16_AWQ") else 0.05)
    if algorithm is None:
        assert [one.token_ids for one in ours] == [one.token_ids for one in theirs]


def test_rounding_dense_weights_is_opted_into(random_model):
    with Checkpoint.from_hugging_face(random_model()).build(BuildConfig(), plan=False) as engine:
        with engine.session(backend="torch", device="cpu") as session:
            exact = session.logits(range(3, 23))
        with engine.session(SessionConfig(fast_cpu_kernels=True), backend="torch", device="cpu") as session:
            rounded = session.logits(range(3, 23))
    assert 1e-5 < (rounded - exact).norm() / exact.norm() < 0.05
