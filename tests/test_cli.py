"""Each command makes one object call: the commands give the same results as the objects."""

import dataclasses
import os
import re
import subprocess
import sys

import pytest
import torch

import trtlab
from trtlab import tiny
from trtlab.cli import (
    BUILD_FLAGS,
    EMBEDDING_FLAGS,
    FLAG_OF_ARGUMENT,
    FLAG_OF_CALL,
    MAPPING_FLAGS,
    SESSION_FLAGS,
    main,
)
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


def test_bench_prints_lines_and_writes_a_csv(engine_dir, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)  # as a test before this one leaves it
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: pytest.fail("the session runs on the CPU"))
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
        (
            ["bench", "--engine_dir", str(engine_dir), "--num_runs", "0"],
            "--num_runs is not valid; got 0; expected an int of at least 1",
        ),
    ):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert words in error and "BuildConfig" not in error and "SamplingParams" not in error


@pytest.fixture
def pages(capsys):
    """The help of each command."""
    texts = {}
    for command in ("convert", "build", "run", "bench"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        texts[f"trtlab {command}"] = capsys.readouterr().out
    return texts


def test_every_command_and_flag_that_an_error_may_name_is_there(pages):
    for flag in FLAG_OF_ARGUMENT.values():
        assert any(f"--{flag} " in page or f"--{flag}]" in page for page in pages.values()), flag
    for words in FLAG_OF_CALL.values():
        command, _, flag = words.rpartition("--")
        command = command.strip() if command.startswith("trtlab") else None
        within = pages.values() if command is None else [pages[command or words]]
        assert words in pages or any(f"--{flag}" in page for page in within), words


PYTHON = re.compile(r"\w+=[\w\"']|\w\(\)|\b[A-Z]\w+\.[a-z_]+\b|\b[A-Z]\w+\(")  # name=value, call(), Class.name, Class(


def argv(line, engine_dir):
    """The arguments of a command line with the folders of this test in it."""
    folders = {"MODEL": tiny.llama_dir(), "CKPT": engine_dir.parent / "ckpt", "ENGINE": engine_dir}
    folders |= {"NEW": engine_dir.parent / "new", "FILE": tiny.llama_dir() / "config.json"}
    return [str(folders.get(word, word)) for word in line.split()]


MISTAKES = [
    "convert --model_dir CKPT --output_dir NEW",
    "convert --model_dir ENGINE --output_dir NEW",
    "convert --gguf_file MODEL --output_dir NEW",
    "convert --meta_ckpt_dir MODEL --output_dir NEW",
    "convert --model_dir MODEL --output_dir NEW --dtype fp16",
    "convert --model_dir MODEL --output_dir NEW --tp_size 3",
    "convert --model_dir MODEL --output_dir NEW --pp_size 99",
    "convert --model_dir MODEL --output_dir NEW --tp_size 99999",
    "convert --model_dir MODEL --output_dir NEW --embedding_sharding_dim 3",
    "convert --model_dir MODEL --output_dir FILE",
    "build --checkpoint_dir MODEL --output_dir NEW",
    "build --checkpoint_dir ENGINE --output_dir NEW",
    "build --checkpoint_dir CKPT --output_dir NEW --max_batch_size 0 --max_num_tokens 0",
    "build --checkpoint_dir CKPT --output_dir NEW --max_batch_size 1000000000",
    "build --checkpoint_dir CKPT --output_dir NEW --dtype half",
    "build --checkpoint_dir CKPT --output_dir FILE --no_plan",
    "run --engine_dir CKPT --input_text hi",
    "run --engine_dir MODEL --input_text hi",
    "run --engine_dir ENGINE --input_text hi --max_output_len 100",
    "run --engine_dir ENGINE --input_text hi --backend trt",
    "run --engine_dir ENGINE --input_text hi --backend tensorrt",  # with a plan or without, as this machine builds
    "run --engine_dir ENGINE --input_text hi --backend tensorrt --no_plan",
    "run --engine_dir ENGINE --input_text hi --device mps",
    "run --engine_dir ENGINE --input_text hi --device cuda",
    "run --engine_dir ENGINE --input_text hi --max_tokens_in_paged_kv_cache 1",
    "run --engine_dir ENGINE --input_text hi --kv_cache_free_gpu_memory_fraction 2",
    "bench --engine_dir ENGINE --batch_size 4",
    "bench --engine_dir ENGINE --input_output_len 8,2 --batch_size 1 --num_runs 1 --csv /nowhere/x.csv",
    "demo --output_dir FILE",
]


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_one_line_without_python_s_names(line, engine_dir, capsys):
    assert main(argv(line, engine_dir)) == 2
    error = capsys.readouterr().err.splitlines()[-1]  # notes may come before
    assert error.startswith("trtlab: ")
    assert not PYTHON.findall(error.replace(str(engine_dir.parent), "").replace(str(tiny.llama_dir()), "")), error


FOLLOWED = [  # a mistake, the remedy in its error, and the command with the remedy in it
    (
        "convert --model_dir MODEL --output_dir NEW --dtype fp16",
        "did you mean 'float16'?",
        "convert --model_dir MODEL --output_dir NEW --dtype float16",
    ),
    (
        "convert --model_dir MODEL --output_dir NEW --tp_size 3",
        "use 1, 2 or 4",
        "convert --model_dir MODEL --output_dir NEW --tp_size 4",
    ),
    (
        "run --engine_dir ENGINE --input_text hi --device cuda",
        "use --device cpu",
        "run --engine_dir ENGINE --input_text hi --device cpu",
    ),
    pytest.param(
        "run --engine_dir ENGINE --input_text hi --backend tensorrt",
        "use --backend interpreter",
        "run --engine_dir ENGINE --input_text hi --backend interpreter --max_output_len 2",
        marks=pytest.mark.plans,
    ),
    (
        "run --engine_dir ENGINE --input_text hi --backend tensorrt --no_plan",
        "no TensorRT plan; use --backend torch, or build and open it again without --no_plan",
        "run --engine_dir ENGINE --input_text hi --backend torch --no_plan --max_output_len 2",
    ),
    (
        "run --engine_dir ENGINE --input_text hi --max_output_len 100",
        "lower --max_output_len to 62",
        "run --engine_dir ENGINE --input_text hi --max_output_len 62",
    ),
    (
        "run --engine_dir CKPT --input_text hi",
        "open the folder with trtlab build --checkpoint_dir",
        "build --checkpoint_dir CKPT --output_dir engine2 --no_plan",
    ),
    (
        "build --checkpoint_dir MODEL --output_dir NEW",
        "open the folder with trtlab convert --model_dir",
        "convert --model_dir MODEL --output_dir NEW",
    ),
    (
        "build --checkpoint_dir CKPT --output_dir NEW --max_seq_len 9000",
        "use --max_seq_len 8192 or less",
        "build --checkpoint_dir CKPT --output_dir engine3 --max_seq_len 8192 --max_batch_size 1 --no_plan",
    ),
]


@pytest.mark.parametrize(("mistake", "remedy", "followed"), FOLLOWED)
def test_a_remedy_that_is_followed_works(mistake, remedy, followed, engine_dir, capsys, monkeypatch):
    monkeypatch.chdir(engine_dir.parent)
    assert main(argv(mistake, engine_dir)) == 2
    assert remedy in capsys.readouterr().err
    assert main(argv(followed, engine_dir)) == 0


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", "trtlab: the following arguments are required: COMMAND; see trtlab --help"),
        ("buld", "trtlab: argument COMMAND: invalid choice: 'buld'"),
        (
            "build --checkpoint_dir x",
            "trtlab build: the following arguments are required: --output_dir; see",
        ),
        (
            "build --checkpoint_dir x --output_dir y --max_bach_size 3",
            "did you mean --max_batch_size?; see",
        ),
        (
            "build --checkpoint_dir x --output_dir y --max_batch_size=x",
            "--max_batch_size: invalid int value: 'x'",
        ),
        (
            "build --checkpoint_dir x --output_dir y --tp_size=2",
            "argument --tp_size=2; trtlab convert takes it",
        ),
        ("run --engine_dir x --input_text y --max_new_tokens 3", "did you mean --max_output_len?"),
        ("run --engine_dir x --input_text y junk", "trtlab run: unknown argument junk; see trtlab run --help"),
        ("run --engine_dir x --input_text y [(", "trtlab run: unknown argument [(; see trtlab run --help"),
        ("run --engine_dir x --input_text y --comand", "trtlab run: unknown argument --comand; see trtlab run --help"),
    ],
)
def test_an_argument_that_is_not_understood_is_one_line_and_status_2(line, words, capsys):
    with pytest.raises(SystemExit) as caught:
        main(line.split())
    error = capsys.readouterr().err
    assert caught.value.code == 2 and words in error and error.count("\n") == 1


def test_what_nobody_foresaw_is_one_line_and_status_1(monkeypatch, capsys):
    monkeypatch.setattr("trtlab.cli.machine", lambda: {}["torch"])
    assert main(["machine"]) == 1
    assert capsys.readouterr().err == "trtlab: KeyError: 'torch'\n"
    monkeypatch.setenv("TRTLAB_TRACEBACK", "full")
    assert main(["machine"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("Traceback (most recent call last)") and error.endswith("\ntrtlab: KeyError: 'torch'\n")


def test_an_interrupt_is_one_line_and_status_130(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr("trtlab.cli.machine", interrupted)
    assert main(["machine"]) == 130
    assert capsys.readouterr().err == "trtlab: interrupted\n"


def test_a_closed_pipe_is_no_error(tmp_path):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "trtlab.cli", "machine"]
    process = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    os.close(write)
    assert (process.returncode, process.stderr) == (1, "")


def test_settings_of_a_session_are_flags(engine_dir, capsys):
    line = "run --engine_dir ENGINE --input_text hi --max_output_len 4 --backend torch --device cpu --no_plan"
    assert main(argv(f"{line} --max_tokens_in_paged_kv_cache 64", engine_dir)) == 0
    assert main(argv(line, engine_dir)) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == second


def test_flags_say_what_the_fields_say(capsys):
    for command, kind, names in (
        ("build", trtlab.BuildConfig, BUILD_FLAGS),
        ("convert", trtlab.Mapping, MAPPING_FLAGS),
        ("convert", EmbeddingLayout, EMBEDDING_FLAGS),
        ("run", trtlab.SessionConfig, SESSION_FLAGS),
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
