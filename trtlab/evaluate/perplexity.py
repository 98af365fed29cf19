"""Perplexity of texts, distance from another model, and the share of questions answered exactly."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from trtlab.checkpoint import Checkpoint
from trtlab.config.sampling import SamplingParams
from trtlab.errors import RequestError
from trtlab.session.session import Session

SPARE_TOKENS = 8  # beyond the longest expected answer
Model = Session | Checkpoint
Texts = Sequence[str] | Sequence[Sequence[int]]


class Asked(Protocol):
    """A prompt that ends where the answer begins, and the exact answer."""

    @property
    def prompt(self) -> str: ...

    @property
    def answer(self) -> str: ...


def perplexity(model: Model, texts: Texts) -> float:
    """exp of the mean loss of every token but each text's first; texts are read on their own.

    A checkpoint is run in torch. Raises RequestError for texts of which none has two tokens.
    """
    with opened(model) as session:
        rows = encoded(session, texts)
        return perplexity_of(rows, map(session.logits, rows))


def divergence(model: Model, reference: Model, texts: Texts) -> float:
    """Mean Kullback-Leibler divergence of the next-token distributions from the reference's, in nats a token.

    It sees every changed probability, where perplexity lets errors of either sign cancel.
    """
    with opened(model) as session, opened(reference) as original:
        rows = encoded(session, texts)
        return divergence_of(map(session.logits, rows), map(original.logits, rows))


def perplexity_of(rows: Sequence[list[int]], logits: Iterable[Tensor]) -> float:
    """``perplexity`` of token ids from the logits that follow each of their tokens ``[tokens, vocab]``."""
    total, tokens = 0.0, 0
    for ids, after in zip(rows, logits, strict=True):
        total += F.cross_entropy(after[:-1], torch.tensor(ids[1:]), reduction="sum").item()
        tokens += len(ids) - 1
    return math.exp(total / tokens)


def divergence_of(logits: Iterable[Tensor], reference: Iterable[Tensor]) -> float:
    """``divergence`` from both models' logits, text by text ``[tokens, vocab]``."""
    total, tokens = 0.0, 0
    for got, expected in zip(logits, reference, strict=True):
        pair = got.log_softmax(-1), expected.log_softmax(-1)
        total += F.kl_div(*pair, reduction="sum", log_target=True).item()
        tokens += len(got)
    return total / tokens


def accuracy(model: Model, questions: Sequence[Asked], max_new_tokens: int | None = None) -> float:
    """The share of questions whose greedy answer is exactly the expected text, without surrounding blanks.

    ``max_new_tokens=None`` leaves room for the longest expected answer, and for a few tokens that would be wrong.
    """
    if not questions:
        raise RequestError("there are no questions", remedy="trtlab.tiny.corpus.questions() makes some")
    with opened(model) as session:
        if max_new_tokens is None:
            max_new_tokens = SPARE_TOKENS + max(len(session.encode(question.answer)) for question in questions)
        answers = session.generate([q.prompt for q in questions], SamplingParams(max_new_tokens=max_new_tokens))
    pairs = zip(answers, questions, strict=True)
    return sum(completion.text.strip() == question.answer for completion, question in pairs) / len(questions)


@contextlib.contextmanager
def opened(model: Model) -> Iterator[Session]:
    """A session as it is, or one in torch on a checkpoint, closed afterwards."""
    if isinstance(model, Session):
        yield model
        return
    with model.build(plan=False) as engine, engine.session(backend="torch") as session:
        yield session


def encoded(session: Session, texts: Texts) -> list[list[int]]:
    """The token ids of each text; RequestError when none has two, which is the least that can be compared."""
    if isinstance(texts, str):
        raise RequestError("one string was given", expected="a list of texts")
    rows = [session.encode(text) if isinstance(text, str) else list(text) for text in texts]
    kept = [row for row in rows if len(row) > 1]
    if not kept:
        raise RequestError("no text has two tokens to compare", remedy="give longer texts")
    return kept
