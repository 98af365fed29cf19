"""What only a CUDA device can show: the same engine there and on the CPU."""

import pytest
import torch

import trtlab
from trtlab import tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


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
