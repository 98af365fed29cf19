"""Still charts as SVG, which GitHub shows too: bars side by side, and what each request does in each step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby

from trtlab.card import bar
from trtlab.runtime.events import StepEvent, Work

WIDTH, LINE, LABEL, HEAD = 760, 20, 150, 30  # pixels: of a chart, a line, the column of names, and the legend
STEP = 15  # pixels of a step, at most
TICK = 5  # steps from one number on the axis to the next
# Okabe and Ito's palette; dark against light, so that the difference shows without colours too.
SERIES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")


@dataclass(frozen=True, repr=False)
class Chart:
    """A still picture: an image in a page, and the same as text."""

    svg: str
    text: str

    def __repr__(self) -> str:
        return self.text

    def _repr_svg_(self) -> str:
        return self.svg


def bars(series: Mapping[str, Sequence[float]], names: Sequence[str], form: str = ".2f") -> Chart:
    """Bars side by side: for each name one bar of each series, with its number in the format ``form``.

    All bars have one scale, from 0 to the largest number.
    """
    most = max(max(numbers) for numbers in series.values())
    room = WIDTH - LABEL - 80  # for the numbers
    parts, y = [_legend(dict(zip(series, SERIES, strict=False)))], HEAD
    lines = []
    for place, name in enumerate(names):
        for order, numbers in enumerate(series.values()):
            length = room * numbers[place] / most
            if order == 0:
                parts.append(_text(LABEL - 8, y + LINE * len(series) / 2 + 4, name, "end"))
            parts.append(_box(LABEL, y + 2, length, LINE - 4, SERIES[order]))
            parts.append(_text(LABEL + length + 6, y + LINE - 6, format(numbers[place], form)))
            y += LINE
        y += 6
        drawn = "  ".join(f"{title} {bar(n[place] / most):16} {n[place]:{form}}" for title, n in series.items())
        lines.append(f"{name}  {drawn}")
    return Chart(_svg(parts, y + 4), "\n".join(lines))


WAITS, READS, WRITES, WASTED = "waits", "reads its prompt", "generates a token", "is computed for nothing"
LOOKS = {WAITS: "#E4E4E4", READS: "#0072B2", WRITES: "#8CC8EE", WASTED: "none"}
SIGNS = {WAITS: "░", READS: "█", WRITES: "▪", WASTED: "×", "": " "}
CROSS, ARM = "#D55E00", 3
Run = tuple[float, float, int]  # left end, middle line, and number of equal steps in a row


def schedule(events: Iterable[StepEvent]) -> Chart:
    """What each request does in each step: one line a request, one column a step."""
    events = list(events)
    numbers = sorted({work.request for event in events for work in event.work})
    doing = {number: [_does(event, number) for event in events] for number in numbers}
    step = min(STEP, (WIDTH - LABEL) / len(events))
    runs: dict[str, list[Run]] = {what: [] for what in LOOKS}
    parts = []
    for line, (number, steps) in enumerate(doing.items()):
        parts.append(_text(LABEL - 8, HEAD + line * LINE + 14, f"request {number}", "end"))
        column = 0
        for what, group in groupby(steps):
            length = len(list(group))
            if what:
                runs[what].append((LABEL + column * step, HEAD + line * LINE + LINE / 2, length))
            column += length
    foot = HEAD + len(numbers) * LINE
    for column in range(0, len(events), TICK):
        parts.append(_text(LABEL + (column + 0.5) * step, foot + 14, str(events[column].step), "middle"))
    parts.append(_text(LABEL - 8, foot + 14, "step", "end"))
    seen = {what: look for what, look in LOOKS.items() if runs[what]}
    drawn = [_marks(what, runs[what], step) for what in seen]
    text = "\n".join(f"{number} {''.join(SIGNS[what] for what in line)}".rstrip() for number, line in doing.items())
    return Chart(_svg([_legend(seen), *drawn, *parts], foot + 22), text)


def _does(event: StepEvent, number: int) -> str:
    """What a request does in a step; nothing before it came and after its end."""
    work: Work | None = next((work for work in event.work if work.request == number), None)
    if work is None:
        return WAITS if number in event.waiting else ""
    return WASTED if work.wasted else READS if work.tokens > 1 else WRITES


def _legend(looks: Mapping[str, str]) -> str:
    parts, x = [], LABEL
    for name, colour in looks.items():
        parts.append(_marks(name, [(x, 12, 1)], STEP) if name in LOOKS else _box(x, 6, 12, 12, colour))
        parts.append(_text(x + 18, 16, name))
        x += 34 + 7 * len(name)
    return "".join(parts)


def _marks(what: str, runs: Sequence[Run], step: float) -> str:
    """All marks of one kind as one path: a dash for each step, or a cross for what is computed for nothing."""
    if what == WASTED:
        cross = f"m-{ARM}-{ARM}l{2 * ARM} {2 * ARM}m0-{2 * ARM}l-{2 * ARM} {2 * ARM}"
        middles = [(x + (place + 0.5) * step, y) for x, y, length in runs for place in range(length)]
        lines = "".join(f"M{x:.4g} {y:g}{cross}" for x, y in middles)
        return f'<path stroke="{CROSS}" stroke-width="1.5" d="{lines}"/>'
    lines = "".join(f"M{x:.4g} {y:g}h{length * step - 1:.4g}" for x, y, length in runs)
    look = f'stroke="{LOOKS[what]}" stroke-width="{LINE - 4}" stroke-dasharray="{step - 1:.4g} 1"'
    return f'<path {look} d="{lines}"/>'


def _box(x: float, y: float, width: float, height: float, colour: str) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{max(width, 1):.1f}" height="{height:g}" fill="{colour}"/>'


def _text(x: float, y: float, words: str, anchor: str = "start") -> str:
    side = "" if anchor == "start" else f' text-anchor="{anchor}"'
    return f'<text x="{x:.4g}" y="{y:g}"{side}>{escape(words)}</text>'


def _svg(parts: Sequence[str], height: float) -> str:
    size = f'width="{WIDTH}" height="{height:.0f}" viewBox="0 0 {WIDTH} {height:.0f}"'
    ground = f'<path fill="#FFF" d="M0 0h{WIDTH}v{height:.0f}h-{WIDTH}z"/>'
    look = 'font-family="sans-serif" font-size="12" fill="#333"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {look}>{ground}{"".join(parts)}</svg>'
