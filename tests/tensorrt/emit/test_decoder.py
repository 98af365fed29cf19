"""Whole decoders: the network that TensorRT compiles, run by the interpreter, against torch."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from trtlab.config.mapping import Mapping
from trtlab.config.model import RotaryScaling
from trtlab.convert.trtllm import rank_shapes
from trtlab.errors import EngineError, RequestError
from trtlab.parallel.shard import shard, shared_where_possible
from trtlab.parallel.step_inputs import Chunk, StepInputs
from trtlab.storage.lazy import in_memory
from trtlab.tensorrt.run.interpreter_runner import interpreter_backend

pytestmark = pytest.mark.tensorrt

VARIANTS = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4},
    "mqa": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "attention bias": {"attn_bias": True},
    "every bias": {"attn_bias": True, "dense_bias": True, "mlp_bias": True},
    "q and k norms": {"qk_layernorm": True},
    "head size not hidden / heads": {"head_size": 12},
    "gelu": {"hidden_act": "gelu"},
    "gelu tanh": {"hidden_act": "gelu_pytorch_tanh"},
    "relu": {"hidden_act": "relu"},
    "linear scaling": {"rotary_scaling": RotaryScaling("linear", 4.0)},
    "llama3 scaling": {"rotary_scaling": RotaryScaling("llama3", 8.0, 32, 1.0, 4.0)},
    "yarn scaling": {"rotary_scaling": RotaryScaling("yarn", 4.0, 32)},
}


def prompts(vocab_size, lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab_size, (n,), generator=generator).tolist() for n in lengths]


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_prefill_and_mixed_decoding_equal_torch(small, bounds, weights_of, torch_reference, changes):
    config = small.replace(**changes)
    weights = weights_of(config)
    theirs, ours = torch_reference(config, weights), interpreter_backend(config, bounds, Mapping(), [weights]).ranks
    texts = prompts(config.vocab_size, (7, 1, 11))
    steps = [StepInputs([Chunk(slot, 0, ids) for slot, ids in enumerate(texts)])]
    for step in range(4):  # slots 0 and 2 go on at unlike lengths, slot 1 pauses between them every other step
        singles = [Chunk(slot, len(texts[slot]) + step, [step + slot]) for slot in (0, 2)]
        middle = [Chunk(1, 1 + step // 2, [step])] if step % 2 == 0 else []
        steps.append(StepInputs([*singles, *middle]))
    for step in steps:
        torch.testing.assert_close(ours.run(step), theirs.run(step), atol=1e-4, rtol=1e-4)


def test_thirty_decode_steps_stay_equal(small, bounds, weights_of, torch_reference):
    weights = weights_of(small)
    theirs, ours = torch_reference(small, weights), interpreter_backend(small, bounds, Mapping(), [weights]).ranks
    (text,) = prompts(small.vocab_size, (8,))
    step = StepInputs([Chunk(1, 0, text)])
    for past in range(8, 40):
        expected, got = theirs.run(step), ours.run(step)
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
        assert got.argmax() == expected.argmax()
        step = StepInputs([Chunk(1, past, [int(expected.argmax())])])


def test_a_prompt_in_pieces_equals_the_prompt_at_once(small, bounds, weights_of):
    weights = weights_of(small)
    (text,) = prompts(small.vocab_size, (20,))
    whole = interpreter_backend(small, bounds, Mapping(), [weights]).ranks.run(StepInputs([Chunk(0, 0, text)]))
    pieces = interpreter_backend(small, bounds, Mapping(), [weights]).ranks
    pieces.run(StepInputs([Chunk(0, 0, text[:9])]))
    torch.testing.assert_close(pieces.run(StepInputs([Chunk(0, 9, text[9:])])), whole, atol=1e-5, rtol=1e-5)


def test_every_token_in_the_order_of_the_chunks(small, bounds, weights_of, torch_reference):
    build = dataclasses.replace(bounds, max_input_len=40, max_num_tokens=40)  # more rows than a run gives logits
    weights = weights_of(small)
    texts = prompts(small.vocab_size, (36, 1, 5))
    step = StepInputs([Chunk(slot, 0, text) for slot, text in zip((2, 0, 1), texts, strict=True)], every_token=True)
    ours = interpreter_backend(small, build, Mapping(), [weights]).ranks.run(step)
    torch.testing.assert_close(ours, torch_reference(small, weights, build).run(step), atol=1e-4, rtol=1e-4)
    assert ours.shape == (42, small.vocab_size)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 0.02), ("bfloat16", 0.15)])
def test_low_precision_stays_near_float32(small, bounds, weights_of, torch_reference, dtype, tolerance):
    config = small.replace(dtype=dtype)
    weights = weights_of(config)
    (text,) = prompts(small.vocab_size, (20,))
    step = StepInputs([Chunk(0, 0, text)], every_token=True)
    ours = interpreter_backend(config, bounds, Mapping(), [weights]).ranks.run(step)
    expected = torch_reference(config, weights).run(step)  # torch on a CPU computes in float32
    assert ours.dtype == torch.float32
    assert (ours - expected).abs().max() < tolerance * expected.abs().max()


@pytest.mark.parametrize("mapping", [Mapping(tp_size=2), Mapping(pp_size=2), Mapping(tp_size=2, pp_size=2)], ids=str)
def test_ranks_together_equal_one(small, bounds, weights_of, torch_reference, mapping):
    config = small.replace(attn_bias=True, dense_bias=True)
    weights = weights_of(config)
    layout = shared_where_possible(config, mapping)
    lazy = {name: in_memory(tensor) for name, tensor in weights.items()}
    shards = [
        {name: tensor.read() for name, tensor in shard(config, mapping, rank, lazy, layout).items()}
        for rank in mapping.ranks
    ]
    assert [set(s) for s in shards] == [set(rank_shapes(config, mapping, rank, layout)) for rank in mapping.ranks]
    ours, theirs = interpreter_backend(config, bounds, mapping, shards).ranks, torch_reference(config, weights)
    texts = prompts(config.vocab_size, (6, 9))
    for step in (
        StepInputs([Chunk(slot, 0, text) for slot, text in enumerate(texts)]),
        StepInputs([Chunk(0, 6, [5]), Chunk(1, 9, [7])]),
    ):
        torch.testing.assert_close(ours.run(step), theirs.run(step), atol=1e-4, rtol=1e-4)
    ours.close()


def test_a_full_slot_is_refused_before_anything_is_written(small, bounds, weights_of):
    ranks = interpreter_backend(small, bounds, Mapping(), [weights_of(small)]).ranks
    ranks.run(StepInputs([Chunk(0, 0, [1] * 40)]))
    with pytest.raises(RequestError, match=r"slot 0 is full: it holds 40 tokens and gets 1 more.*max_seq_len 40"):
        ranks.run(StepInputs([Chunk(0, 40, [1])]))


def test_a_slot_beyond_the_batch_is_refused(small, bounds, weights_of):
    ranks = interpreter_backend(small, bounds, Mapping(), [weights_of(small)]).ranks
    with pytest.raises(EngineError, match="slot 3 is beyond the plan's batch; expected 0 to 2"):
        ranks.run(StepInputs([Chunk(3, 0, [1, 2])]))


def test_a_slot_is_used_again_without_a_trace_of_the_first_request(small, bounds, weights_of):
    weights = weights_of(small)
    used, fresh = (interpreter_backend(small, bounds, Mapping(), [weights]).ranks for _ in range(2))
    used.run(StepInputs([Chunk(0, 0, [3] * 30)]))
    step = StepInputs([Chunk(0, 0, [5, 6, 7])])
    assert torch.equal(used.run(step), fresh.run(step))


def test_closing_twice_is_harmless(small, bounds, weights_of):
    ranks = interpreter_backend(small, bounds, Mapping(), [weights_of(small)]).ranks
    ranks.close()
    ranks.close()
