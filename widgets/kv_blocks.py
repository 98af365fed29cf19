"""The widget KVBlocks: the pool of KV blocks as a map, live and step by step."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from functools import lru_cache

from ipywidgets import HTML, HBox, IntSlider, Label, Play, ToggleButton, VBox, link

from trtlab.card import Card, Table, bar, html
from trtlab.config.calls import public
from trtlab.errors import ConfigError
from trtlab.runtime.events import Block, StepEvent
from trtlab.session.session import Session

from .kv_figure import KvView, block_words, change, ids_text, kv_figure, label, moving, title
from .kv_moment import DRAWN, History, cells, history, moment_after, moment_now
from .kv_panels import BARS, TRACES
from .live import Dashboard, LiveFigure

REFRESH_S = 0.1  # between two pictures, at least
REST = 9  # times the drawing time of a picture until the next one, so that drawing takes at most a tenth of the time
PLAY_MS = 400  # for each step
LISTED, STILL = 8, 16  # lines, and blocks a line, of the still view
CACHED, FREE = "▨", "·"


@dataclass(frozen=True)
class Selection:
    """The selected block after ``step`` (None: now), with its number of filled places and its text."""

    step: int | None
    block: Block
    filled: int
    text: str


@public
class KVBlocks(Dashboard):
    """Shows a session's KV blocks: the requests that use them, shared blocks, blocks cached for reuse, at any step.

    The slider ``step`` covers the steps that ``session.events`` keeps. Its right end, where it starts, means "now":
    with ``live`` on, the picture follows the running session, at most ten times a second. A click on a block selects
    the block, a click on a bar selects its step; ``show`` does both from Python, and ``selection`` is the result. Of a
    pool with more than 512 blocks only those are drawn that have been used.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self._lock = threading.RLock()
        self._selected = 0
        self._ever_used: set[int] = set()
        self._last_read = -1  # the last step whose blocks are in _ever_used
        self._settling = False  # True while refresh() moves the slider, which must not draw
        self._texts = lru_cache(maxsize=8192)(self._text)
        self.step = IntSlider(0, 0, 0, readout=False, layout={"width": "420px"})
        self.live = ToggleButton(True, description="live", tooltip="follow while the session runs")
        self.live.layout.width = "80px"
        self._play = Play(0, 0, 0, interval=PLAY_MS, show_repeat=False)
        self._when = Label(layout={"width": "170px"})
        self._steps = history(())
        self._view = self._current_view()
        self._moving = moving(self._view)
        self.figure = kv_figure(self._view)
        self._live = LiveFigure(self.figure, self._click)
        self._details = HTML()
        self._details.add_class("jp-RenderedHTMLCommon")
        controls = HBox([Label("step", layout={"width": "40px"}), self._play, self.step, self._when, self.live])
        self.view = VBox([controls, self._live, self._details])
        self._observe()
        self.refresh()

    @property
    def selection(self) -> Selection:
        """The selected block after the selected step."""
        self.refresh()
        moment = self._view.moment
        block = moment.block(self._selected)
        return Selection(moment.step, block, moment.filled.get(block.number, 0), self._texts(block.token_ids))

    def show(self, *, step: int | None = None, block: int | None = None) -> None:
        """Select a step (-1 is now), a block, or both. Raises ConfigError for a step or block that does not exist."""
        with self._lock:
            self.refresh()
            first, now = self.step.min, self.step.max
            if step is not None and step != -1 and not first <= step < now:
                kept = f"{first} to {now - 1}" if now > first else "none yet"
                raise ConfigError("there is no such step", got=step, expected=f"{kept}, or -1 for now")
            if block is not None and not 0 <= block < self._view.num_blocks:
                raise ConfigError("there is no such block", got=block, expected=f"0 to {self._view.num_blocks - 1}")
            if step is not None:
                self.step.value = now if step == -1 else step
            if block is not None:
                self._selected = block
            self._show()

    def refresh(self) -> None:
        """Show what the session did since the last picture; with ``live`` on it happens automatically."""
        with self._lock:
            events = list(self.session.events)
            if events:
                self._move_slider(events[0].step, events[-1].step + 1)
            if self._view.num_blocks > DRAWN:  # a smaller pool is drawn whole
                fresh = events[max(0, self._last_read + 1 - events[0].step) :] if events else []
                self._ever_used.update(block.number for event in fresh for block in event.blocks)
                self._last_read = events[-1].step if events else -1
            self._steps = history(events)
            self._show()

    def _move_slider(self, first: int, now: int) -> None:
        at_end, self._settling = self.step.value >= self.step.max, True
        for control in (self.step, self._play):
            control.max, control.min = now, first
        if at_end:
            self.step.value = now
        self._settling = False

    def card(self) -> Card:
        """See Dashboard: the map as text, and the steps."""
        self.refresh()
        width = min(STILL, len(self._view.cells))
        heads = ("block", *(f" +{column}" for column in range(width)))
        lines = [self._view.cells[start : start + width] for start in range(0, len(self._view.cells), width)]
        rows = [
            (f"{line[0][0]:,}", *(_sign(self._view, cell) for cell in line), *[""] * (width - len(line)))
            for line in lines
        ]
        rows = [row for row in rows if set(row[1:]) - {FREE, ""}]
        more = f"; {len(rows) - LISTED} more lines" if len(rows) > LISTED else ""
        words = f"the number of its request, {CACHED} cached for reuse, {FREE} free; free lines are left out{more}"
        tables = (Table(heads, tuple(rows[:LISTED]), words), _steps_table(self._view.history))
        return Card(f"KVBlocks · {title(self._view)}", tables=tables if self._view.history.used else tables[:1])

    def __repr__(self) -> str:
        self.refresh()
        return f"KVBlocks({title(self._view)}; block {self._selected}: {self._words()})"

    def _observe(self) -> None:
        link((self._play, "value"), (self.step, "value"))
        self.step.observe(self._show, "value")
        self.live.observe(self._follow, "value")
        self._follow()

    def _click(self, trace: int, point: int) -> None:
        with self._lock:
            if TRACES[trace] == "map":
                self._selected = self._view.cells[point][0]
                self._show()
            elif TRACES[trace] in BARS:
                self.step.value = min(self._view.history.last(point), self.step.max - 1)

    def _follow(self, _: object = None) -> None:
        self._watcher = threading.Thread(target=self._watch, name="trtlab-kv-blocks", daemon=True)
        if self.live.value:
            self._watcher.start()

    def _watch(self) -> None:
        """Redraw after changes until the session ends or ``live`` is off; a step never waits for it."""
        shown, rest = self._signs(), REFRESH_S
        while self._watcher is threading.current_thread():
            closed = self.session.closed
            if (now := self._signs()) != shown:
                start = time.perf_counter()
                self.refresh()
                shown, rest = now, max(REFRESH_S, REST * (time.perf_counter() - start))
            if closed:
                return
            time.sleep(rest)

    def _signs(self) -> tuple[int, ...]:
        """Numbers that change when the picture changes."""
        events, cache = self.session.events, self.session.kv_cache
        return (events[-1].step if len(events) else -1, cache.used, cache.cached, self.session.running)

    def _show(self, _: object = None) -> None:
        with self._lock:
            if self._settling:
                return
            self._view = self._current_view()
            now = moving(self._view)
            change(self.figure, now, self._moving)
            self._live.draw(self.figure)
            self._moving = now
            step = self._view.moment.step
            self._when.value = f"after step {step:,}" if step is not None else "now"
            self._details.value = html(self._details_card())

    def _current_view(self) -> KvView:
        cache, events, at = self.session.kv_cache, self.session.events, self.step.value
        total, size = cache.pool.num_blocks, cache.pool.tokens_per_block
        if at >= self.step.max:
            moment = moment_now(cache, range(total) if total <= DRAWN else sorted(self._ever_used))
        else:
            moment = moment_after(events, at - events[0].step, size)
        drawn = cells(total, {*self._ever_used, *moment.blocks, self._selected})
        return KvView(total, size, drawn, moment, self._steps, self._selected, self._texts)

    def _text(self, token_ids: tuple[int, ...]) -> str:
        return self.session.decode(token_ids) if token_ids and self.session.has_text else ids_text(token_ids)

    def _words(self) -> str:
        moment = self._view.moment
        block = moment.block(self._selected)
        return block_words(block, moment.filled.get(block.number, 0), self._view.tokens_per_block)

    def _details_card(self) -> Card:
        block = self._view.moment.block(self._selected)
        facts = [(f"block {block.number}", self._words())]
        if block.token_ids:
            facts += [("its tokens", repr(self._texts(block.token_ids)))]
        step = self._view.moment.step
        if step is None:
            facts += [("requests", f"{self.session.running} running, {self.session.waiting} waiting")]
            return Card("Now", tuple(facts))
        event = self.session.events[step - self.session.events[0].step]
        return Card(f"Step {step:,}", (*facts, *_step_facts(event)))


def _step_facts(event: StepEvent) -> list[tuple[str, str]]:
    """The work of a step, by request."""
    work = [
        f"request {work.request}: {work.tokens} after {work.past}" + ("" if work.generated else ", its prompt goes on")
        for work in event.work[:LISTED]
    ]
    work += [f"and {len(event.work) - LISTED} more requests"] if len(event.work) > LISTED else []
    facts = [
        ("tokens computed", f"{event.tokens}: {'; '.join(work)}"),
        ("admitted", ", ".join(f"{a.request} ({a.reused_tokens} tokens reused)" for a in event.admitted)),
        ("preempted", ", ".join(map(str, event.preempted))),
        ("finished", ", ".join(f"{finish.request} ({finish.reason})" for finish in event.finished)),
        ("waiting", ", ".join(map(str, event.waiting))),
    ]
    return [(name, words) for name, words in facts if words]


def _sign(view: KvView, cell: range) -> str:
    """The text of a cell in the still map: its request and how full the block is, or its state."""
    if len(cell) > 1:
        blocks = [view.moment.blocks[number] for number in cell if number in view.moment.blocks]
        return f"{sum(bool(block.owners) for block in blocks)}/{len(cell)}" if blocks else FREE
    block = view.moment.block(cell[0])
    if not block.owners:
        return CACHED if block.cached else FREE
    filled = view.moment.filled.get(block.number, 0)
    return label(block) + (f" ({filled}/{view.tokens_per_block})" if filled < view.tokens_per_block else "")


def _steps_table(steps: History) -> Table:
    """At most LISTED bars of the history, evenly spaced, with the last one."""
    last = len(steps.used) - 1
    chosen = sorted({round(last * place / (LISTED - 1)) for place in range(LISTED)}) if last >= 0 else []
    most = max(max(steps.used, default=0), 1)
    rows = tuple(
        (f"{steps.last(i):,}", f"{steps.used[i]:,}", bar(steps.used[i] / most), f"{steps.cached[i]:,}",
         f"{steps.computed[i]:,}", f"{steps.reused[i]:,}")
        for i in chosen
    )  # fmt: skip
    return Table((" after step", " in use", "", " cached", " tokens computed", " reused"), rows)
