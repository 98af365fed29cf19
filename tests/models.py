"""All small models of the tests: Hugging Face folders, settings with weights, tokenizers.

Import it relatively (``from ..models import small_config``). With ``tests`` on the path, its folders ``tensorrt`` and
``config`` would hide the packages of those names.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch

from trtlab import Checkpoint, ModelConfig
from trtlab.model.tensor_specs import tensor_specs

Weights = dict[str, torch.Tensor]

LLAMA_7B = {  # the arguments of a ModelConfig
    "architecture": "LlamaForCausalLM",
    "dtype": "float16",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_size": 128,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
}

HUGGING_FACE = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
TRTLAB = {
    "architecture": "LlamaForCausalLM",
    "dtype": "float32",
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_size": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}


def small_config(**changes: Any) -> ModelConfig:
    """Two layers of four heads, 99 tokens, float32, with the given changes."""
    return ModelConfig(**{**TRTLAB, **changes})


def normal_weights(config: ModelConfig, seed: int = 0) -> Weights:
    """Standard normal numbers in every tensor, for tests that move, cut and store tensors without running them."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(spec.shape, generator=generator).to(config.torch_dtype)
        for name, spec in tensor_specs(config).items()
    }


def telling_weights(config: ModelConfig, seed: int = 0) -> Weights:
    """Weights that are large enough for every part of the model to change the logits."""
    return {
        name: (0.2 * noise + (1 if _is_norm(name) else 0)).to(config.torch_dtype)
        for name, noise in normal_weights(config.replace(dtype="float32"), seed).items()
    }


def loud_weights(
    config: ModelConfig, seed: int = 0, *, channels: tuple[int, ...] = (3, 17), times: int = 12
) -> Weights:
    """Weights with a few loud channels in each norm, so that there is something to smooth."""
    weights = {}
    for name, noise in normal_weights(config.replace(dtype="float32"), seed).items():
        weights[name] = 1 + 0.1 * noise if _is_norm(name) else noise * noise.shape[-1] ** -0.5
        if _is_norm(name):
            weights[name][list(channels)] *= times
    return {name: weight.to(config.torch_dtype) for name, weight in weights.items()}


def _is_norm(name: str) -> bool:
    return "norm" in name or "ln_f" in name


def normal_checkpoint(config: ModelConfig) -> Checkpoint:
    """A checkpoint of ``normal_weights``."""
    return Checkpoint.from_weights(config, normal_weights(config))


def loud_checkpoint(config: ModelConfig, **loud: Any) -> Checkpoint:
    """A checkpoint of ``loud_weights``."""
    return Checkpoint.from_weights(config, loud_weights(config, **loud))


def random_texts(lengths: tuple[int, ...], vocab_size: int = 99, seed: int = 7) -> list[list[int]]:
    """Random token ids of these lengths, for calibration."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab_size, (length,), generator=generator).tolist() for length in lengths]


def write_random_model(
    folder: Path, architecture: str, *, seed: int = 0, dtype: str = "float32", **changes: Any
) -> None:
    """Write a Hugging Face folder whose logits are not flat: normal weights and biases, norms around one."""
    import transformers

    kind = getattr(transformers, architecture)
    config = kind.config_class(**{**HUGGING_FACE, **changes}, architectures=[architecture])
    generator = torch.Generator().manual_seed(seed)
    model = kind(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.normal_(0.0, 0.08, generator=generator)
        model.get_input_embeddings().weight.normal_(0.0, 0.5, generator=generator)
    model.to(getattr(torch, dtype)).save_pretrained(folder)


def write_fresh_model(folder: Path, **changes: Any) -> None:
    """Write a Hugging Face LLaMA as transformers initializes it: small weights, norms of one."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {name: size for name, size in HUGGING_FACE.items() if not name.endswith("_token_id")}
    LlamaForCausalLM(LlamaConfig(**{**sizes, "max_position_embeddings": 64, **changes})).float().save_pretrained(folder)


TRAINING_TEXT = ["the cat sat on the mat", "größe füße straße", "日本語 の 文章", "🙂🙃 naïve café", "aaa bbb abab"] * 4


def write_byte_level_tokenizer(folder: Path) -> None:
    """Write a byte-level BPE tokenizer of 320 ids with special tokens; few id sequences decode to valid UTF-8."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>", "<|sep|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(TRAINING_TEXT, trainer)
    _save_tokenizer(inner, folder)


def write_byte_fallback_tokenizer(folder: Path, words: list[str]) -> None:
    """Write a tokenizer like Llama 2's: pieces that mark the space, 256 byte tokens, a dropped first space."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *words, *(f"▁{word}" for word in words), "▁"]
    inner = Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    )
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    inner.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    _save_tokenizer(inner, folder)


def _save_tokenizer(inner: Any, folder: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


LLAMA2_PIECES = {  # BPE with bytes, a dummy space in front, no normalization
    "model_type": "bpe",
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
}


def train_sentencepiece(**options: Any) -> bytes:
    """A sentencepiece model of 400 pieces."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*TRAINING_TEXT, "it's 12345 two  spaces"] * 2),
        model_writer=model,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
        **{"vocab_size": 400, **options},
    )
    return model.getvalue()
