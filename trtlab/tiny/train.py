"""Trains the tiny LLaMA from random weights and writes its Hugging Face folder: ``python -m trtlab.tiny.train``.

Owns the model's shape, the optimizer and the loop. The text comes from ``corpus``, the batches from ``batches``.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from trtlab.tiny import llama_dir
from trtlab.tiny.batches import LENGTHS, Batch, Batches
from trtlab.tiny.tokenizer import BOS_ID, EOS_ID, PAD_ID, VOCAB_SIZE, save_tokenizer, train_tokenizer

OUTLIER_CHANNELS = (29, 101, 174, 233)  # of the hidden size: these RMSNorm gains start high in every layer
OUTLIER_GAIN = 24.0
OUTLIER_WEIGHT = 0.4  # factor of the columns that read these channels at the start, so that early steps are stable
MAX_POSITIONS = 8192
_READERS = tuple(f"{name}_proj.weight" for name in ("q", "k", "v", "gate", "up"))


@dataclass(frozen=True)
class Training:
    """The settings of a training run; ``minutes`` is the time after which it stops early."""

    seed: int = 0
    steps: int = 2300
    tokens: int = 256 * 1024  # of one step
    learning_rate: float = 3e-3
    warmup: int = 100
    weight_decay: float = 0.1
    workers: int = 14
    minutes: float = 9.0
    lengths: tuple[int, ...] = LENGTHS
    outlier_gain: float = OUTLIER_GAIN


def train(training: Training, output: Path, device: str = "cuda") -> None:
    """Train by ``training`` and write a folder that ``AutoModelForCausalLM`` and ``AutoTokenizer`` load."""
    import torch

    output.mkdir(parents=True, exist_ok=True)
    save_tokenizer(train_tokenizer(training.seed), output, MAX_POSITIONS)
    with _batches(training, output / "tokenizer.json") as batches:
        torch.manual_seed(training.seed)
        model = new_model(training.outlier_gain).to(device)
        optimizer = _optimizer(model, training)
        start = time.perf_counter()
        tokens, last_time, last_tokens = 0, start, 0  # trained so far, and at the last line printed
        for step, batch in enumerate(batches):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(training, step)
            loss = _loss(model, batch, device)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            tokens += batch.tokens.size
            if step % 50 == 0 or step + 1 == training.steps:
                value, now = loss.item(), time.perf_counter()
                rate = (tokens - last_tokens) / (now - last_time)
                last_time, last_tokens = now, tokens
                print(f"step {step:5d}  loss {value:.4f}  {batch.tokens.shape}  {rate / 1e6:.2f} Mtok/s", flush=True)
            if step % 400 == 399:
                save(model, output)
            if time.perf_counter() - start > training.minutes * 60:
                print(f"out of time at step {step}")
                break
    save(model, output)
    print(f"trained on {tokens / 1e6:.0f} M tokens in {(time.perf_counter() - start) / 60:.1f} minutes")


def new_model(outlier_gain: float = OUTLIER_GAIN) -> Any:
    """The untrained model, float32: every linear layer's dimensions are divisible by 128."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=MAX_POSITIONS,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=False,
        pad_token_id=PAD_ID,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "layernorm" in name:
                tensor[list(OUTLIER_CHANNELS)] = outlier_gain
            elif tensor.dim() == 2:
                tensor.normal_(0.0, 0.03)
            if name.endswith(_READERS):
                tensor[:, list(OUTLIER_CHANNELS)] *= OUTLIER_WEIGHT
    return model


def learning_rate(training: Training, step: int) -> float:
    """Linear warm-up, then half a cosine down to one hundredth."""
    if step < training.warmup:
        return training.learning_rate * (step + 1) / training.warmup
    done = (step - training.warmup) / max(1, training.steps - training.warmup)
    return training.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


def save(model: Any, output: Path) -> None:
    """Write config, generation config and the weights rounded to bfloat16, each renamed into place."""
    import torch
    from safetensors.torch import save_file

    config = json.loads(model.config.to_json_string(use_diff=True))
    config |= {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    generation = {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": PAD_ID, "do_sample": False}
    weights = {name: tensor.detach().to("cpu", torch.bfloat16) for name, tensor in model.state_dict().items()}
    save_file(weights, output / "model.safetensors.part", metadata={"format": "pt"})
    (output / "model.safetensors.part").rename(output / "model.safetensors")
    for name, content in (("config.json", config), ("generation_config.json", generation)):
        part = output / f"{name}.part"
        part.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
        part.rename(output / name)


def _loss(model: Any, batch: Batch, device: str) -> Any:
    import torch

    tokens = torch.from_numpy(batch.tokens.astype("int64")).to(device, non_blocking=True)  # [rows, length + 1]
    weights = torch.from_numpy(batch.weights[:, 1:].astype("float32")).to(device, non_blocking=True).flatten()
    with torch.autocast(device, dtype=torch.bfloat16):
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits  # [rows, length, vocab]
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none")
    return (losses * weights).sum() / weights.sum()


def _optimizer(model: Any, training: Training) -> Any:
    """AdamW with weight decay on matrices but not on gains, so that the outlier gains can stay large."""
    import torch

    matrices = [tensor for tensor in model.parameters() if tensor.dim() == 2]
    gains = [tensor for tensor in model.parameters() if tensor.dim() == 1]
    groups = [{"params": matrices, "weight_decay": training.weight_decay}, {"params": gains, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=training.learning_rate, betas=(0.9, 0.95), fused=True)


@contextmanager
def _batches(training: Training, tokenizer_file: Path) -> Iterator[Iterator[Batch]]:
    """The batches of all steps in order, made ahead by worker processes."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    arguments = (str(tokenizer_file), training.seed, training.steps, training.tokens, training.lengths)
    with multiprocessing.get_context("spawn").Pool(training.workers) as pool:
        yield pool.imap(partial(_make_batch, arguments), range(training.steps))


def _make_batch(arguments: tuple[str, int, int, int, tuple[int, ...]], step: int) -> Batch:
    return _maker(*arguments)(step)


@cache
def _maker(tokenizer_file: str, seed: int, steps: int, tokens: int, lengths: tuple[int, ...]) -> Batches:
    return Batches(tokenizer_file, seed, steps, tokens, lengths)


def main() -> None:
    """Read the command line, train, then print the evaluation."""
    from trtlab.tiny import evaluate

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=llama_dir())
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--steps", type=int, default=Training.steps)
    parser.add_argument("--tokens", type=int, default=Training.tokens, help="tokens of one step")
    parser.add_argument("--learning-rate", type=float, default=Training.learning_rate)
    parser.add_argument("--lengths", type=int, nargs=3, default=LENGTHS)
    parser.add_argument("--workers", type=int, default=Training.workers)
    parser.add_argument(
        "--minutes", type=float, default=Training.minutes, help="stop after so long, whatever the steps"
    )
    parser.add_argument("--outlier-gain", type=float, default=Training.outlier_gain, help="1 trains without outliers")
    parser.add_argument("--evaluate", choices=("none", "quick", "full"), default="full")
    arguments = vars(parser.parse_args())
    output, device, extent = arguments.pop("output"), arguments.pop("device"), arguments.pop("evaluate")
    arguments["lengths"] = tuple(arguments["lengths"])
    train(Training(**arguments), output, device)
    if extent != "none":
        evaluate.report(output, (), device, full=extent == "full")


if __name__ == "__main__":
    main()
