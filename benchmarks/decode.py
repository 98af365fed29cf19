"""Greedy decoding against transformers.generate, with the same weights and prompts, in turn in one run.

python benchmarks/decode.py [--runs 5] [--device cpu|cuda] [--dtype float32]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

import trtlab
from trtlab import tiny
from trtlab.bench import against_transformers

RANDOM_160M = {
    "vocab_size": 32000,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "max_position_embeddings": 2048,
}


def race(title: str, folder: Path, runs: int, device: str, dtype: str, lengths: tuple[int, int]) -> None:
    """Print one comparison for batch 1 and one for batch 8."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), trust_remote_code=False).to(
        device
    )
    bounds = trtlab.BuildConfig(max_batch_size=8, max_input_len=512, max_seq_len=1024, dtype=dtype)
    engine = trtlab.Checkpoint.from_hugging_face(folder).build(bounds, plan=False)
    with engine, engine.session(device=device) as session:
        for batch_size in (1, 8):
            duel = against_transformers(session, model, batch_size, lengths, runs)
            print(f"\n{title}, {dtype} on {device}: {duel}")


def main() -> None:
    """Compare on the tiny model of trtlab and on a random model of 160 M parameters."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    disable_progress_bar()  # type: ignore[no-untyped-call]
    race("tiny LLaMA", tiny.llama_dir(), options.runs, options.device, options.dtype, (32, 64))
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**RANDOM_160M)).save_pretrained(folder)
        race("random LLaMA of 160 M", Path(folder), options.runs, options.device, options.dtype, (32, 32))


if __name__ == "__main__":
    main()
