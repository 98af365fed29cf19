"""A user's error: its text, which is short and printable, and what a notebook shows of it, through a real kernel."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Iterator

import pytest
from jupyter_client.manager import start_new_kernel

from trtlab import CheckpointError, ConfigError, TrtlabError
from trtlab.errors import LONGEST_PART

IMPORT = "from trtlab import BuildConfig, Checkpoint, ConfigError"


@pytest.fixture(scope="module")
def kernel() -> Iterator[object]:
    manager, client = start_new_kernel(kernel_name="python3")
    try:
        assert errors_of(client, IMPORT) == []
        yield client
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def errors_of(client, code):
    """The lines of the traceback that a cell shows, empty without an error."""
    lines = []

    def collect(message):
        if message["msg_type"] == "error":
            lines.extend("\n".join(message["content"]["traceback"]).splitlines())

    client.execute_interactive(code, timeout=120, output_hook=collect)
    return lines


def test_a_cell_s_error_is_the_statement_and_the_message(kernel):
    lines = errors_of(kernel, "x = 1\nBuildConfig(\n    max_batch_size=4,\n    max_bach_size=0,\n)\n")
    assert lines == [
        "Cell, line 2",
        "    BuildConfig(",
        "        max_batch_size=4,",
        "        max_bach_size=0,",
        "    )",
        "",
        "ConfigError: BuildConfig.max_bach_size is unknown; did you mean max_batch_size?",
    ]


def test_functions_of_the_user_are_shown_and_those_of_libraries_are_not(kernel):
    errors_of(kernel, "import functools\n\ndef helper(size):\n    return BuildConfig(max_batch_size=size)")
    lines = errors_of(kernel, "functools.reduce(lambda _, size: helper(size), [1, 0])")
    assert lines[:2] == ["Cell, line 1", "    functools.reduce(lambda _, size: helper(size), [1, 0])"]
    assert "Cell, line 4, in helper" in lines and "    return BuildConfig(max_batch_size=size)" in lines
    assert lines[-1].startswith("ConfigError: BuildConfig.max_batch_size is not valid; got 0")
    assert not [line for line in lines if "pydantic" in line or "trtlab/" in line or "IPython" in line]


@pytest.mark.parametrize("module", ["given.py", "given/__init__.py", "given/deep/inner.py"])
def test_a_library_is_known_wherever_pip_put_it(kernel, module, tmp_path):
    """``pip install --target`` takes any folder."""
    (tmp_path / "given-1.0.dist-info").mkdir()
    (tmp_path / module).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / module).write_text("def call(function):\n    return function()\n", encoding="utf-8")
    name = module.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    path = f"import sys, importlib\nsys.path.insert(0, {str(tmp_path)!r})\nfor n in [n for n in sys.modules if "
    errors_of(kernel, path + f"n.partition('.')[0] == 'given']: del sys.modules[n]\nimport {name} as library")
    lines = errors_of(kernel, "library.call(lambda: BuildConfig(max_batch_size=0))")
    call = "    library.call(lambda: BuildConfig(max_batch_size=0))"
    assert lines[:5] == ["Cell, line 1", call, "", "Cell, line 1", call] and len(lines) == 7


def test_an_awaited_call_is_shown_as_any_other(kernel):
    errors_of(kernel, "import asyncio\nasync def wait():\n    await asyncio.sleep(0)\n    BuildConfig(4, zebra=1)")
    lines = errors_of(kernel, "await asyncio.wait_for(wait(), 5)")
    assert lines[:5] == [
        "Cell, line 1",
        "    await asyncio.wait_for(wait(), 5)",
        "",
        "Cell, line 4, in wait",
        "    BuildConfig(4, zebra=1)",
    ]
    assert len(lines) == 7


def test_a_module_of_the_user_is_shown_with_its_file(kernel, tmp_path):
    file = tmp_path / "recipes.py"
    file.write_text("from trtlab import Mapping\n\ndef split():\n    return Mapping(tp_size=0)\n", encoding="utf-8")
    errors_of(kernel, f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\nimport recipes")
    lines = errors_of(kernel, "recipes.split()")
    assert f'File "{file}", line 4, in split' in lines and "    return Mapping(tp_size=0)" in lines


def test_several_problems_are_a_line_each(kernel):
    lines = errors_of(kernel, "BuildConfig(max_batch_size=0, max_num_tokens=0)")
    assert lines[-2].startswith("ConfigError: BuildConfig.max_batch_size is 0")
    assert lines[-1].startswith("BuildConfig.max_num_tokens is 0")


def test_full_tracebacks_are_there_on_request(kernel):
    errors_of(kernel, "%env TRTLAB_TRACEBACK=full")
    lines = errors_of(kernel, "BuildConfig(max_batch_size=0)")
    errors_of(kernel, "%env TRTLAB_TRACEBACK=")
    assert lines[0].startswith("pydantic_core") or any("ValidationError" in line for line in lines)
    assert any("trtlab/config/base.py" in line for line in lines) and lines[-1].startswith(
        "trtlab.errors.ConfigError: "
    )
    assert len(errors_of(kernel, "BuildConfig(max_batch_size=0)")) == 4


def test_other_errors_look_as_ever(kernel):
    lines = errors_of(kernel, "1 / 0")
    assert any("Traceback (most recent call last)" in line for line in lines)


def test_a_terminal_s_ipython_shows_the_same():
    code = f"{IMPORT}\nBuildConfig(max_bach_size=0)\nexit\n"
    process = subprocess.run(
        [sys.executable, "-m", "IPython", "--simple-prompt", "--no-banner", "--colors=NoColor", "--no-confirm-exit"],
        input=code,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    shown = process.stdout[process.stdout.index("Cell, line 1") :]
    assert shown.splitlines()[:4] == [
        "Cell, line 1",
        "    BuildConfig(max_bach_size=0)",
        "",
        "ConfigError: BuildConfig.max_bach_size is unknown; did you mean max_batch_size?",
    ]


def test_an_error_that_was_never_raised_is_its_message():
    assert ConfigError("size", remedy="give one")._render_traceback_() == ["ConfigError: size; give one"]


def test_a_long_statement_is_cut(kernel):
    lines = errors_of(kernel, "BuildConfig(\n" + "    # sizes\n" * 20 + "    max_bach_size=0)")
    assert lines[:6] == ["Cell, line 1", "    BuildConfig(", *["        # sizes"] * 4] and lines[6] == "    ..."
    assert len(lines) == 9


def test_an_error_joins_the_parts_that_are_given():
    assert str(TrtlabError("no", got=0, expected=1, remedy="try 1")) == "no; got 0; expected 1; try 1"
    assert str(TrtlabError("no", remedy="try 1")) == "no; try 1"


@pytest.mark.parametrize("part", ["what", "got", "expected", "remedy"])
def test_each_part_can_be_printed_and_is_short(part):
    parts = {"what": "no", "got": "a", "expected": "b", "remedy": "c"} | {part: "\ud800\x1b[2J\r" + "x" * 100_000}
    error = TrtlabError(parts.pop("what"), **parts)
    text = str(error)
    text.encode()
    assert r"\ud800\x1b[2J\r" in text and not {"\x1b", "\r"} & set(text)
    assert "... (100,006 characters)" in text and len(text) < LONGEST_PART + 100
    assert str(pickle.loads(pickle.dumps(error))) == text


def test_lines_and_letters_stay_as_they_are():
    assert str(CheckpointError("größe 🙂\n\tzweite Zeile")) == "größe 🙂\n\tzweite Zeile"
