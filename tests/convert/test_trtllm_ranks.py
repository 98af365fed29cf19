"""The ranks of one conversion agree; files that are missing, left over or of another conversion are named."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from trtlab import Checkpoint, CheckpointError

from ..trtllm_folders import UpstreamFolder

TWO = UpstreamFolder(tp=2)
FOUR = UpstreamFolder({"num_hidden_layers": 4}, tp=2, pp=2)
SHARED_HEADS = UpstreamFolder(tp=4, source={"num_key_value_heads": 2})


def two_conversions(folder, place):
    """The same shape converted from two models."""
    for seed in (0, 1):
        (place / str(seed)).mkdir()
        folder.write(place / str(seed), seed=seed)
    return place / "0", place / "1"


@pytest.mark.parametrize("folder", [TWO, FOUR])
def test_a_rank_of_another_conversion_is_found_by_what_all_ranks_hold(folder, tmp_path):
    first, second = two_conversions(folder, tmp_path)
    assert Checkpoint.load(first).tensors
    shutil.copy(second / "rank1.safetensors", first)
    with pytest.raises(CheckpointError, match=r"the ranks hold different transformer.*two conversions") as caught:
        Checkpoint.load(first)
    assert "empty folder" in caught.value.remedy
    assert Checkpoint.load(first, rank=1).tensors


def edited(file, edit):
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)


@pytest.mark.parametrize(
    ("name", "fits"),
    [
        ("transformer.ln_f.weight", False),
        ("transformer.layers.1.input_layernorm.weight", False),
        ("transformer.vocab_embedding.weight", False),
        ("transformer.layers.0.attention.dense.weight", True),
        ("lm_head.weight", True),
    ],
)
def test_copies_are_compared_and_parts_are_not(name, fits, tmp_path):
    TWO.write(tmp_path)
    edited(tmp_path / "rank1.safetensors", lambda tensors: tensors[name].add_(1))
    if fits:
        assert Checkpoint.load(tmp_path).tensors
        return
    with pytest.raises(CheckpointError, match=f"different {name}"):
        Checkpoint.load(tmp_path)


def test_the_rows_of_a_key_head_that_ranks_share_are_compared(tmp_path):
    SHARED_HEADS.write(tmp_path)
    name = "transformer.layers.0.attention.qkv.weight"
    edited(tmp_path / "rank1.safetensors", lambda tensors: tensors[name][:16].add_(1))  # the queries are its own
    assert Checkpoint.load(tmp_path).tensors
    edited(tmp_path / "rank1.safetensors", lambda tensors: tensors[name][16:].add_(1))
    with pytest.raises(CheckpointError, match=f"different {name}"):
        Checkpoint.load(tmp_path)


FILES = {
    "one of two": (TWO, lambda f: (f / "rank1.safetensors").unlink(), r"rank1.safetensors is missing.*2 ranks"),
    "three of four": (
        FOUR,
        lambda f: [(f / f"rank{r}.safetensors").unlink() for r in (0, 2, 3)],
        r"rank0.safetensors and 2 more is missing.*4 ranks \(tp_size=2, pp_size=2\)",
    ),
    "left over": (
        TWO,
        lambda f: shutil.copy(f / "rank1.safetensors", f / "rank3.safetensors"),
        r"has rank3.safetensors, though config.json has 2 ranks.*two conversions",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_files_of_too_few_or_too_many_ranks_are_named(name, tmp_path):
    folder, edit, words = FILES[name]
    folder.write(tmp_path)
    edit(tmp_path)
    with pytest.raises(CheckpointError, match=words) as caught:
        Checkpoint.load(tmp_path)
    assert caught.value.remedy


def test_a_machine_may_have_the_file_of_its_own_rank_alone(tmp_path):
    TWO.write(tmp_path)
    (tmp_path / "rank0.safetensors").unlink()
    assert Checkpoint.load(tmp_path, rank=1).tensors


@pytest.mark.parametrize("table", ["lookup", "head"])
def test_a_last_rank_may_end_with_the_vocabulary(table, tmp_path):
    """99 rows on two ranks: 50 and 49, where the older converter does not pad."""
    UpstreamFolder(tp=2, parallel_embedding=True).write(tmp_path)
    name = {"lookup": "transformer.vocab_embedding.weight", "head": "lm_head.weight"}[table]
    whole = Checkpoint.load(tmp_path).tensors[name].read().clone()
    edited(tmp_path / "rank1.safetensors", lambda t: t.update({name: t[name][:49].clone()}))
    again = Checkpoint.load(tmp_path)
    assert torch.equal(again.tensors[name].read(), whole)
    assert Checkpoint.load(tmp_path, rank=1).tensors[name].shape == (50, 64)
    edited(tmp_path / "rank1.safetensors", lambda t: t.update({name: t[name][:48].clone()}))
    with pytest.raises(CheckpointError, match=f"{name} is .48, 64."):
        Checkpoint.load(tmp_path)


@pytest.mark.parametrize("parallel", [False, True])
def test_a_tied_model_may_store_its_table_twice_but_not_two_tables(parallel, tmp_path):
    UpstreamFolder({"num_hidden_layers": 4}, tp=2, pp=2, parallel_embedding=parallel).write(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"tie_word_embeddings": True}))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from transformer\.vocab_embedding"):
        Checkpoint.load(tmp_path)
    name = "transformer.vocab_embedding.weight"
    table = torch.cat([load_file(tmp_path / f"rank{rank}.safetensors")[name] for rank in (0, 1)])[: 99 + parallel]
    for rank in (2, 3):
        half = torch.nn.functional.pad(table, (0, 0, 0, 100 - len(table))).chunk(2)[rank - 2].clone()
        edited(tmp_path / f"rank{rank}.safetensors", lambda t, half=half: t.update({"lm_head.weight": half}))
    checkpoint = Checkpoint.load(tmp_path)
    assert "lm_head.weight" not in checkpoint.tensors and checkpoint.config.tie_word_embeddings
