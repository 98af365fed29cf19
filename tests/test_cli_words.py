"""The command line's errors name flags and commands where Python's name arguments and calls."""

import ast
import re
from pathlib import Path

import pytest

import trtlab
from trtlab.cli import with_flags


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (
            "add use_parallel_embedding=True, embedding_sharding_dim=0",
            "add --use_parallel_embedding, --embedding_sharding_dim 0",
        ),
        ("build with plan=False", "build with --no_plan"),
        ("or build and open it again without plan=False", "or build and open it again without --no_plan"),
        ("or Engine.load(folder, plan=False) to run", "or trtlab run --engine_dir FOLDER --no_plan to run"),
        ('build with compute_capabilities=("8.9", "12.0")', "build with --compute_capabilities 8.9 12.0"),
        ('build with compute_capabilities=("8.9",)', "build with --compute_capabilities 8.9"),
        ('build with dtype="float32", or plan=False', "build with --dtype float32, or --no_plan"),
        ('use backend="torch" or "interpreter"', 'use --backend torch or "interpreter"'),
        ("there is no CUDA device here; use device='cpu'", "there is no CUDA device here; use --device cpu"),
        ("Engine.session: backend is not valid; got 'x'", "--backend is not valid; got 'x'"),
        ("BuildConfig.dtype is not valid; got 'x'", "--dtype is not valid; got 'x'"),
        ("raise max_new_tokens", "raise --max_output_len"),
        ("open the folder with Checkpoint.load()", "open the folder with trtlab build --checkpoint_dir"),
        ("open another with engine.session(...)", "open another with trtlab run"),
        ("/x/config.json: dtype is not valid", "/x/config.json: dtype is not valid"),
        ("build_config.max_seq_len is 'x'", "build_config.max_seq_len is 'x'"),
    ],
)
def test_arguments_and_calls_become_flags_and_commands(words, shown):
    assert with_flags(words) == shown


HALF = re.compile(r"with(out)? without|\w\(--|--\w+ ?[(=\"']")  # a call's or a value's remains


def remedies():
    """Every remedy in the source that is a text of its own or with values in it, which are 8 here."""
    for path in sorted(Path(trtlab.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword) and node.arg == "remedy":
                yield from _texts(node.value)
            elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):  # a remedy of several errors
                yield from (text for text in _texts(node.value) if re.search(r"\b(plan|backend|dtype)=", text))


def _texts(value):
    if isinstance(value, ast.Constant) and isinstance(value.value, str):
        yield value.value
    elif isinstance(value, ast.JoinedStr):
        yield "".join(part.value if isinstance(part, ast.Constant) else "8" for part in value.values)


def test_no_remedy_becomes_half_a_call():
    shown = [with_flags(remedy) for remedy in remedies()]
    assert len(shown) > 100 and sum("--" in text for text in shown) > 20
    assert [text for text in shown if HALF.search(text)] == []
    assert [text for text in shown if "plan=" in text] == []
