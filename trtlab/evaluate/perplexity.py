"""Perplexity of texts, distance from another model, and the share of questions answered exactly."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F

from trtlab.checkpoint import Checkpoint
from trtlab.config import SamplingParams
from trtlab.errors import RequestError
from trtlab.session import Session

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
    total, tokens = 0.0, 0
    with opened(model) as session:
        for ids in _encoded(session, texts):
            logits = session.logits(ids)[:-1]  # [tokens - 1, vocab]
            total += F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum").item()
            tokens += len(ids) - 1
    return math.exp(total / tokens)


def divergence(model: Model, reference: Model, texts: Texts) -> float:
    """Mean Kullback-Leibler divergence of the next-token distributions from the reference's, in nats a token.

    It sees every changed probability, where perplexity lets errors of either sign cancel.
    """
    total, tokens = 0.0, 0
    with opened(model) as session, opened(reference) as original:
        for ids in _encoded(session, texts):
            expected = original.logits(ids).log_softmax(-1)
            total += F.kl_div(session.logits(ids).log_softmax(-1), expected, reduction="sum", log_target=True).item()
            tokens += len(ids)
    return total / tokens


def accuracy(model: Model, questions: Sequence[Asked], max_new_tokens: int = 32) -> float:
    """The share of questions whose greedy answer is exactly the expected text, without surrounding blanks."""
    if not questions:
        raise RequestError("there are no questions", remedy="trtlab.tiny.corpus.questions() makes some")
    with opened(model) as session:
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


def _encoded(session: Session, texts: Texts) -> list[list[int]]:
    if isinstance(texts, str):
        raise RequestError("one string was given", expected="a list of texts")
    rows = [session.encode(text) if isinstance(text, str) else list(text) for text in texts]
    kept = [row for row in rows if len(row) > 1]
    if not kept:
        raise RequestError("no text has two tokens to compare", remedy="give longer texts")
    return kept
