"""Meta's format: a folder converts to the same ranks as the Hugging Face folder of the same model."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from trtlab import Checkpoint, CheckpointError, ConfigError, Mapping, TrtlabError
from trtlab.convert.meta import to_half_split

PARAMS = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 99, "norm_eps": 1e-6}
NAMES = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}


def to_pairs(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Hugging Face's rows in Meta's order: the two halves of a head become neighbours."""
    first, second = weight.view(heads, 2, -1, weight.shape[1]).unbind(1)
    return torch.stack([first, second], dim=2).reshape(weight.shape)


def meta_tensors(folder: Path) -> dict[str, torch.Tensor]:
    config = json.loads((folder / "config.json").read_text())
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if ".q_proj" in name or ".k_proj" in name:
            heads = config["num_attention_heads" if ".q_proj" in name else "num_key_value_heads"]
            tensor = to_pairs(tensor, heads)
        name = name.removeprefix("model.").replace("embed_tokens", "tok_embeddings").replace("lm_head", "output")
        for theirs, meta in NAMES.items():
            name = name.replace(theirs, meta)
        tensors[name] = tensor
    return tensors


def write_meta(folder: Path, tensors, *, shards=1, embedding_dim=0, **params) -> Path:
    """consolidated.*.pth of Meta's model-parallel ranks."""
    folder.mkdir(exist_ok=True)
    for shard in range(shards):
        mine = {}
        for name, tensor in tensors.items():
            column = name.endswith((".wo.weight", ".w2.weight"))
            dim = embedding_dim if name == "tok_embeddings.weight" else 1 if column else 0
            mine[name] = tensor if tensor.dim() == 1 else tensor.chunk(shards, dim)[shard].clone()
        mine["rope.freqs"] = torch.arange(8.0)
        torch.save(mine, folder / f"consolidated.{shard:02d}.pth")
    (folder / "params.json").write_text(json.dumps({**PARAMS, **params}))
    return folder


@pytest.fixture
def source(random_model):
    # Vocabularies that model-parallel ranks cut by rows must divide; 99 rows would not.
    return random_model("LlamaForCausalLM", vocab_size=100, max_position_embeddings=4096)


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize(
    ("shards", "embedding_dim"), [(1, 0), (2, 0), (2, 1), (4, 1)], ids=["whole", "rows", "columns", "four columns"]
)
def test_both_forms_of_a_model_convert_to_identical_files(shards, embedding_dim, tp, source, files_of, tmp_path):
    meta = write_meta(
        tmp_path / "meta", meta_tensors(source), shards=shards, embedding_dim=embedding_dim, vocab_size=100
    )
    mapping = Mapping(tp_size=tp)
    Checkpoint.from_hugging_face(source).save(tmp_path / "a", mapping)
    Checkpoint.from_meta_ckpt(meta).save(tmp_path / "b", mapping)
    first, second = files_of(tmp_path / "a"), files_of(tmp_path / "b")
    configs = [json.loads(files.pop("config.json")) for files in (first, second)]
    for config in configs:
        config.pop("trtlab")  # names the source
    assert configs[0] == configs[1]
    assert first == second


@pytest.mark.parametrize("shards", [1, 2])
def test_a_llama_1_of_the_format_before_zip_files_converts_to_identical_files(shards, source, files_of, tmp_path):
    meta = write_meta(tmp_path / "meta", meta_tensors(source), shards=shards)
    for file in sorted(meta.glob("*.pth")):
        tensors = torch.load(file, weights_only=True)
        del tensors["rope.freqs"]
        for layer in range(2):
            tensors[f"layers.{layer}.attention.inner_attention.rope.freqs"] = torch.arange(8.0)
        torch.save(tensors, file, _use_new_zipfile_serialization=False)
    Checkpoint.from_meta_ckpt(meta).save(tmp_path / "a")
    Checkpoint.from_hugging_face(source).save(tmp_path / "b")
    assert files_of(tmp_path / "a")["rank0.safetensors"] == files_of(tmp_path / "b")["rank0.safetensors"]


def test_a_model_without_a_head_of_its_own_is_tied(random_model, tmp_path):
    folder = random_model("LlamaForCausalLM", tie_word_embeddings=True)
    meta = write_meta(tmp_path / "meta", meta_tensors(folder))
    checkpoint = Checkpoint.from_meta_ckpt(meta)
    assert checkpoint.config.tie_word_embeddings
    assert not (meta / "output.weight").exists() and "lm_head.weight" not in checkpoint.tensors


def test_scaled_rope_is_the_llama3_scaling(random_model, tmp_path):
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    folder = random_model("LlamaForCausalLM", rope_parameters=rope, max_position_embeddings=131072)
    meta = write_meta(tmp_path / "meta", meta_tensors(folder), rope_theta=500000.0, use_scaled_rope=True)
    ours, theirs = Checkpoint.from_meta_ckpt(meta), Checkpoint.from_hugging_face(folder)
    assert ours.config == theirs.config and set(ours.tensors) == set(theirs.tensors)
    assert all(torch.equal(ours.tensors[name].read(), tensor.read()) for name, tensor in theirs.tensors.items())


@pytest.mark.parametrize(
    ("params", "context", "factor"),
    [
        ({}, 4096, None),
        ({"rope_theta": 500000.0}, 8192, None),
        ({"rope_theta": 500000.0, "use_scaled_rope": True}, 131072, 8.0),
        ({"rope_theta": 500000.0, "use_scaled_rope": True, "rope_scaling_factor": 32}, 131072, 32.0),
        ({"rope_theta": 1000000, "ffn_dim_multiplier": 1.0}, 16384, None),
        ({"max_seq_len": 77}, 77, None),
    ],
    ids=["Llama 2", "Llama 3", "Llama 3.1", "Llama 4's spelling", "Code Llama", "named"],
)
def test_the_context_that_params_json_does_not_tell(params, context, factor, random_model, tmp_path):
    meta = write_meta(tmp_path / "meta", meta_tensors(random_model("LlamaForCausalLM")), **params)
    config = Checkpoint.from_meta_ckpt(meta).config
    assert config.max_position_embeddings == context
    assert (config.rotary_scaling.factor if config.rotary_scaling else None) == factor


def test_the_caller_may_name_the_context(random_model, tmp_path):
    meta = write_meta(tmp_path / "meta", meta_tensors(random_model("LlamaForCausalLM")), rope_theta=1000000)
    assert Checkpoint.from_meta_ckpt(meta, max_position_embeddings=100).config.max_position_embeddings == 100
    with pytest.raises(ConfigError, match="max_position_embeddings"):
        Checkpoint.from_meta_ckpt(meta, max_position_embeddings=0)


def test_an_unknown_key_is_one_warning_that_names_it_or_an_error(random_model, tmp_path, caplog):
    meta = write_meta(tmp_path / "meta", meta_tensors(random_model("LlamaForCausalLM")), _tool=1, shiny=2, unused=0)
    with caplog.at_level(logging.WARNING, logger="trtlab"):
        Checkpoint.from_meta_ckpt(meta)
    (record,) = caplog.records
    assert "params.json" in record.message and record.message.count("shiny=2") == 1 and "unused" not in record.message
    with pytest.raises(CheckpointError, match=r"unknown keys: .*shiny=2"):
        Checkpoint.from_meta_ckpt(meta, allow_unknown_config=False)


@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 4))
def test_the_turn_of_rows_is_the_inverse_of_metas_order(heads, pairs, columns):
    weight = torch.randn(heads * pairs * 2, columns, generator=torch.Generator().manual_seed(0))
    assert torch.equal(to_half_split(to_pairs(weight, heads), 2 * pairs), weight)


@pytest.fixture
def meta(random_model, tmp_path):
    return write_meta(tmp_path / "meta", meta_tensors(random_model("LlamaForCausalLM", vocab_size=100)), shards=2)


def rewrite(file: Path, change) -> None:
    tensors = torch.load(file, weights_only=True)
    change(tensors)
    torch.save(tensors, file)


def test_a_reading_of_a_folder_that_was_written_anew_sees_the_new_tensors(random_model, tmp_path):
    tensors = meta_tensors(random_model("LlamaForCausalLM"))
    meta = write_meta(tmp_path / "meta", tensors)
    Checkpoint.from_meta_ckpt(meta)
    write_meta(meta, {name: tensor + 1 for name, tensor in tensors.items()})
    again = Checkpoint.from_meta_ckpt(meta)
    assert torch.equal(again.tensors["transformer.ln_f.weight"].read(), tensors["norm.weight"] + 1)


class Exploit:
    """The content of a hostile pickle: a call that loading would make."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(legacy, meta, tmp_path):
    payload = {"tok_embeddings.weight": torch.ones(1), "x": Exploit(tmp_path / "owned")}
    torch.save(payload, meta / "consolidated.00.pth", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.from_meta_ckpt(meta)
    assert caught.value.remedy and not (tmp_path / "owned").exists()
    if not legacy:
        assert "would run code" in str(caught.value)


FAULTS = {
    "no folder": (lambda m: m.rename(m.with_name("gone")), "not a folder"),
    "no params": (lambda m: (m / "params.json").unlink(), "params.json is missing"),
    "no weights": (lambda m: [f.unlink() for f in m.glob("*.pth")], "no consolidated"),
    "params is a list": (lambda m: (m / "params.json").write_text("[1]"), "not hold a JSON object"),
    "params cut short": (lambda m: (m / "params.json").write_text('{"dim": 6'), "not JSON"),
    "no dim": (lambda m: (m / "params.json").write_text('{"n_layers": 2, "n_heads": 4}'), "dim is missing"),
    "heads do not fit": (lambda m: set_param(m, n_heads=8), "does not fit"),
    "heads do not divide": (lambda m: set_param(m, n_heads=7), "params.json: dim 64 is not a multiple of n_heads 7"),
    "a base that is 0 in float32": (lambda m: set_param(m, rope_theta=1e-300), "rope_theta is 1e-300"),
    "a base that makes angles infinite": (lambda m: set_param(m, rope_theta=1e-37), "params.json: the rotary angle"),
    "adapters": (lambda m: set_param(m, lora_args={"rank": 16}), "lora_args={'rank': 16}"),
    "no heads": (lambda m: set_param(m, n_heads=0), "n_heads|num_attention_heads"),
    "words for numbers": (lambda m: set_param(m, dim="wide"), "dim"),
    "an experts model": (lambda m: set_param(m, moe={"experts": 8}), "moe"),
    "a vision model": (lambda m: set_param(m, vision_chunk_size=448), "vision_chunk_size"),
    "a shard is missing": (lambda m: (m / "consolidated.01.pth").unlink(), "does not fit"),
    "a shard is cut short": (lambda m: cut(m / "consolidated.01.pth"), "consolidated.01.pth"),
    "a shard is empty": (lambda m: (m / "consolidated.01.pth").write_bytes(b""), "consolidated.01.pth"),
    "a shard holds one tensor": (lambda m: torch.save(torch.ones(3), m / "consolidated.01.pth"), "consolidated.01"),
    "a shard holds numbered tensors": (
        lambda m: torch.save({1: torch.ones(3)}, m / "consolidated.01.pth"),
        "a dict of tensors",
    ),
    "a tensor is missing": (lambda m: every(m, lambda t: t.pop("norm.weight")), "missing norm.weight"),
    "a tensor is missing in one shard": (
        lambda m: rewrite(m / "consolidated.01.pth", lambda t: t.pop("layers.0.attention.wq.weight")),
        "layers.0.attention.wq.weight is not in every",
    ),
    "a surplus tensor": (lambda m: every(m, lambda t: t.update(extra=torch.ones(2))), "surplus extra"),
    "a surplus tensor in the last shard": (
        lambda m: rewrite(m / "consolidated.01.pth", lambda t: t.update(extra=torch.ones(2))),
        "extra",
    ),
    "a mis-shaped tensor": (
        lambda m: every(m, lambda t: t.update({"norm.weight": torch.ones(3)})),
        r"norm.weight is \[3\], expected \[64\]",
    ),
    "a tensor without dimensions": (
        lambda m: every(m, lambda t: t.update({"layers.0.attention.wq.weight": torch.tensor(1.0)})),
        r"wq.weight is \[\]",
    ),
    "a tensor that tells a size, without dimensions": (
        lambda m: every(m, lambda t: t.update({"layers.0.feed_forward.w1.weight": torch.tensor(1.0)})),
        r"w1.weight is \[\], expected two dimensions",
    ),
    "a tensor that tells a size, without rows": (
        lambda m: every(m, lambda t: t.update({"tok_embeddings.weight": torch.ones(0, 64)})),
        r"tok_embeddings.weight is \[0, 64\], expected two dimensions",
    ),
    "a sparse tensor": (
        lambda m: every(m, lambda t: t.update({"norm.weight": torch.ones(64).to_sparse()})),
        "norm.weight in consolidated.00.pth is sparse",
    ),
    "a tensor on the meta device": (
        lambda m: every(m, lambda t: t.update({"norm.weight": torch.ones(64, device="meta")})),
        "norm.weight in consolidated.00.pth is on the meta device",
    ),
    "shards of other widths": (
        lambda m: rewrite(m / "consolidated.01.pth", lambda t: t.update({"output.weight": torch.ones(50, 32)})),
        r"shards of output.weight do not fit together; got \[50, 64\] .* and \[50, 32\]",
    ),
    "shards of other dimensions": (
        lambda m: rewrite(m / "consolidated.01.pth", lambda t: t.update({"output.weight": torch.tensor(1.0)})),
        r"shards of output.weight do not fit together; got \[50, 64\] .* and \[\]",
    ),
    "shards of other dtypes": (
        lambda m: rewrite(m / "consolidated.01.pth", lambda t: t.update({"output.weight": t["output.weight"].half()})),
        r"shards of output.weight do not fit together; got .*float32 and .*float16",
    ),
    "a shard of the format before zip files, cut short": (
        lambda m: (
            torch.save(
                torch.load(m / "consolidated.01.pth", weights_only=True),
                m / "consolidated.01.pth",
                _use_new_zipfile_serialization=False,
            ),
            cut(m / "consolidated.01.pth"),
        ),
        r"consolidated.01.pth cannot be read: unexpected EOF.*truncated or damaged",
    ),
    "integers": (
        lambda m: every(m, lambda t: t.update({n: x.to(torch.int8) for n, x in t.items()})),
        "quantized weights",
    ),
    "another model": (lambda m: every(m, lambda t: [t.pop(n) for n in list(t) if n != "norm.weight"]), "LLaMA"),
}


def set_param(folder: Path, **changes) -> None:
    raw = json.loads((folder / "params.json").read_text()) | changes
    (folder / "params.json").write_text(json.dumps(raw))


def every(folder: Path, change) -> None:
    for file in folder.glob("*.pth"):
        rewrite(file, change)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_folder_is_named_with_what_to_do(name, meta):
    fault, words = FAULTS[name]
    fault(meta)
    with pytest.raises(TrtlabError, match=words) as caught:
        Checkpoint.from_meta_ckpt(meta)
    assert caught.value.remedy or caught.value.expected


values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 70) | st.floats(allow_nan=True) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=3,
)
KEYS = [*PARAMS, "multiple_of", "ffn_dim_multiplier", "rope_theta", "use_scaled_rope", "rope_scaling_factor"]


@given(st.dictionaries(st.sampled_from([*KEYS, "max_seq_len"]) | st.text(max_size=3), values, max_size=3))
def test_no_params_json_raises_anything_but_a_trtlab_error(fuzz_meta, changes):
    (fuzz_meta / "params.json").write_text(json.dumps({**PARAMS, **changes}))
    try:
        Checkpoint.from_meta_ckpt(fuzz_meta)
    except TrtlabError as error:
        assert str(error)


@given(st.binary(max_size=60), st.integers(0, 20000), st.booleans())
def test_no_pickle_file_raises_anything_but_a_trtlab_error(fuzz_meta, junk, place, whole):
    file = fuzz_meta / "consolidated.00.pth"
    good = file.read_bytes()
    place %= len(good)
    file.write_bytes(junk if whole else good[:place] + junk + good[place + len(junk) :])
    (fuzz_meta / "params.json").write_text(json.dumps(PARAMS))
    try:
        Checkpoint.from_meta_ckpt(fuzz_meta)
    except TrtlabError as error:
        assert str(error)
    finally:
        file.write_bytes(good)


@pytest.fixture(scope="module")
def fuzz_meta(random_model, tmp_path_factory):
    return write_meta(tmp_path_factory.mktemp("fuzz"), meta_tensors(random_model("LlamaForCausalLM")))
