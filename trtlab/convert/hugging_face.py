"""Reads a Hugging Face folder as transformers does: its ModelConfig, and its lazy tensors by TensorRT-LLM's names."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path

import torch

from trtlab.config.model import DTYPES, DtypeName, ModelConfig, dtype_name, name_of_dtype
from trtlab.convert.check import check_floating, check_layers, check_tensors
from trtlab.convert.families import FAMILIES
from trtlab.convert.hugging_face_config import REMEDY, HuggingFaceConfig, read_config
from trtlab.errors import CheckpointError
from trtlab.model.names import EMBEDDING, HEAD
from trtlab.storage.json_files import OpenObject, PlainName, naming, read_model
from trtlab.storage.lazy import LazyTensor, cat, open_pickle, open_safetensors
from trtlab.storage.paths import has_file
from trtlab.validation import listed

logger = logging.getLogger("trtlab")

BUFFERS = re.compile(r"rotary_emb\.inv_freq$")  # computed anew; transformers too reads them from no file
FILES = ("model.safetensors", "pytorch_model.bin")
INDEX = ".index.json"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".gguf", ".h5", ".msgpack", ".onnx")


class WeightIndex(OpenObject):
    """model.safetensors.index.json or pytorch_model.bin.index.json: the shard of each tensor."""

    weight_map: dict[str, PlainName]


def read_hugging_face(
    model_dir: Path, dtype: str = "auto", *, allow_unknown: bool = True
) -> tuple[ModelConfig, dict[str, LazyTensor]]:
    """Config and lazy tensors of a folder; CheckpointError when the folder is incomplete or not supported."""
    stored = read_config(model_dir, allow_unknown=allow_unknown)
    with naming(model_dir / "config.json", remedy=REMEDY):
        config = stored.to_model_config("float32")  # refuses a config before the weights are opened
    found = _open_weights(model_dir, stored.transformers_weights)
    tensors = {name: tensor for name, tensor in found.items() if not BUFFERS.search(name)}
    config, tensors = _fit(model_dir.name, config, tensors)
    config = config.replace(dtype=_choose_dtype(stored, dtype, tensors))
    sources = FAMILIES[config.architecture].names.sources(config)
    kind = config.torch_dtype
    return config, {name: cat([tensors[part].to(kind) for part in parts]) for name, parts in sources.items()}


def _open_weights(model_dir: Path, named: str | None) -> dict[str, LazyTensor]:
    """The tensors of the file that config.json names, or else of the one that transformers takes."""
    file = model_dir / (named or _find_weights(model_dir))
    if not file.name.endswith(INDEX):
        return _open_file(file)
    file_of = read_model(file, WeightIndex, remedy="copy the folder again").weight_map
    # As in transformers, the index names the files, and what these hold counts.
    shards = [_open_file(model_dir / shard) for shard in sorted(set(file_of.values()))]
    return {name: tensor for shard in shards for name, tensor in shard.items()}


def _find_weights(model_dir: Path) -> str:
    """The file that transformers takes: safetensors before pickles, and a whole file before an index."""
    for whole in FILES:
        index = whole + INDEX
        if has_file(model_dir / whole):
            if has_file(model_dir / index):
                logger.warning("%s: %s is read, as in transformers, and %s is not", model_dir, whole, index)
            return whole
        if has_file(model_dir / index):
            return index
    others = sorted(path.name for path in model_dir.iterdir() if path.suffix in WEIGHT_SUFFIXES)
    raise CheckpointError(
        f"{model_dir} holds no weights",
        got=listed(others) or None,
        expected=" or ".join(f"{whole} or {whole}{INDEX} with its shards" for whole in FILES),
        remedy="for Meta's consolidated.*.pth use Checkpoint.from_meta_ckpt, for a .gguf file Checkpoint.from_gguf",
    )


def _open_file(file: Path) -> dict[str, LazyTensor]:
    return open_safetensors(file) if file.suffix == ".safetensors" else open_pickle(file)


def _fit(where: str, config: ModelConfig, tensors: dict[str, LazyTensor]) -> tuple[ModelConfig, dict[str, LazyTensor]]:
    """The tensors that a model needs, by the names it needs; like transformers, it ignores those that none needs."""
    check_layers(where, config.num_hidden_layers, len(tensors))
    names = FAMILIES[config.architecture].names
    untied = config.replace(tie_word_embeddings=False)
    (table,), (head,) = (names.sources(untied)[name] for name in (EMBEDDING, HEAD))
    tensors = _with_prefix(tensors, names.shapes(untied), table.split(".")[0])
    if config.tie_word_embeddings:
        check_floating(where, ((name, tensors[name]) for name in (table, head) if name in tensors))
        config = _tie(config, tensors, table, head)
    expected = names.shapes(config)
    needed = {name: tensor for name, tensor in tensors.items() if name in expected}
    missing = [name for name in expected if name not in needed]
    check_floating(where, (tensors if missing else needed).items())
    if missing == [head]:
        raise CheckpointError(
            f"{where} has no {head}, though its config.json does not say that the head is tied",
            remedy="if it is the lookup table, set tie_word_embeddings to true; else copy all files again",
        )
    check_tensors(where, tensors if missing else needed, expected)
    ignored = [name for name in tensors if name not in expected]
    if ignored:
        logger.warning("%s: no weight needs %s: ignored, as in transformers", where, listed(ignored))
    return config, needed


def _with_prefix(tensors: Mapping[str, LazyTensor], known: Mapping[str, object], prefix: str) -> dict[str, LazyTensor]:
    """The tensors by the whole model's names; a base model (``LlamaModel``) saves its own without their prefix."""
    return {f"{prefix}.{name}" if f"{prefix}.{name}" in known else name: tensor for name, tensor in tensors.items()}


def _tie(config: ModelConfig, tensors: dict[str, LazyTensor], table: str, head: str) -> ModelConfig:
    """Leave one table of a model that its config says is tied; with two that differ, transformers 5 uses both."""
    if head not in tensors:
        return config
    if table not in tensors:
        tensors[table] = tensors.pop(head)
    elif tensors[table].shape == tensors[head].shape and torch.equal(tensors[table].read(), tensors[head].read()):
        del tensors[head]
    else:
        return config.replace(tie_word_embeddings=False)
    return config


def _choose_dtype(stored: HuggingFaceConfig, dtype: str, tensors: Mapping[str, LazyTensor]) -> DtypeName:
    """For ``auto`` the dtype in the config, or that of the first tensor where the config has none."""
    if dtype != "auto":
        return dtype_name(dtype)
    if stored.stored_dtype in DTYPES:
        return dtype_name(stored.stored_dtype)
    return name_of_dtype(next(iter(tensors.values())).dtype)
