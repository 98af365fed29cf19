"""A model that does not fit is refused before a weight is read, with the numbers."""

from __future__ import annotations

import dataclasses
import tracemalloc
from contextlib import nullcontext

import pytest

from trtlab import BuildConfig, Checkpoint, EngineError, Mapping, QuantConfig, SessionConfig
from trtlab.memory import fits
from trtlab.memory.estimate import estimate
from trtlab.storage.lazy import LazyTensor

from ..models import normal_weights, small_config


@pytest.fixture
def memory(monkeypatch):
    """``memory(bytes)`` sets the memory that this machine seems to have free."""

    def of(nbytes):
        monkeypatch.setattr(fits, "free_bytes", lambda: nbytes)

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


def test_the_remedy_for_a_pool_that_was_asked_for_works(random_model, memory):
    checkpoint = Checkpoint.from_hugging_face(random_model())
    with checkpoint.build(BuildConfig(max_batch_size=2, max_num_tokens=64), plan=False) as engine:
        memory(4 * 10**6)
        with pytest.raises(EngineError, match=r"of KV for 1,000,000 tokens") as caught:
            engine.session(SessionConfig(max_tokens_in_paged_kv_cache=10**6), backend="torch", device="cpu")
        setting, _, tokens = caught.value.remedy.removeprefix("lower ").partition(" to ")
        engine.session(SessionConfig(**{setting: int(tokens)}), backend="torch", device="cpu").close()


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


ABSURD = {
    "requests": (BuildConfig(max_batch_size=10**9, max_num_tokens=10**9), None, "lower .*max_batch_size"),
    "steps": (BuildConfig(max_batch_size=10**6, max_num_tokens=2**62), 64, "lower max_num_tokens"),
    "blocks": (BuildConfig(tokens_per_block=10**9), None, "lower tokens_per_block, at most to max_seq_len 128"),
    "blocks of half a request": (BuildConfig(tokens_per_block=2**62), 2**62, "lower tokens_per_block"),
}


@pytest.mark.parametrize("name", ABSURD)
def test_absurd_bounds_are_refused_before_anything_is_allocated(random_model, memory, name):
    """As a counted list this takes a minute and all memory; by arithmetic it takes none."""
    build, pool, words = ABSURD[name]
    memory(10**9)
    with Checkpoint.from_hugging_face(random_model()).build(build, plan=False) as engine:
        tracemalloc.start()
        with pytest.raises(EngineError, match=words):
            engine.session(SessionConfig(max_tokens_in_paged_kv_cache=pool), backend="torch", device="cpu")
        assert tracemalloc.get_traced_memory()[1] < 2**20
        tracemalloc.stop()


def test_positions_that_no_table_can_hold_are_refused(memory):
    memory(10**9)
    config = small_config(max_position_embeddings=10**9)
    bounds = BuildConfig(max_batch_size=1, max_seq_len=10**9, max_num_tokens=64)
    with Checkpoint.from_weights(config, normal_weights(config)).build(bounds, plan=False) as engine:
        pool = SessionConfig(max_tokens_in_paged_kv_cache=64)
        with pytest.raises(EngineError, match=r"of tables of positions and blocks.*lower max_num_tokens, max_seq_len"):
            engine.session(pool, backend="torch", device="cpu")


def test_the_remedy_for_large_blocks_works(random_model, memory):
    memory(10**8)
    checkpoint = Checkpoint.from_hugging_face(random_model())
    for size, fits_here in ((10**9, False), (128, True)):
        with checkpoint.build(BuildConfig(tokens_per_block=size), plan=False) as engine:
            refusal = nullcontext() if fits_here else pytest.raises(EngineError, match="max_seq_len 128")
            with refusal:
                engine.session(backend="torch", device="cpu").close()


def test_whole_blocks_count(memory):
    """Requests of 33 tokens take two blocks of 32."""
    config = small_config()
    checkpoint = Checkpoint.from_weights(config, normal_weights(config))
    with checkpoint.build(BuildConfig(max_batch_size=4, max_seq_len=33), plan=False) as engine:
        with engine.session(backend="torch", device="cpu") as session:
            allocated = session.kv_cache.pool.nbytes
        assert estimate(config, engine.build_config).largest.kv_pool_bytes == allocated == 4 * 64 * 256
