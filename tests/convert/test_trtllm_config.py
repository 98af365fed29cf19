"""TensorRT-LLM's config.json: every value is checked when it is read, before a file or memory is spent on it."""

from __future__ import annotations

import copy
import time

import pytest

from trtlab import CheckpointError, Mapping, RotaryScaling, TrtlabError
from trtlab.convert.trtllm_config import REMEDY, TrtllmConfig, config_to_json
from trtlab.parallel.shard import EmbeddingLayout
from trtlab.storage.json_files import parse_model

from ..models import small_config

YARN = RotaryScaling("yarn", 4.0, 16, beta_fast=24.0)


def read(raw):
    return parse_model(raw, TrtllmConfig, "config.json", remedy=REMEDY).to_settings()


def stored(**changes):
    """The file of a small model with yarn scaling on two ranks, changed."""
    raw = config_to_json(small_config(rotary_scaling=YARN), Mapping(tp_size=2), EmbeddingLayout(), {"source": "a test"})
    return {**copy.deepcopy(raw), **changes}


def test_what_is_written_is_read_back():
    config, mapping, layout = read(stored())
    assert config == small_config(rotary_scaling=YARN)
    assert (mapping, layout) == (Mapping(tp_size=2), EmbeddingLayout())


def test_a_null_in_a_scaling_is_the_default():
    scaling = {"type": "yarn", "factor": 4.0, "beta_fast": None, "beta_slow": None, "truncate": None, "mscale": None}
    config, _, _ = read(stored(rotary_scaling=scaling))
    assert config.rotary_scaling == RotaryScaling("yarn", 4.0)


SCALING = {"rope_type": "yarn", "factor": 4.0}
REFUSED = {
    "more ranks than heads": ({"mapping": {"tp_size": 3 * 10**6}}, "cannot be split over tp_size|3000000 ranks"),
    "more ranks than any machine": (
        {"mapping": {"tp_size": 3 * 10**6}, "num_attention_heads": 3 * 10**6, "num_key_value_heads": 3 * 10**6},
        "mapping has 3000000 ranks; expected at most 1024",
    ),
    "more stages than any machine": ({"mapping": {"pp_size": 10**9}, "num_hidden_layers": 10**9}, "1000000000 ranks"),
    "ranks beyond 64 bits": ({"mapping": {"tp_size": 2**62, "pp_size": 2**62}}, "ranks"),
    "ranks that do not divide the heads": ({"mapping": {"tp_size": 3}}, r"tp_size=3; use 1, 2 or 4"),
    "stages that do not divide the layers": ({"mapping": {"pp_size": 3}}, "pp_size=3; use 1 or 2"),
    "another number of processes": ({"mapping": {"tp_size": 2, "world_size": 3}}, "world_size 3"),
    "an embedding cut across a third axis": ({"embedding_sharding_dim": 7}, "embedding_sharding_dim"),
    "an epsilon beyond any float": ({"norm_epsilon": 10**400}, "norm_epsilon is 10000.*, expected a finite number"),
    "an epsilon that is 0 in float32": ({"norm_epsilon": 1e-300}, "norm_epsilon is 1e-300"),
    "a base that is 0 in float32": ({"rotary_base": 1e-300}, "rotary_base is 1e-300"),
    "a base that makes angles infinite": ({"rotary_base": 1e-37}, "rotary angle of the last position"),
    "a factor of 0": ({"rotary_scaling": {**SCALING, "factor": 0}}, r"rotary_scaling\.factor is 0"),
    "a scaling without factor": ({"rotary_scaling": {"rope_type": "yarn"}}, r"rotary_scaling\.factor is missing"),
    "a scaling with an unknown key": ({"rotary_scaling": {**SCALING, "twist": 1}}, r"rotary_scaling\.twist=1"),
    "patterns that are a number": ({"quantization": {"exclude_modules": 2}}, r"quantization\.exclude_modules is 2"),
    "a key that nobody knows": ({"shiny": 1}, "shiny=1 is unknown"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_value_that_cannot_be_is_refused_by_name_at_once(name):
    changes, words = REFUSED[name]
    start = time.process_time()
    with pytest.raises(TrtlabError, match=words) as caught:
        read(stored(**changes))
    assert time.process_time() - start < 1  # milliseconds; a list of three million ranks takes many seconds
    assert caught.value.remedy or caught.value.expected


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, r"a Hugging Face folder.*Checkpoint\.from_hugging_face\(\)"),
        ({"pretrained_config": {}, "build_config": {}}, r"an engine folder.*Engine\.load\(\)"),
    ],
)
def test_the_config_of_another_kind_of_folder_is_told_what_opens_it(raw, words):
    with pytest.raises(CheckpointError, match=words):
        read(raw)
