"""The estimator against published sizes, saved files, and the storage of real caches."""

from __future__ import annotations

from math import prod
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from trtlab.card import html, text
from trtlab.cards.estimate import estimate_card
from trtlab.config.algorithms import ALGORITHMS
from trtlab.config.build import BuildConfig
from trtlab.config.mapping import Mapping
from trtlab.config.model import ModelConfig
from trtlab.config.quant import QuantConfig
from trtlab.errors import ConfigError, EngineError
from trtlab.memory.estimate import estimate, op_table
from trtlab.model.tensor_specs import layer_specs
from trtlab.ops.paged import PagedCache
from trtlab.ops.table import Span
from trtlab.parallel.shard import EmbeddingLayout
from trtlab.published import BANDWIDTH, GIB, SHAPES

from ..models import normal_checkpoint, small_config

LLAMA_2_7B, LLAMA_2_70B, LLAMA_3_8B = SHAPES["LLaMA-2-7B"], SHAPES["LLaMA-2-70B"], SHAPES["Llama-3-8B"]
TINY = small_config(dtype="float16", num_hidden_layers=4)
BIASED = TINY.replace(attn_bias=True, dense_bias=True, mlp_bias=True, qk_layernorm=True, head_size=16)
TIED = TINY.replace(tie_word_embeddings=True)
SMALL_BUILD = BuildConfig(max_batch_size=3, max_input_len=16, max_seq_len=40, max_num_tokens=64, tokens_per_block=8)


def weights_gib(model: ModelConfig, quant_algo: str | None = None, tp_size: int = 1) -> float:
    return estimate(model, mapping=Mapping(tp_size=tp_size), quant_algo=quant_algo).largest.weight_bytes / GIB


# Sizes that recipes print


@pytest.mark.parametrize(
    ("quant_algo", "tp_size", "gib"), [("W8A16", 1, 6.52), (None, 4, 3.32), ("W8A16", 4, 1.81), (None, 1, 12.55)]
)
def test_llama_2_7b_takes_what_its_engines_take_on_disk(quant_algo: str | None, tp_size: int, gib: float) -> None:
    assert round(weights_gib(LLAMA_2_7B, quant_algo, tp_size), 2) == gib


def test_every_rank_of_tp4_keeps_the_whole_embedding_unless_it_is_cut() -> None:
    whole = estimate(LLAMA_2_7B, mapping=Mapping(tp_size=4))
    cut = estimate(LLAMA_2_7B, mapping=Mapping(tp_size=4), layout=EmbeddingLayout(True))
    assert [r.weights["embedding"] for r in whole.ranks] == [32000 * 4096 * 2] * 4
    assert [r.weights["embedding"] for r in cut.ranks] == [8000 * 4096 * 2] * 4


def test_the_pool_of_the_memory_log_is_reproduced() -> None:
    """TensorRT-LLM's memory.md: 4060 blocks of 64 tokens with an 8-bit engine and an 8-bit cache."""
    figures = estimate(LLAMA_2_7B, BuildConfig(tokens_per_block=64), quant_algo="FP8", kv_cache_quant_algo="FP8")
    assert int(figures.largest.weight_bytes / 2**20) == 6676
    assert 4060 * figures.kv_bytes_per_block / GIB == pytest.approx(63.44, abs=0.005)
    assert figures.kv_tokens(63.44 * GIB + figures.largest.weight_bytes, reserve_bytes=0) == 4060 * 64


@pytest.mark.parametrize(
    ("name", "kib", "kib_8_bit"),
    [("LLaMA-2-7B", 512, 256), ("Llama-3-8B", 128, 64), ("LLaMA-2-70B", 320, 160), ("Llama-3-70B", 320, 160)],
)
def test_kv_bytes_a_token_are_the_published_ones(name: str, kib: int, kib_8_bit: int) -> None:
    assert estimate(SHAPES[name]).largest.kv_bytes_per_token == kib * 1024
    for algo in ("INT8", "FP8"):
        assert estimate(SHAPES[name], kv_cache_quant_algo=algo).largest.kv_bytes_per_token == kib_8_bit * 1024


@pytest.mark.parametrize(
    ("name", "memory_gib", "thousands", "thousands_8_bit"),
    [("Llama-3-8B", 78, 484, 967), ("LLaMA-2-7B", 78, 126, 252), ("Llama-3-8B", 139, 983, 1967)],
)
def test_tokens_beside_the_weights_are_the_published_ones(
    name: str, memory_gib: int, thousands: int, thousands_8_bit: int
) -> None:
    for algo, expected in ((None, thousands), ("INT8", thousands_8_bit)):
        figures = estimate(SHAPES[name], kv_cache_quant_algo=algo)
        assert round(figures.kv_tokens(memory_gib * GIB, reserve_bytes=4 * GIB) / 1000) == expected


@pytest.mark.parametrize(("name", "megabytes"), [("Llama-3.2-1B", 525), ("Llama-3.2-3B", 788)])
def test_one_table_for_lookup_and_head_saves_what_is_published(name: str, megabytes: int) -> None:
    shared, twice = (estimate(SHAPES[name], layout=EmbeddingLayout(use_embedding_sharing=s)) for s in (True, False))
    assert round((twice.largest.weight_bytes - shared.largest.weight_bytes) / 1e6) == megabytes
    assert shared.largest.step_weight_bytes == shared.largest.weight_bytes  # the table is read as the head


def test_sharing_the_table_of_an_untied_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs a tied model"):
        estimate(LLAMA_2_7B, layout=EmbeddingLayout(use_embedding_sharing=True))


@pytest.mark.parametrize(
    ("model", "quant_algo", "ceilings"),
    [
        (LLAMA_2_7B, None, [68, 154, 254, 363]),
        (LLAMA_2_7B, "W8A16", [134, 303, 497, 712]),
        (LLAMA_3_8B, None, [60, 136, 223, 320]),
    ],
    ids=["7B FP16", "7B INT8", "8B BF16"],
)
def test_bandwidth_ceilings_are_the_published_ones(
    model: ModelConfig, quant_algo: str | None, ceilings: list[int]
) -> None:
    figures = estimate(model, quant_algo=quant_algo)
    rates = [figures.tokens_per_second(BANDWIDTH[gpu]) for gpu in ("V100", "A100", "H100", "H200")]
    assert rates == pytest.approx(ceilings, abs=0.6)  # the reference rounds sometimes up, sometimes down


def test_a_step_reads_weights_once_and_each_request_its_context() -> None:
    figures = estimate(LLAMA_3_8B)
    weights, kv = figures.largest.step_weight_bytes, 131072
    assert figures.step_seconds(1e12, batch=16, context=2048) == pytest.approx((weights + 16 * 2048 * kv) / 1e12)
    assert figures.tokens_per_second(1e12, batch=16) == pytest.approx(16 * figures.tokens_per_second(1e12))


def test_stages_follow_one_another_and_ranks_of_a_stage_run_side_by_side() -> None:
    alone, staged, split = (estimate(TINY, SMALL_BUILD, m) for m in (Mapping(), Mapping(pp_size=2), Mapping(tp_size=2)))
    assert staged.step_seconds(1.0) == alone.step_seconds(1.0)
    assert split.step_seconds(1.0) == split.ranks[0].step_weight_bytes


def test_the_usual_formula_for_70b_on_eight_gpus_is_near_and_too_low() -> None:
    build = BuildConfig(max_batch_size=8, max_seq_len=4096)  # 32k tokens
    figures = estimate(LLAMA_2_70B, build, Mapping(tp_size=8), kv_cache_quant_algo="FP8")
    assert sum(r.kv_pool_bytes for r in figures.ranks) == 5 * GIB
    assert round(figures.divided_evenly_bytes / 1e9) == 18
    missing = figures.largest.total_bytes - figures.divided_evenly_bytes
    table = 32000 * 8192 * 2
    norms = figures.largest.weights["norms"]
    activations = figures.largest.activation_bytes - figures.whole.activation_bytes / 8
    assert missing == pytest.approx((table + norms) * 7 / 8 + activations)


@pytest.mark.parametrize(
    ("name", "billions"),
    [("LLaMA-2-7B", 6.74), ("LLaMA-2-13B", 13.02), ("LLaMA-2-70B", 68.98), ("Llama-3-8B", 8.03),
     ("Llama-3-70B", 70.55), ("Llama-3.2-1B", 1.24), ("Llama-3.2-3B", 3.21)],
)  # fmt: skip
def test_shapes_have_the_parameters_of_their_models(name: str, billions: float) -> None:
    assert round(estimate(SHAPES[name]).parameters / 1e9, 2) == billions


# Files and storage


@pytest.mark.parametrize("config", [TINY, BIASED, TIED], ids=["plain", "biased", "tied"])
@pytest.mark.parametrize("dim", [None, 0, 1], ids=["replicated", "rows", "columns"])
@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("pp_size", [1, 2])
def test_weight_bytes_are_those_of_saved_rank_files(
    config: ModelConfig, dim: int | None, tp_size: int, pp_size: int, tmp_path: Path
) -> None:
    mapping = Mapping(tp_size=tp_size, pp_size=pp_size)
    normal_checkpoint(config).save(tmp_path / "ckpt", mapping, dim is not None, dim or 0)
    figures = estimate(config, SMALL_BUILD, mapping, layout=EmbeddingLayout(dim is not None, dim or 0))
    assert [r.weight_bytes for r in figures.ranks] == [
        stored_bytes(tmp_path / "ckpt" / f"rank{r}.safetensors") for r in mapping.ranks
    ]


def test_weight_bytes_of_a_shared_table_are_those_of_the_saved_file(tmp_path: Path) -> None:
    normal_checkpoint(TIED).save(tmp_path / "ckpt", use_embedding_sharing=True)
    assert estimate(TIED, SMALL_BUILD).whole.weight_bytes == stored_bytes(tmp_path / "ckpt" / "rank0.safetensors")


def stored_bytes(file: Path) -> int:
    with safe_open(file, framework="pt") as tensors:
        return sum(tensors.get_tensor(name).nbytes for name in tensors.keys())  # noqa: SIM118


def test_a_checkpoint_can_be_given_for_its_config() -> None:
    assert estimate(normal_checkpoint(TINY), SMALL_BUILD) == estimate(TINY, SMALL_BUILD)


@pytest.mark.parametrize("mapping", [Mapping(), Mapping(tp_size=2), Mapping(tp_size=4, pp_size=2)], ids=str)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_kv_bytes_are_those_of_the_slots_that_a_session_keeps(mapping: Mapping, dtype: str) -> None:
    figures = estimate(TINY.replace(dtype=dtype), SMALL_BUILD, mapping).ranks[-1]
    cache = PagedCache(
        layers=len(mapping.layers(0, TINY.num_hidden_layers)),
        num_blocks=SMALL_BUILD.max_batch_size,
        kv_heads=max(1, TINY.num_key_value_heads // mapping.tp_size),
        tokens_per_block=SMALL_BUILD.seq_len,
        head_size=TINY.head_size,
        dtype=getattr(torch, dtype),
        device=torch.device("cpu"),
    )
    assert figures.kv_pool_bytes == cache.keys.nbytes + cache.values.nbytes


def test_the_build_dtype_decides_weights_cache_and_activations() -> None:
    half, full = (
        estimate(TINY, BuildConfig(max_input_len=16, max_seq_len=40, dtype=d)).largest for d in (None, "float32")
    )
    assert full.weight_bytes == 2 * half.weight_bytes
    assert full.kv_pool_bytes == 2 * half.kv_pool_bytes
    assert full.activation_bytes > half.activation_bytes


# Precisions


@pytest.mark.parametrize("quant_algo", ALGORITHMS)
def test_quantization_leaves_embedding_norms_and_head_alone(quant_algo: str) -> None:
    plain, quantized = (estimate(LLAMA_3_8B, quant_algo=a).largest.weights for a in (None, quant_algo))
    assert {k: quantized[k] for k in ("embedding", "norms", "head")} == {
        k: plain[k] for k in ("embedding", "norms", "head")
    }
    assert quantized["mlp"] < plain["mlp"]


WIDE = TINY.replace(hidden_size=128, intermediate_size=256, head_size=32)  # so that groups of 64 divide every width


@pytest.mark.parametrize(
    ("quant_algo", "nbytes"),
    [
        ("W8A16", 256 * 128 + 256 * 2),
        ("W4A16", 256 * 128 // 2 + 256 * 2),
        ("W4A16_AWQ", 256 * 128 // 2 + 256 * 2 * 4 + 128 * 2),
        ("W4A8_AWQ", 256 * 128 // 2 + 256 * 2 * 4 + 128 * 2 + 8),
        ("W4A16_GPTQ", 256 * 128 // 2 + 2 * 256 * 2 * 2),  # scale and zero point
        ("W8A8_SQ_PER_CHANNEL", 256 * 128 + 256 * 4 + 4 + 128 * 2),
        ("W8A8_SQ_PER_TENSOR_PLUGIN", 256 * 128 + 4 + 4),
        ("W8A8_SQ_PER_CHANNEL_PER_TENSOR_PLUGIN", 256 * 128 + 256 * 4 + 4),
        ("W8A8_SQ_PER_TENSOR_PER_TOKEN_PLUGIN", 256 * 128 + 4),
        ("W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN", 256 * 128 + 256 * 4),
        ("FP8", 256 * 128 + 8),
        ("FP8_PER_CHANNEL_PER_TOKEN", 256 * 128 + 256 * 4),
    ],
)
def test_a_quantized_linear_counts_with_its_scales(quant_algo: str, nbytes: int) -> None:
    quantized = WIDE.replace(quantization=QuantConfig(quant_algo=quant_algo, group_size=64))
    fc = [spec for name, spec in layer_specs(quantized, 1).items() if name.startswith("mlp.fc.")]
    assert sum(prod(spec.shape) * (spec.dtype or torch.float16).itemsize for spec in fc) == nbytes


@pytest.mark.parametrize("quant_algo", [a.name for a in ALGORITHMS.values() if not a.only_sizes])
@pytest.mark.parametrize("tp_size", [1, 2])
def test_quantized_weight_bytes_are_those_of_saved_rank_files(quant_algo: str, tp_size: int, tmp_path: Path) -> None:
    quant = QuantConfig(quant_algo=quant_algo, kv_cache_quant_algo="INT8", group_size=64)
    texts = [[3, 1, 4, 1, 5, 9, 2, 6]]
    mapping = Mapping(tp_size=tp_size)
    normal_checkpoint(WIDE).quantize(quant, calibration=texts).save(tmp_path / "ckpt", mapping)
    figures = estimate(
        WIDE,
        SMALL_BUILD,
        mapping,
        quant_algo=quant_algo,
        kv_cache_quant_algo="INT8",
        group_size=64,
        layout=EmbeddingLayout(),
    )
    files = [tmp_path / "ckpt" / f"rank{rank}.safetensors" for rank in mapping.ranks]
    assert [rank.weight_bytes for rank in figures.ranks] == [stored_bytes(file) for file in files]


@pytest.mark.parametrize("mapping", [Mapping(), Mapping(pp_size=4)], ids=str)
def test_fp8_by_rows_leaves_attention_and_the_end_layers_alone(mapping: Mapping) -> None:
    plain = estimate(TINY, SMALL_BUILD, mapping).ranks
    quantized = estimate(TINY, SMALL_BUILD, mapping, quant_algo="FP8_PER_CHANNEL_PER_TOKEN").ranks
    saved = 3 * 48 * 32 - (48 + 48 + 32) * 4  # a layer's bytes at one a weight less its scales
    inner = [sum(layer in (1, 2) for layer in rank.layers) for rank in plain]
    assert [p.weight_bytes - q.weight_bytes for p, q in zip(plain, quantized, strict=True)] == [
        saved * layers for layers in inner
    ]


def test_biases_keep_the_dtype_of_the_model() -> None:
    def extra(quant_algo: str | None) -> int:
        biased, plain = (estimate(TINY.replace(mlp_bias=b), SMALL_BUILD, quant_algo=quant_algo) for b in (True, False))
        return biased.whole.weight_bytes - plain.whole.weight_bytes

    assert extra("W8A16") == extra(None) == 4 * (48 + 48 + 32) * 2


@pytest.mark.parametrize("setting", [{"quant_algo": "INT7"}, {"kv_cache_quant_algo": "INT4"}], ids=str)
def test_an_unknown_precision_lists_the_known_ones(setting: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"estimate: .*_algo.*'INT.'.*8"):
        estimate(TINY, SMALL_BUILD, **setting)


# Work, bounds and cards


def test_work_is_a_tokens_share_of_a_prompt_and_the_token_after_it() -> None:
    rank = estimate(TINY, SMALL_BUILD).whole
    assert rank.prefill_flops_per_token == op_table(TINY, [Span(0, 16)]).flops / 16
    assert rank.generation_flops_per_token == op_table(TINY, [Span(16, 1)]).flops


def test_a_generated_token_costs_about_two_flops_a_weight_that_it_meets() -> None:
    rank = estimate(LLAMA_2_7B, BuildConfig(max_input_len=1)).whole
    assert rank.generation_flops_per_token == pytest.approx(rank.step_weight_bytes, rel=1e-3)  # 2 bytes a weight


def test_activations_grow_with_max_num_tokens() -> None:
    small, large = (estimate(LLAMA_3_8B, BuildConfig(max_num_tokens=n)).whole.activation_bytes for n in (1024, 2048))
    assert large == 2 * small


def test_a_step_has_no_more_tokens_than_its_prompts() -> None:
    loose, tight = (estimate(TINY, BuildConfig(2, 16, 40, n)).whole.activation_bytes for n in (4096, 32))
    assert loose == tight


def test_what_fits_is_not_refused() -> None:
    figures = estimate(LLAMA_2_7B)
    figures.require_fits(figures.largest.total_bytes)


@pytest.mark.parametrize(
    ("gigabytes", "remedy"),
    [
        (16, "lower max_batch_size to 2"),
        (14, "use max_batch_size=1 with max_seq_len=[0-9]+ or less"),
        (13, "split the weights over more ranks"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_numbers_and_a_way_out(gigabytes: int, remedy: str) -> None:
    with pytest.raises(EngineError, match=f"needs 20.69 GiB: 12.55 GiB of weights, 8.00 GiB of KV.*{remedy}"):
        estimate(LLAMA_2_7B).require_fits(gigabytes * 1e9)


def test_the_batch_that_a_refusal_names_fits() -> None:
    estimate(LLAMA_2_7B, BuildConfig(max_batch_size=2)).require_fits(16e9)
    with pytest.raises(EngineError):
        estimate(LLAMA_2_7B, BuildConfig(max_batch_size=3)).require_fits(16e9)


def test_no_tokens_fit_where_the_weights_do_not() -> None:
    assert estimate(LLAMA_2_7B).kv_tokens(1e9) == 0


@pytest.mark.parametrize("mapping", [Mapping(), Mapping(tp_size=2, pp_size=2)], ids=str)
def test_the_card_names_weights_cache_and_what_fits(mapping: Mapping) -> None:
    card = estimate_card(estimate(LLAMA_3_8B, BuildConfig(), mapping, quant_algo="W8A16", kv_cache_quant_algo="INT8"))
    for shown in (text(card), html(card)):
        assert "LlamaForCausalLM · bfloat16, weights W8A16, KV INT8" in shown
        assert "tokens of KV" in shown
        assert ("divided evenly" in shown) == (len(mapping.ranks) > 1)


@pytest.mark.parametrize("model", ["Llama-3-8B", None, {"hidden_size": 4096}, ModelConfig])
def test_what_has_no_config_is_told_what_has_one(model):
    with pytest.raises(ConfigError, match="expected a ModelConfig, or a checkpoint or engine") as caught:
        estimate(model)
    assert caught.value.remedy.endswith("trtlab.published.SHAPES['Llama-3-8B']")
