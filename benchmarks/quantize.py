"""Quantization of a random LLaMA of 160 M against ModelOpt, and what its integers gain when it decodes on a CPU.

python benchmarks/quantize.py [--texts 16] [--tokens 256] [--runs 3] [--only calibration|decode]

Calibration goes from one folder to another on both sides, on the same token ids, each in a process of its own (Linux),
by turns; ModelOpt is ``pip install "trtlab[modelopt]"``. Decoding is greedy at batch 1, its kernels take turns too.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import torch
from convert import memory
from decode import RANDOM_160M
from transformers import LlamaConfig, LlamaForCausalLM

import trtlab
from trtlab.bench import random_prompts, timed
from trtlab.quantize.modelopt import check_modelopt, export_with_modelopt

ALGORITHMS = ("W8A8_SQ_PER_CHANNEL", "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN", "FP8", "W4A16_AWQ")
NEAREST = {"W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN": "W8A8_SQ_PER_CHANNEL"}  # what ModelOpt has for it
DECODED = ("W8A16", "W4A16", "W4A16_AWQ")


def calibrate(folder: Path, side: str, algorithm: str, target: str) -> None:
    """The measured process: prints seconds, and the peak above what its imports hold."""
    quant = trtlab.QuantConfig(quant_algo=algorithm)
    rows = json.loads((folder / "calibration.json").read_text(encoding="utf-8"))
    if side == "modelopt":
        check_modelopt(quant)  # imports it
    before = memory("VmRSS")
    start = time.perf_counter()
    checkpoint = trtlab.Checkpoint.from_hugging_face(folder)
    if side == "modelopt":
        export_with_modelopt(folder, checkpoint.config, quant, rows, Path(target))
    else:
        checkpoint.quantize(quant, calibration=rows, output_dir=target)
    print()
    print(json.dumps([time.perf_counter() - start, memory("VmHWM") - before]))


def measured(folder: Path, side: str, algorithm: str) -> tuple[float, float]:
    """Seconds and bytes of one such process."""
    with tempfile.TemporaryDirectory() as target:
        command = [sys.executable, __file__, "--measured", str(folder), side, algorithm, f"{target}/out"]
        run = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    seconds, peak = json.loads(run.stdout.splitlines()[-1])
    return seconds, peak


def race_calibration(folder: Path, runs: int) -> None:
    """Print time and peak memory of both sides, by turns, and the median of their ratios."""
    print(f"{'':36}   ours              ModelOpt          times faster   memory")
    for algorithm in ALGORITHMS:
        theirs = NEAREST.get(algorithm, algorithm)
        pairs = [(measured(folder, "trtlab", algorithm), measured(folder, "modelopt", theirs)) for _ in range(runs)]
        faster = median(b[0] / a[0] for a, b in pairs)
        memories = median(a[1] / b[1] for a, b in pairs)
        left, right = (_figures([pair[side] for pair in pairs]) for side in (0, 1))
        print(f"{algorithm:36} {left} {right} {faster:8.2f} {memories:14.2f}", flush=True)


def _figures(measurements: Sequence[tuple[float, float]]) -> str:
    seconds, peak = (median(column) for column in zip(*measurements, strict=True))
    return f"{seconds:6.1f} s {peak / 2**20:6.0f} MiB"


def race_decoding(checkpoint: trtlab.Checkpoint, rows: list[list[int]], runs: int, new_tokens: int) -> None:
    """Print tokens per second in float32 and with the fast kernels, and the median of the ratios, by turns."""
    bounds = trtlab.BuildConfig(max_batch_size=1, max_input_len=64, max_seq_len=128)
    prompt = random_prompts(checkpoint.config.vocab_size, 1, 32)[0]
    params = trtlab.SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
    plain = checkpoint.build(bounds, plan=False).session(backend="torch", device="cpu")
    sessions = {}
    for algorithm in DECODED:
        quant = trtlab.QuantConfig(quant_algo=algorithm)
        made = checkpoint.quantize(quant, calibration=rows if quant.reads_texts else None)
        fast = trtlab.SessionConfig(fast_cpu_kernels=True)
        sessions[algorithm] = made.build(bounds, plan=False).session(fast, backend="torch", device="cpu")
    for session in (plain, *sessions.values()):
        session.generate(prompt, params)
    rounds: dict[str, list[tuple[float, float]]] = {algorithm: [] for algorithm in DECODED}
    for _ in range(runs):
        for algorithm, session in sessions.items():
            float32 = timed(lambda: plain.generate(prompt, params))
            rounds[algorithm].append((float32, timed(lambda session=session: session.generate(prompt, params))))  # type: ignore[misc]
    slow = median(pair[0] for pairs in rounds.values() for pair in pairs)
    print(f"decoding at batch 1, {torch.get_num_threads()} threads: float32 {new_tokens / slow:.1f} tokens/s")
    for algorithm, pairs in rounds.items():
        ratio = median(float32 / fast for float32, fast in pairs)
        print(
            f"{algorithm:12} {new_tokens / median(fast for _, fast in pairs):6.1f} tokens/s, {ratio:.2f} times float32"
        )


def main() -> None:
    """Write the model and the token ids once, then race."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", choices=("calibration", "decode"))
    parser.add_argument(
        "--measured", nargs=4, metavar=("FOLDER", "SIDE", "ALGORITHM", "TARGET"), help=argparse.SUPPRESS
    )
    options = parser.parse_args()
    if options.measured:
        folder, side, algorithm, target = options.measured
        calibrate(Path(folder), side, algorithm, target)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**RANDOM_160M)).save_pretrained(folder)
        rows = random_prompts(RANDOM_160M["vocab_size"], options.texts, options.tokens)
        (folder / "calibration.json").write_text(json.dumps(rows), encoding="utf-8")
        if options.only != "decode":
            print(f"quantizing 162 M parameters on {options.texts} texts of {options.tokens} tokens")
            if find_spec("modelopt") is None:
                sys.exit('the other side is missing: pip install "trtlab[modelopt]"')
            race_calibration(folder, options.runs)
        if options.only != "calibration":
            race_decoding(trtlab.Checkpoint.from_hugging_face(folder), rows, max(5, options.runs), 32)


if __name__ == "__main__":
    main()
