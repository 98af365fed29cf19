"""A card as text and as HTML: plain tables, because GitHub drops style and script."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trtlab.display.card import Card, Table

# GitHub keeps align alone, and centres heads; JupyterLab moves every cell to the right unless a style says otherwise.
SIDES = {
    ("td", "left"): 'style="text-align:left"',
    ("th", "left"): 'align="left" style="text-align:left"',
    ("td", "right"): 'align="right"',
    ("th", "right"): 'align="right"',
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
    return "\n".join(lines)


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
    return "\n".join(parts)


def _html_table(table: Table) -> str:
    sides = ["right" if column.startswith(" ") else "left" for column in table.columns]
    head = _html_row("th", [column.strip() for column in table.columns], sides)
    rows = "".join(_html_row("td", row, sides) for row in table.rows)
    caption = f"<p>{escape(table.caption)}</p>" if table.caption else ""
    return f"{caption}<table><thead>{head}</thead><tbody>{rows}</tbody></table>"


def _html_row(tag: str, cells: Sequence[str], sides: Sequence[str]) -> str:
    pairs = zip(cells, sides, strict=True)
    return "<tr>" + "".join(f"<{tag} {SIDES[tag, side]}>{escape(cell)}</{tag}>" for cell, side in pairs) + "</tr>"
