"""Q4_0 blocks that stay in 4 bits, against the same file dequantized."""

from __future__ import annotations

import pickle

import pytest
import torch

from trtlab import BuildConfig, Checkpoint, CheckpointError, Mapping, QuantizedCheckpoint

from ..gguf_files import SIZES, write_gguf

PROMPT = [3, 17, 60, 5, 98]
BOUNDS = BuildConfig(max_batch_size=1, max_input_len=16, max_seq_len=32)


@pytest.fixture(scope="module", params=["LlamaForCausalLM", "Qwen2ForCausalLM"])
def file(request, random_model, tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("blocks") / "model.gguf", random_model(request.param, **SIZES), "Q4_0")


@pytest.fixture(scope="module")
def kept(file):
    return Checkpoint.from_gguf(file, "float32", dequantize=False)


def logits(checkpoint, backend="torch", **build):
    with (
        checkpoint.build(BOUNDS, plan=False, **build) as engine,
        engine.session(backend=backend, device="cpu") as session,
    ):
        return session.logits(PROMPT)


def scales(checkpoint):
    return [tensor.read() for name, tensor in checkpoint.tensors.items() if name.endswith("weights_scaling_factor")]


@pytest.mark.parametrize("backend", ["torch", pytest.param("interpreter", marks=pytest.mark.tensorrt)])
def test_they_give_the_logits_of_the_dequantized_file(backend, file, kept):
    assert isinstance(kept, QuantizedCheckpoint)
    assert kept.config.quantization.quant_algo == "W4A16_AWQ" and kept.config.quantization.group_size == 32
    assert any(bool((scale < 0).any()) for scale in scales(kept))  # which TensorRT's own scales cannot be
    torch.testing.assert_close(logits(kept, backend), logits(Checkpoint.from_gguf(file, "float32")), atol=1e-4, rtol=0)


@pytest.mark.tensorrt
@pytest.mark.plans
def test_a_plan_holds_them(kept):
    with kept.build(BOUNDS) as engine, engine.session(backend="interpreter", device="cpu") as session:
        torch.testing.assert_close(session.logits(PROMPT), logits(kept), atol=1e-4, rtol=0)


def test_they_are_saved_split_and_pickled(kept, tmp_path):
    kept.save(tmp_path / "two", Mapping(tp_size=2))
    for again in (Checkpoint.load(tmp_path / "two"), pickle.loads(pickle.dumps(kept))):
        assert again.config == kept.config
        assert all(torch.equal(again.tensors[name].read(), tensor.read()) for name, tensor in kept.tensors.items())
    torch.testing.assert_close(logits(kept, mapping=Mapping(tp_size=2)), logits(kept), atol=1e-4, rtol=0)


def test_the_card_says_what_is_kept(kept):
    assert "Q4_0" not in kept.source
    assert "W4A16_AWQ, groups of 32" in repr(kept)


def test_a_linear_of_another_type_is_named(random_model, tmp_path):
    kinds = {"blk.0.ffn_up.weight": "Q8_0"}
    file = write_gguf(tmp_path / "mixed.gguf", random_model(**SIZES), "Q4_0", kinds=kinds)
    with pytest.raises(CheckpointError, match=r"cannot be kept in 4 bits: blk\.0\.ffn_up\.weight is Q8_0") as caught:
        Checkpoint.from_gguf(file, dequantize=False)
    assert caught.value.remedy == "leave dequantize=False out"
    Checkpoint.from_gguf(file)
