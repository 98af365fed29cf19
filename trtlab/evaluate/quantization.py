"""Compares recipes: what each saves and what it costs, measured on the user's own texts and questions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trtlab.card import Shown
from trtlab.checkpoint import Checkpoint, QuantizedCheckpoint
from trtlab.config.calls import public
from trtlab.config.quant import QuantConfig
from trtlab.errors import RequestError
from trtlab.evaluate.forward import ForwardPass
from trtlab.evaluate.perplexity import Question, Texts, accuracy, divergence_of, loss_of, predicted, token_rows
from trtlab.progress import progress
from trtlab.quantize.report import QuantizationReport
from trtlab.quantize.run import Quantization, prepare
from trtlab.runtime.tokenizer import Tokenizer
from trtlab.storage.lazy import LazyTensor


@dataclass(frozen=True)
class RecipeRow:
    """The measurements of one recipe; the first row of a comparison is the original model, without a recipe.

    ``distances`` has a number for each layer: how far the hidden states after it are from the original's, as
    ``||x - original|| / ||original||``, the mean over tokens. The errors of all earlier layers are in it.
    ``divergence`` is the Kullback-Leibler divergence from the original's next-token distributions, in nats a token.
    ``accuracy`` is None without questions, ``worst_snr_db`` where no linear is quantized.
    """

    title: str
    quant: QuantConfig | None
    nbytes: int
    kv_bytes_per_token: int
    perplexity: float
    divergence: float
    distances: tuple[float, ...]
    accuracy: float | None
    worst_snr_db: float | None


@dataclass(frozen=True, repr=False)
class RecipeComparison(Shown):
    """The rows of the original model and of each recipe, in the order of the arguments."""

    rows: tuple[RecipeRow, ...]


@public
def compare_recipes(
    checkpoint: Checkpoint,
    recipes: Sequence[QuantConfig],
    *,
    texts: Texts,
    calibration: Texts | None = None,
    questions: Sequence[Question] | None = None,
) -> RecipeComparison:
    """Quantize by every recipe and compare each result with the original, in torch on the CPU, in float32.

    The texts run layer by layer, so that one layer is in memory in float32, besides one quantized model and the
    original's hidden states: 4 bytes times layers, hidden size and tokens of all texts.

    Args:
        checkpoint: The original model.
        recipes: The settings to compare.
        texts: Texts, or lists of token ids, for perplexity, divergence and the distance of each layer. Each is read
            alone; those of fewer than two tokens are left out.
        calibration: Texts for the recipes that read some. Without them they read ``texts``, and their figures are then
            better than those of texts that they have not seen.
        questions: Prompts with their exact answers, for accuracy; None to leave it out.

    Raises:
        RequestError: There is no text of two tokens, or one is too long or has ids outside the vocabulary.
        QuantizeError: The model is quantized already, or a recipe does not fit it.
    """
    checkpoint.require_whole("compared")
    tokenizer = Tokenizer(checkpoint.tokenizer_path) if checkpoint.tokenizer_path else None
    rows = _rows(checkpoint, tokenizer, texts)
    read = rows if calibration is None else calibration
    config, tensors = checkpoint.config, checkpoint.tensors
    prepared = [prepare(config, tensors, tokenizer, quant, read if quant.reads_texts else None) for quant in recipes]
    steps = config.num_hidden_layers * (1 + len(prepared)) + sum(quantization.steps for quantization in prepared)
    with progress("comparing recipes", steps, unit="layer") as bar:
        original = _Original(checkpoint, rows, bar.update)
        compared = [original.row("as it was", None, checkpoint, None, questions)]
        for quantization in prepared:
            quantized, report = _quantized(checkpoint, quantization, bar.update)
            quant = quantization.config.quantization
            compared.append(original.row(recipe_title(quant), quant, quantized, report, questions))
    return RecipeComparison(tuple(compared))


def _rows(checkpoint: Checkpoint, tokenizer: Tokenizer | None, texts: Texts) -> list[list[int]]:
    """The checked token ids of each text."""

    def encode(text: str) -> list[int]:
        if tokenizer is None:
            raise RequestError("this checkpoint has no tokenizer", remedy="give token ids instead of texts")
        return tokenizer.encode(text)

    rows = token_rows(encode, texts)
    limit, vocab = checkpoint.config.max_position_embeddings, checkpoint.config.vocab_size
    for row in rows:
        if len(row) > limit:
            raise RequestError(f"a text has {len(row)} tokens, the model reads {limit}", remedy="split the text")
        outside = next((token for token in row if not 0 <= token < vocab), None)
        if outside is not None:
            raise RequestError(f"a text has token id {outside}", expected=f"0 to {vocab - 1}")
    return rows


def _quantized(
    checkpoint: Checkpoint, quantization: Quantization, done: Callable[[int], object]
) -> tuple[QuantizedCheckpoint, QuantizationReport]:
    quantization.peak(in_memory=True).require_room()
    tensors: dict[str, LazyTensor] = {}
    report = quantization.run(tensors.__setitem__, done)
    source, tokenizer = checkpoint.source, checkpoint.tokenizer_path
    return QuantizedCheckpoint(quantization.config, tensors, source, tokenizer, report=report), report


class _Original:
    """The original model's hidden states on all texts, and how a model is measured against them."""

    def __init__(self, checkpoint: Checkpoint, rows: list[list[int]], done: Callable[[int], object]) -> None:
        self._rows = rows
        self._done = done
        self._forward = ForwardPass(checkpoint, rows)
        self._hidden: list[list[Tensor]] = []  # by layer and text
        for hidden in self._forward.layers():
            self._hidden.append(hidden)
            done(1)

    def row(
        self,
        title: str,
        quant: QuantConfig | None,
        model: Checkpoint,
        report: QuantizationReport | None,
        questions: Sequence[Question] | None,
    ) -> RecipeRow:
        """The measurements of a model; the original itself when there is no recipe."""
        forward, final, distances = self._forward, self._hidden[-1], [0.0] * len(self._hidden)
        if quant is not None:
            forward, distances = ForwardPass(model, self._rows), []
            for final, original in zip(forward.layers(), self._hidden, strict=True):
                distances.append(_distance(final, original))
                self._done(1)
        loss, divergence = 0.0, 0.0
        for row, got, expected in zip(
            self._rows, forward.logits(final), self._forward.logits(self._hidden[-1]), strict=True
        ):
            loss += loss_of(row, got)
            divergence += divergence_of(got, expected)
        worst = report.worst(1) if report is not None else ()
        return RecipeRow(
            title=title,
            quant=quant,
            nbytes=model.nbytes,
            kv_bytes_per_token=model.config.kv_bytes_per_token,
            perplexity=math.exp(loss / predicted(self._rows)),
            divergence=divergence / sum(map(len, self._rows)),
            distances=tuple(distances),
            accuracy=None if questions is None else accuracy(model, questions),
            worst_snr_db=worst[0].snr_db if worst else None,
        )


def _distance(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The mean over all tokens of ``||got - expected|| / ||expected||``, hidden states ``[tokens, hidden]`` by text."""
    x, original = torch.cat(list(got)), torch.cat(list(expected))
    return float(((x - original).norm(dim=-1) / original.norm(dim=-1)).mean())


def recipe_title(quant: QuantConfig) -> str:
    """A recipe in short, such as ``W8A16 · INT8 KV split``."""
    weights: str = quant.quant_algo or ""
    if quant.algorithm is not None and quant.algorithm.grouped:
        weights += f" g{quant.group_size}"
    if quant.algorithm is not None and quant.algorithm.family.startswith("smoothquant"):
        weights += " alpha searched" if quant.smoothquant_val is None else f" alpha {quant.smoothquant_val:g}"
    if quant.quantizes_head:
        weights += " with head"
    cache = ""
    if quant.kv_cache_quant_algo == "INT8":
        cache = f"INT8 KV {quant.kv_cache_scales}"
    elif quant.kv_cache_quant_algo is not None:
        cache = f"{quant.kv_cache_quant_algo} KV"
    return " · ".join(part for part in (weights, cache) if part)
