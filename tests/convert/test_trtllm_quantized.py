"""Quantized folders as TensorRT-LLM 0.13 writes them, against a Hugging Face model that rounds as its kernels do."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DynamicCache

from trtlab import BuildConfig, Checkpoint, QuantizedCheckpoint

from ..models import random_texts
from ..trtllm_folders import QUANTIZATION, UpstreamFolder

(IDS,) = random_texts((40,))
PER_TOKEN = "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN"
PARTS = {"attention.qkv": "input_layernorm", "mlp.fc": "post_layernorm", "mlp.gate": "post_layernorm"}
PARTS |= {"attention.dense": None, "mlp.proj": None}


def logits(checkpoint):
    engine = checkpoint.build(BuildConfig(max_batch_size=1, max_seq_len=64), plan=False)
    with engine.session(backend="torch", device="cpu") as session:
        return session.logits(IDS)


@torch.inference_mode()
def expected_logits(model):
    return model(torch.tensor([IDS])).logits[0]


def rms(x):
    return float(x.square().mean().sqrt())


def assert_rounded_alike(got, rounded, exact):
    """``got`` is the rounded model, to a tenth of what rounding changes.

    The two compute the rounded numbers in another order. One that lies within float32's precision of a tie, some in
    100,000, goes to the next integer instead; a wrong scale, or none, changes as much as rounding itself does.
    """
    assert rms(rounded - exact) > 0.01 * rms(exact)
    assert rms(got - rounded) < 0.1 * rms(rounded - exact)


# --- INT8 KV cache

KV_SCALES = (0.2, 0.1)


def add_kv_scales(tensors):
    for layer, scale in enumerate(KV_SCALES):
        tensors[f"transformer.layers.{layer}.attention.kv_cache_scaling_factor"] = torch.tensor([scale])


def rounding(update):
    """K after rotary and V as INT8 with one scale a layer: rounded half to even, cut off at -128 and 127."""

    def rounded(cache, key, value, layer_idx, *args, **kwargs):
        scale = KV_SCALES[layer_idx]
        key, value = ((x / scale).round().clamp(-128, 127) * scale for x in (key, value))
        return update(cache, key, value, layer_idx, *args, **kwargs)

    return rounded


KV_CACHE = UpstreamFolder(
    edit=add_kv_scales, buffers=None, changes={"quantization": {**QUANTIZATION, "kv_cache_quant_algo": "INT8"}}
)


def test_the_merged_scale_of_an_int8_cache_is_read(tmp_path, monkeypatch):
    model = KV_CACHE.write(tmp_path)
    checkpoint = Checkpoint.load(tmp_path)
    assert isinstance(checkpoint, QuantizedCheckpoint)
    assert checkpoint.config.quantization.kv_cache_scales == "merged"
    exact = expected_logits(model)
    monkeypatch.setattr(DynamicCache, "update", rounding(DynamicCache.update))
    assert_rounded_alike(logits(checkpoint), expected_logits(model), exact)


# --- SmoothQuant, per channel and per token


def quantize(tensors):
    """Smooth every input by random factors, and round the weights to INT8 with a scale for each output."""
    generator = torch.Generator().manual_seed(3)
    for layer in (0, 1):
        prefix, factors = f"transformer.layers.{layer}.", {}
        for part, norm in PARTS.items():
            weight = tensors[f"{prefix}{part}.weight"]
            factor = factors.get(norm) if norm else None
            if factor is None:
                factor = torch.rand(weight.shape[1], generator=generator) + 0.5
                if norm:
                    factors[norm] = factor
                    tensors[f"{prefix}{norm}.weight"] = tensors[f"{prefix}{norm}.weight"] / factor
                    tensors[f"{prefix}{norm}.scale_to_int"] = torch.ones(1)
                else:
                    tensors[f"{prefix}{part}.smoother"] = factor[None]
            smooth = weight * factor
            scale = smooth.abs().amax(1) / 127
            tensors[f"{prefix}{part}.weight"] = (smooth / scale[:, None]).round().to(torch.int8)
            tensors[f"{prefix}{part}.per_channel_scale"] = scale[None].float()


class RoundedLinear(torch.nn.Module):
    """INT8 weight rows with a scale each; each token is rounded with a scale of its own."""

    def __init__(self, rows, scale, smoother):
        super().__init__()
        self.rows, self.scale, self.smoother = rows.double(), scale.double(), smoother

    def forward(self, x):
        x = x if self.smoother is None else x / self.smoother
        step = x.abs().amax(-1, keepdim=True) / 127
        return ((x / step).round().double() @ self.rows.T * self.scale * step).float()


def round_model(model, tensors):
    """Put the stored norms and integers into a Hugging Face model."""
    for i, layer in enumerate(model.model.layers):

        def stored(name, i=i):
            return tensors.get(f"transformer.layers.{i}.{name}")

        layer.input_layernorm.weight.data = stored("input_layernorm.weight")
        layer.post_attention_layernorm.weight.data = stored("post_layernorm.weight")
        q, kv = model.config.hidden_size, model.config.num_key_value_heads * model.config.head_dim
        rows = stored("attention.qkv.weight").split([q, kv, kv])
        scales = stored("attention.qkv.per_channel_scale")[0].split([q, kv, kv])
        for name, row, scale in zip("qkv", rows, scales, strict=True):
            setattr(layer.self_attn, f"{name}_proj", RoundedLinear(row, scale, None))
        places = {"attention.dense": (layer.self_attn, "o_proj"), "mlp.proj": (layer.mlp, "down_proj")}
        places |= {"mlp.fc": (layer.mlp, "gate_proj"), "mlp.gate": (layer.mlp, "up_proj")}
        for part, (parent, name) in places.items():
            linear = (stored(f"{part}.weight"), stored(f"{part}.per_channel_scale")[0], stored(f"{part}.smoother"))
            setattr(parent, name, RoundedLinear(*linear))
    return model


SMOOTHED = UpstreamFolder(edit=quantize, changes={"quantization": {**QUANTIZATION, "quant_algo": PER_TOKEN}})


@pytest.mark.parametrize("dummies", [False, True])
def test_smoothquant_per_token_loads_with_and_without_the_scales_that_it_does_not_use(dummies, tmp_path):
    model = SMOOTHED.write(tmp_path)
    tensors = load_file(tmp_path / "rank0.safetensors")
    exact, rounded = expected_logits(model), expected_logits(round_model(model, tensors))
    if dummies:
        names = [
            f"transformer.layers.{i}.{block}.quantization_scaling_factor"
            for i in (0, 1)
            for block in ("attention", "mlp")
        ]
        save_file(tensors | {name: torch.ones(1) for name in names}, tmp_path / "rank0.safetensors")
    checkpoint = Checkpoint.load(tmp_path)
    assert not any("quantization_scaling_factor" in name for name in checkpoint.tensors)
    assert_rounded_alike(logits(checkpoint), rounded, exact)
