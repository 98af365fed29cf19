"""What an object shows of itself: a title, facts, tables and the next step, as text and as HTML. Knows no object."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import singledispatch
from html import escape

from trtlab.errors import printable


@dataclass(frozen=True)
class Table:
    """Rows of cells under column heads; columns whose head starts with a space are aligned to the right."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""


@dataclass(frozen=True)
class Card:
    """One view of an object; its text and its HTML say the same. It holds no address, no id and no time."""

    title: str
    facts: tuple[tuple[str, str], ...] = ()
    tables: tuple[Table, ...] = ()
    next: str = ""


@singledispatch
def card(value: object) -> Card:
    """The card of a value; public types register theirs in ``trtlab.cards``."""
    return Card(type(value).__name__)


class Shown:
    """Base of classes that show their card: as ``repr`` in a terminal, as HTML in a notebook."""

    def __repr__(self) -> str:
        return text(card(self))

    def _repr_html_(self) -> str:
        return html(card(self))


LINE, HALF_LINE = "━", "╸"


def bar(share: float, width: int = 16) -> str:
    """A line for a share between 0 and 1, ``width`` characters long at 1, in halves of a character; any share shows."""
    halves = round(max(0.0, min(1.0, share)) * width * 2) or int(share > 0)
    return LINE * (halves // 2) + HALF_LINE * (halves % 2)


def size(nbytes: float) -> str:
    """Bytes in binary units: ``4.25 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(nbytes) < 1024 or unit == "GiB":
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.2f} {unit}"
        nbytes /= 1024
    raise AssertionError(f"no unit for {nbytes} GiB")


def count(number: float) -> str:
    """A large number in thousands, millions or billions: ``4.72 M``."""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= limit:
            return f"{number / limit:.2f} {unit}"
    return f"{number:g}"


def share_bars(parts: Sequence[tuple[str, float]]) -> Table:
    """A table of named bytes with their shares of the sum; the bar of the largest is 16 characters long."""
    total = sum(nbytes for _, nbytes in parts) or 1.0
    largest = max((nbytes for _, nbytes in parts), default=1.0) or 1.0
    rows = tuple(
        (name, size(nbytes), f"{nbytes / total:.0%}", bar(nbytes / largest)) for name, nbytes in parts if nbytes
    )
    return Table(("memory", " bytes", " share", ""), rows)


# GitHub keeps only the align attribute and centres heads; JupyterLab aligns every cell right unless a style is set.
# Cells have neither quotes nor closing tags, which HTML can do without: notebooks store many of them.
SIDES = {
    ("td", "bar"): "style=text-align:left;color:#8ac;letter-spacing:-.1em",
    ("td", "left"): "style=text-align:left",
    ("th", "left"): "align=left style=text-align:left",
    ("td", "right"): "align=right",
    ("th", "right"): "align=right",
}


def text(card: Card) -> str:
    """The card for a terminal."""
    lines = [card.title]
    width = max((len(label) for label, _ in card.facts), default=0)
    lines += [f"  {label:<{width}}  {value}" for label, value in card.facts]
    for table in card.tables:
        lines += ["", *(f"  {line}" for line in _text_table(table))]
    if card.next:
        lines += ["", f"  next: {card.next}"]
    return printable("\n".join(lines))


def _text_table(table: Table) -> list[str]:
    heads = [column.strip() for column in table.columns]
    widths = [max([len(head), *(len(row[i]) for row in table.rows)]) for i, head in enumerate(heads)]
    rights = [column.startswith(" ") for column in table.columns]

    def line(cells: list[str] | tuple[str, ...]) -> str:
        columns = zip(cells, widths, rights, strict=True)
        return "  ".join(cell.rjust(width) if right else cell.ljust(width) for cell, width, right in columns).rstrip()

    head = [line(heads), line(["─" * width for width in widths])]
    return ([table.caption] if table.caption else []) + head + [line(row) for row in table.rows]


def html(card: Card) -> str:
    """The card for a notebook."""
    parts = [f"<p><b>{escape(card.title)}</b></p>"]
    if card.facts:
        rows = "".join(_html_row("td", fact, ("left", "left")) for fact in card.facts)
        parts.append(f"<table>{rows}</table>")
    parts += [_html_table(table) for table in card.tables]
    if card.next:
        parts.append(f"<p>next: <code>{escape(card.next)}</code></p>")
    return printable("\n".join(parts))


def _html_table(table: Table) -> str:
    sides = ["right" if column.startswith(" ") else "left" for column in table.columns]
    head = _html_row("th", [column.strip() for column in table.columns], sides)
    rows = "".join(_html_row("td", row, sides) for row in table.rows)
    caption = f"<p>{escape(table.caption)}</p>" if table.caption else ""
    return f"{caption}<table><thead>{head}<tbody>{rows}</table>"


def _html_row(tag: str, cells: Sequence[str], sides: Sequence[str]) -> str:
    pairs = [(cell, "bar" if _is_bar(cell) else side) for cell, side in zip(cells, sides, strict=True)]
    return "<tr>" + "".join(f"<{tag} {SIDES[tag, kind]}>{escape(cell)}" for cell, kind in pairs)


def _is_bar(cell: str) -> bool:
    return bool(cell) and not cell.strip(LINE + HALF_LINE)
