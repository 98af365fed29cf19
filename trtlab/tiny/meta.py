"""Writes a Hugging Face LLaMA in Meta's format, so that a notebook can open one model in both formats."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from trtlab.config.model import ModelConfig
from trtlab.convert.families.llama import META_NAMES, NAMES
from trtlab.convert.hugging_face import read_hugging_face
from trtlab.storage.lazy import open_safetensors


def write_meta_ckpt(model_dir: Path, ckpt_dir: Path, shards: int = 1) -> Path:
    """Write params.json and ``shards`` files consolidated.*.pth of a LLaMA in model.safetensors; returns the folder.

    The inverse of ``Checkpoint.from_meta_ckpt``: rows of q and k return to neighbouring pairs. Shards are cut by rows,
    row-parallel weights and the embedding by columns, as in Meta's Llama 1 and 2.
    """
    config, _ = read_hugging_face(model_dir)
    tensors = open_safetensors(model_dir / "model.safetensors")
    hf_names, meta_names = NAMES.sources(config), META_NAMES.sources(config)
    names = {hf: meta for name in hf_names for hf, meta in zip(hf_names[name], meta_names[name], strict=True)}
    whole = {meta: _to_meta_rows(meta, tensors[hf].read(), config) for hf, meta in names.items()}
    ckpt_dir.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        part = {name: _part(name, tensor, shard, shards) for name, tensor in whole.items()}
        torch.save(part, ckpt_dir / f"consolidated.{shard:02d}.pth")
    (ckpt_dir / "params.json").write_text(json.dumps(_params(config)), encoding="utf-8")
    return ckpt_dir


def _params(config: ModelConfig) -> dict[str, object]:
    return {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "norm_eps": config.norm_epsilon,
        "rope_theta": config.rotary_base,
        "vocab_size": config.vocab_size,
        "max_seq_len": config.max_position_embeddings,
    }


def _to_meta_rows(name: str, weight: Tensor, config: ModelConfig) -> Tensor:
    if not name.endswith((".wq.weight", ".wk.weight")):
        return weight
    halves = weight.view(-1, 2, config.head_size // 2, weight.shape[1])  # [heads, halves, pairs, in]
    return halves.transpose(1, 2).reshape(weight.shape)


def _part(name: str, weight: Tensor, shard: int, shards: int) -> Tensor:
    if weight.dim() == 1:
        return weight
    dim = 1 if name.endswith((".wo.weight", ".w2.weight")) or name.startswith("tok_embeddings") else 0
    return weight.chunk(shards, dim)[shard].clone()
