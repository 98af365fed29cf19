"""Compares recipes: what each saves and what it costs, measured on the user's own texts and questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from trtlab.card import Shown
from trtlab.checkpoint import Checkpoint, QuantizedCheckpoint
from trtlab.config.calls import public
from trtlab.config.quant import QuantConfig
from trtlab.evaluate.perplexity import (
    Question,
    Texts,
    accuracy,
    divergence_of,
    open_model,
    perplexity_of,
    token_rows,
)
from trtlab.session.session import Session


@dataclass(frozen=True)
class RecipeRow:
    """The measurements of one recipe; the first row of a comparison is the original model, without a recipe."""

    title: str
    quant: QuantConfig | None
    nbytes: int
    kv_bytes_per_token: int
    perplexity: float
    divergence: float
    accuracy: float
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
    calibration: Texts,
    texts: Texts,
    questions: Sequence[Question],
) -> RecipeComparison:
    """Quantize by every recipe and compare each result with the original, all in torch.

    Args:
        checkpoint: The original model.
        recipes: The settings to compare.
        calibration: Texts for the recipes that read them.
        texts: Texts for perplexity and divergence.
        questions: Prompts with their exact answers, for accuracy.
    """
    with open_model(checkpoint) as original:
        ids = token_rows(original, texts)
        expected = [original.logits(row) for row in ids]
        rows = [_measure("as it was", None, checkpoint, original, ids, expected, questions)]
    for quant in recipes:
        quantized = checkpoint.quantize(quant, calibration=calibration if quant.reads_texts else None)
        with open_model(quantized) as session:
            rows.append(_measure(recipe_title(quant), quant, quantized, session, ids, expected, questions))
    return RecipeComparison(tuple(rows))


def _measure(
    title: str,
    quant: QuantConfig | None,
    model: Checkpoint,
    session: Session,
    ids: Sequence[list[int]],
    expected: Sequence[Tensor],
    questions: Sequence[Question],
) -> RecipeRow:
    """The row of one model; ``expected`` are the original's logits after each token of ``ids``."""
    report = model.report if isinstance(model, QuantizedCheckpoint) else None
    worst = report.worst(1) if report is not None else ()
    logits = [session.logits(row) for row in ids]
    return RecipeRow(
        title,
        quant,
        model.nbytes,
        model.config.kv_bytes_per_token,
        perplexity_of(ids, logits),
        divergence_of(logits, expected),
        accuracy(session, questions),
        worst[0].snr_db if worst else None,
    )


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
