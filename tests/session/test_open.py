"""Backends and devices: those that a session runs on, and how it refuses the others."""

from __future__ import annotations

import pytest
import torch

from trtlab import BuildConfig, Checkpoint, ConfigError
from trtlab.config.session import BACKENDS
from trtlab.session.open import OPENERS


@pytest.fixture(scope="module")
def engine(tiny_llama):
    with Checkpoint.from_hugging_face(tiny_llama).build(
        BuildConfig(max_batch_size=2, max_seq_len=64), plan=False
    ) as it:
        yield it


@pytest.fixture(scope="module")
def tiny_llama():
    from trtlab.tiny import llama_dir

    return llama_dir()


NOT_SUPPORTED = ["mps", "meta", "xla", "xpu", "vulkan", "hpu", torch.device("meta"), "mps:0"]


@pytest.mark.parametrize("device", NOT_SUPPORTED, ids=str)
def test_a_device_that_is_neither_a_cpu_nor_cuda_is_refused_by_its_name(engine, device):
    with pytest.raises(ConfigError) as caught:
        engine.session(device=device)
    kind = str(device).split(":")[0]
    assert str(caught.value).startswith(f"sessions do not run on {kind}; got ")
    assert caught.value.expected == "cpu | cuda | cuda:0 ..."


@pytest.mark.parametrize(
    "device", ["", "nowhere", 0, 1.5, b"cpu", "cuda:x", "cuda:-1", "cpu cpu", f"cuda:{10**30}", []]
)
def test_what_is_no_device_is_refused(engine, device):
    with pytest.raises(ConfigError, match=r"device.*expected|device.*use"):
        engine.session(backend="torch", device=device)


@pytest.mark.parametrize("device", ["cpu", "cpu:0", torch.device("cpu")], ids=repr)
def test_every_name_of_the_cpu_is_the_cpu(engine, device):
    with engine.session(backend="torch", device=device) as session:
        assert session.backend_reason.startswith("torch on cpu: ")


@pytest.mark.parametrize(("count", "line"), [(1, "expected cuda:0"), (2, r"expected cuda:0 \| cuda:1")])
def test_a_gpu_beyond_the_last_is_refused_with_those_that_are_here(engine, monkeypatch, count, line):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(ConfigError, match=rf"no such CUDA device here; got 'cuda:{count}'; {line}$"):
        engine.session(backend="torch", device=f"cuda:{count}")


def test_cuda_without_a_gpu_names_the_device_that_works(engine, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError) as caught:
        engine.session(backend="torch", device="cuda:0")
    assert caught.value.remedy == 'use device="cpu"'
    engine.session(backend="torch", device="cpu").close()


def test_the_environment_variable_is_named_when_it_holds_no_backend(engine, monkeypatch):
    monkeypatch.setenv("TRTLAB_BACKEND", "trt")
    with pytest.raises(
        ConfigError, match=r"TRTLAB_BACKEND does not name a backend; got 'trt'; expected auto.*unset it"
    ):
        engine.session(device="cpu")
    monkeypatch.setenv("TRTLAB_BACKEND", "torch")
    with engine.session(device="cpu") as session:
        assert session.backend == "torch"


def test_every_backend_but_auto_has_an_opener():
    assert set(OPENERS) == set(BACKENDS) - {"auto"}
