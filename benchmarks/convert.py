"""GB/s and peak memory of converting a sharded Hugging Face folder of random weights, in a separate process (Linux).

python benchmarks/convert.py [--gigabytes 2] [--tp_size 2]

A copy of the same bytes by shutil, timed just before and just after, shows the speed of the disk.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

import trtlab
from trtlab.convert.families.llama import NAMES
from trtlab.convert.hugging_face_config import REMEDY, HuggingFaceConfig
from trtlab.storage.json_files import parse_model

SHARD_BYTES = 500 * 2**20
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "dtype": "bfloat16",
}
LAYER_BYTES = 2 * (2048 * 2048 * 2 + 2048 * 512 * 2 + 3 * 2048 * 5632)


def write_random(folder: Path, gigabytes: float) -> int:
    """Write a sharded folder of about this size and return its bytes."""
    raw = {**CONFIG, "num_hidden_layers": max(1, round((gigabytes * 1e9 - 4 * 32000 * 2048) / LAYER_BYTES))}
    config = parse_model(raw, HuggingFaceConfig, "config.json", remedy=REMEDY).to_model_config("bfloat16")
    (folder / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    shard: dict[str, torch.Tensor] = {}
    where: dict[str, str] = {}
    total = shard_bytes = 0

    def flush() -> None:
        nonlocal shard_bytes
        name = f"model-{len(set(where.values())) + 1:05d}.safetensors"
        save_file(shard, folder / name)
        where.update(dict.fromkeys(shard, name))
        shard.clear()
        shard_bytes = 0

    for name, shape in NAMES.shapes(config).items():
        shard[name] = torch.randn(shape).to(torch.bfloat16)
        shard_bytes += shard[name].nbytes
        total += shard[name].nbytes
        if shard_bytes > SHARD_BYTES:
            flush()
    flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}), encoding="utf-8")
    return total


def convert(source: str, target: str, tp_size: int) -> None:
    """Convert in the measured process and print seconds and the peak bytes above those before the start."""
    before = memory("VmRSS")
    start = time.perf_counter()
    trtlab.Checkpoint.from_hugging_face(source).save(target, mapping=trtlab.Mapping(tp_size=tp_size))
    seconds = time.perf_counter() - start
    print(json.dumps([seconds, memory("VmHWM") - before]))


def memory(field: str) -> int:
    """Present (VmRSS) or peak (VmHWM) bytes of this process, with mapped pages; Linux only."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def copy_seconds(source: Path, target: Path) -> float:
    """Seconds to copy the same bytes."""
    start = time.perf_counter()
    shutil.copytree(source, target)
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return seconds


def main() -> None:
    """Write the folder, copy it, convert it, copy it again."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--tp_size", type=int, default=2)
    parser.add_argument("--measured", nargs=2, metavar=("SOURCE", "TARGET"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measured:
        convert(*options.measured, options.tp_size)
        return
    with tempfile.TemporaryDirectory() as name:
        source = Path(name) / "source"
        source.mkdir()
        total = write_random(source, options.gigabytes)
        copies = [copy_seconds(source, Path(name) / "copy")]
        command = [sys.executable, __file__, "--tp_size", str(options.tp_size), "--measured"]
        out = subprocess.run([*command, str(source), f"{name}/out"], check=True, capture_output=True, text=True).stdout
        copies.append(copy_seconds(source, Path(name) / "copy"))
    seconds, peak = json.loads(out.splitlines()[-1])
    rank = total / options.tp_size
    print(f"{total / 1e9:.2f} GB in {seconds:.1f} s: {total / 1e9 / seconds:.2f} GB/s")
    print(f"copying the same bytes: {' and '.join(f'{total / 1e9 / s:.2f} GB/s' for s in copies)}")
    mib = [f"{n / 2**20:.0f} MiB" for n in (peak, SHARD_BYTES, rank)]
    print(f"peak above the start {mib[0]}; a shard is {mib[1]}, a rank {mib[2]}")


if __name__ == "__main__":
    main()
