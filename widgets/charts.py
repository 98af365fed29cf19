"""Still charts as SVG, which GitHub shows too: bars side by side, and what each request does in each step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from trtlab.card import bar
from trtlab.runtime.events import StepEvent, Work

WIDTH, LINE, LABEL, HEAD = 760, 20, 150, 30  # pixels: of a chart, a line, the column of names, and the legend
STEP = 15  # pixels of a step, at most
TICK = 5  # steps from one number on the axis to the next
# Okabe and Ito's palette; dark against light, so that the difference shows without colours too.
SERIES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")
GRID, WORDS = "#D0D0D0", "#333333"


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
LOOKS = {WAITS: "#EFEFEF", READS: "#0072B2", WRITES: "#8CC8EE", WASTED: "#FFFFFF"}
SIGNS = {WAITS: "░", READS: "█", WRITES: "▪", WASTED: "×", "": " "}


def schedule(events: Iterable[StepEvent]) -> Chart:
    """What each request does in each step: one line a request, one column a step."""
    events = list(events)
    numbers = sorted({work.request for event in events for work in event.work})
    doing = {number: [_does(event, number) for event in events] for number in numbers}
    seen = {what: look for what, look in LOOKS.items() if any(what in line for line in doing.values())}
    step = min(STEP, (WIDTH - LABEL) / len(events))
    parts = [_legend(seen)]
    for line, number in enumerate(numbers):
        y = HEAD + line * LINE
        parts.append(_text(LABEL - 8, y + 14, f"request {number}", "end"))
        for column, what in enumerate(doing[number]):
            if what:
                parts.append(_box(LABEL + column * step, y + 2, step - 1, LINE - 4, LOOKS[what]))
            if what == WASTED:
                parts.append(_text(LABEL + (column + 0.5) * step, y + 14, "×", "middle", "#D55E00"))
    foot = HEAD + len(numbers) * LINE
    for column in range(0, len(events), TICK):
        parts.append(_text(LABEL + (column + 0.5) * step, foot + 14, str(events[column].step), "middle"))
    parts.append(_text(LABEL - 8, foot + 14, "step", "end"))
    text = "\n".join(f"{number} {''.join(SIGNS[what] for what in line)}".rstrip() for number, line in doing.items())
    return Chart(_svg(parts, foot + 22), text)


def _does(event: StepEvent, number: int) -> str:
    """What a request does in a step; nothing before it came and after its end."""
    work: Work | None = next((work for work in event.work if work.request == number), None)
    if work is None:
        return WAITS if number in event.waiting else ""
    return WASTED if work.wasted else READS if work.tokens > 1 else WRITES


def _legend(looks: Mapping[str, str]) -> str:
    parts, x = [], LABEL
    for name, colour in looks.items():
        parts.append(_box(x, 6, 12, 12, colour))
        parts.append(_text(x + 6, 16, "×", "middle", "#D55E00") if name == WASTED else "")
        parts.append(_text(x + 18, 16, name))
        x += 34 + 7 * len(name)
    return "".join(parts)


def _box(x: float, y: float, width: float, height: float, colour: str) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" width="{max(width, 1):.1f}" height="{height:.1f}"'
    return f'<rect {place} fill="{colour}" stroke="{GRID}" stroke-width="0.5"/>'


def _text(x: float, y: float, words: str, anchor: str = "start", colour: str = WORDS) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{escape(words)}</text>'


def _svg(parts: Sequence[str], height: float) -> str:
    size = f'width="{WIDTH}" height="{height:.0f}" viewBox="0 0 {WIDTH} {height:.0f}"'
    ground = f'<rect width="{WIDTH}" height="{height:.0f}" fill="#FFFFFF"/>'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">'
    return f"{head}{ground}{''.join(parts)}</svg>"
