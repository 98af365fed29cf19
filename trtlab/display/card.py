"""What an object shows of itself: a title, facts, tables and the next step. Knows no object and no HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import singledispatch

from trtlab.display.render import html, text


@dataclass(frozen=True)
class Table:
    """Rows of cells under column heads; columns whose head starts with a space are aligned to the right."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""


@dataclass(frozen=True)
class Card:
    """One view, rendered as text and as HTML that cannot disagree. It holds no address, no id and no clock."""

    title: str
    facts: tuple[tuple[str, str], ...] = ()
    tables: tuple[Table, ...] = ()
    next: str = ""


@singledispatch
def card(value: object) -> Card:
    """The card of a value; public types register theirs in ``trtlab.display.cards``."""
    return Card(type(value).__name__)


class Shown:
    """Gives a class its card as ``repr`` in a terminal and as a table in a notebook."""

    def __repr__(self) -> str:
        return text(card(self))

    def _repr_html_(self) -> str:
        return html(card(self))


def bar(share: float, width: int = 16) -> str:
    """A bar of eighth blocks for a share between 0 and 1."""
    eighths = round(max(0.0, min(1.0, share)) * width * 8)
    full, rest = divmod(eighths, 8)
    return "█" * full + ("", "▏", "▎", "▍", "▌", "▋", "▊", "▉")[rest]


def size(nbytes: float) -> str:
    """Bytes in binary units: ``4.25 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(nbytes) < 1024 or unit == "GiB":
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.2f} {unit}"
        nbytes /= 1024
    raise AssertionError("GiB ends the loop")


def count(number: float) -> str:
    """A large number in thousands, millions or billions: ``4.72 M``."""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= limit:
            return f"{number / limit:.2f} {unit}"
    return f"{number:g}"


def share_bars(parts: Sequence[tuple[str, float]]) -> Table:
    """Named bytes as a table with bars, longest 16 blocks; the shares are of the sum."""
    total = sum(nbytes for _, nbytes in parts) or 1.0
    largest = max((nbytes for _, nbytes in parts), default=1.0) or 1.0
    rows = tuple(
        (name, size(nbytes), f"{nbytes / total:.0%}", bar(nbytes / largest)) for name, nbytes in parts if nbytes
    )
    return Table(("memory", " bytes", " share", ""), rows)
