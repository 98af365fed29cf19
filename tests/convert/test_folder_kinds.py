"""A folder of the wrong kind is told what it is and which call opens it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from trtlab import BuildConfig, Checkpoint, Engine, QuantConfig, QuantizedCheckpoint, TrtlabError

OPENERS = {
    "Checkpoint.from_hugging_face()": Checkpoint.from_hugging_face,
    "Checkpoint.from_meta_ckpt()": Checkpoint.from_meta_ckpt,
    "Checkpoint.load()": Checkpoint.load,
    "Engine.load()": Engine.load,
}
UPSTREAM_ENGINES = {  # what TensorRT-LLM writes beside its engines
    "upstream 0.13": {
        "version": "0.13.0",
        "pretrained_config": {"architecture": "LlamaForCausalLM", "mapping": {"world_size": 1}},
        "build_config": {"max_batch_size": 8, "plugin_config": {"gpt_attention_plugin": "float16"}},
    },
    "upstream 0.5": {
        "builder_config": {"name": "llama", "precision": "float16", "num_heads": 32, "tensor_parallel": 1},
        "plugin_config": {"gpt_attention_plugin": "float16", "paged_kv_cache": False},
    },
}


@pytest.fixture(scope="module")
def folders(random_model, tmp_path_factory):
    """A good folder for each opener, and folders that none of them opens, with what these are told."""
    place, source = tmp_path_factory.mktemp("kinds"), random_model()
    checkpoint = Checkpoint.from_hugging_face(source)
    checkpoint.save(place / "checkpoint")
    checkpoint.build(BuildConfig(), plan=False).save(place / "engine")
    for name in ("meta", "gguf", "adapter", "cache/snapshots", "cache/refs"):
        (place / name).mkdir(parents=True)
    (place / "meta" / "params.json").write_text('{"dim": 64, "n_layers": 2, "n_heads": 4}')
    torch.save({"norm.weight": torch.ones(64)}, place / "meta" / "consolidated.00.pth")
    (place / "gguf" / "model.Q4_K_M.gguf").write_bytes(b"GGUF")
    (place / "adapter" / "adapter_config.json").write_text("{}")
    (place / "binary").mkdir()
    (place / "binary" / "config.ini").write_text("[llama]\n")
    (place / "binary" / "layers.0.attention.dense.weight.0.bin").write_bytes(b"\0" * 8)
    for name, raw in UPSTREAM_ENGINES.items():
        (place / name).mkdir()
        (place / name / "config.json").write_text(json.dumps(raw))
    (place / "nameless").mkdir()
    (place / "nameless" / "llama_float16_tp2_rank0.engine").write_bytes(b"ftrt")
    good = {
        "Checkpoint.from_hugging_face()": source,
        "Checkpoint.from_meta_ckpt()": place / "meta",
        "Checkpoint.load()": place / "checkpoint",
        "Engine.load()": place / "engine",
    }
    return good, {
        place / "gguf": "open the file with Checkpoint.from_gguf()",
        place / "gguf" / "model.Q4_K_M.gguf": "open the file with Checkpoint.from_gguf()",
        place / "adapter": "give the folder of the model that it adapts",
        place / "cache": "in its snapshots folder",
        place / "binary": "convert the model's Hugging Face folder",
        **{place / name: "the checkpoint that it was built from" for name in (*UPSTREAM_ENGINES, "nameless")},
        source / "model.safetensors": f"give the folder that it lies in, {source}",
    }


@pytest.mark.parametrize("opener", OPENERS)
def test_a_folder_of_another_kind_names_the_call_that_opens_it(opener, folders):
    good, others = folders
    for call, folder in good.items():
        if call != opener:
            with pytest.raises(TrtlabError, match=r"is an? \w+") as caught:
                OPENERS[opener](folder)
            assert caught.value.remedy == f"open the folder with {call}" and str(folder) in caught.value.what
    for path, words in others.items():
        with pytest.raises(TrtlabError) as caught:
            OPENERS[opener](path)
        assert words in caught.value.remedy


def test_a_folder_that_holds_two_formats_opens_as_either(random_model, tmp_path):
    source = shutil.copytree(random_model(), tmp_path / "both")
    (source / "params.json").write_text("{}")
    Checkpoint.from_hugging_face(source)
    with pytest.raises(TrtlabError, match="dim is missing"):
        Checkpoint.from_meta_ckpt(source)


@pytest.mark.parametrize("name", ["meta-llama/Llama-3-8B", "https://huggingface.co/meta-llama/Llama-3-8B"])
@pytest.mark.parametrize("opener", [Checkpoint.from_hugging_face, Checkpoint.from_meta_ckpt])
def test_the_name_of_a_model_on_the_hub_is_told_how_to_download_it(name, opener):
    with pytest.raises(TrtlabError, match="is not a folder") as caught:
        opener(name)
    assert 'huggingface_hub.snapshot_download("meta-llama/Llama-3-8B")' in caught.value.remedy
    with pytest.raises(TrtlabError, match="give an engine folder"):
        Engine.load(name)


@pytest.mark.parametrize("opener", OPENERS)
@pytest.mark.parametrize("path", [None, 3, b"model", "", "~no-such-user/x", "a\0b", "n" * 300, "gone", "half\ud800"])
def test_what_is_no_folder_is_refused_with_what_to_do(path, opener):
    with pytest.raises(TrtlabError) as caught:
        OPENERS[opener](path)
    assert caught.value.remedy and len(str(caught.value)) < 700


def test_objects_are_not_lost_when_the_current_folder_changes(folders, monkeypatch, tmp_path):
    good, _ = folders
    monkeypatch.setenv("HOME", str(tmp_path))
    for call in ("Checkpoint.from_hugging_face()", "Checkpoint.load()"):
        monkeypatch.chdir(good[call].parent)
        checkpoint = OPENERS[call](good[call].name)
        monkeypatch.chdir(tmp_path)
        assert all(torch.isfinite(tensor.read()).all() for tensor in checkpoint.tensors.values())
    monkeypatch.chdir(good["Engine.load()"].parent)
    engine = Engine.load("engine")
    monkeypatch.chdir("/")
    assert engine.weights(0) and engine.weight_files[0].is_absolute()
    assert engine.save("~/engine") == tmp_path / "engine"
    assert checkpoint.save("~/checkpoint") == tmp_path / "checkpoint"
    quantized = checkpoint.quantize(QuantConfig(quant_algo="W8A16"), output_dir="~/quantized")
    assert quantized.folder == tmp_path / "quantized"
    assert isinstance(Checkpoint.load("~/quantized"), QuantizedCheckpoint)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "engine", "quantized"]
    assert not Path("/~").exists()
