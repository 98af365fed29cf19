"""Each command makes one object call: the commands give the same results as the objects."""

import argparse
import dataclasses

import pytest

import trtlab
from trtlab import tiny
from trtlab.cli import BUILD_FLAGS, EMBEDDING_FLAGS, MAPPING_FLAGS, main, with_flags
from trtlab.config.docs import first_sentence
from trtlab.parallel.shard import EmbeddingLayout

pytestmark = pytest.mark.no_gpu  # commands choose the device

QUESTION = "Question: Which pet does Bruno have?\nAnswer:"


@pytest.fixture(scope="module")
def engine_dir(tmp_path_factory):
    work = tmp_path_factory.mktemp("cli")
    assert main(["convert", "--model_dir", str(tiny.llama_dir()), "--output_dir", str(work / "ckpt")]) == 0
    bounds = ["--max_batch_size", "2", "--max_input_len", "32", "--max_seq_len", "64"]
    assert main(["build", "--checkpoint_dir", str(work / "ckpt"), "--output_dir", str(work / "engine"), *bounds]) == 0
    return work / "engine"


def test_run_prints_the_session_s_text(engine_dir, capsys):
    assert main(["run", "--engine_dir", str(engine_dir), "--input_text", QUESTION, "--max_output_len", "8"]) == 0
    with trtlab.Engine.load(engine_dir) as engine, engine.session(device="cpu") as session:
        expected = session.generate(QUESTION, trtlab.SamplingParams(max_new_tokens=8)).text
    assert capsys.readouterr().out == expected + "\n"


def test_bench_prints_lines_and_writes_a_csv(engine_dir, capsys, tmp_path):
    sweep = ["--batch_size", "1;2", "--input_output_len", "8,2", "--num_runs", "1", "--csv", str(tmp_path / "b.csv")]
    assert main(["bench", "--engine_dir", str(engine_dir), *sweep]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["[BENCHMARK]"] * 2
    assert len((tmp_path / "b.csv").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    "command",
    [
        ["convert", "--model_dir", "nowhere", "--output_dir", "out"],
        ["run", "--engine_dir", "nowhere", "--input_text", "x"],
        ["bench", "--engine_dir", "nowhere", "--input_output_len", "8"],
        ["bench", "--engine_dir", "nowhere", "--batch_size", "two"],
    ],
)
def test_a_mistake_is_one_line_and_status_2(command, capsys):
    assert main(command) == 2
    error = capsys.readouterr().err
    assert error.startswith("trtlab: ") and error.count("\n") == 1


def test_an_error_and_its_remedy_name_flags(engine_dir, capsys):
    convert = ["convert", "--model_dir", str(tiny.llama_dir()), "--output_dir", str(engine_dir.parent / "shared")]
    build = ["build", "--checkpoint_dir", str(engine_dir.parent / "ckpt"), "--output_dir", str(engine_dir.parent / "e")]
    run = ["run", "--engine_dir", str(engine_dir), "--input_text", QUESTION]
    for command, words in (
        ([*build, "--max_batch_size", "0"], "--max_batch_size is not valid; got 0; expected an int of at least 1"),
        ([*build, "--max_seq_len", "9000"], "position_embeddings 8192; use --max_seq_len 8192 or less"),
        ([*build, "--max_num_tokens", "4"], "--max_num_tokens 4 is below --max_batch_size 8; "),
        ([*convert, "--tp_size", "3"], "cannot be split over --tp_size 3; use 1, 2 or 4"),
        ([*convert, "--use_embedding_sharing"], "; leave --use_embedding_sharing out"),
        ([*run, "--max_output_len", "0"], "--max_output_len is not valid; got 0"),
        (["bench", "--engine_dir", str(engine_dir), "--num_runs", "0"], "--num_runs must be at least 1"),
    ):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert words in error and "BuildConfig" not in error and "SamplingParams" not in error
    switch = argparse.Namespace(use_parallel_embedding=False, embedding_sharding_dim=0)
    remedy = "add use_parallel_embedding=True, embedding_sharding_dim=0"
    assert with_flags(remedy, switch) == "add --use_parallel_embedding, --embedding_sharding_dim 0"


def test_flags_say_what_the_fields_say(capsys):
    for command, kind, names in (
        ("build", trtlab.BuildConfig, BUILD_FLAGS),
        ("convert", trtlab.Mapping, MAPPING_FLAGS),
        ("convert", EmbeddingLayout, EMBEDDING_FLAGS),
    ):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        page = " ".join(capsys.readouterr().out.split()).replace("- ", "-")  # argparse breaks lines behind hyphens
        for field in (field for field in dataclasses.fields(kind) if field.name in names):
            default = "" if isinstance(field.default, bool) else f" (default: {field.default})"
            assert f"--{field.name}" in page and first_sentence(kind, field.name) + default in page


def test_machine_prints_its_card(capsys):
    assert main(["machine"]) == 0
    assert capsys.readouterr().out.strip() == repr(trtlab.machine())
