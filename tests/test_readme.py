"""The README's code runs and prints the output shown, and its links are valid."""

import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest

from trtlab.cli import main

from .documents import code_blocks, run_python

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
BLOCKS = code_blocks(ROOT / "README.md")


@pytest.mark.no_gpu
@pytest.mark.plans
def test_the_code_runs_and_prints_what_follows_it():
    run_python(BLOCKS, "README.md")


def test_there_are_blocks_with_a_printed_answer():
    assert [language for language, _ in BLOCKS].count("text") >= 2


LINKS = sorted(set(re.findall(r"\]\(([^)#]+)\)", TEXT)))


@pytest.mark.parametrize("target", [link for link in LINKS if "://" not in link])
def test_a_link_within_the_project_leads_somewhere(target):
    assert (ROOT / target).exists()


def test_links_out_of_the_project_are_the_sources_of_the_removal():
    outside = [link for link in LINKS if "://" in link]
    assert outside == [f"https://github.com/NVIDIA/TensorRT-LLM/pull/{number}" for number in (11723, 15763, 15918)]


@pytest.mark.no_gpu
@pytest.mark.plans
def test_the_commands_run(tmp_path, monkeypatch, capsys):
    (tmp_path / "trtlab").symlink_to(ROOT / "trtlab")
    monkeypatch.chdir(tmp_path)
    lines = [line for language, block in BLOCKS if language == "bash" for line in block.splitlines()]
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("trtlab ")]
    assert [command[0] for command in commands] == ["convert", "build", "run"]
    assert [main(command) for command in commands] == [0, 0, 0]
    assert "trtlab: " not in capsys.readouterr().err


def test_the_install_lines_name_this_project_s_extras_and_files():
    extras = set(PROJECT["optional-dependencies"])
    (named,) = re.findall(r"pip install \"/path/to/trtlab\[([\w,]+)\]\"", TEXT)
    assert set(named.split(",")) == extras - {"dev"}
    environment = (ROOT / "environment.yml").read_text(encoding="utf-8").splitlines()
    assert f"\n{environment[0].removeprefix('# ')}\n" in TEXT


def title(notebook: Path) -> str:
    """The heading of a notebook: its number and its question."""
    first = json.loads(notebook.read_text(encoding="utf-8"))["cells"][0]["source"]
    return "".join(first).splitlines()[0].removeprefix("# ")


def test_a_notebook_has_one_name_everywhere():
    notebooks = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
    rows = re.findall(r"^\| \[(\d+)\]\(notebooks/([\w.]+)\) \| (.*) \|$", TEXT, re.MULTILINE)
    assert [(file, f"{number}: {question}") for number, file, question in rows] == [
        (n.name, title(n)) for n in notebooks
    ]
    for notebook in notebooks:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
        for words, target in re.findall(r"\[([^]]+)\]\((\d\d_\w+\.ipynb)\)", text):
            assert words in (title(notebook.parent / target), f"notebook {target[:2]}"), f"{notebook.name}: {words}"


def test_no_remedy_installs_trtlab_from_an_index_that_does_not_have_it():
    for file in (ROOT / "trtlab").rglob("*.py"):
        assert "trtlab[" not in file.read_text(encoding="utf-8"), file
