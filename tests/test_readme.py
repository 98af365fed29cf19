"""The README's code runs and prints the output shown, and its links are valid."""

import contextlib
import io
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.no_gpu
@pytest.mark.plans
def test_the_code_runs_and_prints_what_follows_it():
    names: dict[str, object] = {}
    for (language, source), following in zip(BLOCKS, [*BLOCKS[1:], ("", "")], strict=True):
        if language != "python":
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(source, "README.md", "exec"), names)
        if following[0] == "text":
            assert printed.getvalue().strip() == following[1].strip()


def test_there_are_blocks_with_a_printed_answer():
    assert [language for language, _ in BLOCKS].count("text") >= 2


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#]+)\)", TEXT))))
def test_a_link_leads_somewhere(target):
    assert (ROOT / target).exists()


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:tests|benchmarks)/[\w/.]+)`", TEXT))))
def test_a_named_file_exists(path):
    assert (ROOT / path).exists()


def test_the_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"`?make (\w+)`?", TEXT)) - {"is", "sure"}:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
