"""Compiled loops are kept until any file of loops changes: Numba by itself looks at the loop's own file only."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("numba", reason="without Numba torch does the same")

from trtlab.ops.cpu import loops

FOLDER = Path(loops.__file__).parent
CALLER = """
from trtlab.ops.cpu.loops import compiled, value
@compiled
def first(x):
    return value(x[0])
"""
SHOW = """
import numpy as np
from trtlab.ops.cpu.caller import first
number = first(np.ones(1, np.int8))
print(sum(first.stats.cache_misses.values()), number)
"""


@pytest.fixture
def package(tmp_path):
    """The files of loops in a package of the same name, with no compiled code, and a small loop that calls theirs."""
    folder = tmp_path / "trtlab" / "ops" / "cpu"
    folder.mkdir(parents=True)
    for parent in (folder, folder.parent, folder.parent.parent):
        (parent / "__init__.py").touch()  # without it an installed trtlab would come first
    for name in loops.SOURCE_FILES:
        shutil.copy(FOLDER / name, folder)
    (folder / "caller.py").write_text(CALLER)
    return folder


def run(package):
    """How many compilations a new process needs for the small loop, and what it gives."""
    command = [sys.executable, "-c", SHOW]
    shown = subprocess.run(command, cwd=package.parents[2], capture_output=True, text=True, check=True).stdout.split()
    return int(shown[0]), float(shown[1])


def test_a_loop_is_compiled_again_when_a_file_that_it_calls_changes(package):
    assert run(package) == (1, 1.0)
    assert run(package) == (0, 1.0), "nothing changed"
    called = package / "loops.py"
    changed = called.read_text().replace("return lambda stored: F32(stored)", "return lambda stored: F32(3 * stored)")
    called.write_text(changed)
    assert run(package) == (1, 3.0)


def test_every_file_that_compiles_is_counted_as_source():
    compiling = {file.name for file in FOLDER.glob("*.py") if "\nfrom numba" in file.read_text()}
    assert compiling == set(loops.SOURCE_FILES)
