"""Perplexity of texts, divergence from another model, and the share of questions answered exactly."""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from trtlab.checkpoint import Checkpoint
from trtlab.config.calls import public
from trtlab.config.sampling import SamplingParams
from trtlab.errors import RequestError
from trtlab.session.session import Session
from trtlab.validation import shorten

QUESTIONS = "trtlab.tiny.corpus.questions() makes some"
SPARE_TOKENS = 8  # after the longest expected answer
Model = Session | Checkpoint
Texts = Sequence[str] | Sequence[Sequence[int]]


class Question(Protocol):
    """A prompt that ends where the answer begins, and the exact answer."""

    @property
    def prompt(self) -> str: ...

    @property
    def answer(self) -> str: ...


@public
def perplexity(model: Model, texts: Texts) -> float:
    """exp of the mean loss of all tokens except the first of each text; each text is read alone.

    A checkpoint is run in torch. Raises RequestError when no text has two tokens.
    """
    with open_model(model) as session:
        rows = token_rows(session.encode, texts)
        return math.exp(sum(loss_of(row, session.logits(row)) for row in rows) / predicted(rows))


@public
def divergence(model: Model, reference: Model, texts: Texts) -> float:
    """Mean Kullback-Leibler divergence of the next-token distributions from the reference's, in nats a token.

    It measures every changed probability; in perplexity errors of opposite sign cancel.
    """
    with open_model(model) as session, open_model(reference) as original:
        rows = token_rows(session.encode, texts)
        return sum(divergence_of(session.logits(row), original.logits(row)) for row in rows) / sum(map(len, rows))


def loss_of(ids: Sequence[int], logits: Tensor) -> float:
    """The summed loss of all tokens but the first, in nats, from the logits ``[tokens, vocab]`` after each token."""
    return F.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="sum").item()


def predicted(rows: Sequence[Sequence[int]]) -> int:
    """The number of tokens that ``loss_of`` counts in all texts."""
    return sum(len(row) - 1 for row in rows)


def divergence_of(logits: Tensor, reference: Tensor) -> float:
    """The summed divergence of a text's next-token distributions, in nats; both ``[tokens, vocab]``."""
    pair = logits.log_softmax(-1), reference.log_softmax(-1)
    return F.kl_div(*pair, reduction="sum", log_target=True).item()


@public
def accuracy(model: Model, questions: Sequence[Question], max_new_tokens: int | None = None) -> float:
    """The share of questions whose greedy answer is exactly the expected text, surrounding blanks ignored.

    ``max_new_tokens=None`` allows the length of the longest expected answer and a few tokens more.
    """
    for question in questions if isinstance(questions, Sequence) else (questions,):
        if not (hasattr(question, "prompt") and hasattr(question, "answer")):
            raise RequestError("a question has no prompt and answer", got=shorten(question), remedy=QUESTIONS)
    if not questions:
        raise RequestError("there are no questions", remedy=QUESTIONS)
    with open_model(model) as session:
        if max_new_tokens is None:
            max_new_tokens = SPARE_TOKENS + max(len(session.encode(question.answer)) for question in questions)
        answers = session.generate([q.prompt for q in questions], SamplingParams(max_new_tokens=max_new_tokens))
    pairs = zip(answers, questions, strict=True)
    return sum(completion.text.strip() == question.answer for completion, question in pairs) / len(questions)


@contextlib.contextmanager
def open_model(model: Model) -> Iterator[Session]:
    """The session itself, or for a checkpoint a session in torch that is closed afterwards."""
    if isinstance(model, Session):
        yield model
        return
    with model.build(plan=False) as engine, engine.session(backend="torch") as session:
        yield session


def token_rows(encode: Callable[[str], list[int]], texts: Texts) -> list[list[int]]:
    """The token ids of each text with two or more tokens; RequestError when there is none."""
    if isinstance(texts, str):
        raise RequestError("expected a list of texts, got a str", remedy="put the text into a list")
    if not isinstance(texts, Sequence):
        raise RequestError("expected a list of texts", got=shorten(texts))
    rows = [encode(text) if isinstance(text, str) else _token_ids(text) for text in texts]
    rows = [row for row in rows if len(row) > 1]
    if not rows:
        raise RequestError("no text has two tokens", remedy="give longer texts")
    return rows


def _token_ids(text: Sequence[int]) -> list[int]:
    try:
        return [operator.index(token) for token in text]
    except TypeError as error:
        raise RequestError("a text is neither a str nor token ids", got=shorten(text)) from error
