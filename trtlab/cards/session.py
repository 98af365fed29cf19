"""The cards of a session, a request and an answer."""

from __future__ import annotations

from trtlab.card import Card, card, size
from trtlab.cards.phrases import bounds_phrase
from trtlab.config.model import ModelConfig
from trtlab.runtime.pool_size import PoolSize
from trtlab.session.request import Completion, Request
from trtlab.session.session import Session


@card.register
def session_card(session: Session) -> Card:
    """A session: its backend and why, its bounds, its pool, and the number of its requests."""
    build = session.engine.build_config
    return Card(
        f"Session · {session.engine.config.architecture}{' · closed' if session.closed else ''}",
        (
            ("backend", session.backend_reason),
            ("bounds", bounds_phrase(build)),
            ("KV pool", _pool(session.kv_cache.pool, session.engine.config)),
            ("requests", f"{session.running} running, {session.waiting} waiting"),
            ("tokenizer", "in the engine's folder" if session.engine.tokenizer_path else "none: give token ids"),
        ),
        next='session.generate("...") or for piece in session.stream("..."): print(piece, end="")',
    )


def _pool(pool: PoolSize, config: ModelConfig) -> str:
    """The pool's size; and why it is larger than the engine's card says, where a CPU stores the cache in float32."""
    wide = pool.block_bytes > pool.tokens_per_block * config.kv_bytes_per_token
    note = f" in float32, where the engine has {config.dtype}" if wide and config.dtype != "float32" else ""
    return f"{pool.num_blocks:,} blocks of {pool.tokens_per_block} tokens, {size(pool.nbytes)}{note}, by {pool.winner}"


@card.register
def request_card(request: Request) -> Card:
    """A request: its status and its tokens so far."""
    facts = [
        ("tokens", f"{len(request.prompt_token_ids)} in, {len(request.token_ids)} out so far"),
        ("from the cache", f"{request.reused_tokens} tokens" if request.reused_tokens else ""),
        ("interrupted", f"{request.preemptions} times" if request.preemptions else ""),
    ]
    return Card(
        f"Request {request.number} · {request.status}",
        tuple((label, value) for label, value in facts if value),
        next="" if request.done else "request.result(), for piece in request.stream(), or await request",
    )


@card.register
def completion_card(completion: Completion) -> Card:
    """An answer: its text, its tokens and why it ended."""
    ended = {
        "stop": "at its end",
        "length": "at max_new_tokens",
        "cancelled": "when it was cancelled",
        "timed_out": "when its time was up",
    }[completion.finish_reason]
    if completion.stop_reason is not None:
        ended = f"before the stop word {completion.stop_reason!r}"
    return Card(
        "Completion",
        (
            ("text", completion.text or "(no tokenizer: see token_ids)"),
            ("tokens", f"{len(completion.prompt_token_ids)} in, {len(completion.token_ids)} out, ended {ended}"),
        ),
    )
