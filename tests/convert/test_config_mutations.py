"""The config of every kind of folder, mutated: it opens, or a TrtlabError says at once what is wrong and what to do."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtlab import BuildConfig, Checkpoint, Engine, Mapping, QuantConfig, TrtlabError

from .test_meta import meta_tensors, write_meta

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32, "mscale": 1.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
KINDS = ["Hugging Face", "transformers 4", "Qwen2", "Meta", "TensorRT-LLM", "quantized", "engine"]
HARMFUL: list[Any] = [
    *(None, True, False, "", "x", "x" * 300, "ä\0", [], {}, [[1]], [None], {"x": {"y": [None]}}),
    *(-1, 0, -0.0, 1, 3, 0.5, 3 * 10**6, 10**9, 2**62, 2**63, 2**64, -(2**64), 10**400),
    *(1e-300, 1e-40, 1e-37, 1e300, float("inf"), float("nan")),
    *("linear", "llama3", "yarn", "dynamic", "MistralForCausalLM"),
]


@pytest.fixture(scope="module")
def folders(random_model, tmp_path_factory) -> dict[str, tuple[Path, dict[str, Any], Callable[[Path], object]]]:
    """For each kind a folder's config file, its valid content, and what opens the folder."""
    root = tmp_path_factory.mktemp("kinds")
    llama = random_model("LlamaForCausalLM", rope_parameters=YARN)
    checkpoint = Checkpoint.from_hugging_face(llama)
    checkpoint.save(root / "trtllm", Mapping(tp_size=2))
    recipe = QuantConfig(quant_algo="W8A16", kv_cache_quant_algo="INT8", exclude_modules=("*.mlp.proj",))
    checkpoint.quantize(recipe, calibration=[[1, 2, 3, 4] * 4]).save(root / "quantized")
    checkpoint.build(BuildConfig(max_seq_len=32), plan=False).save(root / "engine")
    write_meta(root / "meta", meta_tensors(llama), rope_theta=5e5, use_scaled_rope=True, rope_scaling_factor=8.0)
    qwen = random_model("Qwen2ForCausalLM", sliding_window=8, use_sliding_window=True, max_window_layers=1)
    sources = {"hf": llama, "old": llama, "qwen": qwen}
    for name, source in sources.items():
        (root / name).mkdir()
        (root / name / "model.safetensors").hardlink_to(source / "model.safetensors")
        (root / name / "config.json").write_bytes((source / "config.json").read_bytes())
    old = json.loads((root / "old" / "config.json").read_text())
    del old["rope_parameters"]
    old |= {"rope_theta": 5e5, "rope_scaling": LLAMA3, "eos_token_id": [1, 2], "sliding_window": None}
    (root / "old" / "config.json").write_text(json.dumps(old))
    files = ["hf/config.json", "old/config.json", "qwen/config.json", "meta/params.json"]
    files += ["trtllm/config.json", "quantized/config.json", "engine/config.json"]
    hugging_face, load = Checkpoint.from_hugging_face, Checkpoint.load
    openers = [hugging_face, hugging_face, hugging_face, Checkpoint.from_meta_ckpt, load, load, Engine.load]
    return {
        kind: (root / file, json.loads((root / file).read_text()), opener)
        for kind, file, opener in zip(KINDS, files, openers, strict=True)
    }


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container of a JSON value with each of its keys."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield value, key
        yield from places(item)


@pytest.mark.parametrize("kind", KINDS)
def test_the_valid_config_opens(kind, folders):
    file, valid, opener = folders[kind]
    file.write_text(json.dumps(valid))
    opener(file.parent)


@pytest.mark.parametrize("kind", KINDS)
@given(st.data())
def test_a_mutated_config_opens_or_is_refused_with_a_remedy_at_once(kind, folders, data):
    file, valid, opener = folders[kind]
    raw = copy.deepcopy(valid)
    for _ in range(data.draw(st.integers(1, 3))):
        container, key = data.draw(st.sampled_from(list(places(raw)) or [(raw, "surprise")]))
        if isinstance(container, dict) and data.draw(st.integers(0, 9)) == 0:
            del container[key]
        else:
            container[key] = copy.deepcopy(data.draw(st.sampled_from(HARMFUL)))
    file.write_text(json.dumps(raw))
    start = time.process_time()
    try:
        opener(file.parent)
    except TrtlabError as error:
        assert error.remedy or error.expected
        assert len(str(error)) < 2000
    assert time.process_time() - start < 5  # some milliseconds; what a size of 10**9 would cost is minutes
