"""Turns documents into training batches of token ids and loss weights. Knows no model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from trtlab.tiny.corpus import NOISE, Document, documents, passkey_document
from trtlab.tiny.tokenizer import BOS_ID, EOS_ID
from trtlab.tiny.world import Dice

Array = npt.NDArray[np.integer[Any]]

LENGTHS = (256, 1024, 8192)
HAYSTACK, TEXT, ANSWER = 1, 4, 16  # relative weights in the loss
# (end of the phase as a share of the training, share of its steps at each of LENGTHS): short first, long later
CURRICULUM = (
    (0.25, (0.8, 0.2, 0.0)),
    (0.50, (0.5, 0.3, 0.2)),
    (1.00, (0.3, 0.2, 0.5)),
)


@dataclass(frozen=True)
class Batch:
    """The rows of one step: ``tokens`` uint16 [rows, length + 1], ``weights`` uint8 of the same shape."""

    tokens: Array
    weights: Array


class Batches:
    """Makes the batch of any step from (seed, step) only, so that workers can make them in any order."""

    def __init__(
        self, tokenizer_file: str, seed: int, steps: int, tokens: int, lengths: tuple[int, ...] = LENGTHS
    ) -> None:
        from tokenizers import Tokenizer

        self.tokenizer = Tokenizer.from_file(tokenizer_file)
        self.seed, self.steps, self.tokens, self.lengths = seed, steps, tokens, lengths
        self.answer_id = self._single(":")
        self.after_id = self._single("Answer")
        self.line_tokens = max(len(self.tokenizer.encode(f"\n{line}", add_special_tokens=False).ids) for line in NOISE)

    def __call__(self, step: int) -> Batch:
        dice = Dice(self.seed, 5, step)
        shares = next(shares for until, shares in CURRICULUM if step < until * self.steps)
        length = dice.weighted(tuple(zip(shares, self.lengths, strict=True)))
        rows = max(1, self.tokens // length)
        tokens = np.zeros((rows, length + 1), dtype=np.uint16)
        weights = np.zeros((rows, length + 1), dtype=np.uint8)
        stream = self._stream(Dice(self.seed, 6, step).below(2**53))
        for row in range(rows):
            start = 0
            if length != self.lengths[0] and dice.chance(0.5):
                start = self._place(tokens, weights, row, start, *self._passkey(dice, length))
            while True:
                ids, marks = next(stream)
                if start + len(ids) > length + 1:
                    break
                start = self._place(tokens, weights, row, start, ids, marks)
        return Batch(tokens, weights)

    @staticmethod
    def _place(tokens: Array, weights: Array, row: int, start: int, ids: Array, marks: Array) -> int:
        tokens[row, start : start + len(ids)] = ids
        weights[row, start : start + len(ids)] = marks
        weights[row, start] = 0  # a document's first token does not follow from the document before it
        return start + len(ids)

    def _stream(self, seed: int) -> Any:
        source = documents(seed)
        while True:
            chunk = [next(source) for _ in range(256)]
            encodings = self.tokenizer.encode_batch([document.text for document in chunk])
            for document, encoding in zip(chunk, encodings, strict=True):
                yield self._weighed(document, encoding.ids)

    def _passkey(self, dice: Dice, length: int) -> tuple[Array, Array]:
        """A passkey document of a random length up to ``length``, which it often fills."""
        target = length if dice.chance(0.3) else length // 16 + dice.below(length - length // 16)
        lines = max(0, int((target - 100) / (self.line_tokens - 1.5)))
        while True:
            document = passkey_document(dice, "train", lines, dice.random())
            ids = self.tokenizer.encode(document.text).ids
            if len(ids) <= length + 1:
                return self._weighed(document, ids)
            lines -= max(1, (len(ids) - length) // self.line_tokens)

    def _weighed(self, document: Document, ids: list[int]) -> tuple[Array, Array]:
        tokens = np.array(ids, dtype=np.uint16)
        marks = np.full(len(ids), HAYSTACK if document.kind == "passkey" else TEXT, dtype=np.uint8)
        starts = np.flatnonzero((tokens[1:] == self.answer_id) & (tokens[:-1] == self.after_id)) + 2
        ends = np.flatnonzero(tokens == EOS_ID) + 1
        for start in starts:
            marks[start : ends[np.searchsorted(ends, start)]] = ANSWER
        assert tokens[0] == BOS_ID, f"a document starts with {tokens[:3]}, not with BOS"
        return tokens, marks

    def _single(self, text: str) -> int:
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        assert len(ids) == 1, f"{text!r} is {len(ids)} tokens, not one"
        return int(ids[0])
