"""Any model in any split and any form: save, load, save gives the same files, and the same tokens."""

import dataclasses
import tempfile
from pathlib import Path

import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from trtlab import Checkpoint, ConfigError, Mapping, ModelConfig, QuantConfig
from trtlab.config.algorithms import ALGORITHMS
from trtlab.parallel.shard import EmbeddingLayout

from ..models import normal_checkpoint, random_texts, small_config

TEXTS = random_texts((12, 5), vocab_size=33)
WEIGHT_ALGORITHMS = [name for name, algorithm in ALGORITHMS.items() if not algorithm.only_sizes]
FLAGS = st.fixed_dictionaries(
    {name: st.booleans() for name in ("attn_bias", "dense_bias", "mlp_bias", "qk_layernorm", "tie_word_embeddings")}
)
CONFIGS = st.builds(
    lambda dtype, kv_heads, layers, vocab, flags: small_config(
        dtype=dtype,
        hidden_size=64,
        head_size=32,
        num_key_value_heads=kv_heads,
        num_hidden_layers=layers,
        intermediate_size=256,
        vocab_size=vocab,
        **flags,
    ),
    st.sampled_from(["float32", "bfloat16", "float16"]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([2, 4]),
    st.sampled_from([33, 36]),
    FLAGS,
)
RECIPES = st.builds(
    QuantConfig,
    quant_algo=st.none() | st.sampled_from(WEIGHT_ALGORITHMS),
    kv_cache_quant_algo=st.sampled_from([None, "INT8", "FP8"]),
    kv_cache_scales=st.sampled_from(["merged", "split", "per_head"]),
    group_size=st.just(64),
    scale_ranks=st.sampled_from([1, 1, 2]),
    quantize_lm_head=st.booleans(),
    exclude_modules=st.sampled_from([(), ("*.mlp.proj",), ("*.0.attention.*", "*.gate")]),
).filter(lambda recipe: recipe.algorithm is not None or not recipe.quantize_lm_head)
MAPPINGS = st.builds(Mapping, tp_size=st.sampled_from([1, 2, 4]), pp_size=st.sampled_from([1, 2]))
LAYOUTS = st.builds(
    EmbeddingLayout,
    use_parallel_embedding=st.booleans(),
    embedding_sharding_dim=st.sampled_from([0, 1]),
    use_embedding_sharing=st.booleans(),
)


def model(config: ModelConfig, recipe: QuantConfig) -> Checkpoint:
    checkpoint = normal_checkpoint(config)
    if not recipe.active:
        return checkpoint
    return checkpoint.quantize(recipe, calibration=TEXTS if recipe.reads_texts else None)


def add_buffers(folder: Path, config: ModelConfig) -> None:
    """What TensorRT-LLM stores in each rank beside the weights."""
    size = config.head_size
    frequencies = config.rotary_base ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    for file in folder.glob("rank*.safetensors"):
        save_file({**load_file(file), "rotary_inv_freq": frequencies.float()}, file)


def tokens(checkpoint: Checkpoint, mapping: Mapping) -> list[int]:
    with checkpoint.build(mapping=mapping, plan=False).session(backend="torch", device="cpu") as session:
        return list(session.generate(TEXTS[0]).token_ids)


@settings(max_examples=30)
@given(CONFIGS, RECIPES, MAPPINGS, LAYOUTS, st.sampled_from(["plain", "integers"]), st.booleans())
def test_save_load_save_gives_the_same_files_and_tokens(files_of, config, recipe, mapping, layout, form, with_buffers):
    options = dataclasses.asdict(layout)
    told = {"weight_only": form} if recipe.has_plain_form else {}
    with tempfile.TemporaryDirectory() as scratch:
        try:
            source = model(config, recipe)
            first = source.save(Path(scratch) / "first", mapping, **options, **told)
        except ConfigError:  # a model that cannot be split or shared in this way
            reject()
        expected = files_of(first)
        if with_buffers:
            add_buffers(first, config)
        loaded = Checkpoint.load(first)
        running = Mapping(tp_size=recipe.scale_ranks) if recipe.has_plain_form else Mapping()
        assert files_of(loaded.save(Path(scratch) / "second", mapping, **options)) == expected
        assert tokens(loaded, running) == tokens(source, running)
