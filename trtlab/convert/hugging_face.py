"""Reads a Hugging Face folder as transformers does: its ModelConfig, and its lazy tensors by TensorRT-LLM's names."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import torch
from pydantic import AfterValidator

from trtlab.config.model import DTYPES, DtypeName, ModelConfig, dtype_name
from trtlab.convert.check import check_floating, check_layers, check_tensors, listed
from trtlab.convert.families import FAMILIES
from trtlab.convert.hugging_face_config import REMEDY, HuggingFaceConfig, read_config
from trtlab.errors import CheckpointError
from trtlab.model.names import EMBEDDING, HEAD
from trtlab.storage.json_files import OpenObject, naming, read_model
from trtlab.storage.lazy import LazyTensor, cat, open_pickle, open_safetensors
from trtlab.storage.paths import has_file

logger = logging.getLogger("trtlab")

BUFFERS = re.compile(r"rotary_emb\.inv_freq$")  # computed anew; transformers too reads them from no file
FILES = {"model.safetensors": open_safetensors, "pytorch_model.bin": open_pickle}
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".gguf", ".h5", ".msgpack", ".onnx")


def _plain_name(name: str) -> str:
    """The name itself when it is that of a file in the same folder and valid on every file system."""
    if Path(name).name != name or name in ("", "..") or "\0" in name or len(name.encode(errors="replace")) > 255:
        raise ValueError("the name of a file in the same folder")
    return name


class WeightIndex(OpenObject):
    """model.safetensors.index.json or pytorch_model.bin.index.json: the shard of each tensor."""

    weight_map: dict[str, Annotated[str, AfterValidator(_plain_name)]]


def read_hugging_face(
    model_dir: Path, dtype: str = "auto", *, allow_unknown: bool = True
) -> tuple[ModelConfig, dict[str, LazyTensor]]:
    """Config and lazy tensors of a folder; CheckpointError when the folder is incomplete or not supported."""
    stored = read_config(model_dir, allow_unknown=allow_unknown)
    with naming(model_dir / "config.json", remedy=REMEDY):
        config = stored.to_model_config("float32")  # refuses a config before the weights are opened
    tensors = {name: t for name, t in _open_weights(model_dir).items() if not BUFFERS.search(name)}
    config, tensors = _fit(model_dir.name, config, tensors)
    config = config.replace(dtype=_choose_dtype(stored, dtype, tensors))
    sources = FAMILIES[config.architecture].names.sources(config)
    kind = config.torch_dtype
    return config, {name: cat([tensors[part].to(kind) for part in parts]) for name, parts in sources.items()}


def _open_weights(model_dir: Path) -> dict[str, LazyTensor]:
    """The tensors of the file that transformers takes: safetensors before pickles, and a whole file before an index."""
    for file, opener in FILES.items():
        whole, index = model_dir / file, model_dir / f"{file}.index.json"
        if has_file(whole):
            if has_file(index):
                logger.warning("%s: %s is read, as in transformers, and %s is not", model_dir, whole.name, index.name)
            return opener(whole)
        if has_file(index):
            file_of = read_model(index, WeightIndex, remedy="copy the folder again").weight_map
            # As in transformers, the index names the files, and what these hold counts.
            shards = [opener(model_dir / shard) for shard in sorted(set(file_of.values()))]
            return {name: tensor for shard in shards for name, tensor in shard.items()}
    others = sorted(path.name for path in model_dir.iterdir() if path.suffix in WEIGHT_SUFFIXES)
    raise CheckpointError(
        f"{model_dir} holds no weights",
        got=listed(others) or None,
        expected=" or ".join(f"{file} or {file}.index.json with its shards" for file in FILES),
        remedy="for Meta's consolidated.*.pth use Checkpoint.from_meta_ckpt; GGUF is not supported yet",
    )


def _fit(where: str, config: ModelConfig, tensors: dict[str, LazyTensor]) -> tuple[ModelConfig, dict[str, LazyTensor]]:
    """The tensors that a model needs, by the names it needs; like transformers, it ignores those that none needs."""
    check_layers(where, config.num_hidden_layers, len(tensors))
    names = FAMILIES[config.architecture].names
    untied = config.replace(tie_word_embeddings=False)
    (table,), (head,) = (names.sources(untied)[name] for name in (EMBEDDING, HEAD))
    tensors = _with_prefix(tensors, names.shapes(untied), table.split(".")[0])
    if config.tie_word_embeddings:
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
    first = next(iter(tensors.values())).dtype
    return next((name for name, kind in DTYPES.items() if kind == first), "float32")
