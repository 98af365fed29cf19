"""Shape, dtype and split of every tensor of a whole model, plain or quantized. Knows no data."""

from __future__ import annotations

from dataclasses import replace

from trtlab.config.mapping import Mapping
from trtlab.config.model import ModelConfig
from trtlab.config.quant import GROUP_SIZES
from trtlab.errors import ConfigError
from trtlab.model.blocks import LM_HEAD, LinearSite, layer_plan
from trtlab.model.names import EMBEDDING, FINAL_NORM, HEAD, POSITIONS, layer_name
from trtlab.model.quantized_specs import TensorSpec, kv_scale_specs, quantized_specs


def tensor_specs(config: ModelConfig) -> dict[str, TensorSpec]:
    """Every tensor of a whole model by name, embedding first, head last.

    A tied model has no separate head, unless the head is quantized. Raises ConfigError when quantization groups do not
    divide the inputs of a linear, or the algorithm cannot quantize the head.
    """
    _check_head(config)
    _check_groups(config)
    _check_scale_ranks(config)
    table_shape = (config.vocab_size, config.hidden_size)
    specs = {EMBEDDING: TensorSpec(table_shape, "embedding")}
    if not config.uses_rotary:
        specs[POSITIONS] = TensorSpec((config.max_position_embeddings, config.hidden_size))
    for layer in range(config.num_hidden_layers):
        specs |= {layer_name(layer, part): spec for part, spec in layer_specs(config, layer).items()}
    specs[f"{FINAL_NORM}.weight"] = TensorSpec((config.hidden_size,))
    if layer_plan(config).norm == "layer_norm":
        specs[f"{FINAL_NORM}.bias"] = TensorSpec((config.hidden_size,))
    return specs | _head_specs(config)


def _head_specs(config: ModelConfig) -> dict[str, TensorSpec]:
    plain = TensorSpec(linear_shape(config, LM_HEAD), LM_HEAD.split)
    algorithm = config.quantization.algorithm_of(LM_HEAD.part)
    if algorithm is not None:
        return quantized_specs(config, None, LM_HEAD, plain, algorithm)
    return {} if config.tie_word_embeddings else {HEAD: plain}


def layer_specs(config: ModelConfig, layer: int) -> dict[str, TensorSpec]:
    """The tensors of one layer by their names within it; those of a quantized linear replace its plain weight."""
    specs = _plain_specs(config)
    for site in layer_plan(config).linears:
        algorithm = config.quantization.algorithm_of(layer_name(layer, site.part))
        if algorithm is not None:
            specs |= quantized_specs(config, layer, site, specs[f"{site.part}.weight"], algorithm)
    return specs | kv_scale_specs(config)


def plain_linears(config: ModelConfig) -> ModelConfig:
    """The same model with unquantized linears; its KV cache stays as it is."""
    return config.replace(quantization=replace(config.quantization, quant_algo=None, exclude_modules=()))


def quantized_linears(config: ModelConfig) -> list[str]:
    """The full names of the linears that are quantized, without ``.weight``; the head is the last."""
    names = [layer_name(i, part) for i in range(config.num_hidden_layers) for part in layer_plan(config).parts]
    return [name for name in (*names, LM_HEAD.part) if config.quantization.algorithm_of(name) is not None]


def _plain_specs(config: ModelConfig) -> dict[str, TensorSpec]:
    plan = layer_plan(config)
    weights: dict[str, TensorSpec] = {}
    biases: dict[str, TensorSpec] = {}
    for site in plan.linears:
        norm = site.norm_before
        if norm is not None and f"{norm}.weight" not in weights:
            weights[f"{norm}.weight"] = TensorSpec((config.hidden_size,))
            if plan.norm == "layer_norm":
                biases[f"{norm}.bias"] = TensorSpec((config.hidden_size,))
        out, width = linear_shape(config, site)
        weights[f"{site.part}.weight"] = TensorSpec((out, width), site.split, dim=int(site.cuts_input))
        if _has_bias(config, site):  # where the input is cut, every rank holds the whole bias
            biases[f"{site.part}.bias"] = TensorSpec((out,), None if site.cuts_input else site.split)
    if config.qk_layernorm:
        weights["attention.q_layernorm.weight"] = TensorSpec((config.head_size,))
        weights["attention.k_layernorm.weight"] = TensorSpec((config.head_size,))
    return weights | biases


def linear_shape(config: ModelConfig, site: LinearSite) -> tuple[int, int]:
    """The number of outputs and of inputs of a linear."""
    hidden, inner = config.hidden_size, config.intermediate_size
    heads, kv_heads, size = config.num_attention_heads, config.num_key_value_heads, config.head_size
    shapes = {
        "attention.qkv": ((heads + 2 * kv_heads) * size, hidden),
        "attention.dense": (hidden, heads * size),
        "mlp.fc": (inner, hidden),
        "mlp.gate": (inner, hidden),
        "mlp.proj": (hidden, inner),
        LM_HEAD.part: (config.vocab_size, hidden),
    }
    return shapes[site.part]


def _has_bias(config: ModelConfig, site: LinearSite) -> bool:
    if site.block == "mlp":
        return config.mlp_bias
    return config.dense_bias if site.cuts_input else config.attn_bias


def check_quantized(config: ModelConfig, mapping: Mapping) -> None:
    """Raise ConfigError when packed rows or groups cannot be cut over the ranks of ``mapping``."""
    algorithm, tp = config.quantization.algorithm, mapping.tp_size
    if algorithm is None or tp == 1:
        return
    check_runnable(config, mapping)
    if algorithm.packed and config.intermediate_size % (2 * tp):
        raise ConfigError(
            f"intermediate size {config.intermediate_size} over tp_size={tp} leaves an odd number of rows on a rank; "
            "INT4 packs two rows in a byte",
            remedy="use a smaller tp_size",
        )
    _check_groups(config, tp)


def _check_head(config: ModelConfig) -> None:
    """Raise ConfigError for an algorithm that quantizes no head."""
    algorithm = config.quantization.algorithm_of(LM_HEAD.part)
    if algorithm is not None and algorithm.only_mlp:
        raise ConfigError(
            f"{algorithm.name} quantizes linears of the MLPs alone, not the head",
            remedy="leave quantize_lm_head out, or use FP8",
        )


def _check_scale_ranks(config: ModelConfig) -> None:
    """Raise ConfigError when the ranks that have scales do not divide the inputs of a linear that they cut."""
    ranks = config.quantization.scale_ranks
    if not config.quantization.has_plain_form or ranks == 1:
        return
    for site in layer_plan(config).linears:
        width = linear_shape(config, site)[1]
        if site.cuts_input and width % ranks:
            raise ConfigError(
                f"{site.part} has {width} inputs, which scale_ranks={ranks} does not divide",
                remedy="use the tp_size that the model will run on, or 1",
            )


def check_runnable(config: ModelConfig, mapping: Mapping) -> None:
    """Raise ConfigError when the linears have scales for another number of ranks."""
    if config.quantization.has_plain_form and config.quantization.scale_ranks not in (1, mapping.tp_size):
        ranks = config.quantization.scale_ranks
        raise ConfigError(
            f"the weight-only scales are those of {ranks} ranks, and tp_size={mapping.tp_size}",
            remedy=f"use tp_size={ranks}, or quantize the source again with scale_ranks=1",
        )


def _check_groups(config: ModelConfig, tp_size: int = 1) -> None:
    """Raise ConfigError when groups do not divide the inputs of a linear, with a size or a pattern that works."""
    quant = config.quantization
    if quant.algorithm is None or not quant.algorithm.grouped:
        return
    quantized = quantized_linears(config)
    widths = {
        site.part: linear_shape(config, site)[1] // (tp_size if site.cuts_input else 1)
        for site in (*layer_plan(config).linears, LM_HEAD)
        if any(name.endswith(site.part) for name in quantized)
    }
    undivided = [part for part, width in widths.items() if width % quant.group_size]
    if not undivided:
        return
    sizes = [str(size) for size in GROUP_SIZES if not any(width % size for width in widths.values())]
    patterns = (*quant.exclude_modules, *(part if part == LM_HEAD.part else f"*.{part}" for part in undivided))
    if sizes:
        remedy = f"use group_size={' or '.join(sizes)}"
    elif len(undivided) < len(widths):
        remedy = f"use exclude_modules={patterns!r}, or W8A16, which has no groups"
    else:
        remedy = "use W8A16, which has no groups"
    part = undivided[0]
    where = f" on each of {tp_size} ranks" if tp_size > 1 else ""
    raise ConfigError(
        f"{part} has {widths[part]} inputs{where}, which groups of {quant.group_size} do not divide", remedy=remedy
    )
