"""Every verb of the protocol: torch against the network that TensorRT compiles, run by the interpreter."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trtlab.errors import ConfigError
from trtlab.model.op_set import Ops
from trtlab.model.rope import RotaryTable
from trtlab.model.weights import Dense, Embedding, LayerNorm, Norm
from trtlab.ops.cpu.ops import CpuBatch, CpuOps, CpuPool
from trtlab.ops.cpu.weights import has_loops
from trtlab.ops.paged import BlockTables, NewTokens, PackedBatch, PagedCache
from trtlab.ops.torch import TorchOps, spread
from trtlab.parallel.comm import Solo
from trtlab.parallel.step_inputs import Chunk
from trtlab.tensorrt import bindings as io
from trtlab.tensorrt import dtypes
from trtlab.tensorrt.compare import per_token
from trtlab.tensorrt.emit.ops import TensorRTOps
from trtlab.tensorrt.run.batching import Run, input_tensors

CAPACITY, VOCABULARY = 12, 11
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Sizes:
    """The shapes of one case; ``past`` tokens are cached before, as zeros on both sides."""

    tokens: int
    kv_heads: int
    groups: int
    half: int
    past: int

    @property
    def heads(self):
        return self.kv_heads * self.groups

    @property
    def size(self):
        return 2 * self.half

    @property
    def width(self):
        return (self.heads + 2 * self.kv_heads) * self.size

    @property
    def hidden(self):
        return self.heads * self.size


def values(*shape, seed=0, dtype="float32"):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(getattr(torch, dtype))


def embedding(ops, x, n, dtype, first_row=None):
    return [ops.embedding(x["tokens"], Embedding("table.weight", values(VOCABULARY, n.hidden, dtype=dtype), first_row))]


def rms_norm(ops, x, n, dtype):
    return [ops.rms_norm(x["hidden"], Norm("norm.weight", values(n.hidden, dtype=dtype), 1e-5))]


def rms_norm_of_heads(ops, x, n, dtype):
    q, _, _ = ops.split_heads(x["qkv"], n.heads, n.kv_heads)
    return [ops.rms_norm(q, Norm("q_norm.weight", values(n.size, dtype=dtype), 1e-6))]


def layer_norm_weight(n, dtype):
    return LayerNorm("norm.weight", values(n.hidden, dtype=dtype), 1e-5, values(n.hidden, seed=1, dtype=dtype))


def position_embedding(ops, x, n, dtype):
    return [ops.position_embedding(x["tokens"], Embedding("positions.weight", values(CAPACITY, n.hidden, dtype=dtype)))]


def add_norm(ops, x, n, dtype):
    total, normed = ops.add_norm(x["hidden"], x["hidden"], Norm("norm.weight", values(n.hidden, dtype=dtype), 1e-5))
    first, _ = ops.add_norm(total, None, Norm("norm.weight", values(n.hidden, dtype=dtype), 1e-5))
    assert first is total
    return [total, normed]


def self_attention(rotary, normed):
    def case(ops, x, n, dtype):
        norms = [Norm(f"{name}_norm.weight", values(n.size, dtype=dtype), 1e-6) for name in "qk"]
        heads = (n.heads, n.kv_heads)
        return [ops.self_attention(0, x["qkv"], heads, tuple(norms) if normed else None, rotary=rotary)]

    return case


def gated(ops, x, n, dtype):
    fc, gate = (
        Dense(f"{name}.weight", values(5, n.hidden, seed=i, dtype=dtype)) for i, name in enumerate(("fc", "gate"))
    )
    return [ops.gated("silu", x["hidden"], fc, gate)]


def linear(ops, x, n, dtype):
    return [ops.linear(x["hidden"], Dense("dense.weight", values(5, n.hidden, dtype=dtype)))]


def linear_with_bias(ops, x, n, dtype):
    weight, bias = values(5, n.hidden, dtype=dtype), values(5, seed=1, dtype=dtype)
    return [ops.linear(x["hidden"], Dense("dense.weight", weight, bias))]


def split_heads(ops, x, n, dtype):
    return ops.split_heads(x["qkv"], n.heads, n.kv_heads)


def rotary(ops, x, n, dtype):
    q, k, _ = ops.split_heads(x["qkv"], n.heads, n.kv_heads)
    return ops.rotary(q, k)


def attention(ops, x, n, dtype):
    return [ops.attention(0, *ops.split_heads(x["qkv"], n.heads, n.kv_heads))]


def activation(kind):
    return lambda ops, x, n, dtype: [ops.activation(kind, x["hidden"])]


def through(verb):
    """A verb that one rank leaves alone: something has to be computed for there to be an output."""
    return lambda ops, x, n, dtype: [ops.add(getattr(ops, verb)(x["hidden"]), x["hidden"])]


def receive(ops, x, n, dtype):
    return [ops.add(ops.receive(x["hidden"], n.hidden) if isinstance(ops, TensorRTOps) else x["hidden"], x["hidden"])]


def send(ops, x, n, dtype):
    return [ops.send(ops.add(x["hidden"], x["hidden"])) if isinstance(ops, TensorRTOps) else x["hidden"] * 2]


CASES = {
    "embedding": embedding,
    "embedding, cut by rows": lambda ops, x, n, dtype: embedding(ops, x, n, dtype, first_row=4),
    "rms_norm": rms_norm,
    "rms_norm of heads": rms_norm_of_heads,
    "layer_norm": lambda ops, x, n, dtype: [ops.layer_norm(x["hidden"], layer_norm_weight(n, dtype))],
    "norm, by its weight": lambda ops, x, n, dtype: [ops.norm(x["hidden"], layer_norm_weight(n, dtype))],
    "add_norm": add_norm,
    "position_embedding": position_embedding,
    "self_attention": self_attention(rotary=False, normed=False),
    "self_attention, rotary and normed": self_attention(rotary=True, normed=True),
    "gated": gated,
    "linear": linear,
    "linear with bias": linear_with_bias,
    "split_heads": split_heads,
    "rotary": rotary,
    "attention": attention,
    "activation silu": activation("silu"),
    "activation gelu": activation("gelu"),
    "activation gelu_pytorch_tanh": activation("gelu_pytorch_tanh"),
    "activation relu": activation("relu"),
    "multiply": lambda ops, x, n, dtype: [ops.multiply(x["hidden"], x["hidden"])],
    "add": lambda ops, x, n, dtype: [ops.add(x["hidden"], x["hidden"])],
    "all_reduce of one": through("all_reduce"),
    "all_gather of one": through("all_gather"),
    "receive": receive,  # both are the network's ends; with two stages they run in test_decoder.py
    "send": send,
    "last_tokens": lambda ops, x, n, dtype: [ops.last_tokens(x["hidden"])],
    "logits": lambda ops, x, n, dtype: [ops.logits(x["hidden"], max(1, n.hidden - 1))],
}


def empty_cache(n, kind):
    return PagedCache(
        layers=1,
        kv_heads=n.kv_heads,
        num_blocks=1,
        tokens_per_block=CAPACITY,
        head_size=n.size,
        dtype=kind,
        device=CPU,
    )


def on_torch(case, n, x, table, dtype):
    kind = getattr(torch, dtype)
    tables = BlockTables.apart(1, CAPACITY)
    batch = PackedBatch([NewTokens(0, n.past, n.tokens)], spread(table, kind, CPU), tables, CPU)
    return CASES[case](TorchOps(batch, empty_cache(n, kind), Solo()), x, n, dtype)


def on_loops(case, n, x, table):
    batch = CpuBatch([Chunk(0, n.past, (0,) * n.tokens)], BlockTables.apart(1, CAPACITY))
    turns = spread(table, torch.float32, CPU)
    ops = CpuOps(batch, CpuPool(empty_cache(n, torch.float32)), (turns.cos.numpy(), turns.sin.numpy()), Solo())
    arrays = {name: tensor.numpy() for name, tensor in x.items()}
    return [torch.from_numpy(found) for found in CASES[case](ops, arrays, n, "float32")]


def on_tensorrt(hand, case, n, x, table, dtype):
    run = Run("context", 0, (Chunk(0, n.past, [0] * n.tokens),), 1, ((0, 0, n.tokens - 1),))
    given_ = {name: t for name, t in input_tensors(run, CAPACITY).items() if name != io.INPUT_IDS}
    given_ |= {f"cache_{k}_0": torch.zeros(1, n.kv_heads, CAPACITY, n.size).to(getattr(torch, dtype)) for k in "kv"}
    given_ |= {name: tensor[None] for name, tensor in x.items()}
    given_["tokens"] = given_["tokens"].int()
    inputs = {}
    for name, tensor in given_.items():
        fixed = tensor.shape[1:] if name.startswith("cache") else tensor.shape[2:]
        free = 1 if name in (io.WRITE_INDICES,) or name.startswith("cache") else 2
        shape = (-1, 1, -1, CAPACITY) if name == io.MASK else (-1,) * free + tuple(fixed)
        inputs[name] = hand.input(name, dtypes.from_torch(tensor.dtype), shape)
    ops = TensorRTOps(hand.trt, hand.net, inputs, dtype, (table.cos, table.sin), [0])
    outputs = CASES[case](ops, inputs, n, dtype)
    for tensor in (*outputs, *ops.presents):
        hand.net.mark_output(tensor)
    hand.constants = ops.constants
    results = hand.read().run(given_)
    return [per_token(results[tensor.name]) for tensor in outputs]


def inputs(case, n, dtype="float32"):
    angles = values(CAPACITY, n.half, seed=7)
    table = RotaryTable(angles.cos(), angles.sin())
    x = {
        "tokens": torch.arange(n.tokens) * 5 % VOCABULARY,
        "hidden": values(n.tokens, n.hidden, seed=1, dtype=dtype),
        "qkv": values(n.tokens, n.width, seed=2, dtype=dtype),
    }
    if "cut by rows" in case:
        x["tokens"] = x["tokens"] + 2  # some rows lie before the first, some past the last
    return x, table


def check(hand, case, n, dtype, tolerance):
    x, table = inputs(case, n, dtype)
    for got, expected in zip(
        on_tensorrt(hand, case, n, x, table, dtype), on_torch(case, n, x, table, dtype), strict=True
    ):
        torch.testing.assert_close(got.float(), expected.float(), atol=tolerance, rtol=tolerance)


SIZES = st.builds(
    Sizes,
    tokens=st.integers(1, 5),
    kv_heads=st.integers(1, 3),
    groups=st.integers(1, 3),
    half=st.integers(1, 4),
    past=st.integers(0, 6),
)


@pytest.mark.tensorrt
@settings(max_examples=8, deadline=None)
@given(n=SIZES)
@pytest.mark.parametrize("case", CASES)
def test_float32_equals_torch(new_network, case, n):
    check(new_network(), case, n, "float32", 1e-5)


@pytest.mark.skipif(not has_loops(), reason="Numba has no wheel for this Python")
@settings(max_examples=8, deadline=None)
@given(n=SIZES)
@pytest.mark.parametrize("case", CASES)
def test_the_loops_of_a_cpu_equal_torch(case, n):
    x, table = inputs(case, n)
    for got, expected in zip(on_loops(case, n, x, table), on_torch(case, n, x, table, "float32"), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


# One rounding in float16 is 5e-4, in bfloat16 4e-3 of a value; the sums here are of up to eighteen products.
@pytest.mark.tensorrt
@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 4e-3), ("bfloat16", 4e-2)])
@pytest.mark.parametrize("case", CASES)
def test_low_precision_equals_torch_within_rounding(by_hand, case, dtype, tolerance):
    check(by_hand, case, Sizes(tokens=4, kv_heads=2, groups=2, half=2, past=3), dtype, tolerance)


def test_every_verb_has_a_case():
    verbs = {name for name in vars(Ops) if not name.startswith("_")}
    assert {case.replace(",", " ").split()[0] for case in CASES} == verbs


@pytest.mark.tensorrt
def test_an_unknown_activation_is_refused(by_hand):
    x = by_hand.input("x", "float32", (-1, -1, 4))
    ops = TensorRTOps(by_hand.trt, by_hand.net, {}, "float32", (torch.zeros(2, 1), torch.zeros(2, 1)), [0])
    with pytest.raises(ConfigError, match="unknown activation; got 'mish'; expected silu"):
        ops.activation("mish", x)
