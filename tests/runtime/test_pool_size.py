"""The pool's size: every bound that was considered, the one that won, and pools too small."""

from __future__ import annotations

import weakref

import pytest
import torch

from trtlab import (
    BuildConfig,
    Checkpoint,
    ConfigError,
    EngineError,
    QuantConfig,
    RequestError,
    SamplingParams,
    SessionConfig,
)
from trtlab.runtime import torch_backend
from trtlab.runtime.pool_size import Bound, pool_size

BUILD = BuildConfig(max_batch_size=3, max_seq_len=100, max_input_len=64, tokens_per_block=16)
GIB = 2**30


def bounds(size):
    return {bound.name: bound.blocks for bound in size.bounds}


def test_without_any_bound_the_pool_holds_a_full_batch_of_longest_requests():
    size = pool_size(BUILD, SessionConfig(), 1000)
    assert size.num_blocks == 3 * 7 and size.winner == "max_batch_size x max_seq_len"
    assert size.max_tokens == 21 * 16 and size.nbytes == 21_000 and size.free_bytes is None


def test_on_a_cpu_the_tokens_asked_for_are_rounded_down_to_blocks():
    size = pool_size(BUILD, SessionConfig(max_tokens_in_paged_kv_cache=47), 1000)
    assert size.num_blocks == 2 and bounds(size) == {"max_tokens_in_paged_kv_cache": 2}


@pytest.mark.parametrize(
    ("tokens", "winner", "blocks"),
    [(1600, "max_tokens_in_paged_kv_cache", 100), (1_600_000, "kv_cache_free_gpu_memory_fraction", 5120)],
)
def test_on_a_gpu_the_smaller_bound_wins_and_both_are_shown(tokens, winner, blocks):
    session = SessionConfig(max_tokens_in_paged_kv_cache=tokens, kv_cache_free_gpu_memory_fraction=0.5)
    size = pool_size(BUILD, session, 2**20, free_bytes=10 * GIB)
    assert (size.winner, size.num_blocks) == (winner, blocks)
    assert size.bounds == (
        Bound("max_tokens_in_paged_kv_cache", tokens // 16),
        Bound("kv_cache_free_gpu_memory_fraction", 5120),
    )


@pytest.mark.parametrize(
    ("free", "winner", "blocks"),
    [
        (80 * GIB, "2 x max_batch_size x max_seq_len", 2 * 3 * 7),
        (30 * 2**20, "kv_cache_free_gpu_memory_fraction", 27),
    ],
)
def test_on_a_gpu_the_default_is_twice_a_full_batch_or_nine_tenths_of_what_is_free(free, winner, blocks):
    size = pool_size(BUILD, SessionConfig(), 2**20, free_bytes=free)
    assert (size.winner, size.num_blocks) == (winner, blocks)
    assert bounds(size) == {
        "2 x max_batch_size x max_seq_len": 42,
        "kv_cache_free_gpu_memory_fraction": int(0.9 * free) // 2**20,
    }
    assert all(name in repr(size) and name in size._repr_html_() for name in bounds(size))


def test_a_fraction_that_is_given_is_taken_whole():
    size = pool_size(BUILD, SessionConfig(kv_cache_free_gpu_memory_fraction=0.9), 2**20, free_bytes=80 * GIB)
    assert bounds(size) == {"kv_cache_free_gpu_memory_fraction": 72 * 1024}


def test_tokens_that_are_given_replace_the_full_batch_and_stay_below_nine_tenths():
    session = SessionConfig(max_tokens_in_paged_kv_cache=16 * 5000)
    size = pool_size(BUILD, session, 2**20, free_bytes=GIB)
    assert bounds(size) == {"max_tokens_in_paged_kv_cache": 5000, "kv_cache_free_gpu_memory_fraction": 921}
    assert size.num_blocks == 921


def test_of_a_fraction_smaller_keys_and_values_make_more_blocks_not_less_memory():
    session = SessionConfig(kv_cache_free_gpu_memory_fraction=0.9)
    wide, narrow = (pool_size(BUILD, session, block, free_bytes=GIB) for block in (2**16, 2**15))
    assert narrow.num_blocks - 2 * wide.num_blocks in (0, 1) and abs(narrow.nbytes - wide.nbytes) <= 2**16


@pytest.mark.parametrize("free", [None, 100])
def test_a_pool_without_room_for_one_block_is_refused_with_the_numbers(free):
    session = SessionConfig(max_tokens_in_paged_kv_cache=15 if free is None else 1000)
    with pytest.raises(ConfigError, match=r"no room for one block.*: 0 blocks.*16 tokens, 1000 bytes"):
        pool_size(BUILD, session, 1000, free_bytes=free)


@pytest.mark.parametrize("tokens", [0, -1, 1.5, True, "64"])
def test_a_pool_of_no_positive_whole_number_of_tokens_is_refused(tokens):
    with pytest.raises(ConfigError, match="max_tokens_in_paged_kv_cache"):
        SessionConfig(max_tokens_in_paged_kv_cache=tokens)


@pytest.mark.parametrize(
    "settings",
    [
        {"kv_cache_free_gpu_memory_fraction": 0.0},
        {"kv_cache_free_gpu_memory_fraction": 1.1},
        {"kv_cache_free_gpu_memory_fraction": float("nan")},
        {"events_kept": 0},
        {"capacity_scheduler_policy": "EVICT"},
        {"batching_type": "inflight"},
    ],
)
def test_settings_that_mean_nothing_are_refused(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        SessionConfig(**settings)


@pytest.mark.parametrize("size", [0, -3])
def test_a_block_without_tokens_is_refused(size):
    with pytest.raises(ConfigError, match="tokens_per_block"):
        BuildConfig(tokens_per_block=size)


@pytest.mark.parametrize("backend", ["torch", pytest.param("interpreter", marks=pytest.mark.tensorrt)])
def test_a_session_tells_the_bytes_that_its_caches_take(random_model, backend):
    build = BuildConfig(max_batch_size=2, max_seq_len=32, max_input_len=16, max_num_tokens=16, tokens_per_block=8)
    engine = Checkpoint.from_hugging_face(random_model()).build(build, plan=False)
    with engine.session(backend=backend, device="cpu") as session:
        pool = session.kv_cache.pool
        assert pool.block_bytes == 2 * 2 * 2 * 16 * 8 * 4  # K and V, layers, heads, head size, tokens, float32
        assert pool.num_blocks == 2 * 4 and pool.paged == (backend == "torch")
        (rank,) = session._loop.backend.ranks.ranks
        held = [rank.cache.keys, rank.cache.values] if backend == "torch" else rank.caches.values()
        assert sum(tensor.nbytes for tensor in held) == pool.nbytes


@pytest.mark.parametrize("algorithm", ["INT8", "FP8"])
def test_an_eight_bit_cache_takes_a_quarter_of_the_bytes_a_block(random_model, algorithm):
    checkpoint = Checkpoint.from_hugging_face(random_model())
    quant = QuantConfig(kv_cache_quant_algo=algorithm)
    quantized = checkpoint.quantize(quant, calibration=[[1, 2, 3, 4, 5, 6]] if quant.reads_texts else None)
    sizes = []
    for source in (checkpoint, quantized):
        with source.build(BUILD, plan=False).session(backend="torch", device="cpu") as session:
            sizes.append(session.kv_cache.pool)
    assert sizes[0].block_bytes == 4 * sizes[1].block_bytes and sizes[0].num_blocks == sizes[1].num_blocks


def test_a_request_larger_than_the_pool_is_refused_at_submit_and_a_smaller_one_is_served(random_model):
    engine = Checkpoint.from_hugging_face(random_model()).build(BUILD, plan=False)
    with engine.session(SessionConfig(max_tokens_in_paged_kv_cache=32), backend="torch", device="cpu") as session:
        with pytest.raises(RequestError, match="needs 3 KV blocks and the pool has 2") as caught:
            session.submit([1] * 20, SamplingParams(max_new_tokens=14))
        assert caught.value.remedy and session.waiting == 0
        assert len(session.generate([1] * 20, SamplingParams(max_new_tokens=13)).token_ids) == 13


def test_out_of_gpu_memory_is_an_error_with_the_figures_and_keeps_no_tensor(random_model, monkeypatch):
    held = []

    def exhausted(config, pool, weights, dtype, device):
        held.append(weakref.ref(weights))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 12.00 GiB.")

    monkeypatch.setattr(torch_backend, "_cache", exhausted)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * GIB, 80 * GIB))
    engine = Checkpoint.from_hugging_face(random_model()).build(BUILD, plan=False)
    words = (
        r"too little memory for this session; got 3\.00 GiB free of 80\.00 GiB; expected \d+\.\d\d KiB for the weights"
    )
    with pytest.raises(EngineError, match=words) as caught:
        engine.session(backend="torch", device="cpu")
    assert "max_tokens_in_paged_kv_cache" in caught.value.remedy
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
    assert [reference() for reference in held] == [None], "a traceback holds the weights"
