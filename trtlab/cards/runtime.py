"""The cards of a session's runtime: the KV pool and its bounds, the blocks and their requests, the steps."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from trtlab.card import Card, Table, bar, card, size
from trtlab.runtime.events import Block, EventLog, StepEvent
from trtlab.runtime.kv_cache_view import KvCache
from trtlab.runtime.pool_size import FRACTION, PoolSize

SIGNS = {"used": "█", "shared": "▓", "cached": "░", "free": "·"}
LINE = 64  # blocks in a line of the map
DRAWN = 512  # blocks in the map; of a larger pool it shows the first
LISTED = 12  # steps or requests in a table


@card.register
def pool_card(pool: PoolSize) -> Card:
    """The size of the pool, every bound, and the bound that decided."""
    memory = "K and V lie in blocks" if pool.paged else "K and V lie in one slot a request; blocks only count"
    facts = [
        ("holds", f"{pool.max_tokens:,} tokens in {pool.num_blocks:,} blocks of {pool.tokens_per_block}"),
        ("bytes", f"{size(pool.nbytes)}, {size(pool.block_bytes)} a block"),
        ("layout", memory),
    ]
    if pool.free_bytes is not None:
        facts.append(("free beside weights", size(pool.free_bytes)))
    if pool.winner == FRACTION:
        facts.append(("note", "the pool takes its fraction whole: smaller K and V make more blocks, not less memory"))
    return Card(f"KV pool · decided by {pool.winner}", tuple(facts), (_bounds(pool),))


def _bounds(pool: PoolSize) -> Table:
    rows = []
    for bound in pool.bounds:
        tokens, nbytes = bound.blocks * pool.tokens_per_block, bound.blocks * pool.block_bytes
        wins = "the smaller wins" if len(pool.bounds) > 1 and bound.name == pool.winner else ""
        rows.append((bound.name, f"{bound.blocks:,}", f"{tokens:,}", size(nbytes), wins))
    return Table(("bound", " blocks", " tokens", " bytes", ""), tuple(rows))


@card.register
def kv_cache_card(cache: KvCache) -> Card:
    """The current blocks: their number, their requests, and how many are shared, cached and full."""
    pool = cache.pool
    free = cache.free
    facts = (
        ("pool", f"{pool.max_tokens:,} tokens, {size(pool.nbytes)}, by {pool.winner}"),
        ("blocks", f"{cache.used} in use, {cache.shared} of them shared, {cache.cached} cached for reuse, {free} free"),
        ("fragmentation", f"{cache.fragmentation:.0%} of the places in use hold no token"),
        ("reuse", _reuse(cache)),
    )
    blocks = [cache.block(number) for number in range(min(pool.num_blocks, DRAWN))]
    tables = (_chains(cache),) if cache.chains else ()
    return Card(
        f"KV cache · {pool.num_blocks:,} blocks of {pool.tokens_per_block} tokens",
        facts,
        (*tables, _map(blocks, pool.num_blocks)),
        next="trtlab.widgets.KVBlocks(session) replays it, session.kv_cache.pool says why it is this large",
    )


def _reuse(cache: KvCache) -> str:
    if not cache.reuse_enabled:
        return "off" if cache.pool.paged else "none on this backend: a slot belongs to one request"
    phrase = f"{cache.reused_tokens:,} of {cache.prompt_tokens:,} tokens were found here"
    if cache.evicted:
        phrase += f", {cache.evicted:,} blocks evicted"
    if cache.short_prompts:
        prompts = "1 prompt was" if cache.short_prompts == 1 else f"{cache.short_prompts:,} prompts were"
        size_of_block = cache.pool.tokens_per_block
        phrase += f"; {prompts} no longer than a block of {size_of_block}, and only whole blocks are shared"
    return phrase


def _chains(cache: KvCache) -> Table:
    places = cache.pool.tokens_per_block
    rows = []
    for number, blocks in list(cache.chains.items())[:LISTED]:
        tokens = cache.held[number]
        rows.append(
            (f"request {number}", str(tokens), _runs(blocks), bar(tokens / (len(blocks) * places)) if blocks else "")
        )
    return Table(("running", " tokens", "blocks", "filled"), tuple(rows))


def _runs(numbers: Sequence[int]) -> str:
    """Numbers with runs of neighbours shortened: ``0-3, 7``."""
    runs = [list(run) for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    names = [f"{run[0][1]}" if len(run) == 1 else f"{run[0][1]}-{run[-1][1]}" for run in runs]
    return ", ".join(names if len(names) <= LISTED else [*names[: LISTED - 1], "..."])


def _map(blocks: Sequence[Block], total: int) -> Table:
    rows = tuple(
        (f"{start}", "".join(SIGNS[block.state] for block in blocks[start : start + LINE]))
        for start in range(0, len(blocks), LINE)
    )
    legend = ", ".join(f"{sign} {state}" for state, sign in SIGNS.items())
    shown = "" if total <= len(blocks) else f"; the first {len(blocks)} of {total:,}"
    return Table((" from", "blocks"), rows, f"{legend}{shown}")


@card.register
def event_log_card(log: EventLog) -> Card:
    """The last steps in which requests joined or ended: tokens, requests and the use of the pool."""
    eventful = [event for event in log if _what(event)]
    rows = tuple(
        (
            str(event.step),
            str(event.tokens),
            str(event.generated),
            str(len(event.work)),
            str(len(event.waiting)),
            _what(event),
            bar(event.used / (event.used + event.cached + event.free), 8),
        )
        for event in eventful[-LISTED:]
    )
    quiet = f"{len(log) - len(rows)} steps between and before are not listed" if len(log) > len(rows) else ""
    tokens, generated = sum(e.tokens for e in log), sum(e.generated for e in log)
    return Card(
        f"Events · {len(log):,} steps, {tokens:,} tokens computed, {generated:,} generated",
        (),
        (
            Table(
                (" step", " tokens", " generated", " running", " waiting", "what happened", "pool in use"), rows, quiet
            ),
        ),
    )


def _what(event: StepEvent) -> str:
    phrases = [
        f"{a.request} joined" + (f" with {a.reused_tokens} tokens from the cache" if a.reused_tokens else "")
        for a in event.admitted
    ]
    phrases += [f"{number} interrupted" for number in event.preempted]
    phrases += [f"{finish.request} {ENDS[finish.reason]}" for finish in event.finished]
    return ", ".join(phrases)


ENDS = {
    "stop": "finished",
    "length": "reached its length",
    "cancelled": "was cancelled",
    "timed_out": "ran out of time",
    "error": "failed",
}


@card.register
def step_event_card(event: StepEvent) -> Card:
    """One step: the work of every request."""
    rows = tuple(
        (
            f"request {w.request}",
            str(w.past),
            str(w.tokens),
            "a token" if w.generated else "nothing" if w.wasted else "",
        )
        for w in event.work
    )
    return Card(
        f"Step {event.step} · {event.tokens} tokens of {len(event.work)} requests",
        (
            ("happened", _what(event) or "nothing new"),
            ("blocks", f"{event.used} in use, {event.cached} cached, {event.free} free"),
            ("waiting", ", ".join(map(str, event.waiting)) or "none"),
        ),
        (Table(("work", " cached before", " computed", "gave"), rows),),
    )
