"""An engine with TensorRT plans: built where TensorRT is installed, saved, and refused when a plan does not fit."""

import copy
import hashlib
import json
import tempfile
import time
from pathlib import Path

import pytest
import torch

import trtlab
from trtlab import tiny
from trtlab.tensorrt.build import plans

pytestmark = pytest.mark.plans
BOUNDS = {"max_batch_size": 2, "max_input_len": 32, "max_seq_len": 64}


@pytest.fixture(scope="module")
def checkpoint():
    return trtlab.Checkpoint.from_hugging_face(tiny.llama_dir())


@pytest.fixture(scope="module")
def engine(checkpoint):
    with checkpoint.build(trtlab.BuildConfig(**BOUNDS, dtype="float32")) as built:
        yield built


@pytest.fixture
def folder(engine, tmp_path):
    return engine.save(tmp_path / "engine")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("streaming", [False, True])
def test_the_tiny_model_becomes_a_plan(checkpoint, dtype, streaming):
    with checkpoint.build(trtlab.BuildConfig(**BOUNDS, dtype=dtype, weight_streaming=streaming)) as built:
        (record,) = built.plans.records
        assert built.plans.files[0].stat().st_size == record.plan_bytes > sum(t.nbytes for t in built.ranks[0].values())
        assert record.weight_streaming is streaming
        assert dtype in record.dtypes


def test_every_rank_has_a_plan_of_its_own(checkpoint, tmp_path):
    with checkpoint.build(trtlab.BuildConfig(**BOUNDS), mapping=trtlab.Mapping(tp_size=2)) as built:
        saved = built.save(tmp_path / "two")
    assert {f"rank{r}.{kind}" for r in (0, 1) for kind in ("engine", "safetensors")} < {p.name for p in saved.iterdir()}
    with trtlab.Engine.load(saved) as loaded:
        assert len(loaded.plans.records) == 2


def test_a_loaded_engine_has_the_same_plan_and_answers_the_same(engine, folder):
    with trtlab.Engine.load(folder) as loaded:
        assert loaded.plans.records == engine.plans.records
        with (
            loaded.session(backend="torch", device="cpu") as here,
            engine.session(backend="interpreter", device="cpu") as network,
        ):
            params = trtlab.SamplingParams(max_new_tokens=12)
            expected = [answer.token_ids for answer in here.generate(list(tiny.EXAMPLES[:3]), params)]
            assert [answer.token_ids for answer in network.generate(list(tiny.EXAMPLES[:3]), params)] == expected


def test_layers_are_those_of_the_network_as_emitted(engine):
    rows, network = engine.layers, engine.network()
    assert [row.name for row in rows] == [layer.name for layer in network]
    held = sum(tensor.nbytes for tensor in engine.ranks[0].values())
    assert held <= rows.weight_bytes < 1.1 * held  # the rotary tables and small constants come on top
    assert engine.layer_table(tokens=8).flops > 7 * rows.flops


def test_no_scratch_is_left_after_close(checkpoint):
    built = checkpoint.build(trtlab.BuildConfig(**BOUNDS))
    scratch = built.plans.files[0].parent
    assert scratch.is_dir()
    built.close()
    assert not scratch.exists()


def test_an_interrupted_build_leaves_nothing(checkpoint, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(plans, "build_plan", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.build(trtlab.BuildConfig(**BOUNDS))
    assert list(tmp_path.iterdir()) == []


def truncate(folder: Path) -> None:
    path = folder / "rank0.engine"
    path.write_bytes(path.read_bytes()[:1000])


def alter(folder: Path) -> None:
    path = folder / "rank0.engine"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def edit(**changes):
    def change(folder: Path) -> None:
        path = folder / "config.json"
        raw = json.loads(path.read_text())
        raw["trtlab"]["plans"][0].update(changes)
        path.write_text(json.dumps(raw))

    return change


def link_away(folder: Path) -> None:
    away = (folder / "rank0.engine").replace(folder.parent / "away")
    (folder / "rank0.engine").symlink_to(away)


def repeat_plan(folder: Path) -> None:
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    raw["trtlab"]["plans"] *= 2
    path.write_text(json.dumps(raw))


def other_weights(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "rank0.safetensors")
    (folder / "rank0.safetensors").unlink()
    save_file({name: tensor * 1.5 for name, tensor in tensors.items()}, folder / "rank0.safetensors")


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (truncate, "rank0.engine is damaged.*1000 bytes.*copy the engine folder again"),
        (alter, "rank0.engine is damaged.*SHA-256.*build again"),
        (lambda folder: (folder / "rank0.engine").unlink(), "rank0.engine is missing"),
        (edit(version="0.1"), r"another TensorRT; got tensorrt\w* 0.1; expected.*build again.*plan=False"),
        (edit(flavour="tensorrt_of_another_kind"), "another TensorRT; got tensorrt_of_another_kind"),
        (edit(surprise=1), r"trtlab\.plans\[0\]\.surprise=1 is unknown"),
        (edit(digest=1), r"trtlab\.plans\[0\]\.digest is 1, expected a str"),
        (edit(plan_bytes="x"), r"trtlab\.plans\[0\]\.plan_bytes is 'x', expected an int"),
        (edit(activation_bytes={"context": "x"}), r"trtlab\.plans\[0\]\.activation_bytes\.context is 'x', expected"),
        (link_away, "rank0.engine is a link to .*away, outside of the model's folder"),
        (repeat_plan, "has 2 plans for 1 rank"),
        (other_weights, "holds other weights than it was built from"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused_in_one_line(folder, fault, words):
    fault(folder)
    with pytest.raises(trtlab.EngineError, match=words) as refused:
        trtlab.Engine.load(folder)
    assert "\n" not in str(refused.value)


def test_without_its_plan_the_folder_still_runs(folder):
    truncate(folder)
    with trtlab.Engine.load(folder, plan=False) as loaded, loaded.session(device="cpu") as session:
        assert loaded.plans is None
        assert session.generate(tiny.EXAMPLES[3]).text == " Bruno has a rabbit called Lucky."


def test_a_folder_without_weights_says_what_it_needs(engine, tmp_path):
    with trtlab.Engine.load(engine.save(tmp_path / "bare", weights="none")) as bare:
        for use in (lambda: bare.session(backend="torch", device="cpu"), lambda: bare.network(), lambda: bare.layers):
            with pytest.raises(trtlab.EngineError, match="saved without weights"):
                use()


@pytest.mark.no_gpu
def test_a_plan_asked_for_without_a_gpu_names_the_other_backends(engine):
    with pytest.raises(trtlab.EngineError, match=r'runs on an NVIDIA GPU.*"interpreter".*"torch"'):
        engine.session(backend="tensorrt")


def test_without_tensorrt_an_engine_is_built_all_the_same(checkpoint, monkeypatch, caplog):
    def nothing():
        raise trtlab.MissingDependency("building a plan needs TensorRT", remedy="pip install tensorrt")

    monkeypatch.setattr(plans, "library", nothing)
    with checkpoint.build(trtlab.BuildConfig(**BOUNDS)) as built, built.session(device="cpu") as session:
        assert built.plans is None
        assert session.generate(tiny.EXAMPLES[3]).text
    assert "no plan was built" in caplog.text and "pip install tensorrt" in caplog.text


def test_the_environment_chooses_a_backend_and_an_argument_wins(engine, monkeypatch):
    monkeypatch.setenv("TRTLAB_BACKEND", "interpreter")
    with engine.session(device="cpu") as chosen, engine.session(backend="torch", device="cpu") as asked:
        assert (chosen.backend, asked.backend) == ("interpreter", "torch")
    monkeypatch.setenv("TRTLAB_BACKEND", "abacus")
    with pytest.raises(trtlab.ConfigError, match="TRTLAB_BACKEND does not name a backend; got 'abacus'"):
        engine.session(device="cpu")


def test_a_plan_is_hashed_once_a_load_and_read_once_more_to_run(engine, folder, monkeypatch):
    hashed, read = [], []
    file_digest, read_bytes = hashlib.file_digest, Path.read_bytes

    def counted_digest(stream, kind):
        hashed.append(Path(stream.name).name)
        return file_digest(stream, kind)

    def counted_read(path):
        read.append(path.name)
        return read_bytes(path)

    monkeypatch.setattr(hashlib, "file_digest", counted_digest)
    monkeypatch.setattr(hashlib, "sha256", lambda *_: pytest.fail("a plan is hashed again"))
    monkeypatch.setattr(Path, "read_bytes", counted_read)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    loaded = plans.Plans.load(folder, engine.plans.records)
    assert (hashed, read) == (["rank0.engine"], [])
    for own in (loaded, engine.plans):  # the one of a build was hashed as it was written
        assert own.run_on(torch.device("cuda"))
        assert len(own.read(0)) == own.records[0].plan_bytes
    assert (hashed, read) == (["rank0.engine"], ["rank0.engine"] * 2)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (truncate, "has changed"),
        (alter, "has changed"),
        (lambda folder: (folder / "rank0.engine").unlink(), "is gone"),
    ],
)
def test_a_plan_that_changed_after_the_load_does_not_run(engine, folder, tmp_path, fault, words):
    loaded = plans.Plans.load(folder, engine.plans.records)
    fault(folder)
    for use in (lambda: loaded.read(0), lambda: loaded.save(tmp_path)):
        with pytest.raises(trtlab.EngineError, match=rf"rank0\.engine {words} since the engine was opened"):
            use()


def test_without_a_temporary_folder_the_error_names_it(checkpoint, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with pytest.raises(trtlab.EngineError, match=r"no folder for temporary files.*TMPDIR"):
        checkpoint.build(trtlab.BuildConfig(**BOUNDS))


WRONG = (1, -1.5, True, None, "x", [1], {"a": 1}, 10**9, 10**30)


def places(value, place=()):
    """Every key and index inside a JSON value."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*place, key)
        yield from places(inner, (*place, key))


def test_no_value_anywhere_in_config_json_is_a_raw_error_or_takes_long(folder):
    path = folder / "config.json"
    good = json.loads(path.read_text())
    places_tried = [place for place in places(good) if place[:2] != ("trtlab", "digests") or len(place) < 4]
    for place in places_tried:
        for value in WRONG:
            raw = copy.deepcopy(good)
            inner = raw
            for key in place[:-1]:
                inner = inner[key]
            inner[place[-1]] = value
            path.write_text(json.dumps(raw))
            started = time.process_time()
            try:
                with trtlab.Engine.load(folder) as loaded:
                    assert repr(loaded)
            except trtlab.TrtlabError as error:
                assert str(error)
            assert time.process_time() - started < 2.0, (place, value)
