"""The picture of a KV pool: a map of its blocks at one step, and bars for all steps. Knows no session.

The properties that a step can change are separate from the constant ones, because plotly spends most of its time on the
constant ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from textwrap import shorten, wrap

import plotly.graph_objects as go

from trtlab.runtime.events import Block

from .kv_moment import History, Moment
from .kv_panels import BOTTOM, EDGE, TOP, Props, still

# Light tints of Okabe and Ito's palette, on which dark text is readable; each block also shows its request's number.
COLOURS = ("#8CC8EE", "#F3C673", "#7FCFB5", "#EFA98A", "#E3B5CE", "#F2EA8C", "#8FB8DD")
PIXELS = {"history": 110, "tokens": 90}
GAP = 48  # between rows of panels, in pixels
LEAST_STEPS = 16  # of the axis of steps, at least, so that the first step does not fill it
HOVER_WIDTH = 44


def ids_text(token_ids: tuple[int, ...]) -> str:
    """Token ids as text, for a session without a tokenizer."""
    return " ".join(map(str, token_ids))


@dataclass(frozen=True)
class KvView:
    """The data of the picture.

    ``cells`` are the block numbers of each cell of the map, ``chosen`` is the selected block. ``texts`` turns a block's
    token ids into text.
    """

    num_blocks: int
    tokens_per_block: int
    cells: tuple[range, ...]
    moment: Moment
    history: History
    chosen: int
    texts: Callable[[tuple[int, ...]], str] = ids_text

    @property
    def columns(self) -> int:
        """The number of cells in a line of the map."""
        return min(16, max(8, len(self.cells))) if len(self.cells) <= 96 else 32

    @property
    def lines(self) -> int:
        """The number of lines of the map."""
        return max(1, -(-len(self.cells) // self.columns))


@dataclass(frozen=True)
class Moving:
    """The properties that can differ between two pictures of one session, of each trace and of the layout."""

    traces: tuple[Props, ...]
    layout: Props


def kv_figure(view: KvView) -> go.Figure:
    """The map of blocks, the blocks in use after each step, and the tokens of each step; the traces are TRACES.

    The index of a point in the trace "map" is that of its cell, in a trace of the lower panels that of its bar.
    """
    figure = still()
    change(figure, moving(view))
    return figure


def moving(view: KvView) -> Moving:
    """The properties of this view's picture that another view's picture can have differently."""
    blocks, tokens = _tops(view)
    used, kept, free, computed, reused, marks = _bars(view.history, tokens)
    lower = (used, kept, free, _cursor(view, blocks), computed, reused, marks, _cursor(view, tokens))
    return Moving((*_map(view), _frame(view), *lower), _layout(view, blocks, tokens))


def change(figure: go.Figure, new: Moving, old: Moving | None = None) -> None:
    """Set a figure's properties to ``new``; those that are equal in ``old`` are not touched."""
    befores: Sequence[Props] = old.traces if old else [{}] * len(new.traces)
    for trace, now, before in zip(figure.data, new.traces, befores, strict=True):
        trace.update(_differing(now, before))
    figure.update_layout(_differing(new.layout, old.layout if old else {}))


def _differing(now: Props, before: Props) -> Props:
    return {name: value for name, value in now.items() if name not in before or before[name] != value}


def block_words(block: Block, filled: int, size: int) -> str:
    """``in use by request 3, 5 of 8 places filled``."""
    if not block.owners:
        return {"cached": "cached for reuse", "free": "free"}[block.state]
    owners = ", ".join(map(str, block.owners))
    places = "full" if filled == size else f"{filled} of {size} places filled"
    return (
        f"shared by requests {owners}, {places}" if len(block.owners) > 1 else f"in use by request {owners}, {places}"
    )


def label(block: Block) -> str:
    """The text in a block: its request, ``1+2`` for two, ``×3`` for three whose numbers do not fit."""
    text = "+".join(map(str, block.owners))
    return text if len(text) <= 5 else f"×{len(block.owners)}"


def colour(request: int) -> str:
    """A request's colour; request 8 has the colour of request 1 again."""
    return COLOURS[(request - 1) % len(COLOURS)]


def _map(view: KvView) -> list[Props]:
    """The frames, their parts in use, the stripes of shared blocks, the cached parts and the labels."""
    x = [place % view.columns for place in range(len(view.cells))]
    y = [place // view.columns for place in range(len(view.cells))]
    looks = [_look(view, cell) for cell in view.cells]
    floor = [line + 0.95 for line in y]
    return [
        {"x": x, "base": floor, "y": [-0.9] * len(x), "hovertext": [_hover(view, cell) for cell in view.cells]},
        {
            "x": x,
            "base": floor,
            "y": [-0.9 * look.used for look in looks],
            "marker_color": [look.colours[0] for look in looks],
        },
        {
            "x": x,
            "base": floor,
            "y": [-0.9 * look.used if look.colours[1] else 0.0 for look in looks],
            "marker_pattern_fgcolor": [look.colours[1] or EDGE for look in looks],
            "marker_line_width": [1.5 if look.colours[1] else 0 for look in looks],
        },
        {
            "x": x,
            "base": [at - 0.9 * look.used for at, look in zip(floor, looks, strict=True)],
            "y": [-0.9 * look.cached for look in looks],
        },
        {
            "x": x,
            "y": [line + 0.5 for line in y],
            "text": [look.label or " " for look in looks],
        },  # not "": plotly never redraws a label that was empty
    ]


@dataclass(frozen=True)
class _Look:
    """The look of a cell: its shares in use and cached, one or two colours, and a label."""

    used: float
    cached: float
    colours: tuple[str, str] = (EDGE, "")
    label: str = ""


def _look(view: KvView, cell: range) -> _Look:
    blocks = [view.moment.blocks[number] for number in cell if number in view.moment.blocks]
    used = [block for block in blocks if block.owners]
    cached = (len(blocks) - len(used)) / len(cell)
    if not used:
        return _Look(0, cached)
    first = used[0]
    if len(cell) > 1:
        owners = {owner for block in used for owner in block.owners}
        return _Look(
            len(used) / len(cell), cached, (colour(first.owners[0]), ""), label(first) if len(owners) == 1 else ""
        )
    filled = view.moment.filled.get(first.number, 0) / view.tokens_per_block
    return _Look(filled, 0, (colour(first.owners[0]), colour(first.owners[1]) if len(first.owners) > 1 else ""),
                 label(first))  # fmt: skip


def _hover(view: KvView, cell: range) -> str:
    if len(cell) > 1:
        blocks = [view.moment.block(number) for number in cell]
        states = {state: sum(b.state == state for b in blocks) for state in ("used", "shared", "cached", "free")}
        counts = ", ".join(f"{number} {state}" for state, number in states.items() if number)
        return f"<b>blocks {cell[0]} to {cell[-1]}</b><br>{counts}"
    block = view.moment.block(cell[0])
    words = block_words(block, view.moment.filled.get(block.number, 0), view.tokens_per_block)
    return "<br>".join([f"<b>block {block.number}</b>", words, *_wrapped(view.texts(block.token_ids))])


def _wrapped(text: str) -> list[str]:
    short = shorten(text.replace("\n", " ⏎ "), 4 * HOVER_WIDTH, placeholder=" …")
    return [f"<i>{escape(line)}</i>" for line in wrap(short, HOVER_WIDTH)]


def _bars(steps: History, top: float) -> list[Props]:
    """Blocks after each step, tokens of each step, and preemption marks; ``top`` is the end of the axis of tokens."""
    x = [steps.first + steps.width * (bar + 0.5) - 0.5 for bar in range(len(steps.used))]
    width = [0.9 * steps.width] * len(x)
    names = [_step_words(steps, bar) for bar in range(len(x))]
    traces: list[Props] = []
    for values in (steps.used, steps.cached, steps.free, steps.computed, steps.reused):
        traces.append({"x": x, "y": list(values), "width": width, "hovertext": names})
    marked = [bar for bar in range(len(x)) if steps.preempted[bar]]
    traces.append(
        {
            "x": [x[bar] for bar in marked],
            "y": [steps.computed[bar] + steps.reused[bar] + 0.1 * top for bar in marked],
            "hovertext": [f"preempted: {', '.join(map(str, sorted(set(steps.preempted[bar]))))}" for bar in marked],
        }
    )
    return traces


def _step_words(steps: History, bar: int) -> str:
    last = steps.last(bar)
    return f"step {last}" if steps.width == 1 else f"steps {last - steps.width + 1} to {last}"


def title(view: KvView) -> str:
    """``After step 7: 12 of 64 blocks in use (2 shared), 3 cached, 49 free``."""
    used, shared, cached, free = view.moment.counts(view.num_blocks)
    when = "Now" if view.moment.step is None else f"After step {view.moment.step}"
    return (
        f"{when}: {used} of {view.num_blocks:,} blocks in use{f' ({shared} shared)' if shared else ''}, "
        f"{cached} cached for reuse, {free:,} free"
    )


def map_heading(view: KvView) -> str:
    """The heading of the map: what a cell is, and which blocks are drawn if not all are."""
    heading = f"blocks of {view.tokens_per_block} tokens, with the request that uses each (1+2: shared by two)"
    wide = len(view.cells[0]) if view.cells else 1
    if wide > 1:
        drawn = view.cells[-1][-1] + 1
        return f"each cell is {wide:,} blocks; {drawn:,} of {view.num_blocks:,} are drawn, the rest was never used"
    if len(view.cells) < view.num_blocks:
        return f"{heading}; {len(view.cells)} of {view.num_blocks:,} are drawn, the rest was never used"
    return heading


def _layout(view: KvView, blocks: float, tokens: float) -> Props:
    steps, lines = view.history, view.lines
    pixels = {"map": lines * (34 if view.columns <= 16 else 28), **PIXELS}
    whole = sum(pixels.values()) + 2 * GAP
    tops = [1.0, 1 - (pixels["map"] + GAP) / whole, pixels["tokens"] / whole]
    per = "step" if steps.width == 1 else f"{steps.width} steps"
    last = steps.first + steps.width * max(LEAST_STEPS, len(steps.used)) - 0.5
    headings = (map_heading(view), "blocks after each step", f"tokens of each {per}")
    axis = {"range": [steps.first - 0.5, last]}
    return {
        "title_text": title(view),
        "height": whole + TOP + BOTTOM,
        "legend_y": 1 + 20 / whole,
        "xaxis_range": [-0.5, view.columns - 0.5],
        "yaxis": {
            "range": [lines, 0],
            "domain": [1 - pixels["map"] / whole, 1],
            "tickvals": [line + 0.5 for line in range(lines)],
            "ticktext": [f"{view.cells[line * view.columns][0]:,}" if view.cells else "" for line in range(lines)],
        },
        "yaxis2_domain": [tops[1] - pixels["history"] / whole, tops[1]],
        "yaxis3_domain": [0, tops[2]],
        "xaxis2": axis,
        "xaxis3": axis,
        "yaxis2_range": [0, blocks],
        "yaxis3_range": [0, tokens],
        "annotations": [_heading(text, top) for text, top in zip(headings, tops, strict=True)],
    }


def _tops(view: KvView) -> tuple[float, float]:
    """The upper ends of the lower panels' axes, in blocks and in tokens.

    For blocks it is the size of the pool, or the most that were ever taken if that is a small part of a large pool.
    """
    steps = view.history
    taken = max(map(sum, zip(steps.used, steps.cached, strict=True)), default=0)
    blocks = view.num_blocks if view.num_blocks <= 8 * max(taken, 8) else taken
    return 1.05 * blocks, 1.2 * max(map(sum, zip(steps.computed, steps.reused, strict=True)), default=1)


def _heading(text: str, top: float) -> Props:
    return {
        **{"text": text, "x": 0, "xref": "paper", "xanchor": "left", "y": top, "yref": "paper", "yanchor": "bottom"},
        **{"showarrow": False, "font": {"size": 12}},
    }


def _frame(view: KvView) -> Props:
    """A frame around the cell of the selected block."""
    place = next((i for i, cell in enumerate(view.cells) if view.chosen in cell), None)
    if place is None:
        return {"x": [], "y": []}
    line, column = divmod(place, view.columns)
    return _box(column - 0.47, column + 0.47, line + 0.03, line + 0.97)


def _cursor(view: KvView, top: float) -> Props:
    """A frame around the bar of the selected step; empty if the view shows now."""
    steps = view.history
    if view.moment.step is None or not steps.used:
        return {"x": [], "y": []}
    at = steps.first + steps.bar(view.moment.step) * steps.width - 0.5
    return _box(at, at + steps.width, 0, top)


def _box(x0: float, x1: float, y0: float, y1: float) -> Props:
    return {"x": [x0, x1, x1, x0, x0], "y": [y0, y0, y1, y1, y0]}
