"""One row a recipe: what it saves and what it costs, measured on the reader's own texts and questions."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from trtlab.card import Shown
from trtlab.checkpoint import Checkpoint, QuantizedCheckpoint
from trtlab.config.quant import QuantConfig
from trtlab.evaluate.perplexity import Asked, Texts, accuracy, divergence_of, encoded, opened, perplexity_of
from trtlab.session.session import Session


@dataclass(frozen=True)
class Measured:
    """One recipe; the first row of a comparison is the model as it was, with no recipe."""

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
    """Recipes side by side, in the order given."""

    rows: tuple[Measured, ...]


def compare_recipes(
    checkpoint: Checkpoint,
    recipes: Sequence[QuantConfig],
    *,
    calibration: Texts,
    texts: Texts,
    questions: Sequence[Asked],
) -> RecipeComparison:
    """Quantize by every recipe and measure each against the original, all in torch."""
    with opened(checkpoint) as original:
        ids = encoded(original, texts)
        expected = [original.logits(row) for row in ids]
        rows = [_measured("as it was", None, checkpoint, original, ids, expected, questions)]
    for quant in recipes:
        with contextlib.redirect_stdout(io.StringIO()):  # the predicted peak, a line for each recipe
            made = checkpoint.quantize(quant, calibration=calibration if quant.reads_texts else None)
        with opened(made) as session:
            rows.append(_measured(recipe_title(quant), quant, made, session, ids, expected, questions))
    return RecipeComparison(tuple(rows))


def _measured(
    title: str,
    quant: QuantConfig | None,
    model: Checkpoint,
    session: Session,
    ids: Sequence[list[int]],
    expected: Sequence[Tensor],
    questions: Sequence[Asked],
) -> Measured:
    """One row; ``expected`` are the original's logits after each token of ``ids``."""
    report = model.report if isinstance(model, QuantizedCheckpoint) else None
    worst = report.worst(1) if report is not None else ()
    logits = [session.logits(row) for row in ids]
    return Measured(
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
    """``W8A16 · INT8 KV split`` and the like."""
    weights: str = quant.quant_algo or ""
    if quant.algorithm is not None and quant.algorithm.grouped:
        weights += f" g{quant.group_size}"
    if quant.algorithm is not None and quant.algorithm.family.startswith("smoothquant"):
        weights += " alpha searched" if quant.smoothquant_val is None else f" alpha {quant.smoothquant_val:g}"
    cache = ""
    if quant.kv_cache_quant_algo == "INT8":
        cache = f"INT8 KV {quant.kv_cache_scales}"
    elif quant.kv_cache_quant_algo is not None:
        cache = f"{quant.kv_cache_quant_algo} KV"
    return " · ".join(part for part in (weights, cache) if part)
