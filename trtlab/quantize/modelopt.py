"""Quantization by NVIDIA's ModelOpt, as in TensorRT-LLM: ModelOpt quantizes and exports, trtlab reads the result."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trtlab.config.model import ModelConfig
from trtlab.config.quant import QuantConfig
from trtlab.errors import MissingDependency, QuantizeError

ModeloptConfig = dict[str, Any]


@dataclass(frozen=True)
class _Route:
    """ModelOpt's name of a configuration, and the changes that a QuantConfig makes in it."""

    name: str
    adapt: Callable[[ModeloptConfig, QuantConfig], None] = lambda config, quant: None


def _with_group_size(config: ModeloptConfig, quant: QuantConfig) -> None:
    for entry in config["quant_cfg"]:
        stages = entry.get("cfg") or []
        for stage in stages if isinstance(stages, list) else [stages]:
            if "block_sizes" in stage:
                stage["block_sizes"][-1] = quant.group_size


def _with_alpha(config: ModeloptConfig, quant: QuantConfig) -> None:
    if quant.smoothquant_val is None:
        raise QuantizeError("ModelOpt does not search alpha", remedy="set smoothquant_val (ModelOpt's default is 1.0)")
    config["algorithm"] = {"method": "smoothquant", "alpha": quant.smoothquant_val}


def _with_head(config: ModeloptConfig) -> None:
    config["quant_cfg"] = [entry for entry in config["quant_cfg"] if entry["quantizer_name"] != "*lm_head*"]


ROUTES = {
    "FP8": _Route("FP8_DEFAULT_CFG"),
    "W8A8_SQ_PER_CHANNEL": _Route("INT8_SMOOTHQUANT_CFG", _with_alpha),
    "W4A16_AWQ": _Route("INT4_AWQ_CFG", _with_group_size),
    "W4A8_AWQ": _Route("W4A8_AWQ_BETA_CFG", _with_group_size),
}


def check_modelopt(quant: QuantConfig) -> None:
    """Check that ModelOpt can take this recipe.

    Raises:
        QuantizeError: The recipe is not one of ModelOpt's.
        MissingDependency: ModelOpt is not installed.
    """
    if quant.quant_algo not in ROUTES or quant.kv_cache_quant_algo is not None or quant.exclude_modules:
        raise QuantizeError(
            "ModelOpt takes one weight algorithm, without KV cache quantization and without excluded modules",
            got=quant,
            expected=" | ".join(ROUTES),
            remedy="use checkpoint.quantize(), which takes every recipe",
        )
    _modelopt()


def export_with_modelopt(
    model_dir: Path, config: ModelConfig, quant: QuantConfig, rows: Sequence[Sequence[int]], folder: Path
) -> None:
    """Quantize a Hugging Face folder with ModelOpt and export it as a TensorRT-LLM checkpoint of one rank.

    The whole model is in memory. config.json lacks the rotary embedding: ``Checkpoint.load(folder, hf_config=...)``.

    Args:
        model_dir: The Hugging Face folder.
        config: The settings of its model.
        quant: The recipe; ``check_modelopt`` accepts it.
        rows: Token ids of the calibration texts.
        folder: Where the checkpoint is written.
    """
    from transformers import AutoModelForCausalLM

    mtq, export = _modelopt()
    route = ROUTES[str(quant.quant_algo)]
    settings = copy.deepcopy(getattr(mtq, route.name))
    route.adapt(settings, quant)
    if quant.quantize_lm_head:
        _with_head(settings)
    model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, trust_remote_code=False)
    model.eval()

    def read(module: Any) -> None:
        for row in rows:
            module(torch.tensor([list(row)]))

    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        model = mtq.quantize(model, settings, read)
        export(model, "llama", config.torch_dtype, export_dir=str(folder), inference_tensor_parallel=1)


def _modelopt() -> tuple[Any, Callable[..., None]]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import modelopt.torch.quantization as mtq
            from modelopt.torch.export import export_tensorrt_llm_checkpoint
    except ImportError as error:
        raise MissingDependency(
            f"quantizing with ModelOpt needs nvidia-modelopt: {error}", remedy="pip install nvidia-modelopt requests"
        ) from error
    return mtq, export_tensorrt_llm_checkpoint
