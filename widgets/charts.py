"""Still charts as SVG, which GitHub shows too: bars side by side, and what each request does in each step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby

from trtlab.card import bar
from trtlab.runtime.events import StepEvent, Work

WIDTH, LINE, HEAD = 760, 20, 30  # pixels: of a chart, a line, and the legend
NAMES, REQUESTS = 150, 90  # pixels of the column of names, in either chart
STEP = 15  # pixels of a step, at most
TICK = 5  # steps from one number on the axis to the next
# Okabe and Ito's palette; dark against light, so that the difference shows without colours too.
SERIES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")
SWATCH = "█"  # of the legend
Line = tuple[float, float, float]  # left end, middle and length of a bar, or of dashes in a row, in pixels
Words = tuple[str, float, str]  # x of the words, or of each of their letters; their middle; the words


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
    room = WIDTH - NAMES - 80  # for the numbers
    pitch = LINE * len(series) + 6
    parts = [_legend(NAMES, [(SWATCH, colour, title) for title, colour in zip(series, SERIES, strict=False)])]
    for order, numbers in enumerate(series.values()):
        lines = [
            (NAMES, HEAD + pitch * place + LINE * (order + 0.5), max(round(room * number / most), 1))
            for place, number in enumerate(numbers)
        ]
        parts.append(_bars(SERIES[order], lines))
        ends = zip(lines, numbers, strict=True)
        parts.append(_texts([(f"{x + length + 6}", y, format(number, form)) for (x, y, length), number in ends]))
    middle = HEAD + LINE * len(series) / 2
    parts.append(_texts([(f"{NAMES - 8}", middle + pitch * place, name) for place, name in enumerate(names)], "end"))
    return Chart(_svg(parts, HEAD + pitch * len(names) + 4), _bars_text(series, names, form, most))


def _bars_text(series: Mapping[str, Sequence[float]], names: Sequence[str], form: str, most: float) -> str:
    pad = max(map(len, names))
    lines = [[" " * pad, *(f"{title:21}" for title in series)]]
    for place, name in enumerate(names):
        lines.append([f"{name:{pad}}", *(f"{bar(n[place] / most):16} {n[place]:{form}}" for n in series.values())])
    return "\n".join("  ".join(line).rstrip() for line in lines)


WAITS, READS, WRITES, WASTED = "waits", "reads its prompt", "generates a token", "is computed for nothing"
LOOKS = {WAITS: "#E4E4E4", READS: "#0072B2", WRITES: "#8CC8EE", WASTED: "#D55E00"}
SIGNS = {WAITS: "·", READS: "█", WRITES: "▪", WASTED: "×", "": " "}


def schedule(events: Iterable[StepEvent]) -> Chart:
    """What each request does in each step: one line a request, one column a step."""
    events = list(events)
    numbers = sorted({work.request for event in events for work in event.work})
    doing = {number: [_does(event, number) for event in events] for number in numbers}
    step = min(STEP, (WIDTH - REQUESTS) / len(events))
    middles = [f"{REQUESTS + (column + 0.5) * step:.0f}" for column in range(len(events))]
    *lines, foot = [HEAD + LINE * (line + 0.5) for line in range(len(numbers) + 1)]
    dashes: dict[str, list[Line]] = {what: [] for what in LOOKS}
    crosses: list[Words] = []
    for y, steps in zip(lines, doing.values(), strict=True):
        first = 0
        for what, group in groupby(steps):
            end = first + len(list(group))
            if what == WASTED:
                crosses.append((" ".join(middles[first:end]), y, SIGNS[WASTED] * (end - first)))
            elif what:
                dashes[what].append((REQUESTS + first * step, y, (end - first) * step - 1))
            first = end
    seen = [what for what in LOOKS if any(what in steps for steps in doing.values())]
    names = [*(f"request {number}" for number in numbers), "step"]
    drawn = "".join(_bars(LOOKS[what], dashes[what]) for what in seen if what != WASTED)
    parts = [
        _legend(REQUESTS, [(SIGNS[WASTED] if what == WASTED else SWATCH, LOOKS[what], what) for what in seen]),
        f"<g stroke-dasharray='{step - 1:.4g} 1'>{drawn}</g>",
        _texts(crosses, "middle", f" fill='{LOOKS[WASTED]}' font-size='16'") if crosses else "",
        _texts([(f"{REQUESTS - 8}", y, name) for y, name in zip((*lines, foot), names, strict=True)], "end"),
        _texts([(middles[column], foot, str(events[column].step)) for column in range(0, len(events), TICK)], "middle"),
    ]
    text = "\n".join(f"{number} {''.join(SIGNS[what] for what in line)}".rstrip() for number, line in doing.items())
    return Chart(_svg(parts, foot + LINE / 2), text)


def _does(event: StepEvent, number: int) -> str:
    """What a request does in a step; nothing before it came and after its end."""
    work: Work | None = next((work for work in event.work if work.request == number), None)
    if work is None:
        return WAITS if number in event.waiting else ""
    return WASTED if work.wasted else READS if work.tokens > 1 else WRITES


def _legend(x: float, looks: Iterable[tuple[str, str, str]]) -> str:
    """Signs, their colours and what they mean, in one line."""
    words = "\u2003".join(f"<tspan fill='{colour}'>{sign}</tspan> {escape(name)}" for sign, colour, name in looks)
    return f"<text x='{x}' y='16'>{words}</text>"


def _bars(colour: str, lines: Iterable[Line]) -> str:
    path = "".join(f"M{x:.4g} {y:g}h{length:.4g}" for x, y, length in lines)
    return f"<path stroke='{colour}' d='{path}'/>"


def _texts(texts: Iterable[Words], anchor: str = "start", look: str = "") -> str:
    shown = "".join(f"<text x='{x}' y='{y + 4:g}'>{escape(words, quote=False)}</text>" for x, y, words in texts)
    return f"<g text-anchor='{anchor}'{look}>{shown}</g>"


def _svg(parts: Sequence[str], height: float) -> str:
    """Attributes stand in single quotes, because a notebook stores a double one as two characters."""
    size = f"width='{WIDTH}' height='{height:g}' viewBox='0 0 {WIDTH} {height:g}'"
    ground = f"<path fill='#FFF' d='M0 0h{WIDTH}v{height:g}h-{WIDTH}z'/>"
    look = f"font-family='sans-serif' font-size='12' fill='#333' stroke-width='{LINE - 4}'"
    return f"<svg xmlns='http://www.w3.org/2000/svg' {size} {look}>{ground}{''.join(parts)}</svg>"
