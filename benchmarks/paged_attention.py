"""Decoding with paged attention against torch's SDPA on contiguous K and V, and against copying, in one run on CUDA.

python benchmarks/paged_attention.py [--tokens 1024 8192 32768 131072] [--batch 1 16] [--block 32] [--sweep]

Llama 3 8B's attention (32 heads on 8 of K and V, head size 128, bfloat16), one new token a sequence, blocks shuffled.
The calls use the pools of several layers in turn, at least 512 MB of K and V, so that they do not fit the L2 cache.
"graph" is a replayed CUDA graph of the calls, "call" the same calls from Python with their launches; both are medians
for one call. GB/s counts each byte of K and V once, "copy" is bytes read plus bytes written by a device-to-device copy.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from trtlab.ops.cuda.launch_shape import LaunchShape, launch_shape, split_count
from trtlab.ops.cuda.paged_attention import paged_attention

HEADS, KV_HEADS, HEAD_SIZE = 32, 8, 128
BEYOND_CACHE = 512 * 10**6  # bytes
Call = Callable[[int], Tensor]


@dataclass(frozen=True)
class Setting:
    """K and V of several layers, stored twice: contiguous ``[batch, kv_heads, tokens, head_size]``, and in pools."""

    tokens: int
    batch: int
    q: Tensor  # [batch, heads, head_size]
    contiguous: list[tuple[Tensor, Tensor]]
    pools: list[tuple[Tensor, Tensor]]
    tables: list[Tensor]
    pasts: Tensor
    starts: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of K and V that one call must read."""
        return 2 * self.contiguous[0][0].nbytes  # K and V

    def paged(self, layer: int, plan: LaunchShape | None = None) -> Tensor:
        """trtlab's kernel on one layer, ``[batch, heads * head_size]``."""
        keys, values = self.pools[layer]
        return paged_attention(
            *(self.q, keys, values, self.tables[layer], self.pasts, self.starts), longest=self.tokens, most=1, plan=plan
        )

    def sdpa(self, layer: int) -> Tensor:
        """Torch's attention on the same numbers, ``[batch, heads * head_size]``."""
        mixed = scaled_dot_product_attention(self.q.unsqueeze(2), *self.contiguous[layer], enable_gqa=True)
        return mixed.flatten(1)


def setting(tokens: int, batch: int, block: int) -> Setting:
    """Random K and V for enough layers to exceed the L2 cache, and the same in blocks in shuffled order."""
    shape = (batch, KV_HEADS, tokens, HEAD_SIZE)
    layers = -(-BEYOND_CACHE // (2 * batch * KV_HEADS * tokens * HEAD_SIZE * 2))  # K and V, bytes of bfloat16
    contiguous = [(normal(*shape), normal(*shape)) for _ in range(layers)]
    orders = [torch.randperm(batch * tokens // block, device="cuda") for _ in range(layers)]
    pools = [(paged(k, block, order), paged(v, block, order)) for (k, v), order in zip(contiguous, orders, strict=True)]
    tables = [order.int().view(batch, tokens // block) for order in orders]
    pasts = torch.full((batch,), tokens - 1, dtype=torch.int32, device="cuda")
    starts = torch.arange(batch + 1, dtype=torch.int32, device="cuda")
    return Setting(tokens, batch, normal(batch, HEADS, HEAD_SIZE), contiguous, pools, tables, pasts, starts)


def normal(*shape: int) -> Tensor:
    """Normally distributed bfloat16 numbers on the device."""
    return torch.randn(shape, dtype=torch.bfloat16, device="cuda")


def paged(contiguous: Tensor, block: int, order: Tensor) -> Tensor:
    """``[batch, kv_heads, tokens, head_size]`` to a pool whose block ``order[i]`` holds the i-th ``block`` tokens."""
    blocks = contiguous.transpose(0, 1).reshape(KV_HEADS, -1, block, HEAD_SIZE)
    pool = torch.empty_like(blocks)
    pool[:, order] = blocks
    return pool


def seconds(run: Callable[[], object], calls: int, repeats: int = 7) -> float:
    """The median seconds of one call when ``run`` makes ``calls`` of them, by CUDA events after two warm-ups."""
    times = []
    for _ in range(repeats + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(float(start.elapsed_time(end)) / 1e3 / calls)
    return statistics.median(times[2:])


def both_ways(call: Call, layers: int) -> tuple[float, float]:
    """Seconds of one call in a replayed graph and from Python, over all layers in turn, at least eight calls."""
    order = [i % layers for i in range(max(8, layers))]
    call(0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in order:
            call(layer)
    return seconds(graph.replay, len(order)), seconds(lambda: [call(layer) for layer in order], len(order))


def copy_rate(nbytes: int = 2**32) -> float:
    """Bytes read plus bytes written per second by a large copy on the device."""
    source, target = (torch.ones(nbytes, dtype=torch.uint8, device="cuda") for _ in range(2))
    return 2 * nbytes / seconds(lambda: target.copy_(source), 1)


def sweep(case: Setting) -> None:
    """Print the times of other launch shapes for this setting, fastest first."""
    keys = case.pools[0][0]
    times: list[tuple[float, LaunchShape]] = []
    chosen = launch_shape(case.q, keys, case.batch, case.tokens, 1)
    for rows, tile, warps, stages, resident in product((4, 16), (32, 64, 128), (4, 8), (3, 4), (1, 2, 3, 4)):
        if 2 * tile * HEAD_SIZE * keys.element_size() * (stages - 1) * resident > 200_000:
            continue
        slots = resident * torch.cuda.get_device_properties(0).multi_processor_count
        splits = split_count(case.batch * KV_HEADS, case.tokens // tile, slots)
        plan = replace(chosen, rows=rows, tile=tile, splits=splits, warps=warps, stages=stages)
        times.append((both_ways(partial(case.paged, plan=plan), len(case.pools))[0], plan))
    print(f"{case.tokens} tokens, batch {case.batch}; the choice is {chosen}")
    for time, plan in sorted(times, key=lambda pair: pair[0])[:8]:
        print(f"  {time * 1e6:9.1f} us  {case.nbytes / time / 1e9:6.0f} GB/s  {plan}")


def main() -> None:
    """Print one line for each length and batch size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 8192, 32768, 131072])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--block", type=int, default=32, help="tokens a block")
    parser.add_argument("--sweep", action="store_true", help="also time other launch shapes")
    options = parser.parse_args()
    torch.manual_seed(0)
    copy = copy_rate()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {options.block} tokens a block")
    print(f"copy: {copy / 1e9:.0f} GB/s read and written")
    print("| tokens | batch | us paged, graph | call | us SDPA, graph | call | GB/s | of copy | max difference |")
    print("|---|---|---|---|---|---|---|---|---|")
    for batch, tokens in product(options.batch, options.tokens):
        case = setting(tokens, batch, options.block)
        difference = max(
            (case.paged(i).float() - case.sdpa(i).float()).abs().max().item() for i in range(min(4, len(case.pools)))
        )
        ours, theirs = both_ways(case.paged, len(case.pools)), both_ways(case.sdpa, len(case.pools))
        rate = case.nbytes / ours[0]
        times = " | ".join(f"{time * 1e6:.1f}" for time in (*ours, *theirs))
        print(f"| {tokens} | {batch} | {times} | {rate / 1e9:.0f} | {rate / copy:.0%} | {difference:.1g} |", flush=True)
        if options.sweep:
            sweep(case)
        del case
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
