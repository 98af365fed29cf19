"""NaN and infinity become NaN in the logits, or an error that names the layer: never another finite number."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from trtlab import BuildConfig, Checkpoint, QuantConfig, RequestError, SamplingParams
from trtlab.model.quantized_weights import Float8Linear, Int8Linear
from trtlab.model.rope import RotaryTable
from trtlab.model.scales import FLOAT8, ToOriginal, ToQuantized
from trtlab.ops.cpu.weights import _looped_linear, has_loops
from trtlab.ops.paged import BlockTables, NewTokens, PackedBatch, PagedCache
from trtlab.ops.quantized_linear import linear
from trtlab.storage.lazy import in_memory

from ..models import random_texts, small_config, telling_weights

NAN, INF = float("nan"), float("inf")
ONE = ToOriginal(torch.tensor([1.0]))
SIZE, HEADS, KV_HEADS = 8, 4, 2
ON_A_CPU = [
    pytest.param(True, marks=pytest.mark.skipif(not has_loops(), reason="Numba has no wheel for this Python")),
    False,
]


def attended(sequences, q, keys, values):
    """Attention of the last tokens of each sequence, K and V ``[tokens, kv_heads, size]`` in blocks of 4."""
    blocks = [-(-len(k) // 4) for k in keys]
    tables = BlockTables(len(sequences), max(blocks), 4)
    cache = PagedCache(
        layers=1,
        kv_heads=KV_HEADS,
        num_blocks=sum(blocks),
        tokens_per_block=4,
        head_size=SIZE,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    rotary = RotaryTable(torch.ones(64, SIZE), torch.zeros(64, SIZE))
    for slot, count in enumerate(blocks):
        tables.write(slot, 0, range(sum(blocks[:slot]), sum(blocks[:slot]) + count))
        whole = PackedBatch([NewTokens(slot, 0, len(keys[slot]))], rotary, tables, torch.device("cpu"))
        cache.write(0, whole.places, keys[slot], values[slot])
    batch = PackedBatch([NewTokens(i, *span) for i, span in enumerate(sequences)], rotary, tables, torch.device("cpu"))
    return batch.attend(cache, 0, torch.cat(q))


def plain(q, keys, values):
    """Softmax over the visible scores alone, row by row."""
    rows = []
    for own, k, v in zip(q, keys, values, strict=True):
        group, past = HEADS // KV_HEADS, len(k) - len(own)
        for token, row in enumerate(own):
            seen = past + token + 1
            k_seen, v_seen = (x[:seen].repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))
            scores = (row[:, None] @ k_seen.mT) * SIZE**-0.5  # [heads, 1, seen]
            rows.append((scores.softmax(-1) @ v_seen).flatten())
    return torch.stack(rows)


LENGTHS = [[(0, 1)], [(0, 2)], [(0, 5)], [(0, 17)], [(0, 40)], [(3, 5)], [(2, 1), (2, 1)], [(6, 1), (1, 1), (30, 1)]]


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("what", ["q", "k"])
@pytest.mark.parametrize("sequences", LENGTHS, ids=str)
def test_where_the_softmax_is_nan_attention_is_nan(sequences, what, bad):
    dice = torch.Generator().manual_seed(0)
    q = [torch.randn(length, HEADS, SIZE, generator=dice).abs() for _, length in sequences]
    keys, values = ([torch.randn(p + n, KV_HEADS, SIZE, generator=dice).abs() for p, n in sequences] for _ in "kv")
    spoiled = (q if what == "q" else keys)[0]
    spoiled[:, -1] = bad  # one head, all tokens: every score is NaN, or of one infinite sign
    expected, found = plain(q, keys, values), attended(sequences, q, keys, values)
    assert expected.isnan().any() and not expected.isnan().all()
    torch.testing.assert_close(found, expected, equal_nan=True)


def test_values_of_zero_are_no_reason_for_nan():
    q, keys, values = ([torch.randn(5, heads, SIZE)] for heads in (HEADS, KV_HEADS, KV_HEADS))
    assert attended([(0, 5)], q, keys, [torch.zeros_like(values[0])]).eq(0).all()


def test_scores_beyond_float32_are_nan_as_in_a_plain_softmax():
    q, keys, values = ([torch.full((5, heads, SIZE), x)] for heads, x in ((HEADS, 1e30), (KV_HEADS, -1e30), (2, 1.0)))
    assert attended([(0, 5)], q, keys, values).isnan().all() and plain(q, keys, values).isnan().all()


def spoil(checkpoint, name, rows, bad):
    tensor = checkpoint.tensors[name].read().clone()
    tensor[rows] = bad
    return dataclasses.replace(checkpoint, tensors={**checkpoint.tensors, name: in_memory(tensor)})


@pytest.fixture
def session_of(monkeypatch):
    """``session_of(checkpoint, loops)`` is a session on the CPU, with compiled loops or torch alone."""
    opened = []

    def start(checkpoint, loops):
        monkeypatch.setattr("trtlab.runtime.torch_backend.has_loops", lambda: loops)
        engine = checkpoint.build(BuildConfig(max_batch_size=2, max_seq_len=64, dtype="float32"), plan=False)
        opened.append(engine.session(backend="torch", device="cpu"))
        return opened[-1]

    yield start
    for session in opened:
        session.close()


@pytest.mark.parametrize("loops", ON_A_CPU)
@pytest.mark.parametrize("length", [1, 2, 5, 40])
@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_a_projection_that_is_not_finite_gives_nan_as_in_transformers(
    random_model, session_of, part, bad, length, loops
):
    from transformers import AutoModelForCausalLM

    ids = [(7 * token) % 99 for token in range(length)]
    model = AutoModelForCausalLM.from_pretrained(  # torch's kernel, which "sdpa" uses, loses NaN of short prompts
        random_model(), dtype=torch.float32, attn_implementation="eager", trust_remote_code=False
    )
    with torch.no_grad():
        getattr(model.model.layers[0].self_attn, f"{part}_proj").weight.fill_(bad)
        expected = model(torch.tensor([ids])).logits[0]
    rows = {"q": slice(0, 64), "k": slice(64, 96), "v": slice(96, 128)}[part]
    checkpoint = Checkpoint.from_hugging_face(random_model())
    spoiled = spoil(checkpoint, "transformer.layers.0.attention.qkv.weight", rows, bad)
    session = session_of(spoiled, loops)
    assert expected.isnan().all() and session.logits(ids).isnan().all()
    with pytest.raises(RequestError, match=r"request \d+ failed.*not a number"):
        session.generate(ids, SamplingParams(max_new_tokens=4))


@pytest.fixture(scope="module")
def tiny():
    config = small_config(hidden_size=128, head_size=32, intermediate_size=256)
    return Checkpoint.from_weights(config, telling_weights(config))


@pytest.mark.parametrize("loops", ON_A_CPU)
@pytest.mark.parametrize("algorithm", ["INT8", "FP8"])
def test_an_eight_bit_cache_refuses_what_it_cannot_store_and_the_other_request_goes_on(
    tiny, session_of, algorithm, loops
):
    quant = QuantConfig(kv_cache_quant_algo=algorithm)
    quantized = tiny.quantize(quant, calibration=random_texts((24,)) if quant.reads_texts else None)
    session = session_of(spoil(quantized, "transformer.vocab_embedding.weight", 5, NAN), loops)
    params = SamplingParams(max_new_tokens=4, ignore_eos=True)
    good, bad = session.submit([1, 2, 3], params), session.submit([4, 5, 6], params)
    with pytest.raises(RequestError, match=r"K or V of layer 0 is infinite or not a number"):
        bad.result()
    assert len(good.result().token_ids) == 4
    with pytest.raises(RequestError, match=r"K or V of layer 0"):
        session.logits([5])


@pytest.mark.parametrize("loops", ON_A_CPU)
@pytest.mark.parametrize("length", [1, 5, 40])
def test_int8_inputs_that_are_not_finite_give_nan(tiny, session_of, length, loops):
    quant = QuantConfig(quant_algo="W8A8_SQ_PER_TENSOR_PLUGIN")
    quantized = tiny.quantize(quant, calibration=random_texts((24,)))
    name = "transformer.layers.0.attention.qkv.per_channel_scale"
    assert session_of(spoil(quantized, name, ..., NAN), loops).logits([3] * length).isnan().all()


def products(weight, x):
    """A quantized product in torch, and by the loop of a CPU where there is one."""
    yield linear(weight, x)
    if has_loops():
        yield torch.from_numpy(_looped_linear(weight)(x.numpy()))


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("scale", [ToOriginal(torch.tensor(0.02)), ToQuantized(torch.tensor(50.0)), None])
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_a_token_that_is_not_finite_spoils_its_own_row_of_an_int8_product(tokens, scale, bad):
    dice = torch.Generator().manual_seed(tokens)
    numbers = torch.randint(-127, 128, (6, 64), generator=dice).to(torch.int8)
    weight = Int8Linear("w", numbers, ToOriginal(torch.full((6,), 0.01)), scale)
    x = torch.randn(tokens, 64, generator=dice)
    x[-1, 7] = bad
    for product in products(weight, x):
        assert not product[-1].isfinite().any() and product[:-1].isfinite().all()


@pytest.mark.parametrize("tokens", [1, 3])
def test_every_finite_float8_number_is_multiplied_by_its_value(tokens):
    numbers = torch.arange(256).to(torch.uint8).view(FLOAT8)
    finite = numbers[numbers.float().isfinite()]
    weight = Float8Linear("w", finite[:, None].repeat(1, 32), ONE, ONE)
    for product in products(weight, torch.eye(32)[:tokens]):
        assert torch.equal(product, finite.float().expand(tokens, -1))
    assert len(finite) == 254


@pytest.mark.parametrize("loops", ON_A_CPU)
@pytest.mark.parametrize("length", [1, 5, 40])
@pytest.mark.parametrize("byte", [0x7F, 0xFF])
def test_nan_in_a_float8_weight_is_nan_and_not_480(tiny, session_of, byte, length, loops):
    quantized = tiny.quantize(QuantConfig(quant_algo="FP8"), calibration=random_texts((24,)))
    name = "transformer.layers.0.attention.qkv.weight"
    numbers = quantized.tensors[name].read().clone()
    numbers.view(torch.uint8)[3, 5] = byte
    spoiled = dataclasses.replace(quantized, tensors={**quantized.tensors, name: in_memory(numbers)})
    assert session_of(spoiled, loops).logits([3] * length).isnan().all()
