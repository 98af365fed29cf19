"""Turns tokens into text piece by piece: a piece is returned once no later token can change it. Knows no requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Decodes(Protocol):
    """A tokenizer that turns ids into text."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of some ids."""
        ...

    def ends_open(self, token_ids: Sequence[int]) -> bool:
        """Whether the ids end with a single byte, whose meaning depends on the bytes that may follow."""
        ...


class TextStream:
    """The text of one answer as it grows; it ends before the first stop word.

    A trailing part that is an unfinished character, or that could be the beginning of a stop word, is held back.
    """

    def __init__(self, tokenizer: Decodes, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._ids: list[int] = []
        self._context = 0  # where decoding begins: ids from here to _read are known, and the new ones depend on them
        self._read = 0
        self._held = ""
        self.text = ""
        self.stopped_by: str | None = None

    def feed(self, tokens: Sequence[int]) -> str:
        """Add tokens and return the text that is final now; empty if there is none."""
        if self.stopped_by is not None or not tokens:
            return ""
        self._ids.extend(tokens)
        known = self._tokenizer.decode(self._ids[self._context : self._read])
        longer = self._tokenizer.decode(self._ids[self._context :])
        if longer.endswith("�") or self._tokenizer.ends_open(self._ids):
            return ""
        if longer != known:  # ids without text give the next ones no context: a tokenizer may drop their first space
            self._context = self._read
        self._read = len(self._ids)
        return self._settle(longer[len(known) :])

    def finish(self) -> str:
        """Return the text that was still held back, at the end of the answer."""
        if self.stopped_by is not None:
            return ""
        known = self._tokenizer.decode(self._ids[self._context : self._read])
        rest = self._tokenizer.decode(self._ids[self._context :])[len(known) :]
        self._context = self._read = len(self._ids)
        piece = self._settle(rest)
        if self.stopped_by is None:
            piece += self._held
            self.text += self._held
            self._held = ""
        return piece

    def _settle(self, new: str) -> str:
        pending = self._held + new
        cuts = [(pending.find(word), word) for word in self._stop if word in pending]
        if cuts:
            cut, self.stopped_by = min(cuts)
            self._held = ""
        else:
            cut = len(pending) - _overlap(pending, self._stop)
            self._held = pending[cut:]
        self.text += pending[:cut]
        return pending[:cut]


def _overlap(text: str, stop: Sequence[str]) -> int:
    """The length of the longest end of ``text`` that is the beginning of a stop word."""
    sizes = (
        size for word in stop for size in range(min(len(word) - 1, len(text)), 0, -1) if text.endswith(word[:size])
    )
    return max(sizes, default=0)
