"""The notebooks as documents: each has one name, wherever it is named."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
LINK = re.compile(r"\[([^\]]+)\]\((\d\d_\w+)\.ipynb\)")


def words(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def title(path):
    return words(path).partition("\n")[0].removeprefix("# ")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_named_by_its_number_and_its_question_everywhere(path):
    number, _, question = title(path).partition(": ")
    assert path.stem.startswith(f"{number}_")
    assert question.endswith("?")
    assert f"| [{number}](notebooks/{path.name}) | {question} |" in (ROOT / "README.md").read_text(encoding="utf-8")
    for other in NOTEBOOKS:
        for name, stem in LINK.findall(words(other)):
            assert stem != path.stem or name in (title(path), f"notebook {number}"), other.name


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_mention_of_a_notebook_is_a_link_to_a_file(path):
    assert re.findall(r"(?<!\[)\bnotebook \d\d", words(path)) == []
    stems = {stem for _, stem in LINK.findall(words(path))}
    assert stems
    assert stems <= {other.stem for other in NOTEBOOKS}
