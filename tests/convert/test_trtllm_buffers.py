"""Folders as TensorRT-LLM writes them: they give Hugging Face's logits, and their buffers must fit the config."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from trtlab import BuildConfig, Checkpoint, CheckpointError, Mapping
from trtlab.config.model import RotaryScaling
from trtlab.convert.trtllm_buffers import without_buffers
from trtlab.storage.lazy import in_memory

from ..models import random_texts, small_config
from ..trtllm_folders import LINEAR, LLAMA3, YARN, UpstreamFolder, rotary_buffers

NEWER = {  # keys of 0.16
    "rotary_embedding_dim": 16,
    "runtime_defaults": None,
    "layer_idx_offset": 0,
    "fc_after_embed": False,
    "use_last_layernorm": True,
}
QWEN2 = {
    **NEWER,
    "qwen_type": "qwen2",
    "num_labels": 1,
    "moe": {"num_experts": 0, "normalization_mode": 0},
    "moe_intermediate_size": 0,
    "tie_word_embeddings": False,
}
FOUR = {"num_hidden_layers": 4}
FOLDERS = {
    "0.13, one rank": UpstreamFolder(dtype="float16"),
    "0.13, linear scaling, tp 2 and pp 2": UpstreamFolder(FOUR, tp=2, pp=2, parallel_embedding=True, scaling=LINEAR),
    "0.11, buffers in each layer": UpstreamFolder(FOUR, pp=2, buffers="layer"),
    "0.9, no buffers": UpstreamFolder(buffers=None),
    "0.16, tied, llama3, an odd vocabulary": UpstreamFolder(
        dtype="bfloat16", tp=2, parallel_embedding=True, share=True, scaling=LLAMA3, base=500000.0, changes=NEWER
    ),
    "later, yarn": UpstreamFolder(scaling=YARN),
    "0.16, Qwen2": UpstreamFolder(architecture="Qwen2ForCausalLM", dtype="bfloat16", base=1e6, changes=QWEN2),
}


def logits(checkpoint, ids):
    engine = checkpoint.build(BuildConfig(max_batch_size=1, max_seq_len=64), plan=False)
    with engine.session(backend="torch", device="cpu") as session:
        return session.logits(ids)


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_of_tensorrt_llm_gives_hugging_faces_logits(name, tmp_path):
    """Whatever the stored type: both sides compute in float32 from the same rounded weights."""
    model = FOLDERS[name].write(tmp_path)
    (ids,) = random_texts((40,))
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0]
    got = logits(Checkpoint.load(tmp_path), ids)
    assert expected.abs().max() > 1
    assert torch.allclose(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", FOLDERS)
def test_buffers_are_not_kept_and_not_written(name, tmp_path):
    FOLDERS[name].write(tmp_path / "theirs")
    checkpoint = Checkpoint.load(tmp_path / "theirs")
    again = checkpoint.save(tmp_path / "ours", Mapping(tp_size=2))
    stored = [*load_file(again / "rank0.safetensors"), *checkpoint.tensors]
    assert not any("embed_positions" in tensor or "inv_freq" in tensor for tensor in stored)


SCALINGS = {
    "none": (None, None),
    "linear": (LINEAR, RotaryScaling("linear", 2.0)),
    "yarn": (YARN, RotaryScaling("yarn", 4.0, 32)),
    "llama3": (LLAMA3, RotaryScaling("llama3", 8.0, 64, low_freq_factor=1.0, high_freq_factor=4.0)),
}


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("base", [10000.0, 500000.0, 1e6, 123456.789])
@pytest.mark.parametrize(("size", "positions"), [(8, 64), (96, 4096), (128, 40000)])
def test_the_tolerance_covers_float32_at_every_position(size, positions, base, scaling):
    theirs, ours = SCALINGS[scaling]
    config = small_config(head_size=size, max_position_embeddings=positions, rotary_base=base, rotary_scaling=ours)
    tensors = {name: in_memory(t) for name, t in rotary_buffers(size, positions, base, theirs).items()}
    assert without_buffers("c", config, {0: tensors}) == {0: {}}


def edited(folder, edit, rank=0):
    tensors = load_file(folder / f"rank{rank}.safetensors")
    edit(tensors)
    save_file(tensors, folder / f"rank{rank}.safetensors")


def setting(name, index, value):
    def edit(tensors):
        tensors[name].view(-1)[index] = value

    return edit


def settings(**changes):
    def edit(folder):
        raw = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(raw))

    return edit


TABLE = "embed_positions_for_gpt_attention"
CONTRADICTIONS = {
    "another base": (settings(rotary_base=10001.0), "rotary_inv_freq is not of the rotary.*rotary_base 10001"),
    "a scaling that the buffers lack": (settings(rotary_scaling=LINEAR), "rotary_inv_freq.*linear"),
    "another head": (settings(head_size=32, hidden_size=64, num_attention_heads=4), "rotary_inv_freq has the shape"),
    "fewer positions": (settings(max_position_embeddings=64), r"has the shape \[1, "),
    "a frequency": (lambda f: edited(f, setting("rotary_inv_freq", 3, 0.5)), "rank0.*rotary_inv_freq.*index 3"),
    "a cosine of the last position": (lambda f: edited(f, setting(TABLE, -2, 0.9)), f"{TABLE} is not.*got 0.9"),
    "a sine of the first position": (lambda f: edited(f, setting("embed_positions", 1, 1e-3)), "embed_positions is"),
    "a number that is none": (lambda f: edited(f, setting(TABLE, 9, float("nan"))), f"{TABLE} is not.*got nan"),
    "only the second rank": (lambda f: edited(f, setting("rotary_inv_freq", 0, 2.0), rank=1), "rank1.*inv_freq"),
    "slopes of ALiBi": (
        lambda f: edited(f, lambda t: t.update({"transformer.layers.0.attention.alibi_slopes": torch.ones(4)})),
        "alibi_slopes belongs to the position embedding alibi; got position_embedding_type rope_gpt_neox",
    ),
    "factors of long rope": (
        lambda f: edited(f, lambda t: t.update(embed_positions_short_factors=torch.ones(1, 8))),
        "short_factors belongs to the position embedding long_rope",
    ),
    "a table beside learned positions": (
        settings(position_embedding_type="learned_absolute", rotary_base=10000.0),
        "belongs to the position embedding rope_gpt_neox; got position_embedding_type learned_absolute",
    ),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_buffer_that_contradicts_the_config_is_an_error_by_name(name, tmp_path):
    edit, words = CONTRADICTIONS[name]
    UpstreamFolder(tp=2).write(tmp_path)
    Checkpoint.load(tmp_path)
    edit(tmp_path)
    with pytest.raises(CheckpointError, match=words) as caught:
        Checkpoint.load(tmp_path)
    assert caught.value.remedy


def test_one_rank_is_checked_alone(tmp_path):
    UpstreamFolder(tp=2).write(tmp_path)
    edited(tmp_path, setting("rotary_inv_freq", 0, 2.0), rank=1)
    assert Checkpoint.load(tmp_path, rank=0).tensors
    with pytest.raises(CheckpointError, match="rank1"):
        Checkpoint.load(tmp_path, rank=1)
