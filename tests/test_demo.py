"""The demo in a terminal: it runs where there is a CPU only, with and without TensorRT, and its claim holds."""

import pytest

import trtlab
from trtlab.bench import Duel
from trtlab.demo import demo
from trtlab.tensorrt.build import plans

pytestmark = pytest.mark.no_gpu


def missing():
    raise trtlab.MissingDependency("building a plan needs TensorRT", remedy="pip install tensorrt")


@pytest.mark.parametrize("tensorrt", [pytest.param(True, marks=pytest.mark.plans), False])
def test_the_demo_saves_an_engine_and_gives_the_tokens_of_transformers(tmp_path, monkeypatch, capsys, tensorrt):
    monkeypatch.setattr("trtlab.demo.against_transformers", lambda *_, **__: Duel("timed", 1, (1.0,), (1.0,)))
    if not tensorrt:
        monkeypatch.setattr(plans, "library", missing)
    demo(tmp_path / "engine")
    assert "32 greedy tokens are identical" in capsys.readouterr().out
    with trtlab.Engine.load(tmp_path / "engine") as engine:
        assert (engine.plans is not None) is tensorrt
