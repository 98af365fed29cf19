"""Measures a session: TensorRT-LLM's sweep over batch sizes and lengths, its [BENCHMARK] line and its csv."""

from __future__ import annotations

import csv
import itertools
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any

import torch

from trtlab.card import Shown
from trtlab.config.base import NotNegativeInt, PositiveInt
from trtlab.config.build import compute_dtype
from trtlab.config.calls import public
from trtlab.config.sampling import SamplingParams
from trtlab.errors import ConfigError, RequestError
from trtlab.progress import progress
from trtlab.session.session import Session
from trtlab.storage.paths import absolute_path, writing

COLUMNS = {
    "peak_memory_gb": "gpu_peak_mem(gb)",
    "percentile95_ms": "percentile95(ms)",
    "percentile99_ms": "percentile99(ms)",
    "latency_ms": "latency(ms)",
}


@dataclass(frozen=True)
class BenchmarkRow:
    """One cell of the sweep, under the names of TensorRT-LLM's line; ``tokens_per_sec`` counts generated tokens.

    ``latency_ms`` is the mean time of a whole batch, prompt and answer; the percentiles are of the same runs, by sorted
    index. ``peak_memory_gb`` is that of the GPU in GiB, 0 on a CPU. A cell that ran out of memory holds NaN.
    """

    model_name: str
    world_size: int
    num_heads: int
    num_kv_heads: int
    num_layers: int
    hidden_size: int
    vocab_size: int
    precision: str
    batch_size: int
    input_length: int
    output_length: int
    peak_memory_gb: float
    tokens_per_sec: float
    percentile95_ms: float
    percentile99_ms: float
    latency_ms: float
    compute_cap: str

    @property
    def line(self) -> str:
        """``[BENCHMARK] model_name ... world_size ...``; OOM stands in a cell that ran out of memory."""
        return " ".join(["[BENCHMARK]", *(f"{name} {value}" for name, value in self.cells.items())])

    @property
    def cells(self) -> dict[str, str]:
        """The text of each column, as in the line and the csv."""
        return {COLUMNS.get(f.name, f.name): _cell(getattr(self, f.name)) for f in fields(self)}


def _cell(value: object) -> str:
    if isinstance(value, float):
        return "OOM" if math.isnan(value) else f"{value:.3f}".rstrip("0").rstrip(".")
    return str(value)


@dataclass(frozen=True, repr=False)
class Benchmark(Shown):
    """The rows of one sweep, in its order."""

    rows: tuple[BenchmarkRow, ...]

    def to_csv(self, path: str | Path) -> Path:
        """Write the rows under TensorRT-LLM's column names; returns the absolute path."""
        target = absolute_path(path, error=ConfigError)
        with writing(target, error=ConfigError), target.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(self.rows[0].cells) if self.rows else [])
            writer.writeheader()
            writer.writerows(row.cells for row in self.rows)
        return target


@public
def benchmark(
    session: Session,
    batch_size: Sequence[PositiveInt] = (1, 8),
    input_output_len: Sequence[tuple[PositiveInt, PositiveInt]] = ((128, 32),),
    warm_up: NotNegativeInt = 1,
    num_runs: PositiveInt = 5,
) -> Benchmark:
    """Time every batch size with every (input, output) length in tokens; random prompts, greedy, no early end.

    Raises ConfigError for a cell that exceeds the engine's bounds, before anything is measured.
    """
    build = session.engine.build_config
    cells = list(itertools.product(input_output_len, batch_size))
    for (inputs, outputs), batch in cells:
        if batch > build.max_batch_size or inputs > build.input_len or inputs + outputs > build.seq_len:
            raise ConfigError(
                f"batch {batch} of {inputs} + {outputs} tokens is beyond the engine's bounds",
                expected=f"batch up to {build.max_batch_size}, input up to {build.input_len}, "
                f"both lengths up to {build.seq_len}",
                remedy="build with larger bounds",
            )
    rows = []
    with progress("benchmark", len(cells) * (warm_up + num_runs), unit="run") as bar:
        for (inputs, outputs), batch in cells:
            rows.append(_measure(session, batch, inputs, outputs, warm_up, num_runs, bar))
    return Benchmark(tuple(rows))


def random_prompts(vocab_size: int, batch: int, length: int) -> list[list[int]]:
    """The same prompts at every call: ``batch`` lists of ``length`` ids."""
    generator = random.Random(0)
    return [[generator.randrange(vocab_size) for _ in range(length)] for _ in range(batch)]


def _measure(
    session: Session, batch: int, inputs: int, outputs: int, warm_up: int, num_runs: int, bar: Any
) -> BenchmarkRow:
    config = session.engine.config
    prompts = random_prompts(config.vocab_size, batch, inputs)
    params = SamplingParams(max_new_tokens=outputs, ignore_eos=True)
    device = session.device
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    times = []
    try:
        for run in range(warm_up + num_runs):
            session.kv_cache.clear()  # every run computes its prompts
            seconds = timed(lambda: session.generate(prompts, params), device)
            bar.update(1)
            if run >= warm_up:
                times.append(seconds)
    except RequestError as error:
        if not isinstance(error.__cause__, torch.cuda.OutOfMemoryError):
            raise
        times = []
    ordered = sorted(times)
    mean = sum(times) / len(times) if times else math.nan
    return BenchmarkRow(
        model_name=config.architecture,
        world_size=len(session.engine.mapping.ranks),
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        precision=str(compute_dtype(session.engine.build_config, device)).removeprefix("torch."),
        batch_size=batch,
        input_length=inputs,
        output_length=outputs,
        peak_memory_gb=torch.cuda.max_memory_allocated(device) / 2**30 if on_gpu else 0.0,
        tokens_per_sec=batch * outputs / mean,
        percentile95_ms=_percentile(ordered, 0.95) * 1e3,
        percentile99_ms=_percentile(ordered, 0.99) * 1e3,
        latency_ms=mean * 1e3,
        compute_cap="sm{}{}".format(*torch.cuda.get_device_capability(device)) if on_gpu else "cpu",
    )


def _percentile(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else math.nan


def timed(call: Callable[[], object], device: torch.device | None = None) -> float:
    """Seconds that a call takes, including what a GPU still has to do when it returns."""
    start = time.perf_counter()
    call()
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


@dataclass(frozen=True, repr=False)
class Duel(Shown):
    """Two ways to do the same work, timed in turn. ``ratio`` is how many times faster ours is."""

    what: str
    tokens: int
    ours_s: tuple[float, ...]
    theirs_s: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """The median over the runs of theirs / ours."""
        return median(theirs / ours for ours, theirs in zip(self.ours_s, self.theirs_s, strict=True))


@public
def against_transformers(
    session: Session, model: Any, batch_size: int = 1, lengths: tuple[int, int] = (32, 64), num_runs: int = 5
) -> Duel:
    """Time greedy generation here and by ``transformers.generate`` on the same prompts, in turn.

    Args:
        session: The session to time.
        model: The same model, loaded by transformers.
        batch_size: Number of prompts.
        lengths: Input and output length in tokens.
        num_runs: Runs that are counted; one more comes first to warm up.
    """
    inputs, outputs = lengths
    prompts = random_prompts(session.engine.config.vocab_size, batch_size, inputs)
    params = SamplingParams(max_new_tokens=outputs, ignore_eos=True)
    ids = torch.tensor(prompts, device=model.device)
    mask = torch.ones_like(ids)

    def theirs() -> None:
        model.generate(
            ids, attention_mask=mask, max_new_tokens=outputs, do_sample=False, eos_token_id=None, pad_token_id=0
        )

    def ours() -> None:
        session.kv_cache.clear()  # every run computes its prompts
        session.generate(prompts, params)

    rounds = [(timed(ours, session.device), timed(theirs, model.device)) for _ in range(num_runs + 1)]
    return Duel(
        f"batch {batch_size}, {inputs} tokens in, {outputs} out, greedy",
        batch_size * outputs,
        tuple(ours for ours, _ in rounds[1:]),
        tuple(hf for _, hf in rounds[1:]),
    )
