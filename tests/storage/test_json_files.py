"""Every reader of a JSON file: the result is its typed model, or an error that names the key."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtlab import BuildConfig, CheckpointError, EngineError, Mapping, RotaryScaling, TrtlabError
from trtlab.convert.hugging_face import WeightIndex
from trtlab.convert.hugging_face_config import read_config
from trtlab.convert.meta import Params
from trtlab.convert.trtllm_config import TrtllmConfig, config_to_json
from trtlab.engine_config import read_engine_file
from trtlab.parallel.shard import EmbeddingLayout
from trtlab.quantize.report import CacheReport, LinearReport
from trtlab.quantize.report_file import read_report
from trtlab.runtime.tokenizer import listed_end_ids
from trtlab.storage.json_files import Listed, OpenObject, StoredObject, read_model
from trtlab.tensorrt.build.plan import PlanRecord

from ..models import small_config

HUGGING_FACE = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 32},
    "tie_word_embeddings": False,
    "attention_bias": False,
    "sliding_window": None,
    "layer_types": ["full_attention", "full_attention"],
    "torch_dtype": "float32",
    "eos_token_id": [1, 2],
}
MODEL = small_config(rotary_scaling=RotaryScaling("linear", 2.0))
TRTLLM = config_to_json(MODEL, Mapping(tp_size=2), EmbeddingLayout(), {"source": "a test"})
TRTLLM["quantization"] |= {"exclude_modules": ["*.mlp.proj"], "group_size": 128, "smoothquant_val": 0.5}
PLAN = PlanRecord("tensorrt_rtx", "1.5", (), ("float32",), "0" * 64, 9, 8, {"decode": 7}, False, 0.5)
ENGINE = {
    "version": "0.1.0",
    "pretrained_config": TRTLLM,
    "build_config": asdict(BuildConfig(max_seq_len=48, max_input_len=32)),
    "trtlab": {"source": "a test", "fingerprints": ["0" * 64], "plans": [asdict(PLAN)]},
}
ROW = LinearReport("transformer.layers.0.mlp.fc", 0.1, 0.2, 0.3, math.inf, 1.0, 0.0, None, 2.0, 0.5, 100, 50)
REPORT = {"linears": [asdict(ROW)], "caches": [asdict(CacheReport(0, 0.1, 0.2, None, 7.5))]}


@dataclass(frozen=True)
class Reader:
    """A file's name, its valid content, and the function that reads it from a folder."""

    file: str
    valid: dict[str, Any]
    read: Callable[[Path], object]


READERS = {
    "Hugging Face config": Reader("config.json", HUGGING_FACE, lambda f: read_config(f).to_model_config("float32")),
    "Hugging Face index": Reader(
        "model.safetensors.index.json",
        {"metadata": {"total_size": 5}, "weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}},
        lambda f: read_model(f / "model.safetensors.index.json", WeightIndex, remedy="copy it again"),
    ),
    "Meta params": Reader(
        "params.json",
        {"dim": 64, "n_layers": 2, "n_heads": 4, "vocab_size": -1, "norm_eps": 1e-5, "use_scaled_rope": True},
        lambda f: read_model(f / "params.json", Params, remedy="copy it again"),
    ),
    "TensorRT-LLM config": Reader(
        "config.json",
        TRTLLM,
        lambda f: read_model(f / "config.json", TrtllmConfig, remedy="copy it again").to_settings(),
    ),
    "engine": Reader("config.json", ENGINE, lambda f: read_engine_file(f, plans=True)),
    "report": Reader("report.json", REPORT, lambda f: read_report(f, MODEL)),
    "end ids": Reader("generation_config.json", {"eos_token_id": [1, 2], "max_length": 9}, listed_end_ids),
}

numbers = st.integers(-2, 200) | st.floats() | st.sampled_from([2**63, 2**64, -(2**64), 10**400])
values = st.recursive(
    st.none() | st.booleans() | numbers | st.text(max_size=5) | st.just("x" * 300),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container of a JSON value with each of its keys."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield value, key
        yield from places(item)


def write(folder: Path, reader: Reader, raw: object) -> Path:
    (folder / reader.file).write_text(json.dumps(raw))
    return folder


@pytest.mark.parametrize("name", READERS)
@given(st.data())
def test_one_value_replaced_by_any_other_is_read_or_refused(tmp_path, name, data):
    reader = READERS[name]
    expected = reader.read(write(tmp_path, reader, reader.valid))
    raw = copy.deepcopy(reader.valid)
    container, key = data.draw(st.sampled_from(list(places(raw))))
    container[key] = data.draw(values)
    try:
        assert type(reader.read(write(tmp_path, reader, raw))) is type(expected)
    except TrtlabError as error:
        assert str(error)


RAISED_RAW_ONCE = {
    "a file name of 300 characters": ("Hugging Face index", ("weight_map", "model.norm.weight"), "x" * 300),
    "an epsilon beyond any float": ("Hugging Face config", ("rms_norm_eps",), 10**400),
    "an epsilon of 65 bits": ("Hugging Face config", ("rms_norm_eps",), 2**64),
    "an integer of 5,000 digits": ("Hugging Face config", ("hidden_size",), "DIGITS"),
    "an epsilon of TensorRT-LLM's beyond any float": ("TensorRT-LLM config", ("norm_epsilon",), 10**400),
    "an epsilon of Meta's beyond any float": ("Meta params", ("norm_eps",), 10**400),
    "a rope base beyond any float": ("Hugging Face config", ("rope_theta",), 10**400),
    "a rotary scaling without its factor": ("TensorRT-LLM config", ("rotary_scaling", "factor"), ...),
    "an unknown key of a rotary scaling": ("TensorRT-LLM config", ("rotary_scaling", "kind"), "linear"),
    "patterns that are a number": ("TensorRT-LLM config", ("quantization", "exclude_modules"), 2),
    "a pattern that is a number": ("TensorRT-LLM config", ("quantization", "exclude_modules", 0), 2),
    "a digest that is a number": ("engine", ("trtlab", "plans", 0, "digest"), 1),
    "bytes of a plan that are a str": ("engine", ("trtlab", "plans", 0, "plan_bytes"), "x"),
    "a plan without its digest": ("engine", ("trtlab", "plans", 0, "digest"), ...),
    "bytes of a row that are a str": ("report", ("linears", 0, "bytes_after"), "x"),
    "bytes of a row beyond 64 bits": ("report", ("linears", 0, "bytes_after"), 10**400),
    "a list of lists of end ids": ("end ids", ("eos_token_id",), [[1]]),
}


@pytest.mark.parametrize("case", RAISED_RAW_ONCE)
def test_what_once_raised_another_exception_is_refused_by_file_and_key(tmp_path, case):
    name, path, value = RAISED_RAW_ONCE[case]
    raw = copy.deepcopy(READERS[name].valid)
    container = raw
    for part in path[:-1]:
        container = container[part]
    if value is ...:
        del container[path[-1]]
    else:
        container[path[-1]] = value
    write(tmp_path, READERS[name], raw)
    file = tmp_path / READERS[name].file
    file.write_text(file.read_text().replace('"DIGITS"', "9" * 5000))
    with pytest.raises(TrtlabError) as caught:
        READERS[name].read(tmp_path)
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)[1:]
    assert READERS[name].file in str(caught.value) and place in str(caught.value)
    assert caught.value.remedy and len(str(caught.value)) < 600


# --- the words of an error


class Inner(StoredObject):
    size: int = 1


class Outer(StoredObject):
    neutral = frozenset({"comment"})
    passes_empty = True
    inner: Inner | None = None
    names: Listed[str] = ()
    ratio: float = 1.0


def read(folder: Path, text: str, kind: type[StoredObject] = Outer, **options: Any) -> Any:
    (folder / "x.json").write_text(text)
    return read_model(folder / "x.json", kind, remedy="write it again", **options)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{'a': 1}", "x.json is not JSON"),
        ("[" * 100_000, "x.json is not JSON"),
        ("[1]", "x.json does not hold a JSON object; got list"),
        ('{"inner": 3}', "inner is 3, expected an object with the keys size"),
        ('{"inner": {"size": true}}', r"inner\.size is True, expected an int"),
        ('{"inner": {"size": 1.0}}', r"inner\.size is 1\.0, expected an int"),
        ('{"inner": {"sise": 2}}', r"inner\.sise=2 is unknown, did you mean size\?"),
        ('{"names": ["a", 1]}', r"names\[1\] is 1, expected a str"),
        ('{"names": "ab"}', "names is 'ab', expected a list"),
        ('{"ratio": NaN}', "ratio is nan, expected a finite number"),
        ('{"ratio": "1"}', "ratio is '1', expected a number"),
        (f'{{"ratio": {10**400}}}', r"ratio is 10000000000000000000\.\.\. \(more than 64 bits\)"),
        ('{"ratio": null, "names": null}', "names is None, .*; ratio is None"),
        ('{"scale": 2}', "scale=2 is unknown"),
    ],
)
def test_an_error_names_file_key_value_and_remedy(tmp_path, text, words):
    with pytest.raises(CheckpointError, match=words) as caught:
        read(tmp_path, text)
    assert str(tmp_path / "x.json") in str(caught.value)
    assert caught.value.remedy == "write it again"


def test_eight_problems_are_spelled_out_and_the_rest_is_counted(tmp_path):
    text = json.dumps({"names": list(range(11))})
    with pytest.raises(EngineError, match=r"names\[0\].*names\[7\] is 7, expected a str; and 3 more") as caught:
        read(tmp_path, text, error=EngineError)
    assert "names[8]" not in str(caught.value)


def test_a_missing_file_and_one_that_cannot_be_read_are_told_apart(tmp_path):
    with pytest.raises(CheckpointError, match=r"y\.json is missing; write it again"):
        read_model(tmp_path / "y.json", Outer, remedy="write it again")
    (tmp_path / "x.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match="not JSON"):
        read_model(tmp_path / "x.json", Outer, remedy="write it again")


def test_what_asks_for_nothing_passes(tmp_path):
    large = f'"comment": [{"9" * 5000}]'
    assert read(tmp_path, f'{{{large}, "scale": 0, "bias": false, "extra": {{}}, "ratio": 2}}').ratio == 2.0
    assert read(tmp_path, f'{{"other": {2**64}}}', OpenObject) == OpenObject()


def test_a_key_that_a_model_ignores_may_be_of_any_size(tmp_path):
    (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": 7, "max_length": {10**30}}}')
    assert listed_end_ids(tmp_path) == [7]
