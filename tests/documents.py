"""Reads the code blocks of a document, and runs those in Python as its reader would."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

Blocks = list[tuple[str, str]]  # language and source, in order


def code_blocks(document: Path) -> Blocks:
    """The blocks between ``` of a Markdown document."""
    return re.findall(r"```(\w+)\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL)


def run_python(blocks: Blocks, file: str) -> dict[str, object]:
    """Run the Python blocks one after the other, and compare what each prints with a ``text`` block that follows it.

    Returns the names that they define.
    """
    names: dict[str, object] = {}
    for (language, source), following in zip(blocks, [*blocks[1:], ("", "")], strict=True):
        if language != "python":
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(source, file, "exec"), names)
        if following[0] == "text":
            assert printed.getvalue().strip() == following[1].strip()
    return names
