"""Tokenizers of every layout open as in transformers or Meta's code, and no code of a folder runs."""

from __future__ import annotations

import ast
import base64
import builtins
import io
import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest

from trtlab import RequestError
from trtlab.runtime import tokenizer_loading
from trtlab.runtime.sentencepiece_model import read_sentencepiece
from trtlab.runtime.tokenizer import Tokenizer, copy_tokenizer, find_tokenizer

from ..models import LLAMA2_PIECES, TRAINING_TEXT, train_sentencepiece

TEXTS = [
    *TRAINING_TEXT[:5],
    "  two  spaces ",
    " x",
    "é😀 xyz",
    "\n\n",
    "▁a",
    "ﬁ ligature",
    "it's 12345",
    "don't\r\n\t x",
]


@pytest.fixture
def byte_level(talking_model, tmp_path):
    """A copy of the byte-level tokenizer's files, and of a config.json that names its model."""
    folder = tmp_path / "byte level"
    folder.mkdir()
    copy_tokenizer(talking_model, folder)
    shutil.copy(talking_model / "config.json", folder)
    return folder


def edit(path, **changes):
    """Change keys of a JSON file; ``...`` removes one."""
    stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    kept = {key: value for key, value in (stored | changes).items() if value is not ...}
    path.write_text(json.dumps(kept), encoding="utf-8")


@pytest.mark.parametrize(
    "entry",
    [
        {"AutoTokenizer": ["mine.Own", None]},
        {"AutoTokenizer": [None, "mine.Own"]},
        {"AutoTokenizer": "mine.Own"},
        ["mine.Own", None],
        {"AutoTokenizer": ["someone/repository--mine.Own", None]},
    ],
)
@pytest.mark.parametrize("class_name", ["PreTrainedTokenizerFast", "Own"])
def test_a_tokenizer_that_is_a_program_is_refused_and_never_runs(entry, class_name, byte_level, monkeypatch):
    (byte_level / "mine.py").write_text(f"open({str(byte_level / 'ran')!r}, 'w')\nclass Own: pass\n")
    edit(byte_level / "tokenizer_config.json", auto_map=entry, tokenizer_class=class_name)
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("asked"))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    with pytest.raises(RequestError, match=r"program of the folder's own, which is never run.*mine\.Own"):
        Tokenizer(byte_level).encode("a cat")
    assert not (byte_level / "ran").exists()
    edit(byte_level / "tokenizer_config.json", auto_map=...)  # the remedy
    assert Tokenizer(byte_level).decode(Tokenizer(byte_level).encode("a cat")) == "a cat"


def test_code_that_config_json_names_never_runs(byte_level, monkeypatch):
    (byte_level / "mine.py").write_text(f"open({str(byte_level / 'ran')!r}, 'w')\nclass Own: pass\n")
    edit(byte_level / "config.json", auto_map={"AutoConfig": "mine.Own", "AutoModel": "mine.Own"}, model_type="mine")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    assert Tokenizer(byte_level).decode(Tokenizer(byte_level).encode("a cat")) == "a cat"
    assert not (byte_level / "ran").exists()


@pytest.mark.parametrize("length", ["linear", None, -1, 2**70, [3], 4])
def test_the_length_that_a_tokenizer_states_bounds_nothing(length, byte_level, caplog):
    before = Tokenizer(byte_level).encode("a cat sat on the mat")
    edit(byte_level / "tokenizer_config.json", model_max_length=length)
    assert Tokenizer(byte_level).encode("a cat sat on the mat") == before
    assert not caplog.records


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", '{"model": 3}'),
        ("tokenizer_config.json", "[1]"),
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", '{"tokenizer_class": 5}'),
        ("tokenizer_config.json", '{"eos_token": 5}'),
        ("config.json", "{"),
    ],
)
def test_an_unreadable_file_is_a_request_error_and_the_end_ids_stay(file, text, byte_level):
    (byte_level / file).write_text(text)
    tokenizer = Tokenizer(byte_level)
    with pytest.raises(RequestError, match=r"tokenizer in byte level cannot be read|is not JSON|does not hold"):
        tokenizer.encode("a cat")
    assert isinstance(tokenizer.problem, RequestError)
    edit(byte_level / "generation_config.json", eos_token_id=[7, 8])
    assert Tokenizer(byte_level).end_ids == {7, 8}


def test_a_tokenizer_that_does_not_know_its_own_tokens_is_told_when_it_is_opened(byte_level):
    """transformers looks for the id of an unknown unknown token without end, and only when it is asked for one."""
    stored = json.loads((byte_level / "tokenizer.json").read_text(encoding="utf-8"))
    (byte_level / "tokenizer.json").unlink()
    (byte_level / "vocab.json").write_text(json.dumps(stored["model"]["vocab"]), encoding="utf-8")
    (byte_level / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    edit(byte_level / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")
    edit(byte_level / "special_tokens_map.json", unk_token={"</s>": "</s>"})
    tokenizer = Tokenizer(byte_level)
    assert isinstance(tokenizer.problem, RequestError) and "recursion" in str(tokenizer.problem)
    for use in (lambda: tokenizer.special_texts, lambda: tokenizer.special_ids, lambda: tokenizer.ends_open([1])):
        with pytest.raises(RequestError, match=r"cannot be read.*give token ids"):
            use()
    assert tokenizer.end_ids == frozenset()


def test_vocabulary_and_merges_without_tokenizer_json(byte_level, tmp_path):
    stored = json.loads((byte_level / "tokenizer.json").read_text(encoding="utf-8"))
    (byte_level / "tokenizer.json").unlink()
    assert find_tokenizer(byte_level) is None
    merges = "\n".join("#version: 0.2" if n < 0 else " ".join(stored["model"]["merges"][n]) for n in range(-1, 60))
    (byte_level / "vocab.json").write_text(json.dumps(stored["model"]["vocab"]), encoding="utf-8")
    (byte_level / "merges.txt").write_text(merges, encoding="utf-8")
    edit(byte_level / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")
    assert find_tokenizer(byte_level) == byte_level
    copy = tmp_path / "copy"
    copy.mkdir()
    copy_tokenizer(byte_level, copy)
    assert {"vocab.json", "merges.txt"} <= {file.name for file in copy.iterdir()}
    from transformers import AutoTokenizer

    expected = AutoTokenizer.from_pretrained(byte_level, trust_remote_code=False)
    for text in TEXTS:
        assert Tokenizer(byte_level).encode(text) == Tokenizer(copy).encode(text) == expected(text)["input_ids"]


@pytest.mark.parametrize("wrap", [lambda c: c, lambda c: {"pretrained_config": c}], ids=["checkpoint", "engine"])
def test_a_class_that_only_the_kind_of_model_tells_is_found_in_a_saved_folder(wrap, byte_level, tmp_path):
    """transformers takes Qwen2's class because config.json says qwen2; our own config.json says the architecture."""
    stored = json.loads((byte_level / "tokenizer.json").read_text(encoding="utf-8"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (byte_level / name).unlink()
    merges = "\n".join(map(" ".join, stored["model"]["merges"]))
    (byte_level / "vocab.json").write_text(json.dumps(stored["model"]["vocab"]), encoding="utf-8")
    (byte_level / "merges.txt").write_text(merges, encoding="utf-8")
    (byte_level / "config.json").write_text('{"model_type": "qwen2"}')
    copy = tmp_path / "copy"
    copy.mkdir()
    copy_tokenizer(byte_level, copy)
    (copy / "config.json").write_text(json.dumps(wrap({"architecture": "Qwen2ForCausalLM"})))
    from transformers import AutoTokenizer

    expected = AutoTokenizer.from_pretrained(byte_level, trust_remote_code=False)
    assert type(Tokenizer(copy)._inner) is type(expected)
    for text in TEXTS:
        assert Tokenizer(byte_level).encode(text) == Tokenizer(copy).encode(text) == expected(text)["input_ids"]


@pytest.fixture(scope="module")
def sentencepiece_model():
    return train_sentencepiece(**LLAMA2_PIECES)


@pytest.mark.parametrize("config", [None, {"architecture": "LlamaForCausalLM"}], ids=["Meta's folder", "saved"])
def test_metas_sentencepiece_model_gives_the_ids_of_metas_code(config, sentencepiece_model, tmp_path):
    import sentencepiece

    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model)
    if config:
        (tmp_path / "config.json").write_text(json.dumps(config))
    assert find_tokenizer(tmp_path) == tmp_path
    reference = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model)
    tokenizer = Tokenizer(tmp_path)
    for text in TEXTS:
        ids = reference.encode(text)
        assert tokenizer.encode(text) == [reference.bos_id(), *ids], text
        assert tokenizer.decode(ids) == reference.decode(ids)
    assert tokenizer.end_ids == {reference.eos_id()}
    assert tokenizer.special_texts == {"<unk>": 0, "<s>": 1, "</s>": 2}


SETTINGS = {
    "text is normalized": {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
    "no space in front": {"add_dummy_prefix": False, "vocab_size": 390},
    "no bytes": {"byte_fallback": False, "vocab_size": 150},
    "words of its own": {"user_defined_symbols": ["<sep>", "cat sat"]},
    "a special token more": {"control_symbols": ["<end of turn>"], "pad_id": 3},
    "no first token": {"bos_id": -1},
    "unigram": {"model_type": "unigram", "hard_vocab_limit": False},
}


@pytest.mark.parametrize("settings", SETTINGS)
def test_settings_of_a_sentencepiece_model_are_kept(settings, tmp_path):
    import sentencepiece

    stored = train_sentencepiece(**LLAMA2_PIECES | SETTINGS[settings])
    (tmp_path / "tokenizer.model").write_bytes(stored)
    reference = sentencepiece.SentencePieceProcessor(model_proto=stored)
    tokenizer = Tokenizer(tmp_path)
    first = [reference.bos_id()] * (reference.bos_id() >= 0)
    for text in [*TEXTS, "a cat sat.<sep> the catcat sat"]:
        ids = reference.encode(text)
        assert tokenizer.encode(text) == [*first, *ids], text
        known = [number for number in ids if number != reference.unk_id()]
        assert tokenizer.decode(known) == reference.decode(known)


REFUSED = {
    "spaces at the end of words": ({"treat_whitespace_as_suffix": True}, "tokenizers library cannot follow"),
    "single characters": ({"model_type": "char", "vocab_size": 330}, "model type 4 is neither BPE nor unigram"),
}


@pytest.mark.parametrize("settings", REFUSED)
def test_settings_that_cannot_be_kept_are_refused(settings, tmp_path):
    options, words = REFUSED[settings]
    (tmp_path / "tokenizer.model").write_bytes(train_sentencepiece(**LLAMA2_PIECES | options))
    with pytest.raises(RequestError, match=words):
        Tokenizer(tmp_path).encode("a")


@pytest.mark.parametrize("legacy", [{}, {"legacy": True}, {"legacy": False}], ids=str)
@pytest.mark.parametrize("class_name", ["LlamaTokenizer", "PreTrainedTokenizerFast", None])
@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2"])
def test_a_sentencepiece_model_with_a_config_gives_its_ids(
    model_type, class_name, legacy, sentencepiece_model, tmp_path
):
    """transformers 5.17 leaves out the space in front of a text, and no version reads one as Qwen2's tokenizer."""
    import sentencepiece

    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    edit(tmp_path / "tokenizer_config.json", eos_token="</s>", **legacy, **{"tokenizer_class": class_name or ...})
    reference = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model)
    tokenizer = Tokenizer(tmp_path)
    for text in TEXTS:
        if not text.startswith((" ", "▁")):  # transformers counts a space that is there as the one in front
            ids = reference.encode(text)
            assert [i for i in tokenizer.encode(text) if i != reference.bos_id()] == ids, text
            assert tokenizer.decode(ids) == reference.decode(ids)
    assert tokenizer.end_ids == {reference.eos_id()}


@pytest.mark.parametrize(("legacy", "pieces"), [(True, "▁the▁cat"), (False, "the▁cat")])
def test_text_behind_a_special_token_begins_with_a_space_unless_legacy_is_off(
    legacy, pieces, sentencepiece_model, tmp_path
):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model)
    tokenizer, _ = read_sentencepiece(tmp_path / "tokenizer.model", legacy=legacy)
    tokens = tokenizer.encode("the cat</s>the cat").tokens
    end = tokens.index("</s>")
    assert "".join(tokens[:end]) == "▁the▁cat" and "".join(tokens[end + 1 :]) == pieces


@pytest.mark.parametrize("missing", ["sentencepiece", "google.protobuf"])
def test_a_missing_library_is_named(missing, sentencepiece_model, tmp_path, monkeypatch):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model)
    find = tokenizer_loading.importlib.util.find_spec
    monkeypatch.setattr(
        tokenizer_loading.importlib.util, "find_spec", lambda name: None if name == missing else find(name)
    )
    with pytest.raises(RequestError, match=f"needs {missing}; pip install sentencepiece protobuf"):
        Tokenizer(tmp_path).encode("a")


def bpe_ranks():
    """Ranks of a byte-level vocabulary, each token made of two earlier ones, as tiktoken's files list them."""
    tokens = [bytes([byte]) for byte in range(256)]
    for word in ("the", " the", " cat", "größe", " sat", "日本", "123", "\n\n", "  "):
        whole = word.encode()
        tokens += [whole[:end] for end in range(2, len(whole) + 1) if whole[:end] not in tokens]
    return {token: rank for rank, token in enumerate(dict.fromkeys(tokens))}


LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def test_metas_llama3_model_gives_the_ids_of_tiktoken(tmp_path):
    import tiktoken

    ranks = bpe_ranks()
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()]
    (tmp_path / "tokenizer.model").write_text("".join(lines))
    tokenizer = Tokenizer(find_tokenizer(tmp_path))
    base = len(ranks)
    special = {"<|begin_of_text|>": base, "<|end_of_text|>": base + 1, "<|eot_id|>": base + 9}
    reference = tiktoken.Encoding("llama3", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens=special)
    for text in [*TEXTS, "the cat<|eot_id|> sat"]:
        ids = reference.encode(text, allowed_special="all")
        assert tokenizer.encode(text) == [base, *ids], text
        plain = [token for token in ids if token < base]
        assert tokenizer.decode(ids) == reference.decode(plain)
    assert tokenizer.end_ids == {base + 1, base + 8, base + 9}  # end of text, of message, of turn
    names = tokenizer.special_texts
    assert names["<|start_header_id|>"] == base + 6 and names["<|end_header_id|>"] == base + 7
    assert len(names) == 256 and max(names.values()) == base + 255


def test_a_changed_tiktoken_model_is_read_again(tmp_path):
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in bpe_ranks().items()]
    (tmp_path / "tokenizer.model").write_text("".join(lines))
    longer = Tokenizer(tmp_path).encode("the cat")
    (tmp_path / "tokenizer.model").write_text("".join(lines[:256]))
    assert Tokenizer(tmp_path).encode("the cat") == [256, *b"the cat"] != longer


@pytest.mark.parametrize("class_name", ["LlamaTokenizer", "PreTrainedTokenizerFast"])
def test_a_changed_tiktoken_model_is_read_again_by_transformers_too(class_name, tmp_path, monkeypatch):
    """transformers reads it through tiktoken, which would leave a copy for the next reader of the same path."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    (tmp_path / "model").mkdir()
    edit(tmp_path / "model" / "tokenizer_config.json", tokenizer_class=class_name)
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in bpe_ranks().items()]
    for number in (len(lines), 256):
        (tmp_path / "model" / "tokenizer.model").write_text("".join(lines[:number]))
        assert (Tokenizer(tmp_path / "model").encode("the cat") == list(b"the cat")) == (number == 256)
    assert not (tmp_path / "temporary").exists() and "TIKTOKEN_CACHE_DIR" not in os.environ


@pytest.mark.parametrize("content", [b"", b"\x00" * 100, b"aGk= 0\nnot base64\n", b"aGk= 0\n\xff\xff 1\n", b"aGk= x\n"])
def test_a_damaged_tokenizer_model_is_a_request_error(content, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(RequestError, match="cannot be read"):
        Tokenizer(tmp_path).encode("a")


def test_no_code_of_a_model_folder_is_trusted_anywhere():
    root = Path(__file__).parents[2]
    files = [path for room in ("trtlab", "widgets", "tests", "benchmarks") for path in (root / room).rglob("*.py")]
    calls = [
        (path.name, node.lineno, {word.arg: ast.unparse(word.value) for word in node.keywords})
        for path in files
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".from_pretrained")
    ]
    assert len(calls) >= 9
    assert [call for call in calls if call[2].get("trust_remote_code") != "False"] == []
