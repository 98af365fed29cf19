"""What is found, what it is asked for, and what it is said to run on."""

from __future__ import annotations

import importlib.util
import re
import types
from pathlib import Path

import pytest

import trtlab.tensorrt.library as finder
from trtlab.errors import EngineError, MissingDependency
from trtlab.tensorrt.emit.ops import ACTIVATIONS
from trtlab.tensorrt.library import NAMES, NAMES_FOR_RTX, Library, check_names, library
from trtlab.tensorrt.read.readback import PARAMETERS


def rtx() -> Library:
    return Library(library().trt, "tensorrt_rtx", "1.7.1", "tensorrt_rtx")


def full() -> Library:
    return Library(library().trt, "tensorrt", "11.4.0", "tensorrt")


def test_every_name_the_package_uses_is_listed():
    source = "".join(path.read_text() for path in Path(finder.__file__).parent.rglob("*.py"))
    used = set(re.findall(r"\btrt\.([A-Z]\w*(?:\.[A-Za-z]\w*)?)", source))
    used |= {f"ElementWiseOperation.{name}" for name in re.findall(r'_elementwise\(\s*"\w+", "([A-Z]+)"', source)}
    used |= {f"ActivationType.{name}" for name in ACTIVATIONS.values()}
    methods = {name.partition(".")[2] for name in NAMES}
    listed = {*NAMES, *NAMES_FOR_RTX, *(name.partition(".")[0] for name in NAMES)}
    assert len(used) > 20
    assert used - listed == set()
    assert set(re.findall(r"\.(add_\w+)\(", source)) - methods == set()


@pytest.mark.tensorrt
def test_every_class_that_is_cast_to_exists():
    trt = library().trt
    assert all(kind in trt.LayerType.__members__ and hasattr(trt, cls) for kind, (cls, _) in PARAMETERS.items())


@pytest.mark.tensorrt
@pytest.mark.parametrize(
    ("found", "gpu", "dtypes", "expected"),
    [
        (rtx, (8, 0), ["bfloat16"], True),
        (rtx, (8, 9), ["float8_e4m3fn"], True),
        (rtx, (12, 0), ["float32"], True),
        (rtx, (9, 0), ["float16"], False),
        (rtx, (7, 5), ["float16"], True),
        (rtx, (7, 5), ["bfloat16"], False),
        (rtx, (8, 6), ["float8_e4m3fn"], False),
        (rtx, (7, 0), [], False),
        (full, (9, 0), ["bfloat16"], True),
        (full, (10, 0), ["float8_e4m3fn"], True),
        (full, (7, 0), [], False),
    ],
)
def test_what_runs_where(found, gpu, dtypes, expected):
    verdict = found().runs_on(gpu, dtypes)
    assert bool(verdict) is expected
    assert verdict.reason


@pytest.mark.tensorrt
def test_tensorrt_for_rtx_names_the_way_out_on_hopper():
    assert "9.0" in rtx().runs_on((9, 0)).reason
    assert "use tensorrt" in rtx().runs_on((9, 0)).reason


@pytest.mark.tensorrt
def test_only_tensorrt_for_rtx_builds_without_a_gpu():
    assert rtx().builds(None)
    assert not full().builds(None)
    assert full().builds((9, 0))


@pytest.mark.tensorrt
def test_an_old_library_is_refused_by_the_names_it_lacks():
    network = types.SimpleNamespace(
        **{name: None for name in dir(library().trt.INetworkDefinition) if "v2" not in name}
    )
    parts = {name: getattr(library().trt, name) for name in dir(library().trt)}
    old = types.SimpleNamespace(**{**parts, "INetworkDefinition": network})
    with pytest.raises(EngineError) as raised:
        check_names(Library(old, "tensorrt", "10.3.0", "tensorrt"))
    assert raised.value.what == "TensorRT 10.3.0 lacks INetworkDefinition.add_attention_v2"
    assert "TensorRT 11 or later" in str(raised.value)


def test_without_tensorrt_one_error_names_the_feature_and_the_install_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    library.cache_clear()
    try:
        with pytest.raises(MissingDependency, match=r"needs TensorRT; pip install"):
            library()
    finally:
        library.cache_clear()


def test_a_tensorrt_that_does_not_load_is_passed_over_and_named(monkeypatch):
    real = importlib.import_module
    broken = importlib.util.find_spec("json")

    def find(name, *args):
        return broken if name == "tensorrt" else None

    def load(name, *args):
        if name == "tensorrt":
            raise ImportError("libnvinfer.so.11: cannot open shared object file")
        return real(name, *args)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    monkeypatch.setattr(importlib, "import_module", load)
    library.cache_clear()
    try:
        with pytest.raises(MissingDependency, match=r"tensorrt does not load: libnvinfer.*pip install"):
            library()
    finally:
        library.cache_clear()


@pytest.mark.tensorrt
@pytest.mark.skipif(importlib.util.find_spec(finder.BINDINGS) is None, reason="TensorRT is not from the PyPI wheels")
def test_bindings_and_libraries_of_two_releases_are_refused(monkeypatch):
    release = finder.load_shared_libraries()
    assert library().version.startswith(release)
    monkeypatch.setattr(finder, "load_shared_libraries", lambda: "1.5.0")
    library.cache_clear()
    try:
        with pytest.raises(EngineError, match=r"bindings are .* and its libraries 1\.5\.0"):
            library()
    finally:
        library.cache_clear()
