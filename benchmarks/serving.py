"""In-flight against static batching, prefix reuse, and the time of a step outside the model.

python benchmarks/serving.py [--requests 48] [--runs 3] [--device cpu|cuda] [--dtype float32]
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from statistics import median

import torch
from torch import Tensor

import trtlab
from trtlab import tiny
from trtlab.ops.cpu.ops import CpuBatch
from trtlab.ops.paged import PackedBatch
from trtlab.parallel.comm import Comm
from trtlab.runtime.loop import Loop
from trtlab.runtime.request_state import RequestState
from trtlab.runtime.torch_backend import torch_backend


def long_tailed(count: int, seed: int) -> list[tuple[int, int]]:
    """(prompt, answer) lengths in tokens, log-normal as in real traffic: most are short, a few are very long."""
    source = random.Random(seed)

    def draw(typical: float, spread_: float, largest: int) -> int:
        return max(1, min(largest, round(typical * source.lognormvariate(0, spread_))))

    return [(draw(24, 0.8, 256), draw(16, 1.2, 384)) for _ in range(count)]


def serve(engine: trtlab.Engine, batching: str, lengths: Sequence[tuple[int, int]], device: str) -> dict[str, float]:
    """Run all requests with one batching type; returns tokens per second, steps, and mean waiting time in steps."""
    source = random.Random(1)
    config = trtlab.SessionConfig(batching_type=batching, enable_block_reuse=False)
    with engine.session(config, device=device) as session:
        session.generate([1, 2, 3])
        begun = len(session.events)
        start = time.perf_counter()
        for prompt, answer in lengths:
            ids = [source.randrange(3, engine.config.vocab_size) for _ in range(prompt)]
            session.submit(ids, trtlab.SamplingParams(max_new_tokens=answer, ignore_eos=True))
        events = session.run()
        seconds = time.perf_counter() - start
        joined = [event.step - begun for event in events for _ in event.admitted]
    generated = sum(event.generated for event in events)
    return {
        "tokens_per_s": generated / seconds,
        "steps": len(events),
        "running": sum(len(event.work) for event in events) / len(events),
        "waited_steps": sum(joined) / len(joined),
    }


def batching(engine: trtlab.Engine, requests: int, runs: int, device: str) -> None:
    """Compare in-flight with static batching on the same long-tailed requests, in turn."""
    lengths = long_tailed(requests, seed=0)
    rounds = [
        (serve(engine, "INFLIGHT", lengths, device), serve(engine, "STATIC", lengths, device)) for _ in range(runs)
    ]
    print(f"\n{requests} requests, answers of {min(n for _, n in lengths)} to {max(n for _, n in lengths)} tokens")
    for name, index in (("in-flight", 0), ("static", 1)):
        last = rounds[-1][index]
        rate = median(pair[index]["tokens_per_s"] for pair in rounds)
        print(
            f"  {name:9} {rate:8.0f} tokens/s {last['steps']:6.0f} steps {last['running']:5.1f} running "
            f"{last['waited_steps']:6.0f} steps waited on average"
        )
    ratio = median(ours["tokens_per_s"] / theirs["tokens_per_s"] for ours, theirs in rounds)
    print(f"  throughput, in-flight over static: {ratio:.2f}")


def first_token(session: trtlab.Session, ids: list[int]) -> float:
    """Seconds to the first token."""
    start = time.perf_counter()
    session.generate(ids, trtlab.SamplingParams(max_new_tokens=1, ignore_eos=True))
    return time.perf_counter() - start


def prefix_reuse(engine: trtlab.Engine, runs: int, device: str, shared: int = 2048, own: int = 16) -> None:
    """Time to the first token of prompts with the same beginning, computed and reused."""
    source = random.Random(2)
    draw = lambda count: [source.randrange(3, engine.config.vocab_size) for _ in range(count)]  # noqa: E731
    with engine.session(device=device) as session:
        first_token(session, draw(64))
        fresh, reused = [], []
        for _ in range(runs):
            session.kv_cache.clear()
            prefix = draw(shared)
            fresh.append(first_token(session, prefix + draw(own)))
            reused.append(first_token(session, prefix + draw(own)))
    ratio = median(a / b for a, b in zip(fresh, reused, strict=True))
    print(f"\ntime to first token, {shared} shared tokens and {own} that differ")
    print(f"  fresh {median(fresh) * 1e3:.1f} ms, reused {median(reused) * 1e3:.1f} ms: {ratio:.1f} times sooner")


def overhead(checkpoint: trtlab.Checkpoint, running: int, steps: int = 400) -> float:
    """Microseconds of a generation step outside the model: the median over ``steps``."""
    build = trtlab.BuildConfig(max_batch_size=running, max_num_tokens=max(2048, running), max_seq_len=2048)
    engine = checkpoint.build(build, plan=False)
    backend = torch_backend(
        engine.config, engine.build_config, engine.mapping, [engine.weights(0)], torch.device("cpu")
    )
    logits = torch.randn(running, engine.config.vocab_size)

    def forward(batch: CpuBatch | PackedBatch, comm: Comm, every_token: bool) -> Tensor:
        """Constant logits in place of a model; only the step's inputs are prepared."""
        return logits[: len(batch.token_ids if batch.last is None else batch.last)]

    vars(backend.ranks.ranks[0])["forward"] = forward
    loop = Loop(backend, engine.build_config, trtlab.SessionConfig(enable_block_reuse=True))
    for number in range(1, running + 1):
        params = trtlab.SamplingParams(max_new_tokens=steps + 200, ignore_eos=True)
        loop.submit(RequestState(number, tuple(range(3, 35)), params))
    while any(not request.generates for request in loop.scheduler.running) or loop.scheduler.waiting:
        loop.step()
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        loop.step()
        times.append(time.perf_counter() - start)
    return median(times) * 1e6


def main() -> None:
    """Run all three on the tiny model of trtlab."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    checkpoint = trtlab.Checkpoint.from_hugging_face(tiny.llama_dir())
    print("a step takes outside the model (scheduler, blocks, inputs, sampling)")
    for running in (1, 8, 64, 256):
        print(f"  {running:4} running: {overhead(checkpoint, running):7.0f} us")
    bounds = trtlab.BuildConfig(max_batch_size=8, max_input_len=2304, max_seq_len=2560, dtype=options.dtype)
    with checkpoint.build(bounds, plan=False) as engine:
        batching(engine, options.requests, options.runs, options.device)
        prefix_reuse(engine, options.runs, options.device)


if __name__ == "__main__":
    main()
