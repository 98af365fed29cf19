"""Quantization of a random LLaMA of 160 M against ModelOpt, predicted and measured peaks, and decoding on a CPU.

python benchmarks/quantize.py [--texts 8] [--tokens 256] [--runs 3] [--only calibration|peak|decode]

Both sides quantize from one folder to another on the same token ids, in turn, each in a separate process (Linux);
``pip install "trtlab[modelopt]"`` installs ModelOpt. Decoding is greedy at batch 1 from a prompt of one token, so that
every step is a generation step; the algorithms run in turn too.
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
from trtlab.card import size
from trtlab.model.tensor_specs import tensor_specs
from trtlab.published import SHAPES
from trtlab.quantize.modelopt import check_modelopt, export_with_modelopt
from trtlab.quantize.peak import Peak, predict
from trtlab.quantize.texts import batches
from trtlab.storage.lazy import LazyTensor

ALGORITHMS = ("W8A8_SQ_PER_CHANNEL", "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN", "FP8", "W4A16_AWQ")
NEAREST = {
    "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN": "W8A8_SQ_PER_CHANNEL"
}  # the recipe of ModelOpt that is nearest to it
MEASURED = ("W8A8_SQ_PER_CHANNEL", "FP8")  # AWQ's search would take minutes at this width
DECODED = ("W8A16", "W4A16", "W4A16_AWQ", "FP8", "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN")
WIDE = trtlab.ModelConfig(
    architecture="LlamaForCausalLM",
    dtype="bfloat16",
    vocab_size=32000,
    hidden_size=2048,
    num_hidden_layers=4,
    num_attention_heads=16,
    num_key_value_heads=16,
    head_size=128,
    intermediate_size=5504,
    max_position_embeddings=2048,
)  # 640 MB; one layer in float32 has 200 MB


def calibrate(folder: Path, side: str, algorithm: str, target: str) -> None:
    """Quantize in the measured process and print seconds and the peak bytes above those of its imports."""
    quant = trtlab.QuantConfig(quant_algo=algorithm)
    rows = json.loads(folder.with_name("calibration.json").read_text(encoding="utf-8"))
    if side == "modelopt":
        check_modelopt(quant)  # imports ModelOpt before the measurement starts
    before = memory("VmRSS")
    start = time.perf_counter()
    if side == "wide":
        trtlab.Checkpoint.load(folder).quantize(quant, calibration=rows, output_dir=target)
    elif side == "modelopt":
        checkpoint = trtlab.Checkpoint.from_hugging_face(folder)
        export_with_modelopt(folder, checkpoint.config, quant, rows, Path(target))
    else:
        trtlab.Checkpoint.from_hugging_face(folder).quantize(quant, calibration=rows, output_dir=target)
    print()
    print(json.dumps([time.perf_counter() - start, memory("VmHWM") - before]))


def measured(folder: Path, side: str, algorithm: str) -> tuple[float, float]:
    """Seconds and peak bytes of one such process."""
    with tempfile.TemporaryDirectory() as target:
        command = [sys.executable, __file__, "--measured", str(folder), side, algorithm, f"{target}/out"]
        run = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    seconds, peak = json.loads(run.stdout.splitlines()[-1])
    return seconds, peak


def race_calibration(folder: Path, runs: int) -> None:
    """Print time and peak memory of both sides, run in turn, and the medians of their ratios."""
    print(f"{'':36}   trtlab            ModelOpt          times faster   memory")
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


def predicted(config: trtlab.ModelConfig, algorithm: str, rows: Sequence[Sequence[int]]) -> Peak:
    """The predicted peak of a quantization to a folder; no weight is read."""
    tensors = {
        name: LazyTensor(spec.shape, config.torch_dtype, lambda: torch.empty(0))
        for name, spec in tensor_specs(config).items()
    }
    quant = trtlab.QuantConfig(quant_algo=algorithm)
    return predict(config.replace(quantization=quant), tensors, batches(rows), in_memory=False)


def compare_peaks(folder: Path, rows: list[list[int]]) -> None:
    """Print predicted and measured peaks of a model of some hundred MB, and the prediction for 70 B parameters."""
    weights = {n: (torch.randn(s.shape) * 0.02).to(torch.bfloat16) for n, s in tensor_specs(WIDE).items()}
    trtlab.Checkpoint.from_weights(WIDE, weights).save(folder / "wide")
    del weights
    for algorithm in MEASURED:
        prediction = predicted(WIDE, algorithm, rows).total
        _, peak = measured(folder / "wide", "wide", algorithm)
        print(
            f"{algorithm:36} peak predicted {size(prediction)}, measured {size(peak)}: {peak / prediction:.2f}",
            flush=True,
        )
    large = predicted(SHAPES["LLaMA-2-70B"], "FP8", [[0] * 512] * 512)
    print(
        f"LLaMA-2-70B to FP8 on 512 texts of 512 tokens: {large.total / 1e9:.0f} GB predicted, of which hidden states"
    )
    print(f"{large.hidden / 1e9:.0f} GB; with the whole model in both forms it takes {large.at_once / 1e9:.0f} GB")


def race_decoding(checkpoint: trtlab.Checkpoint, rows: list[list[int]], runs: int, new_tokens: int) -> None:
    """Print tokens per second in float32 and with the fast kernels, run in turn, and the medians of the ratios."""
    bounds = trtlab.BuildConfig(max_batch_size=1, max_input_len=64, max_seq_len=128)
    prompt = random_prompts(checkpoint.config.vocab_size, 1, 1)[0]
    params = trtlab.SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
    plain = checkpoint.build(bounds, plan=False).session(backend="torch", device="cpu")
    sessions = {}
    for algorithm in DECODED:
        quant = trtlab.QuantConfig(quant_algo=algorithm)
        quantized = checkpoint.quantize(quant, calibration=rows if quant.reads_texts else None)
        fast = trtlab.SessionConfig(fast_cpu_kernels=True)
        sessions[algorithm] = quantized.build(bounds, plan=False).session(fast, backend="torch", device="cpu")
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
            f"{algorithm:36} {new_tokens / median(fast for _, fast in pairs):6.1f} tokens/s, {ratio:.2f} times float32"
        )


def main() -> None:
    """Write the model and the token ids once, then run the comparisons."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", choices=("calibration", "peak", "decode"))
    parser.add_argument(
        "--measured", nargs=4, metavar=("FOLDER", "SIDE", "ALGORITHM", "TARGET"), help=argparse.SUPPRESS
    )
    options = parser.parse_args()
    if options.measured:
        folder, side, algorithm, target = options.measured
        calibrate(Path(folder), side, algorithm, target)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**RANDOM_160M)).save_pretrained(folder)
        rows = random_prompts(RANDOM_160M["vocab_size"], options.texts, options.tokens)
        folder.with_name("calibration.json").write_text(json.dumps(rows), encoding="utf-8")
        if options.only in (None, "calibration"):
            print(f"quantizing 162 M parameters on {options.texts} texts of {options.tokens} tokens")
            if find_spec("modelopt") is None:
                sys.exit('ModelOpt is not installed: pip install "trtlab[modelopt]"')
            race_calibration(folder, options.runs)
        if options.only in (None, "peak"):
            compare_peaks(Path(name), rows)
        if options.only in (None, "decode"):
            race_decoding(trtlab.Checkpoint.from_hugging_face(folder), rows, max(5, options.runs), 32)


if __name__ == "__main__":
    main()
