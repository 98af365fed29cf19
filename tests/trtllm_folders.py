"""Writes checkpoint folders as TensorRT-LLM's converters lay them out, from the description of the format alone.

Nothing of trtlab is used: numpy computes the buffers, and a Hugging Face model gives the weights and the logits.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from .models import write_random_model

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class UpstreamFolder:
    """What one run of a converter writes.

    ``buffers`` is ``"model"`` for one set a rank (0.12 and later), ``"layer"`` for one set a layer (0.10 and 0.11) or
    None. ``changes`` are keys of config.json that this version writes, or with the value ``...`` does not write.
    ``edit`` changes the tensors of a whole model before they are cut.
    """

    source: dict[str, Any] = field(default_factory=dict)
    architecture: str = "LlamaForCausalLM"
    dtype: str = "float32"
    tp: int = 1
    pp: int = 1
    parallel_embedding: bool = False
    share: bool = False
    scaling: dict[str, Any] | None = None
    base: float = 10000.0
    buffers: str | None = "model"
    changes: dict[str, Any] = field(default_factory=dict)
    edit: Callable[[Tensors], None] = lambda tensors: None

    def write(self, folder: Path, *, seed: int = 0) -> Any:
        """Write config.json and the ranks; returns the Hugging Face model, in float32, with the stored weights."""
        import transformers

        source = folder / "source"
        rope = {**(self.scaling or {"rope_type": "default"}), "rope_theta": self.base}
        changes = {"tie_word_embeddings": self.share, "rope_parameters": rope, "rms_norm_eps": 1e-6, **self.source}
        write_random_model(source, self.architecture, seed=seed, dtype=self.dtype, **changes)
        hf = json.loads((source / "config.json").read_text())
        whole = self._whole(load_file(source / "model.safetensors"), hf["num_hidden_layers"])
        self.edit(whole)
        for rank in range(self.tp * self.pp):
            save_file(self._rank(whole, hf, rank), folder / f"rank{rank}.safetensors")
        (folder / "config.json").write_text(json.dumps(self._config(hf)))
        model = (
            getattr(transformers, self.architecture)
            .from_pretrained(source, dtype=torch.float32, trust_remote_code=False)
            .eval()
        )
        for path in sorted(source.iterdir()):
            path.unlink()
        source.rmdir()
        return model

    def _whole(self, hf: Tensors, layers: int) -> Tensors:
        whole = {
            "transformer.vocab_embedding.weight": hf["model.embed_tokens.weight"],
            "transformer.ln_f.weight": hf["model.norm.weight"],
        }
        if not self.share:
            whole["lm_head.weight"] = hf["lm_head.weight"]
        for i in range(layers):
            theirs, ours = f"model.layers.{i}", f"transformer.layers.{i}"
            for kind in ("weight", "bias"):
                if f"{theirs}.self_attn.q_proj.{kind}" in hf:
                    parts = [hf[f"{theirs}.self_attn.{name}_proj.{kind}"] for name in "qkv"]
                    whole[f"{ours}.attention.qkv.{kind}"] = torch.cat(parts)
            whole[f"{ours}.attention.dense.weight"] = hf[f"{theirs}.self_attn.o_proj.weight"]
            whole[f"{ours}.mlp.fc.weight"] = hf[f"{theirs}.mlp.gate_proj.weight"]
            whole[f"{ours}.mlp.gate.weight"] = hf[f"{theirs}.mlp.up_proj.weight"]
            whole[f"{ours}.mlp.proj.weight"] = hf[f"{theirs}.mlp.down_proj.weight"]
            whole[f"{ours}.input_layernorm.weight"] = hf[f"{theirs}.input_layernorm.weight"]
            whole[f"{ours}.post_layernorm.weight"] = hf[f"{theirs}.post_attention_layernorm.weight"]
        return whole

    def _rank(self, whole: Tensors, hf: dict[str, Any], rank: int) -> Tensors:
        stage, place = divmod(rank, self.tp)
        each = hf["num_hidden_layers"] // self.pp
        tensors: Tensors = {}
        for name, tensor in whole.items():
            own = self._cut(name, tensor, hf, place)
            if ".layers." in name:
                _, _, number, part = name.split(".", 3)
                if int(number) // each == stage:
                    tensors[f"transformer.layers.{int(number) - stage * each}.{part}"] = own
            elif stage == (0 if "embedding" in name else self.pp - 1):
                tensors[name] = own
        for prefix in self._buffer_places(each):
            tensors |= {prefix + name: value for name, value in self._rotary(hf).items()}
        return {name: tensor.contiguous().clone() for name, tensor in tensors.items()}

    def _buffer_places(self, layers: int) -> list[str]:
        each_layer = [f"transformer.layers.{i}.attention." for i in range(layers)]
        return {"model": [""], "layer": each_layer, None: []}[self.buffers]

    def _cut(self, name: str, tensor: torch.Tensor, hf: dict[str, Any], place: int) -> torch.Tensor:
        if self.tp == 1:
            return tensor
        if "qkv" in name:
            size = hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]
            q_rows, kv_rows = hf["num_attention_heads"] * size, hf["num_key_value_heads"] * size
            q, k, v = tensor.split([q_rows, kv_rows, kv_rows])
            times = max(1, self.tp // hf["num_key_value_heads"])  # with fewer key heads than ranks, each is repeated
            k, v = (part.unflatten(0, (-1, size)).repeat_interleave(times, 0).flatten(0, 1) for part in (k, v))
            return torch.cat([part.chunk(self.tp)[place] for part in (q, k, v)])
        if "mlp.fc" in name or "mlp.gate" in name:
            return tensor.chunk(self.tp)[place]
        if name.endswith(("dense.weight", "mlp.proj.weight")):
            return tensor.chunk(self.tp, dim=1)[place]
        if name == "lm_head.weight" or ("vocab_embedding" in name and self.parallel_embedding):
            padded = torch.nn.functional.pad(tensor, (0, 0, 0, -len(tensor) % self.tp))
            return padded.chunk(self.tp)[place]
        return tensor

    def _rotary(self, hf: dict[str, Any]) -> Tensors:
        size = hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]
        return rotary_buffers(size, hf["max_position_embeddings"], self.base, self.scaling)

    def _config(self, hf: dict[str, Any]) -> dict[str, Any]:
        size = hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]
        mapping = {"world_size": self.tp * self.pp, "gpus_per_node": 8, "cp_size": 1, "tp_size": self.tp}
        mapping |= {"pp_size": self.pp, "moe_tp_size": self.tp, "moe_ep_size": 1}
        config = {
            "mlp_bias": False,
            "attn_bias": "Qwen2" in self.architecture,
            "rotary_base": self.base,
            "rotary_scaling": self.scaling,
            "residual_mlp": False,
            "disable_weight_only_quant_plugin": False,
            "moe": {"num_experts": 0, "top_k": 0, "normalization_mode": None, "tp_mode": 0},
            "remove_duplicated_kv_heads": False,
            "architecture": self.architecture,
            "dtype": self.dtype,
            **{key: hf[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")},
            **{key: hf[key] for key in ("num_key_value_heads", "intermediate_size", "max_position_embeddings")},
            "hidden_act": "silu",
            "logits_dtype": "float32",
            "norm_epsilon": hf["rms_norm_eps"],
            "position_embedding_type": "rope_gpt_neox",
            "mapping": mapping,
            "quantization": dict(QUANTIZATION),
            "use_parallel_embedding": self.parallel_embedding,
            "embedding_sharding_dim": 0,
            "share_embedding_table": self.share,
            "head_size": size,
            "qk_layernorm": False,
            **self.changes,
        }
        return {key: value for key, value in config.items() if value is not ...}


QUANTIZATION = {
    "quant_algo": None,
    "kv_cache_quant_algo": None,
    "group_size": 128,
    "smoothquant_val": 0.5,
    "clamp_val": None,
    "has_zero_point": False,
    "pre_quant_scale": False,
    "exclude_modules": None,
}
LINEAR = {"rope_type": "linear", "type": "linear", "factor": 2.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


def rotary_buffers(size: int, positions: int, base: float, scaling: dict[str, Any] | None) -> Tensors:
    """The three buffers of a rotary embedding, in float32 throughout.

    ``rotary_inv_freq`` holds a frequency for each pair of dimensions. ``embed_positions_for_gpt_attention`` is flat:
    for each position and pair a cosine and a sine, under yarn times its attention factor. ``embed_positions`` has all
    sines of a position before its cosines; it is of base 10000 and unscaled in every version.
    """
    frequencies = (1.0 / (base ** (np.arange(0, size, 2) / size)).astype(np.float32)).astype(np.float32)
    factor = 1.0
    kind = (scaling or {}).get("rope_type")
    if kind == "linear":
        frequencies = (frequencies / np.float32(scaling["factor"])).astype(np.float32)
    elif kind == "llama3":
        frequencies = np.array([_llama3(float(f), scaling) for f in frequencies], np.float32)
    elif kind == "yarn":
        frequencies = np.array([_yarn(i, float(f), size, base, scaling) for i, f in enumerate(frequencies)], np.float32)
        factor = 0.1 * math.log(scaling["factor"]) + 1.0
    else:
        assert kind is None, kind
    plain = (1.0 / (10000.0 ** (np.arange(0, size, 2) / size)).astype(np.float32)).astype(np.float32)
    places = np.arange(positions, dtype=np.float32)
    turned, unscaled = np.outer(places, frequencies), np.outer(places, plain)
    pairs = np.stack((np.cos(turned), np.sin(turned)), axis=-1) * np.float32(factor)
    rows = np.concatenate((np.sin(unscaled), np.cos(unscaled)), axis=1)
    return {
        "rotary_inv_freq": torch.from_numpy(frequencies),
        "embed_positions": torch.from_numpy(rows[None].astype(np.float32)),
        "embed_positions_for_gpt_attention": torch.from_numpy(pairs.reshape(1, -1).astype(np.float32)),
    }


def _llama3(frequency: float, scaling: dict[str, Any]) -> float:
    trained, factor = scaling["original_max_position_embeddings"], scaling["factor"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = trained * frequency / (2 * math.pi)  # full turns over the trained length
    keep = min(1.0, max(0.0, (turns - low) / (high - low)))
    return keep * frequency + (1 - keep) * frequency / factor


def _yarn(pair: int, frequency: float, size: int, base: float, scaling: dict[str, Any]) -> float:
    """Pairs of 32 turns and more over the trained length are kept, those of one and less are divided by the factor."""
    trained = scaling["original_max_position_embeddings"]
    first, last = (size / 2 * math.log(trained / (2 * math.pi * turns)) / math.log(base) for turns in (32, 1))
    low, high = max(math.floor(first), 0), min(math.ceil(last), size - 1)
    divided = min(1.0, max(0.0, (pair - low) / (high - low)))
    return divided * frequency / scaling["factor"] + (1 - divided) * frequency
