"""Whole small folders of every format, from which cases start; each is made once in a process."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as safetensors_bytes

from trtlab import BuildConfig, Checkpoint, Mapping, ModelConfig, QuantConfig
from trtlab.convert.families import FAMILIES
from trtlab.convert.families.llama import META_NAMES
from trtlab.tensorrt.build.plan import PlanRecord
from trtlab.tensorrt.library import library

from ..models import random_texts, small_config, telling_weights, write_byte_fallback_tokenizer
from ..models import write_byte_level_tokenizer as write_byte_level
from .folder import Files, Link, read

TINY: dict[str, Any] = {"vocab_size": 40, "hidden_size": 16, "head_size": 4, "intermediate_size": 24}
HUGGING_FACE: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PARAMS = {
    "dim": 16,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "vocab_size": 40,
    "norm_eps": 1e-5,
    "max_seq_len": 64,
}


def tensors_of(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tensors; those of one dimension, the norms, are near one."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator) * 0.2 + (len(shape) == 1)
        for name, shape in sorted(shapes.items())
    }


@cache
def hugging_face_tensors(architecture: str = "LlamaForCausalLM", vocab_size: int = 40) -> dict[str, torch.Tensor]:
    """The tensors of a small model under Hugging Face's names."""
    family = FAMILIES[architecture]
    config = small_config(**TINY | {"vocab_size": vocab_size, "architecture": architecture}).replace(
        attn_bias=bool(family.attn_bias), qk_layernorm=family.qk_layernorm
    )
    return tensors_of(family.names.shapes(config))


def hugging_face(architecture: str = "LlamaForCausalLM", vocab_size: int = 40, **changes: Any) -> Files:
    """config.json and model.safetensors; ``...`` takes a key out."""
    config = HUGGING_FACE | {"architectures": [architecture], "vocab_size": vocab_size} | changes
    config = {key: value for key, value in config.items() if value is not ...}
    return {
        "config.json": json.dumps(config).encode(),
        "model.safetensors": safetensors_bytes(hugging_face_tensors(architecture, vocab_size)),
    }


def pickled(value: object, *, legacy: bool = False) -> bytes:
    """What ``torch.save`` writes, as a zip file or as it was before torch 1.6."""
    stream = io.BytesIO()
    torch.save(value, stream, _use_new_zipfile_serialization=not legacy)
    return stream.getvalue()


def sharded(*, pickle: bool = False) -> Files:
    """A Hugging Face folder of two shards and their index."""
    stem, suffix = ("pytorch_model", "bin") if pickle else ("model", "safetensors")
    tensors = hugging_face_tensors()
    names = [f"{stem}-0000{number}-of-00002.{suffix}" for number in (1, 2)]
    parts = [dict(list(tensors.items())[number::2]) for number in (0, 1)]
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
        "weight_map": {name: file for file, part in zip(names, parts, strict=True) for name in part},
    }
    files: Files = {
        name: pickled(part) if pickle else safetensors_bytes(part) for name, part in zip(names, parts, strict=True)
    }
    return {
        "config.json": hugging_face()["config.json"],
        f"{stem}.{suffix}.index.json": json.dumps(index).encode(),
        **files,
    }


@cache
def meta_tensors() -> dict[str, torch.Tensor]:
    """The tensors of a small LLaMA under Meta's names."""
    return tensors_of(META_NAMES.shapes(small_config(**TINY)))


def meta(**changes: Any) -> Files:
    """params.json and one consolidated.00.pth."""
    params = {key: value for key, value in (PARAMS | changes).items() if value is not ...}
    return {"params.json": json.dumps(params).encode(), "consolidated.00.pth": pickled(meta_tensors())}


@cache
def _checkpoint(**changes: Any) -> Checkpoint:
    config: ModelConfig = small_config(**TINY | changes)
    return Checkpoint.from_weights(config, telling_weights(config))


def _saved(checkpoint: Checkpoint, **how: Any) -> Files:
    with tempfile.TemporaryDirectory() as folder:
        return read(checkpoint.save(Path(folder) / "checkpoint", **how))


def checkpoint(mapping: Mapping | None = None, **how: Any) -> Files:
    """A checkpoint folder in TensorRT-LLM's format."""
    return _saved(_checkpoint(), mapping=mapping, **how)


@cache
def _quantized(quant_algo: str, **quant: Any) -> Checkpoint:
    config = QuantConfig(quant_algo=quant_algo, **quant)  # type: ignore[arg-type]
    texts = random_texts((8, 8), TINY["vocab_size"]) if config.reads_texts else None
    return _checkpoint(hidden_size=64, head_size=16, intermediate_size=64).quantize(config, calibration=texts)


def quantized(quant_algo: str, **quant: Any) -> Files:
    """A quantized checkpoint folder, with the report that quantizing made."""
    with tempfile.TemporaryDirectory() as folder:
        return read(_quantized(quant_algo, **quant).save(Path(folder) / "checkpoint"))


def engine(mapping: Mapping | None = None, quant_algo: str | None = None, **build: Any) -> Files:
    """An engine folder without plans."""
    source = _quantized(quant_algo) if quant_algo else _checkpoint()
    bounds = BuildConfig(**{"max_batch_size": 2, "max_seq_len": 32, "max_num_tokens": 64} | build)
    with tempfile.TemporaryDirectory() as folder:
        return read(source.build(bounds, mapping, plan=False).save(Path(folder) / "engine"))


def engine_with_plan() -> Files:
    """An engine folder with the record of a plan; the plan is a few bytes, for only its digest is read on a CPU."""
    files, plan = engine(), b"not a plan of TensorRT" * 9
    try:
        flavour, version = library().flavour, library().version
    except Exception:  # noqa: BLE001 - any version will do where there is no TensorRT
        flavour, version = "tensorrt", "11.0"
    digest = hashlib.sha256(plan).hexdigest()
    bytes_of = {"context": 1000, "generation": 500}
    record = PlanRecord(flavour, version, (), ("float32",), digest, len(plan), 100, bytes_of, False, 0.5)
    config = json.loads(files["config.json"])  # type: ignore[arg-type]
    config["trtlab"]["plans"] = [dataclasses.asdict(record)]
    return files | {"config.json": json.dumps(config).encode(), "rank0.engine": plan}


@cache
def tokenizer(kind: str = "byte level") -> Files:
    """The files of a tokenizer of at most 320 ids."""
    with tempfile.TemporaryDirectory() as folder:
        if kind == "byte level":
            write_byte_level(Path(folder))
        else:
            write_byte_fallback_tokenizer(Path(folder), ["hello", "a", "b", "the"])
        return read(Path(folder))


def in_a_hub_cache(files: Files) -> Files:
    """The same folder as huggingface_hub stores it: links into a folder of blobs."""
    blobs = {
        f"blobs/{hashlib.sha256(entry).hexdigest()}": entry for entry in files.values() if isinstance(entry, bytes)
    }
    links = {
        f"snapshots/abc/{name}": Link(f"../../blobs/{hashlib.sha256(entry).hexdigest()}")
        for name, entry in files.items()
        if isinstance(entry, bytes)
    }
    return {**blobs, **links}
