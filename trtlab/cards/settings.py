"""The card of settings: every field with its value, its default and the first sentence of its docstring."""

from __future__ import annotations

import dataclasses

from trtlab.card import Card, Table, card
from trtlab.config.base import Settings, default_of, python_code
from trtlab.config.docs import first_sentence


@card.register
def settings_card(chosen: Settings) -> Card:
    """Every field with its value, its default where the value differs, and its meaning."""
    kind = type(chosen)
    rows = []
    for field in dataclasses.fields(chosen):
        value, default = getattr(chosen, field.name), default_of(field)
        words = "required" if default is dataclasses.MISSING else repr(default)
        rows.append((field.name, repr(value), "" if value == default else words, first_sentence(kind, field.name)))
    facts = (("in Python", python_code(chosen)),)
    return Card(kind.__name__, facts, (Table(("setting", "value", "default", "what it is"), tuple(rows)),))
