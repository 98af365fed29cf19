"""Computes each kind of layer with torch. Knows TensorRT's documentation, and does not need its module.

Floating-point layers compute in float32 and round once to the type of their output. TensorRT accumulates the same way,
but may round more often inside a fused kernel, so FP16 and BF16 results agree only within a tolerance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from trtlab.errors import EngineError
from trtlab.parallel.comm import Comm
from trtlab.tensorrt import dtypes
from trtlab.tensorrt.read.readback import NetworkLayer

Inputs = Sequence[torch.Tensor | None]


Kernel = Callable[[NetworkLayer, Inputs, Comm | None], torch.Tensor]


def compute(layer: NetworkLayer, inputs: Inputs, comm: Comm | None) -> torch.Tensor:
    """The output of one layer, in the type that TensorRT inferred for it."""
    if layer.kind not in KERNELS:
        raise EngineError(
            f"layer {layer.name!r} is a {layer.kind}, which the interpreter cannot run",
            remedy="add it to KERNELS in trtlab/tensorrt/read/kernels.py",
        )
    output = KERNELS[layer.kind](layer, inputs, comm)
    dtype = dtypes.to_torch(layer.precision)
    return output if output.dtype == dtype else output.to(dtype)


def only(inputs: Inputs, index: int = 0) -> torch.Tensor:
    """A required input of the layer."""
    tensor = inputs[index]
    assert tensor is not None, f"required input {index} is not set"
    return tensor


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """A floating-point tensor in float32; any other tensor unchanged."""
    return tensor.float() if tensor.is_floating_point() else tensor


def axes_of(mask: int, rank: int) -> list[int]:
    """The axes whose bit is set in TensorRT's axis mask."""
    return [axis for axis in range(rank) if mask >> axis & 1]


def unsupported(layer: NetworkLayer, attribute: str) -> EngineError:
    """The error for a parameter that the interpreter does not implement."""
    return EngineError(
        f"layer {layer.name!r}: {layer.kind} with {attribute}={layer.attributes[attribute]} has no kernel"
    )


def constant(layer: NetworkLayer, inputs: Inputs, comm: Comm | None) -> torch.Tensor:
    """The layer's stored numbers."""
    assert layer.value is not None, f"constant {layer.name} was read without its numbers"
    return layer.value


def identity(layer: NetworkLayer, inputs: Inputs, comm: Comm | None) -> torch.Tensor:
    """The input. ``compute`` changes the type for a cast; an attention is computed at its first layer."""
    return only(inputs)


ELEMENTWISE: Mapping[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "sum": torch.add,
    "sub": torch.sub,
    "prod": torch.mul,
    "div": torch.div,
    "max": torch.maximum,
    "min": torch.minimum,
    "pow": torch.pow,
    "and": torch.logical_and,
    "or": torch.logical_or,
    "equal": torch.eq,
    "greater": torch.gt,
    "less": torch.lt,
}


def elementwise(layer: NetworkLayer, inputs: Inputs, comm: Comm | None) -> torch.Tensor:
    """An operation on two tensors of the same rank; axes of size 1 are broadcast."""
    if layer.attributes["op"] not in ELEMENTWISE:
        raise unsupported(layer, "op")
    return ELEMENTWISE[layer.attributes["op"]](wide(only(inputs)), wide(only(inputs, 1)))


UNARY: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "abs": torch.abs,
    "exp": torch.exp,
    "log": torch.log,
    "neg": torch.neg,
    "not": torch.logical_not,
    "recip": torch.reciprocal,
    "round": torch.round,  # half to even
    "sqrt": torch.sqrt,
}


def unary(layer: NetworkLayer, inputs: Inputs, comm: Comm | None) -> torch.Tensor:
    """A function of each element."""
    if layer.attributes["op"] not in UNARY:
        raise unsupported(layer, "op")
    return UNARY[layer.attributes["op"]](wide(only(inputs)))


ACTIVATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "gelu_erf": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
}


def activation(layer: NetworkLayer, inputs: Inputs, comm: Comm | None) -> torch.Tensor:
    """An activation function of each element."""
    if layer.attributes["type"] not in ACTIVATIONS:
        raise unsupported(layer, "type")
    return ACTIVATIONS[layer.attributes["type"]](wide(only(inputs)))


def softmax(layer: NetworkLayer, inputs: Inputs, comm: Comm | None) -> torch.Tensor:
    """Softmax over the only axis in the layer's axis mask."""
    x = wide(only(inputs))
    (axis,) = axes_of(layer.attributes["axes"], x.dim())
    return torch.softmax(x, dim=axis)


REDUCTIONS: Mapping[str, Callable[[torch.Tensor, list[int], bool], torch.Tensor]] = {
    "sum": lambda x, axes, keep: x.sum(axes, keepdim=keep),
    "avg": lambda x, axes, keep: x.mean(axes, keepdim=keep),
    "max": lambda x, axes, keep: x.amax(axes, keepdim=keep),
    "min": lambda x, axes, keep: x.amin(axes, keepdim=keep),
}


def reduce(layer: NetworkLayer, inputs: Inputs, comm: Comm | None) -> torch.Tensor:
    """A reduction over the axes in the layer's axis mask, which keep size 1 or are dropped."""
    if layer.attributes["op"] not in REDUCTIONS:
        raise unsupported(layer, "op")
    x = wide(only(inputs))
    axes = axes_of(layer.attributes["axes"], x.dim())
    return REDUCTIONS[layer.attributes["op"]](x, axes, layer.attributes["keep_dims"])


def matrix_multiply(layer: NetworkLayer, inputs: Inputs, comm: Comm | None) -> torch.Tensor:
    """The matrix product over the last two axes; each operand may be transposed, and leading axes are broadcast."""
    operands = []
    for index in (0, 1):
        operand, operation = wide(only(inputs, index)), layer.attributes[f"op{index}"]
        if operation not in ("none", "transpose"):
            raise unsupported(layer, f"op{index}")
        operands.append(operand.transpose(-2, -1) if operation == "transpose" else operand)
    return operands[0] @ operands[1]


def shuffle(layer: NetworkLayer, inputs: Inputs, comm: Comm | None) -> torch.Tensor:
    """A transpose, a reshape in which 0 copies a size and -1 is inferred, and a second transpose."""
    x = only(inputs).permute(layer.attributes["first_transpose"])
    dims = layer.attributes["reshape_dims"]
    if dims is not None:
        if layer.attributes["zero_is_placeholder"]:
            dims = [x.shape[axis] if size == 0 else size for axis, size in enumerate(dims)]
        x = x.reshape(dims)
    return x.permute(layer.attributes["second_transpose"])


def slice_(layer: NetworkLayer, inputs: Inputs, comm: Comm | None) -> torch.Tensor:
    """A start, a size and a stride for each axis in ``axes``; for all axes if it is empty."""
    if layer.attributes["mode"] != "strict_bounds":
        raise unsupported(layer, "mode")
    x = only(inputs)
    starts, sizes, strides = (layer.attributes[key] for key in ("start", "shape", "stride"))
    axes = layer.attributes["axes"] or range(len(starts))
    for axis, start, size, stride in zip(axes, starts, sizes, strides, strict=True):
        x = x.index_select(axis, start + stride * torch.arange(size, device=x.device))
    return x


def concatenation(layer: NetworkLayer, inputs: Inputs, comm: Comm | None) -> torch.Tensor:
    """The inputs concatenated along one axis."""
    return torch.cat([only(inputs, i) for i in range(len(inputs))], dim=layer.attributes["axis"])


def select(layer: NetworkLayer, inputs: Inputs, comm: Comm | None) -> torch.Tensor:
    """The second input where the first is True, the third elsewhere."""
    return torch.where(only(inputs), only(inputs, 1), only(inputs, 2))


def gather(layer: NetworkLayer, inputs: Inputs, comm: Comm | None) -> torch.Tensor:
    """Slices of the data along one axis; with leading elementwise axes, each row has its own indices."""
    if layer.attributes["mode"] != "default":
        raise unsupported(layer, "mode")
    data, indices = only(inputs), only(inputs, 1).long()
    axis, batch = layer.attributes["axis"], layer.attributes["num_elementwise_dims"]
    if batch == 0:
        flat = data.index_select(axis, indices.reshape(-1))
        return flat.reshape(*data.shape[:axis], *indices.shape, *data.shape[axis + 1 :])
    # One row of indices for each leading row of the data.
    where = indices.reshape(*indices.shape[:batch], *[1] * (axis - batch), -1, *[1] * (data.dim() - axis - 1))
    where = where.expand(*data.shape[:axis], -1, *data.shape[axis + 1 :])
    picked = torch.gather(data, axis, where)
    return picked.reshape(*data.shape[:axis], *indices.shape[batch:], *data.shape[axis + 1 :])


def expanded_scale(layer: NetworkLayer, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """A scale that broadcasts against ``x``: one for all, one per index of ``axis``, or one per block."""
    if scale.numel() == 1:
        return scale.float().reshape(())
    if scale.dim() == 1:
        axis = layer.attributes["axis"]
        return scale.float().reshape([-1 if i == axis else 1 for i in range(x.dim())])
    scale = scale.float()
    for axis, (size, blocks) in enumerate(zip(x.shape, scale.shape, strict=True)):
        scale = scale.repeat_interleave(size // blocks, dim=axis)
    return scale


# The range to which a value saturates, by the type it is quantized to.
RANGES = {"int8": (-128.0, 127.0), "int4": (-8.0, 7.0), "float8_e4m3fn": (-448.0, 448.0)}


def quantize(layer: NetworkLayer, inputs: Inputs, comm: Comm | None) -> torch.Tensor:
    """``x / scale``, rounded half to even (FP8: to its own grid) and saturated."""
    x = wide(only(inputs))
    scaled = x / expanded_scale(layer, x, only(inputs, 1))
    if layer.precision != "float8_e4m3fn":
        scaled = torch.round(scaled)  # half to even
    return scaled.clamp(*RANGES[layer.precision])


def dequantize(layer: NetworkLayer, inputs: Inputs, comm: Comm | None) -> torch.Tensor:
    """``q * scale``."""
    x = only(inputs).float()
    return x * expanded_scale(layer, x, only(inputs, 1))


def rotary_embedding(layer: NetworkLayer, inputs: Inputs, comm: Comm | None) -> torch.Tensor:
    """Pairs (i, i + half), or neighbours when interleaved, rotated by the angles of their positions."""
    x = wide(only(inputs))  # [batch, heads, tokens, head]
    cos, sin = wide(only(inputs, 1)), wide(only(inputs, 2))
    if len(inputs) > 3 and inputs[3] is not None:
        positions = only(inputs, 3).long()  # [batch, tokens]
        cos, sin = cos[positions], sin[positions]  # [batch, tokens, rotary / 2]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    rotary = layer.attributes["rotary_embedding_dim"] or x.shape[-1]
    pairs, rest = x[..., :rotary], x[..., rotary:]
    if layer.attributes["interleaved"]:
        first, second = pairs[..., 0::2], pairs[..., 1::2]
    else:
        first, second = pairs.chunk(2, dim=-1)
    parts = (first * cos - second * sin, second * cos + first * sin)
    rotated = torch.stack(parts, -1).flatten(-2) if layer.attributes["interleaved"] else torch.cat(parts, -1)
    return torch.cat((rotated, rest), dim=-1)


def kv_cache_update(layer: NetworkLayer, inputs: Inputs, comm: Comm | None) -> torch.Tensor:
    """Write into the bound cache and return it; a token past the capacity is dropped, as in TensorRT."""
    if layer.attributes["update_form"] != "padded_bhnd":
        raise unsupported(layer, "update_form")
    cache, update, starts = only(inputs), only(inputs, 1), only(inputs, 2)
    if cache.is_meta:
        return cache
    capacity, tokens = cache.shape[2], update.shape[2]
    for row, start in enumerate(starts.tolist()):
        count = max(0, min(tokens, capacity - start))
        cache[row, :, start : start + count] = update[row, :, :count]
    return cache


def attention(layer: NetworkLayer, inputs: Inputs, comm: Comm | None) -> torch.Tensor:
    """``softmax(Q Kᵀ) V``. The layer has no scale, so Q is scaled already; True in a boolean mask means attend."""
    if layer.attributes["query_form"] != "padded_bhnd":
        raise unsupported(layer, "query_form")
    query, key, value = (wide(only(inputs, i)) for i in range(3))
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))  # [batch, heads, keys, head]
    scores = query @ key.transpose(-2, -1)  # [batch, heads, queries, keys]
    causal = layer.attributes["causal_kind"]
    if causal != "none":
        diagonal = scores.shape[-1] - scores.shape[-2] if causal == "lower_right" else 0
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(diagonal), -torch.inf)
    if layer.attributes["mask"] is not None:
        mask = only(inputs, 3)
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + wide(mask)
    if layer.attributes["norm_op"] == "softmax":
        scores = torch.softmax(scores, dim=-1)
    return scores @ value


def dist_collective(layer: NetworkLayer, inputs: Inputs, comm: Comm | None) -> torch.Tensor:
    """A sum over ranks, or the ranks' tensors concatenated along the first axis."""
    x, operation = only(inputs), layer.attributes["operation"]
    if x.is_meta:  # only the shape is wanted, for a table
        return torch.cat([x] * layer.attributes["num_ranks"]) if operation == "all_gather" else x
    if comm is None:
        raise EngineError(
            f"layer {layer.name!r} exchanges tensors with the other ranks",
            got="one rank alone",
            remedy="run every rank's network with its comm: network.run(inputs, comm=comm)",
        )
    if operation == "all_gather":
        return comm.all_gather(x.movedim(0, -1)).movedim(-1, 0)  # Comm concatenates last axes, TensorRT first ones
    if (operation, layer.attributes["reduce"]) != ("all_reduce", "sum"):
        raise unsupported(layer, "operation")
    return comm.all_reduce(x)


KERNELS: Mapping[str, Kernel] = {
    "activation": activation,
    "attention_input": attention,
    "attention_output": identity,
    "cast": identity,  # compute() rounds to the output's type
    "concatenation": concatenation,
    "constant": constant,
    "dequantize": dequantize,
    "dist_collective": dist_collective,
    "elementwise": elementwise,
    "gather": gather,
    "identity": identity,
    "kv_cache_update": kv_cache_update,
    "matrix_multiply": matrix_multiply,
    "quantize": quantize,
    "reduce": reduce,
    "rotary_embedding": rotary_embedding,
    "select": select,
    "shuffle": shuffle,
    "slice": slice_,
    "softmax": softmax,
    "unary": unary,
}
