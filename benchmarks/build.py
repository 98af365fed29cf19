"""Time and peak memory of building a plan of 1.1 B random BF16 parameters, by trtlab and by TensorRT's bare call.

python benchmarks/build.py [--layers 22] [--runs 3]

Both build the same network. Each run is a separate process (Linux); the two kinds run in turn, and minima are compared.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from convert import memory

import trtlab
from trtlab.model.tensor_specs import tensor_specs
from trtlab.tensorrt.build.plan import builder_config, compile_plan
from trtlab.tensorrt.build.watch import Watch
from trtlab.tensorrt.emit.emission import emit

BOUNDS = trtlab.BuildConfig(max_batch_size=8, max_input_len=1024, max_seq_len=2048)


class Counter(io.RawIOBase):
    """A binary file that counts the bytes and does not keep them."""

    count = 0

    def writable(self) -> bool:
        """True, as for a file that is open for writing."""
        return True

    def write(self, data: object) -> int:
        """Count the bytes."""
        size = len(memoryview(data))  # type: ignore[arg-type]
        self.count += size
        return size


def write_random(folder: Path, layers: int) -> int:
    """Write a checkpoint of random BF16 weights and return their bytes."""
    config = trtlab.ModelConfig(
        architecture="LlamaForCausalLM",
        dtype="bfloat16",
        vocab_size=32000,
        hidden_size=2048,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_size=64,
        intermediate_size=5632,
        max_position_embeddings=2048,
    )
    weights = {n: (torch.randn(s.shape) * 0.02).to(torch.bfloat16) for n, s in tensor_specs(config).items()}
    checkpoint = trtlab.Checkpoint.from_weights(config, weights)
    checkpoint.save(folder)
    return checkpoint.nbytes


def measure(folder: str, how: str) -> None:
    """Build once in this process and print seconds, peak bytes above the start, and bytes of the plan."""
    before = memory("VmRSS")
    checkpoint = trtlab.Checkpoint.load(folder)
    weights = {name: tensor.read() for name, tensor in checkpoint.tensors.items()}
    emission = emit(checkpoint.config, BOUNDS, trtlab.Mapping(), 0, weights)
    start = time.perf_counter()
    if how == "trtlab":
        size = compile_plan(emission, Counter()).plan_bytes  # type: ignore[arg-type]
    else:
        settings = builder_config(emission, (), Watch(emission.library.trt))
        settings.progress_monitor = None
        size = emission.builder.build_serialized_network(emission.network, settings).nbytes
    print(json.dumps([time.perf_counter() - start, memory("VmHWM") - before, size]))


def main() -> None:
    """Write the checkpoint, build it in turn by both ways, print minima and ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--measured", nargs=2, metavar=("FOLDER", "HOW"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measured:
        measure(*options.measured)
        return
    results: dict[str, list[tuple[float, float, float]]] = {"trtlab": [], "bare call": []}
    with tempfile.TemporaryDirectory() as name:
        weights = write_random(Path(name) / "checkpoint", options.layers)
        for _ in range(options.runs):
            for how, rows in results.items():
                command = [sys.executable, __file__, "--measured", f"{name}/checkpoint", how]
                out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                rows.append(tuple(json.loads(out.splitlines()[-1])))
    print(f"{weights / 1e9:.2f} GB of weights, minima of {options.runs}")
    for how, rows in results.items():
        seconds, peak, size = (min(column) for column in zip(*rows, strict=True))
        print(f"{how:10} {seconds:6.1f} s, peak {peak / weights:.2f} x the weights, plan {size / 1e9:.2f} GB")
    trtlab_s, bare_s = (min(row[0] for row in rows) for rows in results.values())
    print(f"trtlab / bare call: {trtlab_s / bare_s:.2f}")


if __name__ == "__main__":
    main()
