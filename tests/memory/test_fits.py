"""A model that does not fit is refused before a weight is read, with the numbers."""

from __future__ import annotations

import dataclasses

import pytest

from trtlab import BuildConfig, Checkpoint, EngineError, Mapping, QuantConfig, SessionConfig
from trtlab.memory import fits
from trtlab.storage.lazy import LazyTensor


@pytest.fixture
def memory(monkeypatch):
    """``memory(bytes)`` sets the memory that this machine seems to have."""

    def of(nbytes):
        monkeypatch.setattr(fits, "memory_bytes", lambda: nbytes)

    return of


@pytest.fixture
def unread(random_model):
    """A checkpoint whose weights cannot be read: reading one fails the test."""
    checkpoint = Checkpoint.from_hugging_face(random_model())

    def refuse():
        raise AssertionError("a weight was read")

    tensors = {name: LazyTensor(t.shape, t.dtype, refuse) for name, t in checkpoint.tensors.items()}
    return dataclasses.replace(checkpoint, tensors=tensors)


def test_the_refusal_says_what_would_fit(random_model, memory):
    bounds = BuildConfig(max_batch_size=256, max_num_tokens=256)
    with Checkpoint.from_hugging_face(random_model()).build(bounds, plan=False) as engine:
        memory(4 * 10**6)
        with pytest.raises(EngineError, match=r"of weights, .* of KV .*; expected at most .*; lower max_batch_size to"):
            engine.session(backend="torch", device="cpu")


@pytest.mark.parametrize("backend", ["torch", pytest.param("interpreter", marks=pytest.mark.tensorrt)])
def test_what_a_session_holds_decides(random_model, memory, backend):
    checkpoint = Checkpoint.from_hugging_face(random_model())
    with checkpoint.build(BuildConfig(max_batch_size=2, max_seq_len=64, max_num_tokens=64), plan=False) as engine:
        memory(10_000)
        with pytest.raises(EngineError, match="this machine has free"):
            engine.session(backend=backend, device="cpu")
        memory(10**9)
        engine.session(backend=backend, device="cpu").close()


def test_a_smaller_pool_may_fit(random_model, memory):
    checkpoint = Checkpoint.from_hugging_face(random_model())
    with checkpoint.build(BuildConfig(max_batch_size=64, max_num_tokens=64), plan=False) as engine:
        memory(4 * 10**6)
        with pytest.raises(EngineError, match="of KV"):
            engine.session(backend="torch", device="cpu")
        engine.session(SessionConfig(max_tokens_in_paged_kv_cache=256), backend="torch", device="cpu").close()


def test_a_pool_in_half_the_bytes_may_fit(random_model, memory):
    checkpoint = Checkpoint.from_hugging_face(random_model())
    small = checkpoint.quantize(QuantConfig(kv_cache_quant_algo="INT8"), calibration=[[3, 4, 5, 6]])
    bounds = BuildConfig(max_batch_size=32, max_num_tokens=64)
    memory(2 * 10**6)
    with checkpoint.build(bounds, plan=False) as engine, pytest.raises(EngineError, match="of KV"):
        engine.session(backend="torch", device="cpu")
    with small.build(bounds, plan=False) as engine:
        engine.session(backend="torch", device="cpu").close()


def test_a_plan_is_not_begun_where_weights_and_plan_do_not_fit(unread, memory):
    memory(100_000)
    with pytest.raises(EngineError, match=r"building the plan of rank 0 takes about .*plan=False"):
        fits.require_room_to_build(unread.config, BuildConfig().resolve(unread.config), Mapping(), unread.layout)
