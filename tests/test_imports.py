"""Who may import whom (shared/design/architecture.md): checked over the source, and by importing with much blocked."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# From the ground up; a file imports from lines above its own, and its neighbours within a folder. A folder's line
# holds for the files in it that have none of their own.
LAYERS = """
    version errors progress
    display display.render display.card
    machine lazy quantize.primitives quantize.recipes runtime.events runtime.blocks
    settings
    quantize.config
    model_config
    config
    files model.specs model.quantized model.formats model.rope
    model.weights
    parallel ops.protocol
    ops.quantized
    ops.paged
    ops
    model
    estimate published fingerprint runtime.request runtime.tokenizer tensorrt.library tensorrt.log tensorrt.dtypes
    convert quantize
    runtime
    tensorrt
    checkpoint room
    engine
    request
    session
    backends
    evaluate bench serve
    tiny display.cards display.estimate display.plan display.quantized display.runtime
    __init__
    demo
    cli __main__
"""
ORDER = {name: layer for layer, line in enumerate(LAYERS.strip().splitlines()) for name in line.split()}
# Inside a function, and only there: the fluent methods, and the machine that asks the library.
FLUENT = {
    ("checkpoint", "engine"),
    ("engine", "backends"),
    ("machine", "tensorrt.library"),
    ("machine", "display.card"),
}
# Third-party packages that one place alone may import, and how.
HOMES = {
    "tensorrt": ("tensorrt.",),
    "tensorrt_rtx": ("tensorrt.",),
    "tensorrt_rtx_bindings": ("tensorrt.",),
    "mpi4py": ("parallel.comm",),
    "ipywidgets": (),
    "anywidget": (),
    "plotly": (),
    "IPython": (),
    "triton": ("ops.paged_triton",),
    "numba": ("ops.cpu_loops", "ops.cpu_products", "ops.cpu_vectors"),
    "llvmlite": ("ops.cpu_loops", "ops.cpu_vectors"),
}
LAZY = {"transformers", "modelopt", "tokenizers", *HOMES} - {
    "triton",
    "numba",
    "llvmlite",
}  # kernels are made as their file is imported


def module_name(path: Path) -> str:
    """``runtime.executor`` for trtlab/runtime/executor.py; a package is its folder, trtlab itself ``__init__``."""
    parts = path.relative_to(ROOT / "trtlab").with_suffix("").parts
    if parts[-1] == "__init__" and len(parts) > 1:
        parts = parts[:-1]
    return ".".join(parts)


def layer_of(name: str) -> int:
    while name not in ORDER:
        assert "." in name, f"{name} has no layer: give it one, in architecture.md too"
        name = name.rsplit(".", 1)[0]
    return ORDER[name]


def imports(path: Path) -> list[tuple[str, bool, int]]:
    """(what is imported, whether at the top of the file, line); what is for type checkers alone is left out."""
    found = []

    def walk(node: ast.AST, top: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                continue
            if isinstance(child, ast.Import):
                found.extend((alias.name, top, child.lineno) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}:{child.lineno} imports relatively"
                # ``from trtlab.display import cards`` is of the module, ``from trtlab.display.card import Card`` too
                for alias in child.names:
                    whole = f"{child.module}.{alias.name}"
                    is_module = (ROOT / whole.replace(".", "/")).with_suffix(".py").exists()
                    found.append((whole if is_module else str(child.module), top, child.lineno))
            walk(child, top and not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)))

    walk(ast.parse(path.read_text(encoding="utf-8")), True)
    return found


SOURCES = sorted((ROOT / "trtlab").rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_a_file_imports_from_lines_above_it(path):
    name = module_name(path)
    wrong = []
    for target, top, line in imports(path):
        if not target.startswith("trtlab"):
            continue
        other = target.removeprefix("trtlab").lstrip(".") or "__init__"
        neighbours = other.split(".")[0] == name.split(".")[0]
        allowed = layer_of(other) < layer_of(name) or (neighbours and layer_of(other) == layer_of(name))
        if not allowed and not (not top and (name, other) in FLUENT):
            wrong.append(f"line {line}: {name} ({layer_of(name)}) imports {other} ({layer_of(other)})")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_what_is_heavy_or_optional_is_imported_where_it_is_used(path):
    name, wrong = module_name(path), []
    for target, top, line in imports(path):
        package = target.split(".")[0]
        if package in LAZY and top:
            wrong.append(f"line {line}: {package} at the top of the file")
        if package in HOMES and not any(f"{name}.".startswith(f"{home}".rstrip(".") + ".") for home in HOMES[package]):
            wrong.append(f"line {line}: {package} outside its home")
    assert not wrong, "\n".join(wrong)


def test_neighbours_do_not_import_each_other_in_circles():
    graph = {
        module_name(path): {t.removeprefix("trtlab.") for t, top, _ in imports(path) if top and t.startswith("trtlab.")}
        for path in SOURCES
    }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " imports ".join((*trail[trail.index(name) :], name))
        if name in graph and name not in done:
            for other in graph[name]:
                visit(other, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_nothing_imports_the_widgets():
    assert not [p for p in SOURCES for target, _, _ in imports(p) if target.startswith(("trtlab.widgets", "widgets"))]


BLOCKED = '''
import sys
for name in """transformers tokenizers tensorrt tensorrt_rtx tensorrt_rtx_bindings tensorrt_bindings mpi4py modelopt
IPython ipywidgets anywidget plotly pandas matplotlib onnxruntime""".split():
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


def test_importing_trtlab_loads_nothing_heavy():
    code = "import sys, torch; before = set(sys.modules); import trtlab; print(*sorted(set(sys.modules) - before))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    heavy = {"transformers", "tokenizers", "huggingface_hub", "tensorrt", "tensorrt_rtx", "mpi4py", "IPython"}
    heavy |= {"ipywidgets", "plotly", "pandas", "scipy", "matplotlib", "onnxruntime"}
    assert not heavy & {name.split(".")[0] for name in loaded.stdout.split()}


def test_the_widgets_leave_out_what_takes_plotly_seconds():
    if find_spec("rfc3987_syntax") is None:
        pytest.skip("the slow package is not installed")
    code = """if True:
        import sys, trtlab.widgets
        assert "plotly.basewidget" in sys.modules
        assert "rfc3987_syntax" not in sys.modules
        import rfc3987_syntax  # whoever wants it still gets it
    """
    subprocess.run([sys.executable, "-c", code], timeout=120, check=True)


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
