"""The decoder against transformers: logits to 1e-4 in float32, and 64 greedy tokens that are the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import trtlab.tiny

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
MODELS = {
    "grouped queries": ("LlamaForCausalLM", {}),
    "multi-head": ("LlamaForCausalLM", {"num_key_value_heads": 4}),
    "multi-query": ("LlamaForCausalLM", {"num_key_value_heads": 1}),
    "tied": ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    "attention bias": ("LlamaForCausalLM", {"attention_bias": True}),
    "mlp bias": ("LlamaForCausalLM", {"mlp_bias": True}),
    "every bias, tied, multi-query": (
        "LlamaForCausalLM",
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "num_key_value_heads": 1},
    ),
    "narrow heads": ("LlamaForCausalLM", {"head_dim": 8}),
    "wide heads": ("LlamaForCausalLM", {"head_dim": 48}),
    "one layer": ("LlamaForCausalLM", {"num_hidden_layers": 1}),
    "large epsilon": ("LlamaForCausalLM", {"rms_norm_eps": 0.1}),
    "rope base": ("LlamaForCausalLM", {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
    "linear scaling": (
        "LlamaForCausalLM",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5}},
    ),
    "llama3 scaling": ("LlamaForCausalLM", {"rope_parameters": LLAMA3}),
    "yarn": ("LlamaForCausalLM", {"rope_parameters": YARN}),
    "yarn, mscale": ("LlamaForCausalLM", {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3}}),
    "yarn, mscale alone": ("LlamaForCausalLM", {"rope_parameters": {**YARN, "mscale": 0.7}}),
    "yarn, attention factor": ("LlamaForCausalLM", {"rope_parameters": {**YARN, "attention_factor": 1.2}}),
    "yarn, not truncated": ("LlamaForCausalLM", {"rope_parameters": {**YARN, "truncate": False}}),
    "yarn, betas": ("LlamaForCausalLM", {"rope_parameters": {**YARN, "beta_fast": 16.0, "beta_slow": 2.0}}),
    "gelu": ("LlamaForCausalLM", {"hidden_act": "gelu"}),
    "tanh gelu": ("LlamaForCausalLM", {"hidden_act": "gelu_pytorch_tanh"}),
    "relu": ("LlamaForCausalLM", {"hidden_act": "relu"}),
    "Mistral, no window": ("MistralForCausalLM", {"sliding_window": None}),
    "Mistral, window beyond the build": ("MistralForCausalLM", {"sliding_window": 128}),
    "Qwen2": ("Qwen2ForCausalLM", {}),
    "Qwen2, tied, yarn": ("Qwen2ForCausalLM", {"tie_word_embeddings": True, "rope_parameters": YARN}),
    "Qwen2, window switched off": ("Qwen2ForCausalLM", {"use_sliding_window": False, "sliding_window": 8}),
    "Qwen3": ("Qwen3ForCausalLM", {"head_dim": 32}),
    "Qwen3, attention bias, tied": (
        "Qwen3ForCausalLM",
        {"head_dim": 32, "attention_bias": True, "tie_word_embeddings": True},
    ),
    "stored as float16": ("LlamaForCausalLM", {"dtype": "float16"}),
    "stored as bfloat16": ("Qwen3ForCausalLM", {"head_dim": 16, "dtype": "bfloat16"}),
}
PROMPT = [5, 17, 3, 0, 96, 41, 8, 8, 23, 64, 0]
NEW = 64


def reference_logits(model, ids):
    with torch.inference_mode():
        return model(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long)).logits[0]


def reference_tokens(model, ids, new=NEW):
    """Greedy tokens by transformers' generate; without a mask it would ignore prompt ids equal to pad_token_id."""
    with torch.inference_mode():
        out = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            do_sample=False,
            max_new_tokens=new,
            min_new_tokens=new,
            eos_token_id=None,
            pad_token_id=0,
        )
    return tuple(out[0, len(ids) :].tolist())


def greedy(session, ids, new=NEW):
    from trtlab import SamplingParams

    return session.generate(ids, SamplingParams(max_new_tokens=new, ignore_eos=True)).token_ids


def token_by_token(session, ids):
    """The logits after each token when every step adds one token to the cache."""
    from trtlab.parallel.step_inputs import Chunk, StepInputs

    blocks = tuple(range(-(-len(ids) // session.kv_cache.pool.tokens_per_block)))
    steps = (StepInputs((Chunk(1, past, (token,), blocks),)) for past, token in enumerate(ids))
    rows = [session._loop.backend.ranks.run(step) for step in steps]
    return torch.cat(rows)


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_64_greedy_tokens_are_those_of_transformers(name, random_model, hugging_face, open_session):
    architecture, changes = MODELS[name]
    folder = random_model(architecture, **changes)
    model, session = hugging_face(folder), open_session(folder)
    expected_tokens = reference_tokens(model, PROMPT)
    whole = [*PROMPT, *expected_tokens]
    expected = reference_logits(model, whole)
    assert expected.std() > 0.3, f"the logits are too flat for a comparison: {expected.std()}"
    torch.testing.assert_close(session.logits(whole), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(token_by_token(session, whole), expected, atol=1e-4, rtol=0)
    assert greedy(session, PROMPT) == expected_tokens


def test_the_reference_tells_the_models_apart(random_model, hugging_face):
    """If both sides ignored a setting, the comparison would prove nothing."""
    plain = {
        name: reference_logits(hugging_face(random_model(*MODELS[name][:1], **MODELS[name][1])), PROMPT * 5)
        for name in MODELS
        if MODELS[name][0] == "LlamaForCausalLM" and set(MODELS[name][1]) <= {"rope_parameters"}
    }
    names = list(plain)
    same = {("yarn", "yarn, mscale alone")}  # transformers wants both mscale and mscale_all_dim
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            apart = float((plain[a] - plain[b]).abs().max())
            assert (apart > 1e-3) == ((a, b) not in same), (a, b, apart)


@pytest.mark.parametrize("prompt", trtlab.tiny.EXAMPLES)
def test_the_shipped_model_gives_the_tokens_of_transformers(prompt, tiny_reference, tiny_session):
    ids = tiny_session.encode(prompt)
    expected_tokens = reference_tokens(tiny_reference, ids)
    whole = [*ids, *expected_tokens]
    expected = reference_logits(tiny_reference, whole)
    torch.testing.assert_close(tiny_session.logits(whole), expected, atol=1e-4, rtol=0)
    assert greedy(tiny_session, ids) == expected_tokens


@pytest.fixture(scope="module")
def tiny_reference(hugging_face):
    return hugging_face(trtlab.tiny.llama_dir())


@pytest.fixture(scope="module")
def tiny_session():
    from trtlab import BuildConfig, Checkpoint

    checkpoint = Checkpoint.from_hugging_face(trtlab.tiny.llama_dir())
    with checkpoint.build(BuildConfig(max_seq_len=512, max_input_len=448), plan=False).session(device="cpu") as session:
        yield session


OLD_SPELLINGS = {
    "base": ({"rope_theta": 500000.0, "rope_scaling": None}, {"rope_type": "default", "rope_theta": 500000.0}),
    "linear": (
        {"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 2.5}},
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5},
    ),
    "llama3": (
        {"rope_theta": 10000.0, "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}},
        LLAMA3,
    ),
    "yarn": (
        {"rope_theta": 10000.0, "rope_scaling": {k: v for k, v in YARN.items() if k != "rope_theta"}},
        YARN,
    ),
    "nothing at all": ({}, {"rope_type": "default", "rope_theta": 10000.0}),
}


@pytest.mark.parametrize("name", OLD_SPELLINGS)
def test_the_spelling_of_transformers_4_is_the_same_model(name, random_model, hugging_face, open_session, edited):
    old, new = OLD_SPELLINGS[name]
    folder = random_model("LlamaForCausalLM", rope_parameters=new)
    copy = edited(folder, rope_parameters=..., dtype=..., torch_dtype="float32", **old)
    raw = json.loads((copy / "config.json").read_text())
    assert "rope_parameters" not in raw and "dtype" not in raw
    expected = reference_logits(hugging_face(folder), PROMPT * 5)
    torch.testing.assert_close(open_session(copy).logits(PROMPT * 5), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(reference_logits(hugging_face(copy), PROMPT * 5), expected)


def test_positions_far_beyond_the_prompt_are_exact_to_the_end_of_the_context(random_model, hugging_face, open_session):
    folder = random_model("LlamaForCausalLM", max_position_embeddings=2048, rope_parameters={**YARN, "factor": 64.0})
    ids = torch.randint(0, 99, (2000,), generator=torch.Generator().manual_seed(1)).tolist()
    session = open_session(folder, max_seq_len=2048, max_input_len=2048, max_num_tokens=300)
    torch.testing.assert_close(session.logits(ids), reference_logits(hugging_face(folder), ids), atol=1e-4, rtol=0)


def test_pytorch_bin_gives_the_same_weights(random_model, tmp_path):
    folder = random_model("LlamaForCausalLM")
    write_bin(folder, tmp_path, shards=1)
    assert_same_weights(tmp_path, folder)


def test_a_sharded_pytorch_bin_gives_the_same_weights(random_model, tmp_path):
    folder = random_model("LlamaForCausalLM")
    write_bin(folder, tmp_path, shards=3)
    assert_same_weights(tmp_path, folder)


def test_sharded_safetensors_give_the_same_weights(random_model, hugging_face, tmp_path):
    folder = random_model("LlamaForCausalLM")
    hugging_face(folder).save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_same_weights(tmp_path, folder)


def assert_same_weights(folder: Path, reference: Path) -> None:
    """Weights are equal bit for bit. Logits may differ: some processors sum in an order that depends on addresses."""
    ours, theirs = (trtlab.Checkpoint.from_hugging_face(source) for source in (folder, reference))
    assert ours.config == theirs.config and set(ours.tensors) == set(theirs.tensors)
    for name, tensor in theirs.tensors.items():
        assert torch.equal(ours.tensors[name].read(), tensor.read()), name


def write_bin(source: Path, target: Path, shards: int) -> None:
    from safetensors.torch import load_file

    tensors = load_file(source / "model.safetensors")
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    if shards == 1:
        torch.save(tensors, target / "pytorch_model.bin")
        return
    names = {name: f"pytorch_model-{i % shards + 1:05d}-of-{shards:05d}.bin" for i, name in enumerate(tensors)}
    for file in set(names.values()):
        torch.save({name: tensors[name] for name in names if names[name] == file}, target / file)
    (target / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
