"""The op set for a CPU: NumPy arrays, and compiled loops where a step of generation spends its time.

Steps of few tokens read the weights as they are stored (``cpu_weights``); steps of many use torch's product, on weights
that are widened for it. Products and sums are float32 in both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trtlab.errors import ConfigError
from trtlab.model.op_set import Ops
from trtlab.model.weights import Embedding, LayerNorm, ModelWeights, Norm, map_linears
from trtlab.ops.cpu.weights import Array, Gain, Looped, array_of
from trtlab.ops.paged import BlockTables, Gathered, NewTokens, PagedCache
from trtlab.ops.quantized_linear import linear
from trtlab.ops.torch import ACTIVATIONS
from trtlab.parallel.comm import Comm, Solo
from trtlab.parallel.step_inputs import Chunk
from trtlab.progress import progress


def loops_on_torchs_threads() -> ModuleType:
    """The module of loops, on torch's number of threads: both use OpenMP, and Numba changes the number at start."""
    from trtlab.ops.cpu import loops as cpu_loops

    threads = torch.get_num_threads()
    cpu_loops.run_on(threads)
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    return cpu_loops


class CpuPool:
    """One rank's paged cache in the form that the loops read: arrays and scales of each layer, made once."""

    def __init__(self, cache: PagedCache) -> None:
        self.cache = cache
        self.layers = [(array_of(keys), array_of(values)) for keys, values in cache.layers]
        heads = len(cache.layers[0][0])
        ones = np.ones(heads, np.float32)
        self.scales = [(ones, ones)] * len(self.layers)
        if cache.scales:
            self.scales = [(_by_head(s.keys.value, heads), _by_head(s.values.value, heads)) for s in cache.scales]


def _by_head(scale: Tensor, heads: int) -> Array:
    return scale.float().expand(heads).contiguous().numpy()


class CpuBatch:
    """The tokens of a step as arrays: chunks of a single new token come first, then the longer ones."""

    def __init__(self, chunks: Sequence[Chunk], tables: BlockTables) -> None:
        lengths = [len(chunk.token_ids) for chunk in chunks]
        self.singles = lengths.count(1)
        assert lengths[: self.singles] == [1] * self.singles, f"single tokens must come first, got lengths {lengths}"
        short, longer = chunks[: self.singles], chunks[self.singles :]
        self.tables = tables.array
        self.slots = np.array([chunk.slot for chunk in short], np.int32)  # [tokens]
        self.positions = np.array([chunk.past for chunk in short], np.int32)  # [tokens]
        self.token_ids = np.array([token for chunk in chunks for token in chunk.token_ids])
        self.longer: list[Gathered] = []
        self.last: Array | None = None  # [sequences]: the row of each request's last token, if not every row is one
        for slot, past, token_ids, _ in longer:
            own = np.arange(past, past + len(token_ids), dtype=np.int32)
            self.positions = np.concatenate([self.positions, own])
            self.slots = np.concatenate([self.slots, np.full(len(own), slot, np.int32)])
            self.longer.append(Gathered([NewTokens(slot, past, len(own))], tables, torch.from_numpy(own)))
        if longer:
            self.last = np.cumsum(lengths) - 1


class CpuOps(Ops[Array]):
    """The verbs on arrays, in float32, over one batch; the rotary tables come from ``trtlab.ops.torch.spread``."""

    def __init__(
        self, batch: CpuBatch, pool: CpuPool, rotary: tuple[Array, Array], comm: Comm, *, every_token: bool = False
    ) -> None:
        self._batch = batch
        self._pool = pool
        self._cos, self._sin = rotary
        self._comm = comm
        self._every_token = every_token
        self._loops = loops_on_torchs_threads()

    def embedding(self, tokens: Array, weight: Embedding) -> Array:
        rows = torch.from_numpy(tokens if weight.first_row is None else tokens - weight.first_row)
        if weight.first_row is None:
            return weight.weight[rows].float().numpy()
        inside = (rows >= 0) & (rows < len(weight.weight))  # the other rows are on other ranks
        return (weight.weight[rows * inside].float() * inside[:, None]).numpy()

    def position_embedding(self, tokens: Array, weight: Embedding) -> Array:
        return weight.weight[torch.from_numpy(self._batch.positions)].float().numpy()

    def rms_norm(self, x: Array, weight: Norm) -> Array:
        gain = weight.array if isinstance(weight, Gain) else weight.weight.float().numpy()
        rows = np.ascontiguousarray(x).reshape(-1, x.shape[-1])
        out = np.empty_like(rows)
        self._loops.rms_norm(rows, gain, weight.epsilon, out)
        return out.reshape(x.shape)

    def layer_norm(self, x: Array, weight: LayerNorm) -> Array:
        gain, bias = weight.weight.float(), weight.bias.float()
        return F.layer_norm(torch.from_numpy(x), x.shape[-1:], gain, bias, weight.epsilon).numpy()

    def linear(self, x: Array, weight: object) -> Array:
        if isinstance(weight, Looped) and len(x) <= weight.few:
            return weight(x)
        return linear(weight, torch.from_numpy(x)).numpy()

    def split_heads(self, qkv: Array, heads: int, kv_heads: int) -> tuple[Array, Array, Array]:
        rows = qkv.reshape(len(qkv), heads + 2 * kv_heads, -1)  # [tokens, heads + 2 kv_heads, head_size]
        return rows[:, :heads], rows[:, heads : heads + kv_heads], rows[:, heads + kv_heads :]

    def rotary(self, q: Array, k: Array) -> tuple[Array, Array]:
        return self._rotated(q), self._rotated(k)

    def _rotated(self, x: Array) -> Array:
        out = np.empty(x.shape, np.float32)
        self._loops.rotate(np.ascontiguousarray(x), self._cos, self._sin, self._batch.positions, out)
        return out

    def attention(self, layer: int, q: Array, k: Array, v: Array) -> Array:
        # Single tokens read their blocks in place; longer chunks use torch's attention.
        batch, (keys, values) = self._batch, self._pool.layers[layer]
        for pool, new in zip((keys, values), self._stored(layer, k, v), strict=True):
            self._loops.store(pool, batch.tables, batch.slots, batch.positions, np.ascontiguousarray(new))
        out = np.empty(q.shape, np.float32)
        start = batch.singles
        if start:
            scales = self._pool.scales[layer]
            self._loops.attend(
                q[:start], keys, values, *scales, batch.tables, batch.slots, batch.positions, out[:start]
            )
        for part in batch.longer:
            rows = slice(start, start + part.tokens)
            mixed = part.attend(self._pool.cache, layer, torch.from_numpy(q[rows]))
            out[rows] = mixed.numpy().reshape(out[rows].shape)
            start = rows.stop
        return out.reshape(len(q), -1)

    def _stored(self, layer: int, k: Array, v: Array) -> tuple[Array, Array]:
        cache = self._pool.cache
        if not cache.scales:
            return k, v
        keys, values = cache.encoded(layer, torch.from_numpy(k), torch.from_numpy(v))
        return array_of(keys), array_of(values)

    def activation(self, kind: str, x: Array) -> Array:
        if kind == "silu":
            out = np.empty_like(x)
            self._loops.silu(x, out)
            return out
        if kind not in ACTIVATIONS:
            raise ConfigError("unknown activation", got=repr(kind), expected=" | ".join(ACTIVATIONS))
        return ACTIVATIONS[kind](torch.from_numpy(x)).numpy()

    def multiply(self, a: Array, b: Array) -> Array:
        return a * b

    def add(self, a: Array, b: Array) -> Array:
        return a + b

    def all_reduce(self, x: Array) -> Array:
        return x if isinstance(self._comm, Solo) else self._comm.all_reduce(torch.from_numpy(x)).numpy()

    def all_gather(self, x: Array) -> Array:
        return x if isinstance(self._comm, Solo) else self._comm.all_gather(torch.from_numpy(x)).numpy()

    def receive(self, tokens: Array, hidden_size: int) -> Array:
        return self._comm.receive().numpy()

    def send(self, x: Array) -> Array:
        self._comm.send(torch.from_numpy(x))
        return x

    def last_tokens(self, x: Array) -> Array:
        return x if self._every_token or self._batch.last is None else x[self._batch.last]

    def logits(self, x: Array, vocab_size: int) -> Array:
        return x[..., :vocab_size]


def compile_loops(weights: ModelWeights, pool: CpuPool) -> None:
    """Call each loop of this model's steps once, on a token of zeros, so that no step waits for the compiler."""
    cpu_loops = loops_on_torchs_threads()

    def zeros(kind: Any, *shape: int) -> Array:
        return np.zeros(shape, kind)

    x, one, place = zeros(np.float32, 1, 8), zeros(np.float32, 1), zeros(np.int32, 1)
    heads, row, table = x[None], zeros(np.float32, 1, 8), zeros(np.int32, 1, 1)
    block = zeros(pool.layers[0][0].dtype, 1, 1, 1, 8)
    calls: dict[object, tuple[Callable[..., object], tuple[Any, ...]]] = {
        "norm": (cpu_loops.rms_norm, (x, row[0], 1e-5, row)),
        "silu": (cpu_loops.silu, (x, row)),
        "rotary": (cpu_loops.rotate, (heads, x, x, place, row[None])),
        "store": (cpu_loops.store, (block, table, place, place, block[0])),
        "attend": (cpu_loops.attend, (heads, block, block, one, one, table, place, place, row[None])),
    }

    def add_call(weight: object) -> object:
        if isinstance(weight, Looped):
            calls[weight.loop, weight.arrays[0].dtype] = weight, (zeros(np.float32, 1, weight.shape[1]),)
            if weight.widen is not None:
                first = [array[:1] for array in weight.arrays]
                calls[weight.widen] = weight.widen, (*first, zeros(np.float32, 1, weight.shape[1]))
        return weight

    map_linears(weights, add_call)
    with progress("loops of this CPU, compiled once", len(calls), unit="loop") as bar:
        for loop, arguments in calls.values():
            loop(*arguments)
            bar.update(1)
