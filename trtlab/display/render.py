"""A card as text and as HTML: plain tables, because GitHub drops style and script."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trtlab.display.card import Card, Table


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
        rows = "".join(
            f'<tr><td align="left">{escape(label)}</td><td align="left">{escape(value)}</td></tr>'
            for label, value in card.facts
        )
        parts.append(f"<table>{rows}</table>")
    parts += [_html_table(table) for table in card.tables]
    if card.next:
        parts.append(f"<p>next: <code>{escape(card.next)}</code></p>")
    return "\n".join(parts)


def _html_table(table: Table) -> str:
    sides = ["right" if column.startswith(" ") else "left" for column in table.columns]
    heads = "".join(
        f'<th align="{side}">{escape(column.strip())}</th>' for column, side in zip(table.columns, sides, strict=True)
    )
    rows = "".join(
        "<tr>"
        + "".join(f'<td align="{side}">{escape(cell)}</td>' for cell, side in zip(row, sides, strict=True))
        + "</tr>"
        for row in table.rows
    )
    caption = f"<p>{escape(table.caption)}</p>" if table.caption else ""
    return f"{caption}<table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"
