"""A ModelOpt export without its rotary embedding opens with the Hugging Face config of its model."""

from __future__ import annotations

import json
import pickle

import pytest
import torch

from trtlab import Checkpoint, CheckpointError, RotaryScaling

from ..trtllm_folders import LLAMA3, UpstreamFolder

LACKING = {"rotary_base": ..., "rotary_scaling": ..., "producer": {"name": "modelopt", "version": "0.33"}}
EXPORT = UpstreamFolder(base=500000.0, scaling=LLAMA3, buffers=None, changes=LACKING)
SCALING = RotaryScaling("llama3", 8.0, 64, low_freq_factor=1.0, high_freq_factor=4.0)


@pytest.fixture
def export(tmp_path):
    """The folder of an export, and the Hugging Face model that it was made of."""
    folder = tmp_path / "export"
    folder.mkdir()
    model = EXPORT.write(folder)
    model.config.save_pretrained(tmp_path / "hf")
    return folder, model, tmp_path / "hf"


def test_without_it_the_error_says_what_to_give(export):
    with pytest.raises(CheckpointError, match=r"leaves rotary_base out.*hf_config="):
        Checkpoint.load(export[0])


SOURCES = {
    "a folder": lambda model, hf: hf,
    "its config.json": lambda model, hf: str(hf / "config.json"),
    "the object": lambda model, hf: json.loads((hf / "config.json").read_text()),
    "a config of transformers": lambda model, hf: model.config,
}


@pytest.mark.parametrize("name", SOURCES)
def test_the_rotary_embedding_is_taken_from_the_models_config(name, export):
    folder, model, hf = export
    checkpoint = Checkpoint.load(folder, hf_config=SOURCES[name](model, hf))
    assert (checkpoint.config.rotary_base, checkpoint.config.rotary_scaling) == (500000.0, SCALING)
    again = pickle.loads(pickle.dumps(checkpoint))
    assert again.config == checkpoint.config
    assert Checkpoint.load(checkpoint.save(folder.parent / "saved")).config == checkpoint.config


def rewritten(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


REFUSED = {
    "another model": (lambda folder, hf: rewritten(hf / "config.json", hidden_size=128), "another model.*hidden_size"),
    "another base than the file has": (
        lambda folder, hf: rewritten(folder / "config.json", rotary_base=10000.0),
        "different rotary bases; got 10000.0 and 500000",
    ),
    "no config": (lambda folder, hf: (hf / "config.json").unlink(), "config.json is missing"),
    "no model of ours": (
        lambda folder, hf: rewritten(hf / "config.json", architectures=["Foo"], model_type=None),
        "hf_config.*Foo",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_config_that_does_not_fit_is_refused(name, export):
    folder, _, hf = export
    edit, words = REFUSED[name]
    edit(folder, hf)
    with pytest.raises(CheckpointError, match=words) as caught:
        Checkpoint.load(folder, hf_config=hf)
    assert caught.value.remedy or caught.value.expected


@pytest.mark.parametrize("value", [3, "gone", torch.ones(2), "\0", [1]])
def test_what_is_no_config_is_refused(value, export):
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.load(export[0], hf_config=value)
    assert caught.value.remedy
