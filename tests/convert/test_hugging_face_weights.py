"""Weight files are read as transformers reads them: the same file, the same names, the same tensors ignored."""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from trtlab import Checkpoint, CheckpointError
from trtlab.convert.families import FAMILIES

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def write(folder: Path, file: str, tensors, *, legacy: bool = False) -> None:
    """Write a weight file, or for ``*.index.json`` two shards with their index."""
    if file.endswith(".index.json"):
        kind = Path(file.removesuffix(".index.json")).suffix
        shards = {f"part-{number}{kind}": dict(list(tensors.items())[number::2]) for number in range(2)}
        for shard, part in shards.items():
            write(folder, shard, part, legacy=legacy)
        weight_map = {name: shard for shard, part in shards.items() for name in part}
        (folder / file).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    elif file.endswith(".safetensors"):
        save_file(tensors, folder / file, metadata={"format": "pt"})
    else:
        torch.save(tensors, folder / file, _use_new_zipfile_serialization=not legacy)


def replace(folder: Path, file: str, tensors, **how) -> None:
    (folder / "model.safetensors").unlink()
    write(folder, file, tensors, **how)


def require_the_tensors_of_transformers(folder: Path, hugging_face) -> Checkpoint:
    """Compare every tensor with the model that transformers opens, bit for bit."""
    theirs = hugging_face(folder).state_dict()
    checkpoint = Checkpoint.from_hugging_face(folder)
    sources = FAMILIES[checkpoint.config.architecture].names.sources(checkpoint.config)
    assert checkpoint.tensors.keys() == sources.keys()
    for name, parts in sources.items():
        assert torch.equal(checkpoint.tensors[name].read().float(), torch.cat([theirs[part] for part in parts])), name
    assert checkpoint.config.tie_word_embeddings == torch.equal(theirs[EMBEDDING], theirs[HEAD])
    return checkpoint


@pytest.fixture
def plain(random_model, edited):
    folder = edited(random_model())
    return folder, load_file(folder / "model.safetensors")


@pytest.fixture
def tied(random_model, edited):
    folder = edited(random_model(tie_word_embeddings=True))
    return folder, load_file(folder / "model.safetensors")


KINDS = ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"]


@pytest.mark.parametrize(
    "kinds", [*(KINDS[first:] for first in range(4)), KINDS[:1], KINDS[1:2], KINDS[::2], KINDS[1:3]]
)
def test_of_several_weight_files_the_one_of_transformers_is_read(kinds, plain, hugging_face, caplog):
    folder, tensors = plain
    (folder / "model.safetensors").unlink()
    for number, kind in enumerate(kinds):
        write(folder, kind, {name: tensor * (number + 1) for name, tensor in tensors.items()})
    with caplog.at_level(logging.WARNING, "trtlab"):
        require_the_tensors_of_transformers(folder, hugging_face)
    index = f"{kinds[0]}.index.json"
    said = [record.getMessage() for record in caplog.records if record.name == "trtlab"]
    assert [f"{kinds[0]} is read" in line and f"{index} is not" in line for line in said] == [True] * (index in kinds)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "pytorch_model.bin.index.json"])
def test_pickles_of_the_format_before_zip_files_are_read(file, plain, hugging_face):
    folder, tensors = plain
    replace(folder, file, tensors, legacy=True)
    require_the_tensors_of_transformers(folder, hugging_face)


def test_a_tied_model_that_stores_only_its_head_is_read(tied, hugging_face):
    folder, tensors = tied
    tensors[HEAD] = tensors.pop(EMBEDDING)
    replace(folder, "model.safetensors", tensors)
    assert require_the_tensors_of_transformers(folder, hugging_face).config.tie_word_embeddings


@pytest.mark.parametrize("dtype", [torch.float8_e8m0fnu, torch.float8_e4m3fn, torch.int8, torch.bool])
@pytest.mark.parametrize("name", [EMBEDDING, HEAD])
def test_tables_that_cannot_be_compared_are_named(name, dtype, tied):
    folder, tensors = tied
    both = {**tensors, HEAD: tensors[EMBEDDING].clone()}
    write(folder, "model.safetensors", {**both, name: both[name].to(dtype)})
    with pytest.raises(CheckpointError, match=rf"holds quantized weights: {re.escape(name)} is {dtype}"):
        Checkpoint.from_hugging_face(folder)


def test_the_names_of_a_base_model_are_read(tied, hugging_face):
    folder, tensors = tied
    replace(folder, "model.safetensors", {name.removeprefix("model."): tensor for name, tensor in tensors.items()})
    require_the_tensors_of_transformers(folder, hugging_face)


def test_an_index_may_name_tensors_that_no_shard_holds(plain, hugging_face):
    folder, tensors = plain
    replace(folder, "model.safetensors.index.json", tensors)
    stored = json.loads((folder / "model.safetensors.index.json").read_text())
    for name in ("model.layers.0.self_attn.rotary_emb.inv_freq", "model.ghost"):
        stored["weight_map"][name] = "part-0.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(stored))
    require_the_tensors_of_transformers(folder, hugging_face)
    write(folder, "part-1.safetensors", {})
    with pytest.raises(CheckpointError, match=r"missing model\."):
        Checkpoint.from_hugging_face(folder)


def test_of_a_tensor_in_two_shards_the_last_is_read(plain, hugging_face):
    folder, tensors = plain
    replace(folder, "model.safetensors.index.json", tensors)
    name = "model.norm.weight"
    for number, factor in enumerate((2, 3)):
        shard = folder / f"part-{number}.safetensors"
        write(folder, shard.name, {**load_file(shard), name: tensors[name] * factor})
    require_the_tensors_of_transformers(folder, hugging_face)


def test_tensors_that_no_weight_needs_are_ignored_and_named(plain, hugging_face, caplog):
    folder, tensors = plain
    surplus = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "model.layers.0.self_attn.q_proj.bias": torch.ones(64),
        "model.layers.9.mlp.up_proj.weight": torch.ones(96, 64),
        "causal_mask": torch.ones(3, 3, dtype=torch.bool),
        "counts": torch.ones(2, dtype=torch.int16),
    }
    replace(folder, "model.safetensors", {**tensors, **surplus})
    with caplog.at_level(logging.WARNING, "trtlab"):
        require_the_tensors_of_transformers(folder, hugging_face)
    (line,) = [record.getMessage() for record in caplog.records if record.name == "trtlab"]
    assert all((name in line) == ("inv_freq" not in name) for name in surplus)


def test_a_config_of_fewer_layers_than_stored_is_read(random_model, edited, hugging_face):
    folder = edited(random_model(), num_hidden_layers=1)
    assert len(require_the_tensors_of_transformers(folder, hugging_face).tensors) == 3 + 7


@pytest.mark.parametrize("file", ["other.safetensors", "other.safetensors.index.json"])
def test_a_weight_file_that_config_json_names_is_read(file, plain, hugging_face):
    folder, tensors = plain
    write(folder, file, {name: tensor * 2 for name, tensor in tensors.items()})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": file}))
    checkpoint = require_the_tensors_of_transformers(folder, hugging_face)
    assert torch.equal(checkpoint.tensors["lm_head.weight"].read(), tensors[HEAD] * 2)


@pytest.mark.parametrize("file", ["../other.safetensors", "other.bin", 3])
def test_a_weight_file_of_another_folder_or_format_is_refused(file, plain):
    folder, tensors = plain
    write(folder, "../other.safetensors", tensors)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": file}))
    with pytest.raises(CheckpointError, match="transformers_weights is"):
        Checkpoint.from_hugging_face(folder)


# --- what is refused, and what it is told


def test_a_missing_head_is_told_of_tying(plain, edited):
    folder, tensors = plain
    del tensors[HEAD]
    replace(folder, "model.safetensors", tensors)
    with pytest.raises(CheckpointError, match=r"no lm_head.weight.*set tie_word_embeddings to true"):
        Checkpoint.from_hugging_face(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    assert Checkpoint.from_hugging_face(folder).config.tie_word_embeddings, "the remedy works"


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "base_model.model.", "state_dict.module."])
def test_a_prefix_before_all_names_is_shown(prefix, plain):
    folder, tensors = plain
    replace(folder, "model.safetensors", {prefix + name: tensor for name, tensor in tensors.items()})
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.from_hugging_face(folder)
    assert f"begin with '{prefix}'" in caught.value.remedy
    assert "missing model." in caught.value.what and f"surplus {prefix}" in caught.value.what


def test_other_names_are_shown_beside_those_that_are_missing(plain):
    folder, tensors = plain
    replace(folder, "model.safetensors", {f"gpt_neox.{name[::-1]}": tensor for name, tensor in tensors.items()})
    with pytest.raises(CheckpointError, match=r"missing model\..* and \d+ more; surplus gpt_neox\..* and \d+ more"):
        Checkpoint.from_hugging_face(folder)


def test_a_training_checkpoint_is_told_what_its_file_holds(plain):
    folder, tensors = plain
    replace(folder, "pytorch_model.bin", {"state_dict": tensors, "epoch": 3})
    with pytest.raises(CheckpointError, match=r"it has state_dict, epoch; .*store the model's own state_dict"):
        Checkpoint.from_hugging_face(folder)


ODD = {
    "sparse": (lambda: torch.eye(64).to_sparse(), "norm.weight in .* is sparse"),
    "sparse in rows": (lambda: torch.eye(64).to_sparse_csr(), "norm.weight in .* is sparse"),
    "meta": (lambda: torch.ones(64, device="meta"), "norm.weight in .* is on the meta device"),
    "qint8": (lambda: torch.quantize_per_tensor(torch.ones(64), 0.1, 0, torch.qint8), "norm.weight in .* is quantized"),
    "without dimensions": (lambda: torch.tensor(1.0), r"norm.weight is \[\], expected \[64\]"),
}


@pytest.mark.filterwarnings(
    "ignore:Sparse CSR tensor support", "ignore:.*quantize", "ignore:TypedStorage", "ignore:.*nested"
)
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("kind", ODD)
def test_a_tensor_without_plain_values_is_named(kind, legacy, plain):
    folder, tensors = plain
    make, words = ODD[kind]
    replace(folder, "pytorch_model.bin", {**tensors, "model.norm.weight": make()}, legacy=legacy)
    with pytest.raises(CheckpointError, match=words) as caught:
        Checkpoint.from_hugging_face(folder)
    assert caught.value.remedy


@pytest.mark.filterwarnings("ignore:.*nested")
def test_a_nested_tensor_is_named(plain):
    """In the zip format alone: torch stores none whole in the old one."""
    folder, tensors = plain
    nested = torch.nested.nested_tensor([torch.ones(60), torch.ones(4)])
    replace(folder, "pytorch_model.bin", {**tensors, "model.norm.weight": nested})
    with pytest.raises(CheckpointError, match=r"norm.weight in .* is sparse or nested; store it as a plain tensor"):
        Checkpoint.from_hugging_face(folder)


UNUSUAL = {
    "a parameter": lambda ones: torch.nn.Parameter(ones),
    "with a gradient": lambda ones: ones.requires_grad_(),
    "one number at every place": lambda ones: ones[:1].expand(ones.shape),
    "every second place": lambda ones: torch.ones(128)[::2],
}


@pytest.mark.parametrize("kind", UNUSUAL)
def test_a_tensor_is_read_by_its_values_however_it_is_stored(kind, plain, tmp_path):
    folder, tensors = plain
    replace(folder, "pytorch_model.bin", {**tensors, "model.norm.weight": UNUSUAL[kind](torch.ones(64))})
    checkpoint = Checkpoint.from_hugging_face(folder)
    with checkpoint.build(plan=False) as engine, engine.session(backend="torch", device="cpu") as session:
        assert len(session.generate([1, 2, 3]).token_ids) > 0
    saved = Checkpoint.load(checkpoint.save(tmp_path / "saved"))
    assert saved.tensors["transformer.ln_f.weight"].read().tolist() == [1.0] * 64


@pytest.mark.parametrize("size", [0, 3, 20, 200, 2000, -1])
def test_a_truncated_pickle_of_the_old_format_is_said_to_be_truncated(size, plain):
    folder, tensors = plain
    replace(folder, "pytorch_model.bin", tensors, legacy=True)
    content = (folder / "pytorch_model.bin").read_bytes()
    (folder / "pytorch_model.bin").write_bytes(content[:size])
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin cannot be read: .*truncated or damaged") as caught:
        Checkpoint.from_hugging_face(folder)
    assert not any(word in str(caught.value) for word in ("weights_only", "mmap", "run code"))


def test_weights_of_other_names_are_listed(plain):
    folder, _ = plain
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")
    with pytest.raises(CheckpointError, match=r"no weights; got model.fp16.safetensors; expected model.safetensors or"):
        Checkpoint.from_hugging_face(folder)


@pytest.mark.parametrize("name", ["n" * 300, "a\0b", "../model.safetensors", "a/b", "", "."])
def test_an_index_names_files_of_its_own_folder_alone(name, plain):
    folder, tensors = plain
    replace(folder, "model.safetensors.index.json", tensors)
    shutil.copy(folder / "part-0.safetensors", folder.parent / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(CheckpointError, match=r"weight_map.x is .*expected the name of a file in the same folder"):
        Checkpoint.from_hugging_face(folder)
