"""AWQ's search, which leaves an alpha as soon as its error is too large, against all errors in full.

python benchmarks/awq_search.py [--model FOLDER] [--texts 16] [--tokens 400] [--layers 6]

Both sides see the same weights and the same Gram matrices, in turn. The model is the tiny LLaMA unless a folder is
given in Hugging Face's layout; the texts are Markdown files of this repository.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

import trtlab
from trtlab.model.scales import dequantize
from trtlab.quantize import awq
from trtlab.quantize.layer import InputStatistics
from trtlab.quantize.run import prepare
from trtlab.runtime.tokenizer import Tokenizer
from trtlab.tiny import llama_dir

GROUP = 64
Search = Callable[[Tensor, InputStatistics, int], tuple[float, Tensor]]


def every_error(weight: Tensor, inputs: InputStatistics, group_size: int) -> tuple[float, Tensor]:
    """The straightforward search: the whole error of each alpha by one product with the whole Gram matrix."""
    assert inputs.gram is not None
    w_mean = awq.importance(weight, group_size)
    scales = {alpha: awq.awq_scale(inputs.mean, w_mean, alpha) for alpha in awq.ALPHAS}
    losses = {}
    for alpha, s in scales.items():
        steps = awq.group_scales(weight * s, group_size)
        error = dequantize(awq.int4_groups(weight * s, steps), steps.value) / s - weight
        losses[alpha] = float((error @ inputs.gram * error).sum())
    best = min(losses, key=losses.__getitem__)
    return best, scales[best]


def timed(search: Search, weight: Tensor, inputs: InputStatistics) -> tuple[float, float]:
    """The alpha, and the processor's seconds in this thread: other processes count less than in wall time."""
    start = time.thread_time()
    alpha, _ = search(weight, inputs, GROUP)
    return alpha, time.thread_time() - start


def main() -> None:
    """Print one line for each kind of linear, and one for all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=llama_dir())
    parser.add_argument("--texts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--layers", type=int, default=6)
    options = parser.parse_args()
    torch.set_num_threads(1)
    checkpoint = trtlab.Checkpoint.from_hugging_face(options.model)
    documents = "\n".join(path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parents[1].glob("*.md")))
    ids = Tokenizer(options.model).encode(documents)
    rows = [ids[start : start + options.tokens] for start in range(0, options.texts * options.tokens, options.tokens)]
    quant = trtlab.QuantConfig(quant_algo="W4A16_AWQ", group_size=GROUP)
    quantization = prepare(checkpoint.config, checkpoint.tensors, None, quant, rows)
    seconds: dict[str, list[tuple[float, float]]] = {}
    with torch.inference_mode():
        for layer in quantization.layers():
            for linear in layer.linears:
                for part in layer.parts(linear):
                    inputs = layer.observed.input_of(linear)
                    (ours, fast), (plain, slow) = (timed(way, part, inputs) for way in (awq.search_scale, every_error))
                    assert ours == plain, (layer.name, linear, ours, plain)
                    seconds.setdefault(linear, []).append((fast, slow))
            if layer.index == options.layers - 1:
                break
    for linear, pairs in seconds.items():
        print(f"{linear:16} {median(slow / fast for fast, slow in pairs):.2f} times faster, the same alphas")
    fast, slow = (sum(pair[side] for pairs in seconds.values() for pair in pairs) for side in (0, 1))
    print(f"all              {slow / fast:.2f} times faster ({fast:.2f} and {slow:.2f} s)")


if __name__ == "__main__":
    main()
