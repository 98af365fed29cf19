"""Calibration texts as packed batches of token ids. Knows no model."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trtlab.errors import QuantizeError
from trtlab.runtime.tokenizer import Tokenizer

Texts = Sequence[str] | Sequence[Sequence[int]]
MAX_TOKENS = 512  # of one text, as in TensorRT-LLM; the rest of the text is not used
BATCH_TOKENS = 2048  # of one packed batch, at most
SAMPLE_ROWS = 256  # rows of each linear's input that are kept, evenly spaced over all texts


@dataclass(frozen=True)
class TextBatch:
    """Several texts, concatenated: ``ids`` ``[tokens]`` and the length of each text.

    ``sampled`` are the rows whose activations are kept. ``shares`` ``[tokens]`` are the weights of the tokens in means:
    every text has the same sum, and all batches together sum to 1.
    """

    ids: Tensor
    lengths: tuple[int, ...]
    sampled: Tensor
    shares: Tensor


def encode_texts(texts: Texts, tokenizer: Tokenizer | None, vocab_size: int, context: int) -> list[list[int]]:
    """The token ids of each text, at most MAX_TOKENS of them and at most the model's ``context``.

    Raises QuantizeError if there are no texts, or a text has fewer than two tokens or unknown token ids.
    """
    if isinstance(texts, str):
        raise QuantizeError("calibration needs a list of texts", got="one string", remedy='pass ["...", "..."]')
    if isinstance(texts, Mapping) or not isinstance(texts, Iterable):
        raise QuantizeError("calibration needs a list of texts", got=repr(texts), remedy='pass ["...", "..."]')
    items: list[str | Sequence[int]] = list(texts)
    if not items:
        raise QuantizeError("calibration has no texts", remedy="pass some that look like what the model will read")
    rows = [_encode(number, text, tokenizer)[: min(MAX_TOKENS, context)] for number, text in enumerate(items)]
    for number, row in enumerate(rows):
        if len(row) < 2:
            raise QuantizeError(
                f"calibration text {number} is too short: {len(row)} tokens",
                expected="at least 2 tokens",
                remedy="leave it out, or join short texts",
            )
        outside = next((token for token in row if not 0 <= token < vocab_size), None)
        if outside is not None:
            raise QuantizeError(f"calibration text {number} has token id {outside}", expected=f"0 to {vocab_size - 1}")
    if tokenizer is not None and all(token in tokenizer.special_ids for row in rows for token in row):
        raise QuantizeError(
            "the calibration texts have no token that the tokenizer knows",
            remedy="pass texts in the script and language that the model was trained on",
        )
    return rows


def _encode(number: int, text: str | Sequence[int], tokenizer: Tokenizer | None) -> list[int]:
    if not isinstance(text, str):
        try:
            return [operator.index(token) for token in text]
        except TypeError as error:
            raise QuantizeError(
                f"calibration text {number} is neither a string nor a list of token ids",
                got=repr(text)[:80],
                remedy='pass strings, ["...", "..."], or one list of int for each text',
            ) from error
    if tokenizer is None:
        raise QuantizeError(
            "this checkpoint has no tokenizer", remedy="pass token ids, or put tokenizer.json in its folder"
        )
    return tokenizer.encode(text)


def batches(rows: Sequence[Sequence[int]]) -> list[TextBatch]:
    """Texts packed into batches in their order, up to BATCH_TOKENS tokens in a batch."""
    groups: list[list[Sequence[int]]] = [[]]
    for row in rows:
        if groups[-1] and sum(map(len, groups[-1])) + len(row) > BATCH_TOKENS:
            groups.append([])
        groups[-1].append(row)
    total = sum(map(len, rows))
    stride = max(1, -(-total // SAMPLE_ROWS))
    packed, before = [], 0
    for group in groups:
        lengths = tuple(map(len, group))
        shares = torch.cat([torch.full((n,), 1.0 / (n * len(rows))) for n in lengths])
        sampled = torch.arange(-before % stride, sum(lengths), stride)
        packed.append(TextBatch(torch.tensor([t for row in group for t in row]), lengths, sampled, shares))
        before += sum(lengths)
    return packed
