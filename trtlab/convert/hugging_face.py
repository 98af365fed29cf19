"""Reads a Hugging Face folder: its ModelConfig, and its lazy tensors under TensorRT-LLM's names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import torch
from pydantic import AfterValidator

from trtlab.config.model import DTYPES, DtypeName, ModelConfig, dtype_name
from trtlab.convert.check import check_floating, check_layers, check_tensors
from trtlab.convert.families import FAMILIES
from trtlab.convert.hugging_face_config import HuggingFaceConfig, read_config
from trtlab.errors import CheckpointError
from trtlab.storage.json_files import OpenObject, read_model
from trtlab.storage.lazy import LazyTensor, cat, open_pickle, open_safetensors

BUFFERS = re.compile(r"\.rotary_emb\.inv_freq$")  # rotary frequencies in old folders; Hugging Face ignores them


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
    if not model_dir.is_dir():
        raise CheckpointError(f"{model_dir} is not a folder", remedy="give a folder with config.json and safetensors")
    stored = read_config(model_dir, allow_unknown=allow_unknown)
    config = stored.to_model_config("float32")  # refuses a config before the weights are opened
    tensors = {name: t for name, t in _find_tensors(model_dir).items() if not BUFFERS.search(name)}
    check_floating(model_dir.name, tensors.items())
    config = config.replace(dtype=_choose_dtype(stored, dtype, tensors))
    if config.tie_word_embeddings and "lm_head.weight" in tensors:
        if _head_differs(tensors):
            config = config.replace(tie_word_embeddings=False)
        else:
            del tensors["lm_head.weight"]
    return config, _rename(model_dir.name, config, tensors)


def _head_differs(tensors: Mapping[str, LazyTensor]) -> bool:
    """Whether a folder whose config says tied holds two different tables; transformers 5 then uses both, as we do."""
    table, head = tensors.get("model.embed_tokens.weight"), tensors["lm_head.weight"]
    return table is not None and (table.shape != head.shape or not torch.equal(table.read(), head.read()))


def _choose_dtype(stored: HuggingFaceConfig, dtype: str, tensors: Mapping[str, LazyTensor]) -> DtypeName:
    """For ``auto`` the dtype in the config, or that of the first tensor where the config has none."""
    if dtype != "auto":
        return dtype_name(dtype)
    named = stored.stored_dtype
    if named in DTYPES:
        return dtype_name(named)
    first = next(iter(tensors.values())).dtype if tensors else torch.float32
    return next((name for name, kind in DTYPES.items() if kind == first), "float32")


def _rename(where: str, config: ModelConfig, tensors: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    check_layers(where, config.num_hidden_layers, len(tensors))
    table = FAMILIES[config.architecture].names
    check_tensors(where, tensors, table.shapes(config))
    kind = config.torch_dtype
    return {name: cat([tensors[part].to(kind) for part in parts]) for name, parts in table.sources(config).items()}


def _find_tensors(model_dir: Path) -> dict[str, LazyTensor]:
    for stem, opener in (("model.safetensors", open_safetensors), ("pytorch_model.bin", open_pickle)):
        index = model_dir / f"{stem}.index.json"
        if index.is_file():
            file_of = read_model(index, WeightIndex, remedy="copy the folder again").weight_map
            shards = {file: opener(model_dir / file) for file in sorted(set(file_of.values()))}
            missing = [name for name, file in file_of.items() if name not in shards[file]]
            if missing:
                raise CheckpointError(
                    f"{index.name} lists tensors that its shards lack: {', '.join(missing[:5])}",
                    remedy="copy the folder again",
                )
            return {name: shards[file][name] for name, file in file_of.items()}
        if (model_dir / stem).is_file():
            return opener(model_dir / stem)
    raise CheckpointError(
        f"{model_dir} holds no weights",
        expected="model.safetensors, or model.safetensors.index.json with its shards",
        remedy="for Meta's consolidated.*.pth use Checkpoint.from_meta_ckpt",
    )
