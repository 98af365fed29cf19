"""Engines without a plan: built repeatedly, saved in three ways, loaded, or refused with the fault named."""

from __future__ import annotations

import hashlib
import json
import pickle
import shlex
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trtlab import BuildConfig, Checkpoint, ConfigError, Engine, EngineError, Mapping, SamplingParams, TrtlabError
from trtlab.cli import main

BOUNDS = {"max_seq_len": 48, "max_input_len": 32}
PROMPT = [5, 17, 3, 0, 96]


@pytest.fixture
def checkpoint(random_model, tmp_path):
    return Checkpoint.load(Checkpoint.from_hugging_face(random_model()).save(tmp_path / "ckpt"))


@pytest.fixture
def engine(checkpoint):
    return checkpoint.build(BuildConfig(**BOUNDS), plan=False)


def answer(engine):
    with engine.session(backend="torch", device="cpu") as session:
        return session.generate(PROMPT, SamplingParams(max_new_tokens=8))


def test_a_checkpoint_can_be_built_again_and_does_not_change(checkpoint, files_of):
    before = files_of(checkpoint.folder)
    first = checkpoint.build(BuildConfig(**BOUNDS), plan=False)
    second = checkpoint.build(BuildConfig(**BOUNDS), mapping=Mapping(tp_size=2), plan=False)
    assert answer(first) == answer(second) == answer(checkpoint.build(BuildConfig(**BOUNDS), plan=False))
    assert files_of(checkpoint.folder) == before


@pytest.mark.parametrize("weights", ["link", "copy"])
@pytest.mark.parametrize("mapping", [Mapping(), Mapping(tp_size=2), Mapping(pp_size=2)], ids=["one", "tp2", "pp2"])
def test_a_saved_engine_answers_as_before(weights, mapping, checkpoint, tmp_path):
    engine = checkpoint.build(BuildConfig(**BOUNDS), mapping=mapping, plan=False)
    engine.save(tmp_path / "engine", weights=weights)
    again = Engine.load(tmp_path / "engine")
    assert (again.config, again.build_config, again.mapping) == (engine.config, engine.build_config, engine.mapping)
    assert answer(again) == answer(engine)


def test_links_take_no_space_and_copies_stand_alone(engine, checkpoint, tmp_path):
    engine.save(tmp_path / "linked")
    engine.save(tmp_path / "copied", weights="copy")
    source = checkpoint.folder / "rank0.safetensors"
    assert (tmp_path / "linked" / "rank0.safetensors").samefile(source)
    assert not (tmp_path / "copied" / "rank0.safetensors").samefile(source)
    assert (tmp_path / "copied" / "rank0.safetensors").read_bytes() == source.read_bytes()


def test_a_file_that_is_a_link_is_saved_as_what_it_points_to(engine, tmp_path):
    """As in Hugging Face's cache; a link of the link would point to nothing from another folder."""
    folder = engine.save(tmp_path / "first")
    (folder / "blobs").mkdir()
    (folder / "rank0.safetensors").rename(folder / "blobs" / "x")
    (folder / "rank0.safetensors").symlink_to("blobs/x")
    Engine.load(folder).save(tmp_path / "second")
    saved = tmp_path / "second" / "rank0.safetensors"
    assert not saved.is_symlink() and saved.samefile(folder / "blobs" / "x")
    assert answer(Engine.load(tmp_path / "second")) == answer(engine)


def test_what_cannot_be_linked_is_copied(engine, tmp_path, monkeypatch):
    def refused(*_):
        raise OSError("another file system")

    monkeypatch.setattr("trtlab.engine_weights.os.link", refused)
    engine.save(tmp_path / "engine")
    assert answer(Engine.load(tmp_path / "engine")) == answer(engine)


def test_a_link_is_made_only_of_the_weights_that_the_engine_has(random_model, checkpoint, tmp_path):
    """With another dtype, another split or a shared table the engine cannot link the checkpoint's file."""
    for build, mapping in ((BuildConfig(dtype="float16", **BOUNDS), None), (BuildConfig(**BOUNDS), Mapping(tp_size=2))):
        engine = checkpoint.build(build, mapping=mapping, plan=False)
        engine.save(tmp_path / "engine")
        again = Engine.load(tmp_path / "engine")
        for rank, tensors in enumerate(engine.ranks):
            for name, tensor in tensors.items():
                assert torch.equal(again.ranks[rank][name].read(), tensor.read())
    tied = Checkpoint.from_hugging_face(random_model("LlamaForCausalLM", tie_word_embeddings=True))
    tied = Checkpoint.load(tied.save(tmp_path / "tied"))
    tied.build(BuildConfig(**BOUNDS), plan=False).save(tmp_path / "engine")
    assert "lm_head.weight" not in Engine.load(tmp_path / "engine").ranks[0]


def test_a_build_dtype_rounds_the_weights(checkpoint):
    half = checkpoint.build(BuildConfig(dtype="bfloat16", **BOUNDS), plan=False)
    assert half.config.dtype == half.build_config.dtype == "bfloat16"
    name = "transformer.layers.0.mlp.fc.weight"
    assert torch.equal(half.ranks[0][name].read(), checkpoint.tensors[name].read().bfloat16())


def test_an_engine_saves_over_itself(engine, tmp_path):
    engine.save(tmp_path / "engine")
    expected = answer(engine)
    for _ in range(2):
        again = Engine.load(tmp_path / "engine")
        again.save(tmp_path / "engine")
    assert answer(Engine.load(tmp_path / "engine")) == expected


def test_bounds_beyond_the_model_name_flag_bound_and_value(checkpoint):
    for changes, words in (
        (
            {"max_seq_len": 129, "max_input_len": 8},
            "max_seq_len 129 exceeds the model's max_position_embeddings 128.*max_seq_len=128",
        ),
        ({"max_seq_len": 64, "max_input_len": 65}, "max_input_len 65 exceeds max_seq_len 64"),
    ):
        with pytest.raises(ConfigError, match=words):
            checkpoint.build(BuildConfig(**changes), plan=False)


def test_open_bounds_are_filled_in_from_the_model(checkpoint):
    built = checkpoint.build(plan=False).build_config
    assert (built.max_seq_len, built.max_input_len, built.dtype) == (128, 128, "float32")


def test_a_split_that_cannot_be_is_refused_at_build(checkpoint):
    with pytest.raises(ConfigError, match=r"tp_size=3.*use 1, 2 or 4"):
        checkpoint.build(BuildConfig(**BOUNDS), mapping=Mapping(tp_size=3), plan=False)


def test_after_close_every_use_is_an_error_and_a_second_close_is_none(engine, tmp_path):
    with engine:
        pass
    engine.close()
    for use in (engine.session, engine.__enter__, lambda: engine.save(tmp_path / "x")):
        with pytest.raises(EngineError, match="closed") as caught:
            use()
        assert caught.value.remedy
    assert not (tmp_path / "x").exists()


def test_an_unknown_way_to_keep_weights_is_named(engine, tmp_path):
    with pytest.raises(ConfigError, match=r"link \| copy \| none"):
        engine.save(tmp_path / "x", weights="move")
    assert not (tmp_path / "x").exists()


def rewrite(folder, section=None, **changes) -> None:
    raw = json.loads((folder / "config.json").read_text())
    part = raw[section] if section else raw
    part |= changes
    for key in [key for key, value in part.items() if value is ...]:
        del part[key]
    (folder / "config.json").write_text(json.dumps(raw))


FAULTS = {
    "no folder": (lambda f: f.rename(f.with_name("gone")), "not a folder"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "a checkpoint": (lambda f: rewrite(f, build_config=...), "not the config.json of an engine folder"),
    "nothing of a build": (lambda f: rewrite(f, build_config=[]), "not the config.json of an engine folder"),
    "no bounds": (lambda f: rewrite(f, "build_config", max_seq_len=...), "max_seq_len"),
    "a bound of words": (lambda f: rewrite(f, "build_config", max_seq_len="long"), "max_seq_len is 'long'"),
    "a bound from the future": (lambda f: rewrite(f, "build_config", max_dreams=3), "max_dreams"),
    "no architecture": (
        lambda f: rewrite(f, "pretrained_config", architecture=...),
        "pretrained_config.architecture is missing",
    ),
    "a rank is missing": (lambda f: (f / "rank1.safetensors").unlink(), "rank1.safetensors is missing"),
    "a rank is cut short": (lambda f: (f / "rank1.safetensors").write_bytes(b"x" * 90), "rank1.safetensors cannot"),
    "other shapes": (lambda f: rewrite(f, "pretrained_config", intermediate_size=64), r"is \[.*expected"),
    "a billion layers": (lambda f: rewrite(f, "pretrained_config", num_hidden_layers=10**9), "1000000000 layers"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_folder_is_named_with_what_to_do(name, checkpoint, tmp_path):
    folder = tmp_path / "engine"
    checkpoint.build(BuildConfig(**BOUNDS), mapping=Mapping(tp_size=2), plan=False).save(folder, weights="copy")
    fault, words = FAULTS[name]
    fault(folder)
    with pytest.raises(TrtlabError, match=words) as caught:
        Engine.load(folder)
    assert caught.value.remedy or caught.value.expected


def test_other_weights_under_the_same_config_are_noticed(engine, random_model, tmp_path):
    engine.save(tmp_path / "engine", weights="copy")
    other = Checkpoint.from_hugging_face(random_model(seed=5)).save(tmp_path / "other")
    (tmp_path / "engine" / "rank0.safetensors").write_bytes((other / "rank0.safetensors").read_bytes())
    with pytest.raises(EngineError, match="other weights") as caught:
        Engine.load(tmp_path / "engine")
    assert caught.value.remedy


def alter(folder, name, row):
    """Add one to the first number of a tensor's row, in the file, as a failing disk might."""
    path = folder / "rank0.safetensors"
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    entry = json.loads(content[8:start])[name]
    row_bytes = entry["shape"][-1] * 4
    content[start + entry["data_offsets"][0] + row * row_bytes] ^= 1
    path.unlink()  # not in the checkpoint that it may be linked to
    path.write_bytes(content)


NAME = "transformer.layers.1.mlp.fc.weight"


@pytest.mark.parametrize("weights", ["link", "copy"])
def test_an_altered_row_anywhere_is_found_and_its_tensor_named(engine, tmp_path, weights):
    rows = engine.ranks[0][NAME].shape[0]
    for row in (0, 1, rows // 2 + 1, rows - 2, rows - 1):
        engine.save(tmp_path / "engine", weights=weights)
        Engine.load(tmp_path / "engine", verify=True).close()
        alter(tmp_path / "engine", NAME, row)
        with pytest.raises(EngineError, match="other weights") as caught:
            Engine.load(tmp_path / "engine", verify=True)
        sampled = row in (0, rows // 2, rows - 1)
        assert sampled or f"rank0.safetensors holds other weights than were saved: {NAME};" in str(caught.value)
        shutil.rmtree(tmp_path / "engine")


def test_without_verify_three_rows_a_tensor_are_read(engine, tmp_path):
    folder = engine.save(tmp_path / "engine", weights="copy")
    alter(folder, NAME, 1)
    Engine.load(folder).close()
    alter(folder, NAME, 0)
    with pytest.raises(EngineError, match="holds other weights than it was built from"):
        Engine.load(folder)


def test_a_second_save_keeps_the_digests_and_a_copy_is_held_against_them(engine, tmp_path):
    folder = engine.save(tmp_path / "engine", weights="copy")
    alter(folder, NAME, 1)
    damaged = Engine.load(folder)
    with pytest.raises(EngineError, match=f"other weights than were saved: {NAME}"):
        damaged.save(tmp_path / "again", weights="copy")
    assert not (tmp_path / "again").exists()
    damaged.save(tmp_path / "linked")
    with pytest.raises(EngineError, match=NAME):
        Engine.load(tmp_path / "linked", verify=True)


def test_the_bar_of_a_save_ends_full_in_every_way(engine, tmp_path, monkeypatch):
    counted = []

    class Bar:
        def __init__(self, label, total):
            self.left = total
            counted.append(self)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def update(self, number):
            self.left -= number

    monkeypatch.setattr("trtlab.engine_weights.progress", Bar)
    for weights in ("link", "link", "copy"):
        engine.save(tmp_path / "engine", weights=weights)
    Engine.load(tmp_path / "engine", verify=True).close()
    assert [bar.left for bar in counted] == [0, 0, 0, 0]


def test_a_folder_without_digests_cannot_be_verified(engine, tmp_path):
    folder = engine.save(tmp_path / "engine")
    rewrite(folder, "trtlab", digests=...)
    with pytest.raises(EngineError, match=r"has no digests.*load it without verify=True, and save it again"):
        Engine.load(folder, verify=True)
    with Engine.load(folder) as loaded:
        Engine.load(loaded.save(tmp_path / "again"), verify=True).close()


def test_digests_are_those_of_the_bytes(engine, tmp_path):
    engine.save(tmp_path / "engine")
    for name, tensor in engine.ranks[0].items():
        expected = hashlib.sha256(tensor.read().numpy().tobytes()).hexdigest()
        assert engine.digests[0][name] == expected


def test_a_pickle_holds_the_path_of_a_saved_engine(engine, checkpoint, tmp_path, monkeypatch):
    with pytest.raises(EngineError, match=r"not saved cannot be pickled; save\(\) it first"):
        pickle.dumps(engine)
    engine.save(tmp_path / "engine")
    for held in (engine, Engine.load(tmp_path / "engine")):
        content = pickle.dumps(held)
        assert len(content) < 5000
        monkeypatch.chdir("/")
        assert answer(pickle.loads(content)) == answer(engine)
    checkpoint.build(BuildConfig(max_seq_len=16), plan=False).save(tmp_path / "engine")
    with pytest.raises(EngineError, match="holds another engine than the one that was pickled"):
        pickle.loads(content)
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        pickle.dumps(engine)


def test_a_relative_path_survives_a_change_of_directory(engine, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    engine.save("engine", weights="copy")
    loaded = Engine.load("engine")
    monkeypatch.chdir("/")
    assert answer(loaded) == answer(engine)
    assert loaded.folder == tmp_path / "engine"


def test_a_folder_without_weights_and_plan_is_refused(engine, tmp_path):
    folder = engine.save(tmp_path / "engine")
    (folder / "rank0.safetensors").unlink()
    with pytest.raises(EngineError, match="has no weights and no plan to run; copy"):
        Engine.load(folder)


COMMANDS = (
    ({}, "--max_seq_len 128"),
    ({"max_batch_size": 3, "max_input_len": 7}, "--max_batch_size 3 --max_input_len 7"),
    ({"dtype": "bfloat16", "tokens_per_block": 16, "weight_streaming": True}, "--tokens_per_block 16"),
    ({"compute_capabilities": ("8.9", "12.0"), "optimization_level": 2}, "--compute_capabilities 8.9 12.0"),
)


@pytest.mark.parametrize(("changes", "words"), COMMANDS)
def test_the_command_of_an_engine_builds_it_again(checkpoint, tmp_path, changes, words, capsys):
    built = checkpoint.build(BuildConfig(**changes), plan=False)
    assert "--output_dir ENGINE_DIR" in built.command()
    built.save(tmp_path / "an engine")
    assert words in built.command()
    (tmp_path / "an engine").rename(tmp_path / "first")
    assert main(shlex.split(built.command())[1:]) == 0
    again = Engine.load(tmp_path / "an engine")
    assert (again.build_config, again.fingerprints) == (built.build_config, built.fingerprints)
    assert built.command() in capsys.readouterr().out


def test_a_command_shows_in_capitals_what_is_not_known(random_model):
    built = Checkpoint.from_hugging_face(random_model()).build(BuildConfig(max_seq_len=16), plan=False)
    expected = "trtlab build --checkpoint_dir CHECKPOINT_DIR --output_dir ENGINE_DIR --max_seq_len 16 --dtype float32"
    assert built.command() == f"{expected} --no_plan"


values = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 300) | st.floats(allow_nan=True) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
)
BUILD_KEYS = """max_batch_size max_input_len max_seq_len max_num_tokens tokens_per_block dtype weight_streaming
compute_capabilities optimization_level notes""".split()


@given(
    st.dictionaries(st.sampled_from(BUILD_KEYS) | st.text(max_size=3), values, max_size=3),
    st.dictionaries(st.sampled_from(["version", "trtlab", "pretrained_config", "build_config"]), values, max_size=1),
    st.dictionaries(st.sampled_from(["source", "fingerprints", "digests", "plans"]), values, max_size=2),
)
def test_no_config_json_raises_anything_but_a_trtlab_error(fuzzed, build, whole, ours):
    folder, good = fuzzed
    raw = good | {"build_config": good["build_config"] | build, "trtlab": good["trtlab"] | ours} | whole
    (folder / "config.json").write_text(json.dumps(raw))
    try:
        Engine.load(folder).close()
    except TrtlabError as error:
        assert str(error)


@pytest.fixture(scope="module")
def fuzzed(random_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz") / "engine"
    Checkpoint.from_hugging_face(random_model()).build(BuildConfig(**BOUNDS), plan=False).save(folder)
    return folder, json.loads((folder / "config.json").read_text())
