"""Each kind of layer, written by hand with TensorRT's calls and held against plain torch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.tensorrt

sizes = st.integers(1, 5)
quick = settings(max_examples=20, deadline=None)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@quick
@given(batch=sizes, m=sizes, k=sizes, n=sizes, flip=st.booleans(), shared=st.booleans())
def test_matrix_multiply_is_torch_matmul(new_network, batch, m, k, n, flip, shared):
    hand = new_network()
    a, b = random(batch, m, k), random(1 if shared else batch, *((n, k) if flip else (k, n)), seed=1)
    operation = hand.trt.MatrixOperation
    x, w = hand.input("x", "float32", (-1, -1, k)), hand.constant("w", b)
    op = operation.TRANSPOSE if flip else operation.NONE
    hand.output(hand.net.add_matrix_multiply(x, operation.NONE, w, op))
    torch.testing.assert_close(hand.run(x=a), a @ (b.transpose(1, 2) if flip else b))


@quick
@given(rows=sizes, columns=sizes, left=st.booleans(), right=st.booleans())
@pytest.mark.parametrize(("op", "expected"), [("SUM", torch.add), ("PROD", torch.mul), ("DIV", torch.div)])
def test_elementwise_broadcasts(new_network, op, expected, rows, columns, left, right):
    hand = new_network()
    a, b = random(1 if left else rows, columns), random(rows, 1 if right else columns, seed=1).abs() + 1
    layer = hand.net.add_elementwise(
        hand.constant("a", a), hand.constant("b", b), getattr(hand.trt.ElementWiseOperation, op)
    )
    hand.output(layer)
    torch.testing.assert_close(hand.run(), expected(a, b))


@quick
@given(batch=sizes, tokens=sizes, heads=sizes, size=sizes)
def test_shuffle_transposes_then_reshapes_then_transposes(new_network, batch, tokens, heads, size):
    hand = new_network()
    layer = hand.net.add_shuffle(hand.input("x", "float32", (-1, -1, heads * size)))
    layer.reshape_dims = hand.trt.Dims((0, 0, heads, size))
    layer.second_transpose = hand.trt.Permutation([0, 2, 1, 3])
    back = hand.net.add_shuffle(layer.get_output(0))
    back.first_transpose = hand.trt.Permutation([0, 2, 1, 3])
    back.reshape_dims = hand.trt.Dims((0, -1, heads * size))
    hand.output(back)
    x = random(batch, tokens, heads * size)
    kept = hand.read().run({"x": x}, keep=[layer.name])
    expected = x.view(batch, tokens, heads, size).transpose(1, 2)
    assert torch.equal(kept[layer.name], expected)
    assert torch.equal(kept["y"], x)


@quick
@given(data=st.data(), size=st.integers(1, 9))
def test_slice_takes_start_size_and_stride(new_network, data, size):
    start, stride = data.draw(st.integers(0, size - 1)), data.draw(st.integers(1, 3))
    length = data.draw(st.integers(1, (size - 1 - start) // stride + 1))
    hand, x = new_network(), random(2, size)
    dims = hand.trt.Dims
    layer = hand.net.add_slice(hand.constant("x", x), dims((0, start)), dims((2, length)), dims((1, stride)))
    hand.output(layer)
    assert torch.equal(hand.run(), x[:, start::stride][:, :length])


@quick
@given(parts=st.lists(sizes, min_size=1, max_size=4), axis=st.integers(0, 1))
def test_concatenation_joins_along_its_axis(new_network, parts, axis):
    hand = new_network()
    tensors = [random(*((n, 3) if axis == 0 else (3, n)), seed=i) for i, n in enumerate(parts)]
    layer = hand.net.add_concatenation([hand.constant(f"x{i}", x) for i, x in enumerate(tensors)])
    layer.axis = axis
    hand.output(layer)
    assert torch.equal(hand.run(), torch.cat(tensors, axis))


@quick
@given(rows=sizes, picks=st.lists(st.integers(0, 4), min_size=1, max_size=6))
def test_gather_picks_rows(new_network, rows, picks):
    hand, table = new_network(), random(5, rows)
    hand.output(hand.net.add_gather(hand.constant("t", table), hand.input("i", "int32", (-1, -1)), 0))
    indices = torch.tensor([picks], dtype=torch.int32)
    assert torch.equal(hand.run(i=indices), table[indices.long()])


@quick
@given(batch=sizes, tokens=sizes, picks=sizes)
def test_gather_with_a_leading_batch_picks_for_each_row(new_network, batch, tokens, picks):
    hand, x = new_network(), random(batch, tokens, 3)
    layer = hand.net.add_gather(hand.input("x", "float32", (-1, -1, 3)), hand.input("i", "int32", (-1, -1)), 1)
    layer.num_elementwise_dims = 1
    hand.output(layer)
    indices = torch.arange(batch * picks, dtype=torch.int32).reshape(batch, picks) % tokens
    expected = torch.stack([x[row, indices[row].long()] for row in range(batch)])
    assert torch.equal(hand.run(x=x, i=indices), expected)


@quick
@given(shape=st.tuples(sizes, sizes, sizes), mask=st.integers(1, 7), keep=st.booleans())
@pytest.mark.parametrize(
    ("op", "expected"), [("SUM", torch.sum), ("AVG", torch.mean), ("MAX", torch.amax), ("MIN", torch.amin)]
)
def test_reduce_runs_over_the_axes_of_its_mask(new_network, op, expected, shape, mask, keep):
    hand, x = new_network(), random(*shape)
    operation = getattr(hand.trt.ReduceOperation, op)
    hand.output(hand.net.add_reduce(hand.constant("x", x), operation, mask, keep))
    axes = [axis for axis in range(3) if mask & (1 << axis)]
    torch.testing.assert_close(hand.run(), expected(x, axes, keepdim=keep))


@quick
@given(values=st.lists(st.floats(-300, 300, width=32), min_size=1, max_size=20), scale=st.sampled_from([0.5, 1.0, 2.0]))
def test_int8_rounds_half_to_even_and_saturates(new_network, values, scale):
    hand = new_network()
    s = hand.constant("s", torch.tensor(scale))
    q = hand.net.add_quantize(hand.input("x", "float32", (-1,)), s, hand.trt.int8)
    hand.output(q)
    x = torch.tensor(values)
    expected = [max(-128, min(127, round(float(v) / scale))) for v in x]  # Python rounds half to even as well
    assert hand.run(x=x).tolist() == expected


def test_halves_and_the_ends_of_int8(by_hand):
    q = by_hand.net.add_quantize(
        by_hand.input("x", "float32", (-1,)), by_hand.constant("s", torch.tensor(1.0)), by_hand.trt.int8
    )
    by_hand.output(q)
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 1000.0, -1000.0])
    assert by_hand.run(x=x).tolist() == [0, 2, 2, 0, -2, 127, -128]


def test_fp8_saturates_and_rounds_to_its_own_grid(by_hand):
    s = by_hand.constant("s", torch.tensor(1.0))
    q = by_hand.net.add_quantize(by_hand.input("x", "float32", (-1,)), s, by_hand.trt.fp8)
    by_hand.output(by_hand.net.add_dequantize(q.get_output(0), s, by_hand.trt.float32))
    # E4M3 has 3 bits of mantissa: between 16 and 32 it counts in twos.
    assert by_hand.run(x=torch.tensor([1000.0, -500.0, 17.0, 19.0, 18.0])).tolist() == [448.0, -448.0, 16.0, 20.0, 18.0]


def test_dequantize_by_channel(by_hand):
    q = torch.randint(-128, 128, (3, 4), dtype=torch.int8)
    scale = torch.tensor([0.5, 1.0, 2.0])
    layer = by_hand.net.add_dequantize(by_hand.constant("q", q), by_hand.constant("s", scale), by_hand.trt.float32)
    layer.axis = 0
    by_hand.output(layer)
    assert torch.equal(by_hand.run(), q * scale[:, None])


def test_dequantize_int4_by_block_reads_the_low_nibble_first(by_hand):
    values = torch.tensor([[-8, 7, 1, -1], [2, 3, -4, 0]])
    packed = ((values[:, 0::2] & 15) | ((values[:, 1::2] & 15) << 4)).to(torch.uint8)
    scale = torch.tensor([[1.0, 10.0], [100.0, 0.5]])
    weight = by_hand.constant("q", packed, "int4", (2, 4))
    layer = by_hand.net.add_dequantize(weight, by_hand.constant("s", scale), by_hand.trt.float32)
    layer.block_shape = by_hand.trt.Dims((1, 2))
    by_hand.output(layer)
    assert by_hand.run().tolist() == [[-8, 7, 10, -10], [200, 300, -2, 0]]


@quick
@given(batch=st.integers(1, 3), heads=st.integers(1, 3), tokens=sizes, half=st.integers(1, 4), extra=st.integers(0, 2))
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_turns_each_pair_by_its_angle(new_network, interleaved, batch, heads, tokens, half, extra):
    hand = new_network()
    angles = random(32, half)
    size = 2 * half + 2 * extra  # what lies past the rotary part stays as it is
    x = hand.input("x", "float32", (-1, heads, -1, size))
    cos, sin = hand.constant("cos", angles.cos()), hand.constant("sin", angles.sin())
    layer = hand.net.add_rotary_embedding(x, cos, sin, interleaved, 2 * half)
    layer.set_input(3, hand.input("p", "int64", (-1, -1)))
    hand.output(layer)
    given_x, positions = random(batch, heads, tokens, size, seed=1), torch.randint(0, 32, (batch, tokens))
    first = torch.arange(half) * 2 if interleaved else torch.arange(half)
    second = first + (1 if interleaved else half)
    turned = torch.polar(torch.ones(32, half), angles)[positions][:, None]
    pairs = torch.complex(given_x[..., first], given_x[..., second]) * turned
    expected = given_x.clone()
    expected[..., first], expected[..., second] = pairs.real, pairs.imag
    torch.testing.assert_close(hand.run(x=given_x, p=positions), expected)


def cache_network(hand, capacity=6):
    cache = hand.input("cache", "float32", (-1, 2, capacity, 3))
    update = hand.input("update", "float32", (-1, 2, -1, 3))
    starts = hand.input("starts", "int32", (-1,))
    hand.output(hand.net.add_kv_cache_update(cache, update, starts, hand.trt.KVCacheMode.LINEAR))
    return hand.read()


def test_the_cache_is_written_in_place(by_hand):
    cache, update = torch.zeros(2, 2, 6, 3), random(2, 2, 2, 3)
    result = cache_network(by_hand).run({"cache": cache, "update": update, "starts": torch.tensor([0, 3]).int()})["y"]
    assert result.data_ptr() == cache.data_ptr()
    assert torch.equal(cache[0, :, 0:2], update[0])
    assert torch.equal(cache[1, :, 3:5], update[1])
    assert cache.count_nonzero() == update.count_nonzero()


def test_writes_past_the_capacity_are_dropped(by_hand):
    cache, update = torch.zeros(2, 2, 6, 3), random(2, 2, 2, 3)
    cache_network(by_hand).run({"cache": cache, "update": update, "starts": torch.tensor([5, 9]).int()})
    assert torch.equal(cache[0, :, 5], update[0, :, 0])
    assert not cache[1].any()


@quick
@given(batch=st.integers(1, 2), kv_heads=st.integers(1, 2), groups=st.integers(1, 3), queries=sizes, keys=sizes)
def test_attention_with_a_boolean_mask(new_network, batch, kv_heads, groups, queries, keys):
    hand, heads = new_network(), kv_heads * groups
    q = hand.input("q", "float32", (-1, heads, -1, 4))
    k, v = (hand.input(n, "float32", (-1, kv_heads, -1, 4)) for n in "kv")
    softmax, none = hand.trt.AttentionNormalizationOp.SOFTMAX, hand.trt.CausalMaskKind.NONE
    attention = hand.net.add_attention_v2(q, k, v, softmax, none)
    attention.mask, attention.decomposable = hand.input("m", "bool", (-1, 1, -1, -1)), True
    hand.output(attention)
    mask = random(batch, 1, queries, keys, seed=3) > 0
    mask[..., 0] = True
    tensors = [random(batch, n, t, 4, seed=i) for i, (n, t) in enumerate([(heads, queries)] + [(kv_heads, keys)] * 2)]
    expected = torch.nn.functional.scaled_dot_product_attention(*tensors, attn_mask=mask, scale=1.0, enable_gqa=True)
    torch.testing.assert_close(hand.run(q=tensors[0], k=tensors[1], v=tensors[2], m=mask), expected)


@pytest.mark.parametrize(("kind", "diagonal"), [("UPPER_LEFT", 0), ("LOWER_RIGHT", 2)])
def test_the_two_causal_masks_differ_when_there_is_a_past(by_hand, kind, diagonal):
    q, k, v = (by_hand.input(n, "float32", (-1, 1, -1, 4)) for n in "qkv")
    softmax = by_hand.trt.AttentionNormalizationOp.SOFTMAX
    by_hand.output(by_hand.net.add_attention_v2(q, k, v, softmax, getattr(by_hand.trt.CausalMaskKind, kind)))
    a, b, c = random(1, 1, 3, 4), random(1, 1, 5, 4, seed=1), random(1, 1, 5, 4, seed=2)
    scores = (a @ b.transpose(2, 3)).masked_fill(~torch.ones(3, 5, dtype=torch.bool).tril(diagonal), -torch.inf)
    torch.testing.assert_close(by_hand.run(q=a, k=b, v=c), scores.softmax(-1) @ c)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_low_precision_computes_wide_and_rounds_once(by_hand, dtype):
    kind = getattr(torch, dtype)
    w = random(4, 64).to(kind)
    operation = by_hand.trt.MatrixOperation
    x = by_hand.input("x", dtype, (-1, 64))
    by_hand.output(by_hand.net.add_matrix_multiply(x, operation.NONE, by_hand.constant("w", w), operation.TRANSPOSE))
    a = random(3, 64, seed=1).to(kind)
    assert torch.equal(by_hand.run(x=a), (a.float() @ w.float().T).to(kind))


def test_a_cast_changes_the_type(by_hand):
    by_hand.output(by_hand.net.add_cast(by_hand.input("x", "float32", (-1,)), by_hand.trt.bfloat16))
    x = random(7)
    assert torch.equal(by_hand.run(x=x), x.bfloat16())


@pytest.mark.parametrize(
    ("op", "expected"), [("SQRT", torch.sqrt), ("ABS", torch.abs), ("RECIP", torch.reciprocal), ("EXP", torch.exp)]
)
def test_unary(by_hand, op, expected):
    by_hand.output(by_hand.net.add_unary(by_hand.input("x", "float32", (-1,)), getattr(by_hand.trt.UnaryOperation, op)))
    x = random(9).abs() + 0.1
    torch.testing.assert_close(by_hand.run(x=x), expected(x))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("SIGMOID", torch.sigmoid),
        ("RELU", torch.relu),
        ("GELU_ERF", torch.nn.functional.gelu),
        ("GELU_TANH", lambda x: torch.nn.functional.gelu(x, approximate="tanh")),
    ],
)
def test_activation(by_hand, kind, expected):
    x = by_hand.input("x", "float32", (-1,))
    by_hand.output(by_hand.net.add_activation(x, getattr(by_hand.trt.ActivationType, kind)))
    a = random(9)
    torch.testing.assert_close(by_hand.run(x=a), expected(a))


def test_softmax_select_and_logic(by_hand):
    trt, net = by_hand.trt, by_hand.net
    a, b = by_hand.input("a", "float32", (-1, 4)), by_hand.input("b", "float32", (-1, 4))
    less = net.add_elementwise(a, b, trt.ElementWiseOperation.LESS)
    smaller = net.add_select(less.get_output(0), a, b)
    soft = net.add_softmax(smaller.get_output(0))
    soft.axes = 1 << 1
    by_hand.output(soft)
    x, y = random(3, 4), random(3, 4, seed=1)
    torch.testing.assert_close(by_hand.run(a=x, b=y), torch.minimum(x, y).softmax(1))
