"""A file fits a reader's head and a function a screen; every parameter and result has a type."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(path for room in ("trtlab", "widgets") for path in (ROOT / room).rglob("*.py"))
MOST_LINES = 350  # of a file
MOST_FUNCTION_LINES = 60
KERNELS = {"trtlab/ops/cuda/paged_attention.py": {"_attend"}}  # one program of a GPU, which cannot be cut


def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def without_type(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    arguments = function.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    names = [a.arg for a in every if a is not None and a.annotation is None and a.arg not in ("self", "cls")]
    return names + (["return"] if function.returns is None else [])


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_short_and_typed(path):
    name = str(path.relative_to(ROOT))
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES
    for function in functions(path):
        lines = (function.end_lineno or 0) - function.lineno + 1
        assert lines <= MOST_FUNCTION_LINES or function.name in KERNELS.get(name, ()), f"{function.name}: {lines} lines"
        assert not without_type(function), f"{function.name}: no type for {', '.join(without_type(function))}"


def test_the_exceptions_are_needed():
    for name, kernels in KERNELS.items():
        long = {f.name for f in functions(ROOT / name) if (f.end_lineno or 0) - f.lineno >= MOST_FUNCTION_LINES}
        assert kernels == long
