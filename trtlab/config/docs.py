"""The docstrings of fields: their first sentences, their page for ``help()``, and the names that other tools use."""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import re
import textwrap

OTHER_NAMES = re.compile(r"(?:TensorRT-LLM|ModelOpt): ((?:``[\w-]+``(?:, )?)+)")


class DocWithFields:
    """The docstring of a class with those of its fields as ``Args:``, made when ``help()`` asks for it."""

    def __init__(self, summary: str) -> None:
        self.summary = summary

    def __get__(self, instance: object, kind: type) -> str:
        fields = "\n".join(f"{name}: {textwrap.indent(doc, '    ').strip()}" for name, doc in field_docs(kind).items())
        return f"{inspect.cleandoc(self.summary)}\n\nArgs:\n{textwrap.indent(fields, '    ')}\n"


@functools.cache
def field_docs(kind: type) -> dict[str, str]:
    """The docstring under each field of a class, in the order of the fields; empty where there is no source."""
    try:
        source = textwrap.dedent(inspect.getsource(kind))
    except (OSError, TypeError):
        return {}
    (body,) = [node.body for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    return {
        field.target.id: inspect.cleandoc(doc.value.value)
        for field, doc in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant) and isinstance(doc.value.value, str)
    }


def first_sentence(kind: type, field: str) -> str:
    """The first sentence of a field's docstring on one line, without its full stop."""
    words = " ".join(field_docs(kind).get(field, "").split())
    return words.split(". ")[0].removesuffix(".").replace("``", "")


@functools.cache
def other_names(kind: type) -> dict[str, str]:
    """The names that TensorRT-LLM and ModelOpt have for fields, from the fields' docstrings: other name to field."""
    return {
        name.lstrip("-"): field
        for field, doc in field_docs(kind).items()
        for names in OTHER_NAMES.findall(doc)
        for name in re.findall(r"[\w-]+", names)
    }
