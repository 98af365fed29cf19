"""GGUF files as llama.cpp's converter writes them, from the folders of small Hugging Face models and tokenizers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.torch import load_file

Array = np.ndarray[Any, Any]
FLOATS = ("F32", "F16", "BF16")
BLOCKS = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
K_BLOCKS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
SIZES = {"hidden_size": 256, "intermediate_size": 256}  # a K-quant's block has 256 numbers of one row
QWEN3 = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 128}  # transformers' reader knows 128 alone

NAMES = {  # llama.cpp's, of Hugging Face's
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
ARCHITECTURES = {"mistral": "llama"}  # of Hugging Face's model_type, where it is another
# Where the scales of a K-quant's block lie: byte, and mean value; they make numbers of about 0.05 around zero.
SCALES = {
    "Q2_K": ((80, 3e-3), (82, 4.5e-3)),
    "Q3_K": ((108, 1e-3),),
    "Q4_K": ((0, 1.5e-4), (2, 1.1e-3)),
    "Q5_K": ((0, 8e-5), (2, 1.2e-3)),
    "Q6_K": ((208, 6e-5),),
}


def write_gguf(
    path: Path,
    model: Path,
    kind: str = "F32",
    *,
    tokenizer: Mapping[str, Any] | None = None,
    keys: Mapping[str, Any] | None = None,
    kinds: Mapping[str, str] | None = None,
) -> Path:
    """Write a GGUF file of a Hugging Face folder with ``config.json`` and ``model.safetensors``; returns its path.

    Args:
        path: The file.
        model: The folder.
        kind: ggml's name of the type of all matrices. Vectors are float32. K-quants are random valid blocks, for the
            ``gguf`` package cannot quantize to them.
        tokenizer: Keys of a tokenizer: ``byte_level_keys`` or ``sentencepiece_keys``.
        keys: Further keys; ``{}`` in one is the name of the architecture, ``...`` takes one out.
        kinds: Other types for single tensors, by llama.cpp's names.
    """
    config = json.loads((model / "config.json").read_text())
    architecture = ARCHITECTURES.get(config["model_type"], config["model_type"])
    stored = model_keys(config, architecture) | dict(tokenizer or {})
    stored |= {name.format(architecture): value for name, value in (keys or {}).items()}
    writer = gguf.GGUFWriter(path, stored.pop("general.architecture", architecture))
    for name, value in stored.items():
        if value is not ...:
            _add(writer, name, value)
    for name, values in model_tensors(model, config, architecture).items():
        chosen = (kinds or {}).get(name, kind if values.ndim > 1 else "F32")
        writer.add_tensor(
            name, pack(values, chosen, seed=len(writer.tensors[0])), raw_dtype=gguf.GGMLQuantizationType[chosen]
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, name: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, int):
        writer.add_uint32(name, value)
    elif isinstance(value, float):
        writer.add_float32(name, value)
    elif isinstance(value, str):
        writer.add_string(name, value)
    else:
        writer.add_array(name, value)


def model_keys(config: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    """The keys of a config.json, with the scaling of its rotary embedding that has keys: linear and yarn."""
    rope = config.get("rope_parameters") or {}
    heads = config["num_attention_heads"]
    head_size = config.get("head_dim") or config["hidden_size"] // heads
    keys = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "vocab_size": config["vocab_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "rope.freq_base": float(rope["rope_theta"]),
    }
    if architecture == "llama":
        keys["rope.dimension_count"] = head_size
    if config.get("head_dim"):
        keys |= {"attention.key_length": head_size, "attention.value_length": head_size}
    if rope["rope_type"] in ("linear", "yarn"):
        keys |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": float(rope["factor"])}
    if rope["rope_type"] == "yarn":
        keys["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    return {f"{architecture}.{name}": value for name, value in keys.items()}


def model_tensors(model: Path, config: Mapping[str, Any], architecture: str) -> dict[str, Array]:
    """The tensors by llama.cpp's names, q and k of a LLaMA in its order; with the divisors of Llama 3.1's scaling."""
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors = {}
    for theirs, tensor in load_file(model / "model.safetensors").items():
        name = theirs
        for part, ours in NAMES.items():
            name = name.replace(part, ours) if part in name.rsplit(".", 1)[0] else name
        values = tensor.float().numpy()
        part = name.split(".")[-2]
        if architecture == "llama" and part in heads:
            halves = values.reshape(heads[part], 2, -1, *values.shape[1:])  # [heads, 2, head size / 2, ...]
            values = halves.swapaxes(1, 2).reshape(values.shape)
        tensors[name] = np.ascontiguousarray(values)
    rope = config["rope_parameters"]
    if rope["rope_type"] == "llama3":
        head_size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        tensors["rope_freqs.weight"] = _llama3_divisors(rope, head_size)
    return tensors


def _llama3_divisors(rope: Mapping[str, Any], head_size: int) -> Array:
    divisors = []
    for pair in range(head_size // 2):
        wavelength = 2 * np.pi * rope["rope_theta"] ** (2 * pair / head_size)
        turns = rope["original_max_position_embeddings"] / wavelength
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
        divisors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(divisors, np.float32)


def pack(values: Array, kind: str, seed: int = 0) -> Array:
    """Numbers as a file stores them: float16 and float32 as they are, others as bytes ``[rows, bytes of a row]``."""
    if kind in K_BLOCKS:
        return random_blocks(kind, values.size // 256, seed).reshape(*values.shape[:-1], -1)
    packed: Array = gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind])
    return packed


def random_blocks(kind: str, count: int, seed: int = 0) -> Array:
    """Random blocks of a K-quant whose scales are finite: ``[count, bytes of a block]``."""
    rng = np.random.default_rng(seed)
    _, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    blocks = rng.integers(0, 256, (count, nbytes), np.uint8)
    for place, mean in SCALES[kind]:
        scales = rng.uniform(0.7 * mean, 1.3 * mean, (count, 1)).astype(np.float16)
        blocks[:, place : place + 2] = scales.view(np.uint8)
    return blocks


NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # types of tokens


def byte_level_keys(folder: Path, pre: str, vocab_size: int | None = None, **special: Any) -> dict[str, Any]:
    """The keys of a byte-level BPE tokenizer in ``tokenizer.json``, whose splitting rule llama.cpp calls ``pre``.

    Ids up to ``vocab_size`` that the tokenizer does not use are padded. ``special`` are further keys, such as
    ``bos_token_id``.
    """
    stored = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    tokens = {number: token for token, number in stored["model"]["vocab"].items()}
    kinds = dict.fromkeys(tokens, NORMAL)
    for added in stored["added_tokens"]:
        tokens[added["id"]] = added["content"]
        kinds[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    ids = range(vocab_size or len(tokens))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in stored["model"]["merges"]]
    keys = {
        "model": "gpt2",
        "pre": pre,
        "tokens": [tokens.get(number, f"[PAD{number}]") for number in ids],
        "token_type": [kinds.get(number, UNUSED) for number in ids],
        "merges": merges,
        **special,
    }
    return {f"tokenizer.ggml.{name}": value for name, value in keys.items()} | chat_template(folder)


def sentencepiece_keys(model: bytes, **special: Any) -> dict[str, Any]:
    """The keys of a sentencepiece model."""
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    kinds = {
        number: UNKNOWN if pieces.IsUnknown(number) else CONTROL if pieces.IsControl(number) else BYTE
        for number in range(len(pieces))
        if pieces.IsUnknown(number) or pieces.IsControl(number) or pieces.IsByte(number)
    }
    keys = {
        "model": "llama",
        "pre": "default",
        "tokens": [pieces.IdToPiece(number) for number in range(len(pieces))],
        "scores": [float(pieces.GetScore(number)) for number in range(len(pieces))],
        "token_type": [kinds.get(number, NORMAL) for number in range(len(pieces))],
        "bos_token_id": pieces.bos_id(),
        "eos_token_id": pieces.eos_id(),
        "unknown_token_id": pieces.unk_id(),
        **special,
    }
    return {f"tokenizer.ggml.{name}": value for name, value in keys.items()}


def chat_template(folder: Path) -> dict[str, str]:
    """The key of a folder's chat template, if it has one."""
    file = folder / "chat_template.jinja"
    return {"tokenizer.chat_template": file.read_text(encoding="utf-8")} if file.is_file() else {}
