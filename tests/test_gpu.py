"""What only a CUDA device can show: the same engine there and on the CPU."""

import contextlib

import pytest
import torch

import trtlab
from trtlab import tiny
from trtlab.tiny.corpus import documents

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def prompts():
    from trtlab.runtime.tokenizer import Tokenizer

    tokenizer = Tokenizer(tiny.llama_dir())
    return [tokenizer.encode(text) for text in tiny.EXAMPLES]


def engine(dtype, **changes):
    bounds = trtlab.BuildConfig(max_seq_len=512, max_input_len=256, dtype=dtype, **changes)
    return trtlab.Checkpoint.from_hugging_face(tiny.llama_dir()).build(bounds, plan=False)


def test_float32_logits_on_cuda_equal_those_on_the_cpu(prompts):
    with engine("float32").session(device="cuda") as there, engine("float32").session(device="cpu") as here:
        assert there.backend_reason.startswith("torch on cuda")
        for ids in prompts:
            torch.testing.assert_close(there.logits(ids), here.logits(ids), atol=1e-3, rtol=1e-4)


def test_float32_tokens_on_cuda_equal_those_on_the_cpu(prompts):
    params = trtlab.SamplingParams(max_new_tokens=64)
    with engine("float32").session(device="cuda") as there, engine("float32").session(device="cpu") as here:
        assert [a.token_ids for a in there.generate(prompts, params)] == [
            a.token_ids for a in here.generate(prompts, params)
        ]


@pytest.mark.parametrize(("dtype", "atol"), [("float16", 0.1), ("bfloat16", 1.0)])
def test_half_precision_on_cuda_stays_near_float32(prompts, dtype, atol):
    with engine(dtype).session(device="cuda") as there, engine("float32").session(device="cpu") as here:
        for ids in prompts:
            got, expected = there.logits(ids), here.logits(ids)
            torch.testing.assert_close(got, expected, atol=atol, rtol=0.05)


def test_a_mixed_batch_on_cuda_equals_one_by_one(prompts):
    params = trtlab.SamplingParams(max_new_tokens=24)
    with engine("float32", max_batch_size=4, max_num_tokens=32).session(device="cuda") as session:
        together = session.generate(prompts, params)
        alone = [session.generate(ids, params) for ids in prompts]
    assert [a.token_ids for a in together] == [a.token_ids for a in alone]


def test_reused_forked_and_interrupted_requests_on_cuda_give_the_fresh_tokens(prompts):
    params = trtlab.SamplingParams(max_new_tokens=40, ignore_eos=True)
    with engine("float32", tokens_per_block=16).session(device="cuda") as session:
        fresh = [session.generate(ids, params).token_ids for ids in prompts]
        assert [session.generate(ids, params).token_ids for ids in prompts] == fresh
        assert session.kv_cache.reused_tokens > 0
        parent = session.submit(prompts[-1], params)
        for _ in range(7):
            session.step()
        child = session.fork(parent)
        assert session.kv_cache.shared > 0
        assert child.result().token_ids == parent.result().token_ids == fresh[-1]
    tight = trtlab.SessionConfig(max_tokens_in_paged_kv_cache=192, capacity_scheduler_policy="MAX_UTILIZATION")
    with engine("float32", tokens_per_block=16).session(tight, device="cuda") as session:
        assert session.kv_cache.pool.winner == "max_tokens_in_paged_kv_cache"
        assert [answer.token_ids for answer in session.generate(prompts, params)] == fresh
        assert any(event.preempted for event in session.events)


def test_a_fraction_that_is_given_is_taken_whole():
    config = trtlab.SessionConfig(kv_cache_free_gpu_memory_fraction=0.02)
    with engine("bfloat16").session(config, device="cuda") as session:
        pool = session.kv_cache.pool
        assert pool.winner == "kv_cache_free_gpu_memory_fraction"
        assert 0.019 * pool.free_bytes < pool.nbytes <= 0.02 * pool.free_bytes


def test_by_default_the_pool_holds_a_full_batch_twice_and_sessions_live_side_by_side():
    with contextlib.ExitStack() as opened:
        for _ in range(8):
            session = opened.enter_context(engine("bfloat16", max_batch_size=4).session(device="cuda"))
            assert session.kv_cache.pool.max_tokens == 2 * 4 * 512
            assert session.device.type == "cuda" and len(session.generate([5, 6, 7]).token_ids) > 0


def test_a_session_that_does_not_fit_says_so_and_leaves_room_for_one_that_does():
    large = trtlab.SessionConfig(max_tokens_in_paged_kv_cache=500_000)  # 3 GiB in float32
    whole = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(2**30 / whole)
    try:
        with pytest.raises(trtlab.EngineError, match=r"too little memory.*GiB free of.*for the weights"):
            engine("float32").session(large, device="cuda")
        engine("float32").session(device="cuda").close()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize(
    "quant",
    [
        {"kv_cache_quant_algo": "INT8", "kv_cache_scales": "split"},
        {"kv_cache_quant_algo": "INT8", "kv_cache_scales": "per_head"},
        {"kv_cache_quant_algo": "INT8", "kv_cache_scales": "merged"},
        {"kv_cache_quant_algo": "FP8"},
        {"quant_algo": "W8A16"},
        {"quant_algo": "W4A16_AWQ"},
        {"quant_algo": "W4A16_AWQ", "quantize_lm_head": True},
        {"quant_algo": "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN"},
        {"quant_algo": "FP8"},
    ],
    ids=lambda quant: "-".join(f"{key}={value}" for key, value in quant.items()),
)
def test_a_quantized_model_on_cuda_has_the_logits_of_the_cpu(quant, prompts):
    texts = [document.text for document, _ in zip(documents(seed=0), range(4), strict=False)]
    checkpoint = trtlab.Checkpoint.from_hugging_face(tiny.llama_dir())
    config = trtlab.QuantConfig(**quant)
    quantized = checkpoint.quantize(config, calibration=texts if config.reads_texts else None)
    bounds = trtlab.BuildConfig(max_seq_len=512, max_input_len=256, dtype="float32")
    with quantized.build(bounds, plan=False) as built:
        small = trtlab.SessionConfig(max_tokens_in_paged_kv_cache=4096)
        with built.session(small, device="cuda") as there, built.session(device="cpu") as here:
            for ids in prompts:
                got, expected = there.logits(ids), here.logits(ids)
                # a value on the edge of two integers may fall to either side
                assert (got - expected).norm() / expected.norm() < 0.02
