"""Who may import whom: checked over the source, and by importing with much blocked."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# The rooms (folders, and files beside them) from the ground up. A file imports from floors below its own and from its
# own room; rooms of one floor do not know each other. An import in a function, or for type checkers alone, counts too.
FLOORS = """
    errors version progress hardware interrupts
    validation
    card
    config
    storage
    model
    parallel
    ops
    memory
    convert runtime
    quantize tensorrt
    machine session engine_config engine_command engine_weights weight_source checkpoint_folder
    engine
    checkpoint
    published packaged
    evaluate bench tiny
    cards
    __init__
    demo
    cli
"""
FLOOR = {room: number for number, line in enumerate(FLOORS.strip().splitlines()) for room in line.split()}
# Third-party packages that one room alone may import, and those that are imported where they are used, in a function.
HOMES = {
    "tensorrt": ("tensorrt",),
    "tensorrt_rtx": ("tensorrt",),
    "tensorrt_rtx_bindings": ("tensorrt",),
    "mpi4py": ("parallel",),
    "triton": ("ops.cuda",),
    "numba": ("ops.cpu",),
    "llvmlite": ("ops.cpu",),
    "ipywidgets": (),
    "anywidget": (),
    "plotly": (),
    "IPython": (),
    "fcntl": ("storage",),
}
LAZY = {"transformers", "modelopt", "tokenizers", *HOMES} - {"triton", "numba", "llvmlite"}  # kernels: their files are


def module_name(path: Path) -> str:
    """``runtime.loop`` for trtlab/runtime/loop.py; a package is its folder, trtlab itself ``__init__``."""
    parts = path.relative_to(ROOT / "trtlab").with_suffix("").parts
    if parts[-1] == "__init__" and len(parts) > 1:
        parts = parts[:-1]
    return ".".join(parts)


def room(name: str) -> str:
    """The folder of a module, or the module itself where it lies beside the folders."""
    return name.split(".")[0]


def imports(path: Path) -> list[tuple[str, bool, int]]:
    """Every import of a file: (what, whether at the top of the file, line)."""
    listed = []

    def walk(node: ast.AST, top: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                listed.extend((alias.name, top, child.lineno) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}:{child.lineno} imports relatively"
                for alias in child.names:  # ``from trtlab.tensorrt import dtypes`` is of that module
                    whole = f"{child.module}.{alias.name}"
                    place = ROOT / whole.replace(".", "/")
                    is_module = place.with_suffix(".py").exists() or place.is_dir()
                    listed.append((whole if is_module else str(child.module), top, child.lineno))
            walk(child, top and not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)))

    walk(ast.parse(path.read_text(encoding="utf-8")), True)
    return listed


def ours(target: str) -> str | None:
    """The name within trtlab of what is imported, None for another package."""
    if target != "trtlab" and not target.startswith("trtlab."):
        return None
    return target.removeprefix("trtlab").lstrip(".") or "__init__"


SOURCES = sorted((ROOT / "trtlab").rglob("*.py"))


def test_the_floors_name_every_room_and_no_other():
    assert set(FLOOR) == {room(module_name(path)) for path in SOURCES}


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_a_file_imports_from_floors_below(path):
    name, wrong = module_name(path), []
    for target, _, line in imports(path):
        other = ours(target)
        if other is not None and room(other) != room(name) and FLOOR[room(other)] >= FLOOR[room(name)]:
            wrong.append(f"line {line}: {name} (floor {FLOOR[room(name)]}) imports {other} ({FLOOR[room(other)]})")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_what_is_heavy_or_optional_is_imported_where_it_is_used(path):
    name, wrong = module_name(path), []
    for target, top, line in imports(path):
        package = target.split(".")[0]
        if package in LAZY and top:
            wrong.append(f"line {line}: {package} at the top of the file")
        if package in HOMES and not any(f"{name}.".startswith(f"{home}.") for home in HOMES[package]):
            wrong.append(f"line {line}: {package} outside its home")
    assert not wrong, "\n".join(wrong)


def test_no_two_files_import_each_other_in_a_circle():
    graph = defaultdict(set)
    for path in SOURCES:
        graph[module_name(path)] |= {other for target, _, _ in imports(path) if (other := ours(target)) is not None}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " imports ".join((*trail[trail.index(name) :], name))
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*trail, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())


def test_nothing_imports_the_widgets():
    assert not [p for p in SOURCES for target, _, _ in imports(p) if target.startswith(("trtlab.widgets", "widgets"))]


BLOCKED = '''
import sys
for name in """transformers tokenizers tensorrt tensorrt_rtx tensorrt_rtx_bindings tensorrt_bindings mpi4py modelopt
IPython ipywidgets anywidget plotly pandas matplotlib onnxruntime fcntl msvcrt""".split():
    sys.modules[name] = None  # an import of it fails, as where it is not installed
import trtlab
from trtlab import BuildConfig, Checkpoint, Mapping, SamplingParams
with Checkpoint.from_hugging_face(sys.argv[1]).build(BuildConfig(), plan=False) as engine:
    with engine.session(backend="torch", device="cpu") as session:
        print(session.generate([1, 2, 3], SamplingParams(max_new_tokens=5)).token_ids)
print(trtlab.machine().builds_plans)
'''


def test_trtlab_imports_and_generates_with_every_optional_package_blocked(random_model, open_session):
    from trtlab import SamplingParams

    process = subprocess.run(
        [sys.executable, "-W", "error", "-c", BLOCKED, str(random_model())],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    expected = open_session(random_model()).generate([1, 2, 3], SamplingParams(max_new_tokens=5)).token_ids
    assert process.stdout == f"{expected}\nFalse\n"


IMPORTS = """
import sys, torch
before = set(sys.modules)
import trtlab, trtlab.config
print(*sorted({name.split(".")[0] for name in set(sys.modules) - before}))
import trtlab.widgets
print("plotly.graph_objs" in sys.modules, "jsonschema" in sys.modules)
"""


def test_trtlab_loads_nothing_heavy_and_the_widgets_leave_out_what_takes_plotly_seconds():
    process = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, timeout=120, check=True)
    loaded, by_widgets = process.stdout.splitlines()
    heavy = {"transformers", "tokenizers", "huggingface_hub", "mpi4py", "IPython", "ipywidgets", "plotly", "pandas"}
    heavy |= {"tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings", "tensorrt_bindings"}
    assert not (heavy | {"scipy", "matplotlib", "onnxruntime"}) & set(loaded.split())
    assert by_widgets == "True False"  # no FigureWidget, which loads jsonschema for four seconds


# --- packaging


def test_every_package_folder_is_listed_in_pyproject():
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {
        ".".join(path.parent.relative_to(ROOT).parts): path.parent
        for root in ("trtlab", "widgets")
        for path in (ROOT / root).rglob("__init__.py")
    }
    expected = {name if name.startswith("trtlab") else f"trtlab.{name}" for name in folders}
    assert sorted(tool["packages"]) == sorted(expected)
    assert tool["package-dir"]["trtlab.widgets"] == "widgets"


def test_every_folder_with_code_is_a_package():
    bare = {p.parent for root in ("trtlab", "widgets") for p in (ROOT / root).rglob("*.py")}
    assert not [folder for folder in bare if not (folder / "__init__.py").exists()]


def test_every_public_name_is_there():
    import trtlab

    assert all(hasattr(trtlab, name) for name in trtlab.__all__)
    assert sorted(trtlab.__all__, key=str) == sorted(set(trtlab.__all__), key=str)
