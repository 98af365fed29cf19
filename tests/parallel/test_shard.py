"""Ranks against an independent table of TensorRT-LLM's format, and put together again bit for bit."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from trtlab import Checkpoint, ConfigError, Mapping, ModelConfig
from trtlab.parallel.shard import EmbeddingLayout, shard, unshard
from trtlab.storage.lazy import in_memory

from ..models import normal_weights, small_config

LAYOUTS = {"replicated": {}, "rows": {"use_parallel_embedding": True}}
LAYOUTS["columns"] = {"use_parallel_embedding": True, "embedding_sharding_dim": 1}


def model_config(**changes) -> ModelConfig:
    """Four layers, heads whose size is no power of two, and every optional tensor."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 8, "head_size": 6}
    biases = {"attn_bias": True, "dense_bias": True, "mlp_bias": True, "qk_layernorm": True}
    return small_config(**{**sizes, **biases, "intermediate_size": 172, **changes})


def heads(matrix: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    return matrix.view(-1, config.head_size, *matrix.shape[1:])


def expected_rank(config, tp, pp, rank, layout, whole):
    """One rank's tensors, written down from reference 1.7 without a look at trtlab's own code: torch.chunk and cat."""
    t, p = rank % tp, rank // tp
    layers, padded = config.num_hidden_layers // pp, -(-config.vocab_size // tp) * tp
    nq, nkv = config.num_attention_heads, config.num_key_value_heads
    out = {}

    def pad(table):
        return torch.cat([table, torch.zeros(padded - config.vocab_size, table.shape[1])])

    if p == 0:
        table = whole["transformer.vocab_embedding.weight"]
        if layout.get("use_parallel_embedding") and layout.get("embedding_sharding_dim") == 1:
            table = table.chunk(tp, dim=1)[t]
        elif layout.get("use_parallel_embedding"):
            table = pad(table).chunk(tp)[t]
        out["transformer.vocab_embedding.weight"] = table
    for local in range(layers):
        source, name = f"transformer.layers.{p * layers + local}.", f"transformer.layers.{local}."
        for kind in ("weight", "bias"):
            if source + f"attention.qkv.{kind}" in whole:
                fused = heads(whole[source + f"attention.qkv.{kind}"], config)
                q, k, v = fused[:nq], fused[nq : nq + nkv], fused[nq + nkv :]
                if nkv < tp:  # each key head repeated for the ranks that share it
                    k, v = (x.repeat_interleave(tp // nkv, dim=0) for x in (k, v))
                mine = [x.chunk(tp)[t] for x in (q, k, v)]
                out[name + f"attention.qkv.{kind}"] = torch.cat(mine).flatten(0, 1)
            for part in ("mlp.fc", "mlp.gate"):
                if source + f"{part}.{kind}" in whole:
                    out[name + f"{part}.{kind}"] = whole[source + f"{part}.{kind}"].chunk(tp)[t]
        for part in ("attention.dense", "mlp.proj"):
            out[name + f"{part}.weight"] = whole[source + f"{part}.weight"].chunk(tp, dim=1)[t]
            if source + f"{part}.bias" in whole:
                out[name + f"{part}.bias"] = whole[source + f"{part}.bias"]
        for part in ("input_layernorm", "post_layernorm", "attention.q_layernorm", "attention.k_layernorm"):
            if source + f"{part}.weight" in whole:
                out[name + f"{part}.weight"] = whole[source + f"{part}.weight"]
    if p == pp - 1:
        out["transformer.ln_f.weight"] = whole["transformer.ln_f.weight"]
        if not layout.get("use_embedding_sharing"):
            head = whole.get("lm_head.weight", whole["transformer.vocab_embedding.weight"])
            out["lm_head.weight"] = pad(head).chunk(tp)[t]
    return out


def assert_same(found, expected):
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
@pytest.mark.parametrize("pp", [1, 2])
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_saved_ranks_are_the_reference_table_and_load_whole_again(tp, pp, layout, tied, tmp_path):
    config = model_config(tie_word_embeddings=tied)
    whole = normal_weights(config)
    Checkpoint.from_weights(config, whole).save(tmp_path / "ckpt", mapping=Mapping(tp_size=tp, pp_size=pp), **layout)
    files = sorted(path.name for path in (tmp_path / "ckpt").iterdir())
    assert files == sorted(["config.json", *(f"rank{r}.safetensors" for r in range(tp * pp))])
    for rank in range(tp * pp):
        expected = expected_rank(config, tp, pp, rank, layout, whole)
        assert_same(load_file(tmp_path / "ckpt" / f"rank{rank}.safetensors"), expected)
        own = Checkpoint.load(tmp_path / "ckpt", rank=rank)
        assert_same({name: t.read() for name, t in own.tensors.items()}, expected)
    again = Checkpoint.load(tmp_path / "ckpt")
    assert again.config == config
    assert_same({name: t.read() for name, t in again.tensors.items()}, whole)


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_a_shared_table_is_stored_once_and_loads_whole_again(tp, tmp_path):
    config = model_config(tie_word_embeddings=True)
    whole = normal_weights(config)
    layout = {"use_embedding_sharing": True, "use_parallel_embedding": tp > 1}
    Checkpoint.from_weights(config, whole).save(tmp_path / "c", mapping=Mapping(tp_size=tp), **layout)
    for rank in range(tp):
        expected = expected_rank(config, tp, 1, rank, layout, whole)
        assert "lm_head.weight" not in expected
        assert_same(load_file(tmp_path / "c" / f"rank{rank}.safetensors"), expected)
    assert_same({n: t.read() for n, t in Checkpoint.load(tmp_path / "c").tensors.items()}, whole)


def test_sharing_makes_the_checkpoint_smaller_by_one_table(tmp_path):
    config = model_config(tie_word_embeddings=True)
    checkpoint = Checkpoint.from_weights(config, normal_weights(config))
    sizes = []
    for shared in (False, True):
        checkpoint.save(tmp_path / str(shared), use_embedding_sharing=shared)
        sizes.append(Checkpoint.load(tmp_path / str(shared), rank=0).nbytes)
    assert sizes[0] - sizes[1] == 99 * 64 * 4


@pytest.mark.parametrize(
    ("mapping", "layout", "words"),
    [
        (Mapping(tp_size=2), {"use_embedding_sharing": True}, "use_parallel_embedding=True"),
        (
            Mapping(tp_size=2),
            {"use_embedding_sharing": True, "use_parallel_embedding": True, "embedding_sharding_dim": 1},
            "embedding_sharding_dim=0",
        ),
        (
            Mapping(pp_size=2),
            {"use_embedding_sharing": True},
            "pp_size=2",
        ),
        (
            Mapping(tp_size=2, pp_size=2),
            {"use_embedding_sharing": True, "use_parallel_embedding": True},
            "pp_size=2",
        ),
        (Mapping(), {"use_parallel_embedding": True, "embedding_sharding_dim": 2}, "embedding_sharding_dim"),
    ],
)
def test_a_table_that_cannot_lie_so_is_refused_with_what_would(mapping, layout, words, tmp_path):
    config = model_config(tie_word_embeddings=True)
    checkpoint = Checkpoint.from_weights(config, normal_weights(config))
    with pytest.raises(ConfigError, match=words):
        checkpoint.save(tmp_path / "c", mapping=mapping, **layout)
    assert list(tmp_path.iterdir()) == []


def test_sharing_an_untied_model_is_refused_with_the_largest_difference(tmp_path):
    config = model_config()
    whole = normal_weights(config)
    gap = float((whole["lm_head.weight"] - whole["transformer.vocab_embedding.weight"]).abs().max())
    with pytest.raises(ConfigError, match=re.escape(f"{gap:.6g}")):
        Checkpoint.from_weights(config, whole).save(tmp_path / "c", use_embedding_sharing=True)
    assert list(tmp_path.iterdir()) == []


def test_equal_tables_of_an_untied_model_may_be_shared(tmp_path):
    config = model_config()
    whole = normal_weights(config)
    whole["lm_head.weight"] = whole["transformer.vocab_embedding.weight"].clone()
    Checkpoint.from_weights(config, whole).save(tmp_path / "c", use_embedding_sharing=True)
    again = Checkpoint.load(tmp_path / "c")
    assert again.config.tie_word_embeddings and "lm_head.weight" not in again.tensors


@pytest.mark.parametrize("tp", [3, 16])
def test_heads_that_do_not_divide_name_the_sizes_that_would_work(tp, tmp_path):
    config = model_config()
    checkpoint = Checkpoint.from_weights(config, normal_weights(config))
    with pytest.raises(ConfigError, match=f"tp_size={tp}.*use 1, 2 or 4"):
        checkpoint.save(tmp_path / "c", mapping=Mapping(tp_size=tp))
    with pytest.raises(ConfigError, match=r"pp_size=3.*use 1, 2 or 4"):
        checkpoint.save(tmp_path / "c", mapping=Mapping(pp_size=3))
    assert list(tmp_path.iterdir()) == []


@st.composite
def shapes(draw):
    """A config and a split of it that is legal, of sizes that show every kind of remainder."""
    tp = draw(st.sampled_from([1, 2, 3, 4, 6]))
    pp = draw(st.sampled_from([1, 2, 3]))
    kv_heads = draw(st.sampled_from([n for n in range(1, 13) if n % tp == 0 or tp % n == 0]))
    per_kv = draw(st.sampled_from([n for n in range(1, 7) if kv_heads * n % tp == 0]))
    layout = draw(st.sampled_from([{}, {"use_parallel_embedding": True}, LAYOUTS["columns"]]))
    config = model_config(
        num_key_value_heads=kv_heads,
        num_attention_heads=kv_heads * per_kv,
        head_size=2 * draw(st.integers(1, 3)),
        hidden_size=tp * draw(st.integers(1, 4)),
        intermediate_size=tp * draw(st.integers(1, 4)),
        num_hidden_layers=pp * draw(st.integers(1, 3)),
        vocab_size=draw(st.integers(2, 40)),
        tie_word_embeddings=draw(st.booleans()),
        **{flag: draw(st.booleans()) for flag in ("attn_bias", "dense_bias", "mlp_bias", "qk_layernorm")},
    )
    return config, tp, pp, layout


@given(shapes())
def test_any_legal_split_is_the_reference_table_and_inverts(case):
    config, tp, pp, layout = case
    whole = normal_weights(config)
    lazy, mapping, table = {n: in_memory(t) for n, t in whole.items()}, Mapping(None, tp, pp), EmbeddingLayout(**layout)
    ranks = [shard(config, mapping, rank, lazy, table) for rank in mapping.ranks]
    for rank, parts in enumerate(ranks):
        read = {name: part.read() for name, part in parts.items()}
        assert {name: part.shape for name, part in parts.items()} == {n: tuple(t.shape) for n, t in read.items()}
        assert_same(read, expected_rank(config, tp, pp, rank, layout, whole))
    again = unshard(config, mapping, table, ranks.__getitem__)
    assert_same({name: tensor.read() for name, tensor in again.items()}, whole)


@given(st.integers(1, 24), st.integers(1, 24), st.integers(1, 48), st.integers(1, 24))
def test_a_split_is_accepted_exactly_when_every_piece_comes_out_whole(kv_heads, per_kv, inner, tp):
    config = model_config(num_key_value_heads=kv_heads, num_attention_heads=kv_heads * per_kv, intermediate_size=inner)
    whole_heads = kv_heads * per_kv % tp == 0 and (kv_heads % tp == 0 or tp % kv_heads == 0)
    if whole_heads and inner % tp == 0:
        Mapping(tp_size=tp).check(config)
    else:
        with pytest.raises(ConfigError, match="use 1"):
            Mapping(tp_size=tp).check(config)


def test_a_split_again_of_a_split_checkpoint_is_the_split_of_the_whole(tmp_path):
    config = model_config()
    checkpoint = Checkpoint.from_weights(config, normal_weights(config))
    for (tp, pp), layout in itertools.product([(1, 1), (4, 2), (2, 1)], LAYOUTS):
        folder = tmp_path / f"{tp}-{pp}-{layout}"
        checkpoint.save(folder, Mapping(tp_size=tp, pp_size=pp), **LAYOUTS[layout])
        checkpoint = Checkpoint.load(folder)
    assert_same({n: t.read() for n, t in checkpoint.tensors.items()}, normal_weights(config))
