"""A family that trtlab does not ship, defined only by data: LayerNorm with bias, ungated MLP, learned positions.

Its tensors are those of a transformers OPT under other names, so that OPT's logits are the reference.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from trtlab import BuildConfig, Checkpoint, Mapping, QuantConfig, SamplingParams
from trtlab.convert.families import FAMILIES
from trtlab.convert.families.family import Family, NameTable
from trtlab.convert.families.llama import DEFAULTS

PARABLE = Family(
    NameTable(
        outside={
            "transformer.vocab_embedding": "words",
            "transformer.position_embedding": "places",
            "transformer.ln_f": "last_norm",
            "lm_head": "head",
        },
        layer="verse.{}",
        parts={
            "input_layernorm": ("norm_1",),
            "attention.qkv": ("q", "k", "v"),
            "attention.dense": ("out",),
            "post_layernorm": ("norm_2",),
            "mlp.fc": ("up",),
            "mlp.proj": ("down",),
        },
    ),
    DEFAULTS,
    mlp_bias=True,
    settings={"norm": "layer_norm", "gated_mlp": False, "position_embedding_type": "learned_absolute"},
)
OPT_PARTS = {
    "self_attn_layer_norm": "norm_1",
    "self_attn.q_proj": "q",
    "self_attn.k_proj": "k",
    "self_attn.v_proj": "v",
    "self_attn.out_proj": "out",
    "final_layer_norm": "norm_2",
    "fc1": "up",
    "fc2": "down",
}
OPT_OUTSIDE = {
    "model.decoder.embed_tokens.weight": "words.weight",
    "model.decoder.embed_positions.weight": "places.weight",
    "model.decoder.final_layer_norm.weight": "last_norm.weight",
    "model.decoder.final_layer_norm.bias": "last_norm.bias",
    "lm_head.weight": "head.weight",
}
OPT_OFFSET = 2  # OPT's table of positions begins with two rows that no token uses
PROMPT = [3, 14, 15, 9, 26, 5]


def parable_name(name):
    if name in OPT_OUTSIDE:
        return OPT_OUTSIDE[name]
    number, part = name.removeprefix("model.decoder.layers.").split(".", 1)
    module, _, kind = part.rpartition(".")
    return f"verse.{number}.{OPT_PARTS[module]}.{kind}"


@pytest.fixture(scope="module")
def opt():
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=48,
        hidden_size=64,
        word_embed_proj_dim=64,
        ffn_dim=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        dropout=0.0,
        tie_word_embeddings=False,
    )
    model = OPTForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            shift = 1.0 if "norm.weight" in name else 0.0
            parameter.normal_(shift, 0.2)
    return model


@pytest.fixture(scope="module")
def folder(opt, tmp_path_factory):
    folder = tmp_path_factory.mktemp("parable")
    tensors = {parable_name(name): tensor.contiguous() for name, tensor in opt.state_dict().items()}
    tensors["places.weight"] = tensors["places.weight"][OPT_OFFSET:].contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["ParableForCausalLM"],
        "vocab_size": 48,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 64,
        "hidden_act": "relu",
        "rms_norm_eps": 1e-5,
        "attention_bias": True,
        "mlp_bias": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def checkpoint(folder, monkeypatch):
    monkeypatch.setitem(FAMILIES, "ParableForCausalLM", PARABLE)
    return Checkpoint.from_hugging_face(folder)


def expected_logits(opt):
    with torch.inference_mode():
        return opt(torch.tensor([PROMPT])).logits[0]


@pytest.mark.parametrize("mapping", [Mapping(), Mapping(tp_size=2), Mapping(tp_size=2, pp_size=2)], ids=str)
@pytest.mark.parametrize("backend", ["torch", pytest.param("interpreter", marks=pytest.mark.tensorrt)])
def test_logits_are_transformers(checkpoint, opt, backend, mapping):
    engine = checkpoint.build(BuildConfig(max_batch_size=2, max_seq_len=32), mapping, plan=False)
    with engine.session(backend=backend, device="cpu") as session:
        # 1e-4: sums of up to 96 products in float32, in another order
        torch.testing.assert_close(session.logits(PROMPT), expected_logits(opt), atol=1e-4, rtol=1e-4)


def test_decoding_from_the_cache_continues_as_transformers_does(checkpoint, opt):
    engine = checkpoint.build(BuildConfig(max_batch_size=2, max_seq_len=32), plan=False)
    with engine.session(backend="torch", device="cpu") as session:
        ours = session.generate(PROMPT, SamplingParams(max_new_tokens=8, ignore_eos=True)).token_ids
    with torch.inference_mode():
        ids = torch.tensor([PROMPT])
        theirs = opt.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, eos_token_id=None
        )
    assert list(ours) == theirs[0, len(PROMPT) :].tolist()


@pytest.mark.plans
def test_a_plan_is_compiled(checkpoint):
    with checkpoint.build(BuildConfig(max_batch_size=2, max_seq_len=32)) as engine:
        assert engine.plans is not None
        assert engine.plans.nbytes > 0


def test_a_saved_checkpoint_is_read_back(checkpoint, tmp_path):
    checkpoint.save(tmp_path / "ckpt", Mapping(tp_size=2))
    again = Checkpoint.load(tmp_path / "ckpt")
    assert again.config == checkpoint.config
    assert all(torch.equal(again.tensors[name].read(), checkpoint.tensors[name].read()) for name in checkpoint.tensors)


# Eight bits leave a few percent of error after two layers, E4M3's three bits of mantissa a tenth. With the bias of the
# norms left as it was SmoothQuant's is 0.29.
@pytest.mark.parametrize(
    ("quant_algo", "most"),
    [("W8A16", 0.1), ("W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN", 0.1), ("W8A8_SQ_PER_CHANNEL", 0.1), ("FP8", 0.2)],
)
def test_it_is_quantized(checkpoint, opt, quant_algo, most):
    texts = None if quant_algo == "W8A16" else [PROMPT, PROMPT[::-1]]
    quantized = checkpoint.quantize(QuantConfig(quant_algo=quant_algo), calibration=texts)
    engine = quantized.build(BuildConfig(max_batch_size=2, max_seq_len=32), plan=False)
    with engine.session(backend="torch", device="cpu") as session:
        logits, expected = session.logits(PROMPT), expected_logits(opt)
    assert float((logits - expected).norm() / expected.norm()) < most
