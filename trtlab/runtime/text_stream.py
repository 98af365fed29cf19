"""Turns tokens into text piece by piece: a piece is returned once no later token can change it. Knows no requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

FIRST_MARK = 0xD800  # half of a character: no text that a tokenizer decodes can contain it


class Decodes(Protocol):
    """A tokenizer that turns ids into text."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of some ids."""
        ...

    def ends_open(self, token_ids: Sequence[int]) -> bool:
        """Whether the ids end with a single byte, whose meaning depends on the bytes that may follow."""
        ...

    @property
    def special_texts(self) -> Mapping[str, int]:
        """The texts of the special tokens, which ``decode`` leaves out, and their ids."""
        ...


@dataclass(frozen=True)
class _State:
    """All that a stream knows. It is replaced in one assignment, so that an interrupt leaves it before or after it."""

    fed: int = 0
    ids: tuple[int, ...] = ()  # the newest ids; the text has the first ``known`` of them, and the others depend on them
    known: int = 0
    marks: str = ""  # marks of special tokens that came within an unfinished character
    held: str = ""  # text that could be the beginning of a stop word, with marks
    text: str = ""
    stopped_by: str | None = None


class TextStream:
    """The text of one answer as it grows; it ends before the first stop word.

    A trailing part that is an unfinished character, or that could be the beginning of a stop word, is held back. A stop
    word may contain special tokens by their text, though the answer's text has none. After an error of the tokenizer,
    or an interrupt, ``fed`` tells how many tokens the text has taken: the others can be fed again.
    """

    def __init__(self, tokenizer: Decodes, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        inside = [
            (text, number) for text, number in tokenizer.special_texts.items() if any(text in word for word in stop)
        ]
        inside.sort(key=lambda special: -len(special[0]))  # the longest first, as tokenizers match them
        self._marks = {number: chr(FIRST_MARK + place) for place, (_, number) in enumerate(inside)}
        self._stop: list[tuple[str, str]] = []  # a text to look for, and the stop word that it stands for
        for word in stop:
            marked = word
            for text, number in inside:
                marked = marked.replace(text, self._marks[number])
            self._stop += [(form, word) for form in dict.fromkeys((word, marked))]
        self._state = _State()

    @property
    def text(self) -> str:
        """The text that is final so far."""
        return self._state.text

    @property
    def stopped_by(self) -> str | None:
        """The stop word that ended the text."""
        return self._state.stopped_by

    @property
    def fed(self) -> int:
        """How many tokens were fed so far."""
        return self._state.fed

    def feed(self, tokens: Sequence[int]) -> str:
        """Add tokens and return the text that is final now; empty if there is none."""
        state, run = self._state, []
        for token in tokens:
            if (mark := self._marks.get(token)) is None:
                run.append(token)
                continue
            state, run = self._add(state, run), []
            state = self._add(replace(state, marks=state.marks + mark), [token])
        return self._commit(replace(self._add(state, run), fed=state.fed + len(tokens)))

    def finish(self) -> str:
        """Return the text that was still held back, at the end of the answer."""
        state = self._state
        if state.stopped_by is not None:
            return ""
        known, longer = self._decode(state)
        state = self._settle(replace(state, ids=(), known=0), longer[len(known) :])
        if state.stopped_by is None:
            state = replace(state, text=state.text + self._visible(state.held), held="")
        return self._commit(state)

    def _commit(self, state: _State) -> str:
        piece = state.text[len(self._state.text) :]
        self._state = state
        return piece

    def _add(self, state: _State, tokens: Sequence[int]) -> _State:
        if state.stopped_by is not None or not tokens:
            return state
        state = replace(state, ids=(*state.ids, *tokens))
        known, longer = self._decode(state)
        if longer.endswith("�") or self._tokenizer.ends_open(state.ids):
            return state
        # Ids without text give the next ones no context: a tokenizer may drop their first space.
        context = state.known if longer != known else 0
        return self._settle(
            replace(state, ids=state.ids[context:], known=len(state.ids) - context), longer[len(known) :]
        )

    def _decode(self, state: _State) -> tuple[str, str]:
        """The text of the known ids, and that of all."""
        return self._tokenizer.decode(state.ids[: state.known]), self._tokenizer.decode(state.ids)

    def _settle(self, state: _State, new: str) -> _State:
        """Make new text final, up to a stop word or what could become one."""
        pending = state.held + new + state.marks
        state = replace(state, marks="")
        found = [(pending.find(form), word) for form, word in self._stop if form in pending]
        if found:
            cut, stopped_by = min(found)
            return replace(state, held="", text=state.text + self._visible(pending[:cut]), stopped_by=stopped_by)
        cut = len(pending) - _overlap(pending, [form for form, _ in self._stop])
        return replace(state, held=pending[cut:], text=state.text + self._visible(pending[:cut]))

    def _visible(self, text: str) -> str:
        return text.translate(dict.fromkeys(map(ord, self._marks.values())))


def _overlap(text: str, stop: Sequence[str]) -> int:
    """The length of the longest end of ``text`` that is the beginning of a stop word."""
    sizes = (
        size for word in stop for size in range(min(len(word) - 1, len(text)), 0, -1) if text.endswith(word[:size])
    )
    return max(sizes, default=0)
