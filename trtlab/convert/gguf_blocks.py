"""Keeps the Q4_0 blocks of a GGUF file: they are W4A16_AWQ's integers and scales in groups of 32."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from trtlab.config.model import ModelConfig
from trtlab.config.quant import GroupSize, QuantConfig
from trtlab.errors import CheckpointError
from trtlab.model.scales import pack_int4
from trtlab.model.tensor_specs import tensor_specs
from trtlab.storage.gguf_file import GgufFile, StoredTensor
from trtlab.storage.lazy import LazyTensor, cat
from trtlab.validation import listed

KIND = "Q4_0"
GROUP: GroupSize = 32
SCALES = ".weights_scaling_factor"
HALF = GROUP // 2
SCALE_BYTES = 2  # a float16 before the 16 bytes of a block's integers
Reorder = Callable[[Tensor], Tensor]


def keep_blocks(
    config: ModelConfig,
    file: GgufFile,
    sources: Mapping[str, Sequence[str]],
    floats: Mapping[str, LazyTensor],
    reorder: Callable[[str], Reorder],
) -> tuple[ModelConfig, dict[str, LazyTensor]]:
    """The config and tensors of the same model with its linears in 4 bits, as they are stored.

    Args:
        config: The model's config, not quantized.
        file: The file.
        sources: The file's names of the tensors, by TensorRT-LLM's names.
        floats: The dequantized tensors by TensorRT-LLM's names, of which those outside the linears are used.
        reorder: The order of rows that a tensor of the file needs.

    Raises:
        CheckpointError: A linear is of another type, which is named.
    """
    config = config.replace(quantization=QuantConfig("W4A16_AWQ", group_size=GROUP))
    specs = tensor_specs(config)
    modules = [name.removesuffix(SCALES) for name in specs if name.endswith(SCALES)]
    _require_kind(file, [part for module in modules for part in sources[f"{module}.weight"]])
    tensors = {name: floats[name] for name in specs if name in floats}
    for module in modules:
        parts = [(file.stored[part], reorder(part)) for part in sources[f"{module}.weight"]]
        integers = cat([_lazy(file, part, _integers, order, torch.int8, part.shape[1]) for part, order in parts])
        scales = [_lazy(file, part, _scales, order, torch.float32, part.shape[1] // GROUP) for part, order in parts]
        spec, one = specs[f"{module}.weight"], torch.ones(integers.shape[1], dtype=config.torch_dtype)
        tensors[f"{module}.weight"] = LazyTensor(spec.shape, torch.int8, partial(_packed, integers))
        tensors[f"{module}{SCALES}"] = cat(scales)
        tensors[f"{module}.prequant_scaling_factor"] = LazyTensor(tuple(one.shape), one.dtype, one.clone)
    return config, {name: tensors[name] for name in specs}


def _require_kind(file: GgufFile, names: Sequence[str]) -> None:
    others = sorted(f"{name} is {file.stored[name].kind}" for name in names if file.stored[name].kind != KIND)
    if others:
        raise CheckpointError(
            f"{file.path.name} cannot be kept in 4 bits: {listed(others)}",
            expected=f"every linear in {KIND}, the type whose blocks a TensorRT-LLM checkpoint can hold",
            remedy="leave dequantize=False out",
        )


def _lazy(
    file: GgufFile, tensor: StoredTensor, of: Callable[[Tensor], Tensor], order: Reorder, dtype: torch.dtype, width: int
) -> LazyTensor:
    def read() -> Tensor:
        blocks = torch.from_numpy(file.read_bytes(tensor, 0, tensor.rows)).view(tensor.rows, -1, SCALE_BYTES + HALF)
        return order(of(blocks))

    return LazyTensor((tensor.rows, width), dtype, read)


def _scales(blocks: Tensor) -> Tensor:
    """``[rows, groups]`` from blocks ``[rows, groups, 18]``; a scale may be negative."""
    return blocks[..., :SCALE_BYTES].contiguous().view(torch.float16)[..., 0].float()


def _integers(blocks: Tensor) -> Tensor:
    """-8 to 7, ``[rows, in]``: the low halves of a block's bytes are its first 16 numbers, the high halves the others.

    They are stored from 0 to 15.
    """
    both = blocks[..., SCALE_BYTES:].to(torch.int8)
    return torch.cat([both & 15, (both >> 4) & 15], dim=-1).flatten(1) - 8


def _packed(integers: LazyTensor) -> Tensor:
    return pack_int4(integers.read()).view(torch.int8)
