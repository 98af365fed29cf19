"""What each recipe costs a real model: perplexity and KL of SmolLM2, beside ModelOpt's own quantized model.

python benchmarks/recipes.py [--awq]

The texts are trtlab's own prose (``trtlab.evaluate.english``): twelve to calibrate with, three to measure. Where both
have the algorithm, ModelOpt quantizes the same weights in transformers, and its simulated model is measured on the same
token ids (``pip install nvidia-modelopt requests accelerate``). ``--awq`` measures its AWQ too.
"""

from __future__ import annotations

import argparse
import copy
import math
import warnings
from collections.abc import Sequence
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from transformers import AutoModelForCausalLM

import trtlab
from trtlab import QuantConfig
from trtlab.evaluate.english import CALIBRATION, HELD_OUT
from trtlab.evaluate.perplexity import divergence_of, loss_of, predicted
from trtlab.packaged import smollm2_path
from trtlab.quantize.modelopt import ROUTES
from trtlab.runtime.tokenizer import Tokenizer

RECIPES = {
    "W8A16": QuantConfig("W8A16"),
    "W4A16": QuantConfig("W4A16"),
    "W4A16_AWQ, groups of 64": QuantConfig("W4A16_AWQ", group_size=64),
    "W4A16_AWQ, groups of 32": QuantConfig("W4A16_AWQ", group_size=32),
    "the same, with the head": QuantConfig("W4A16_AWQ", group_size=32, quantize_lm_head=True),
    "SmoothQuant per tensor": QuantConfig("W8A8_SQ_PER_TENSOR_PLUGIN"),
    "SmoothQuant per channel": QuantConfig("W8A8_SQ_PER_CHANNEL"),
    "SmoothQuant per channel and token": QuantConfig("W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN"),
    "FP8": QuantConfig("FP8"),
    "INT8 KV, merged": QuantConfig(None, "INT8", kv_cache_scales="merged"),
    "INT8 KV, split": QuantConfig(None, "INT8"),
    "FP8 KV": QuantConfig(None, "FP8"),
}
Rows = Sequence[Sequence[int]]


def main() -> None:
    """Print a line for each recipe."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--awq", action="store_true", help="measure ModelOpt's AWQ too")
    beside = {"FP8", "W8A8_SQ_PER_CHANNEL", *["W4A16_AWQ"] * parser.parse_args().awq}
    checkpoint = trtlab.smollm2("float32")
    table = trtlab.compare_recipes(checkpoint, list(RECIPES.values()), calibration=CALIBRATION, texts=HELD_OUT)
    assert checkpoint.tokenizer_path is not None, "the packaged model has a tokenizer"
    encode = Tokenizer(checkpoint.tokenizer_path).encode
    calibration, held_out = ([encode(text) for text in texts] for texts in (CALIBRATION, HELD_OUT))
    plain = _logits(_model(), held_out)
    print(f"{'recipe':34} {'perplexity':>10} {'KL, nats':>9} {'last layer':>10}  ModelOpt")
    for title, row in zip(("float", *RECIPES), table.rows, strict=True):
        line = f"{title:34} {row.perplexity:10.2f} {row.divergence:9.4f} {row.distances[-1]:10.1%}"
        if row.quant is None:
            line += f"  {_perplexity(plain, held_out):.2f}"
        elif row.quant.quant_algo in beside and not row.quant.quantize_lm_head:
            theirs = _logits(_by_modelopt(row.quant, calibration), held_out)
            line += f"  {_perplexity(theirs, held_out):.2f}, KL {_divergence(theirs, plain):.4f}"
        print(line, flush=True)


def _model() -> Any:
    file = smollm2_path()
    kwargs: Any = {"gguf_file": file.name, "dtype": torch.float32}
    return AutoModelForCausalLM.from_pretrained(file.parent, trust_remote_code=False, **kwargs).eval()


def _by_modelopt(quant: QuantConfig, calibration: Rows) -> Any:
    """transformers' model with ModelOpt's quantizers in it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        route = ROUTES[str(quant.quant_algo)]
        settings = copy.deepcopy(getattr(mtq, route.name))
        route.adapt(settings, quant)
        with torch.inference_mode():
            return mtq.quantize(_model(), settings, lambda model: _logits(model, calibration))


def _logits(model: Any, rows: Rows) -> list[torch.Tensor]:
    """The logits of each text ``[tokens, vocabulary]``, each text alone."""
    with torch.inference_mode():
        return [model(torch.tensor([list(row)])).logits[0].float() for row in rows]


def _perplexity(logits: Sequence[torch.Tensor], rows: Rows) -> float:
    return math.exp(sum(map(loss_of, rows, logits)) / predicted(rows))


def _divergence(logits: Sequence[torch.Tensor], plain: Sequence[torch.Tensor]) -> float:
    return sum(map(divergence_of, logits, plain)) / sum(map(len, plain))


if __name__ == "__main__":
    main()
