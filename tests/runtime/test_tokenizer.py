"""A folder's tokenizer is read once, and again when its files are others."""

from __future__ import annotations

import json
import os
import shutil

import pytest

from trtlab import Checkpoint, TrtlabError
from trtlab.runtime.tokenizer import Tokenizer


def test_the_same_files_are_read_once(talking_model):
    assert Tokenizer(talking_model)._inner is Tokenizer(talking_model / ".." / talking_model.name)._inner


def test_changed_files_are_read_again(talking_model, tmp_path):
    folder = shutil.copytree(talking_model, tmp_path / "own")
    before = Tokenizer(folder)
    assert before.encode("a cat")
    path = folder / "tokenizer.json"
    stored = json.loads(path.read_text(encoding="utf-8"))
    assert stored["model"]["merges"]
    stored["model"]["merges"] = []  # every byte stays a token of its own
    path.write_text(json.dumps(stored), encoding="utf-8")
    os.utime(path, ns=(1, 1))  # whatever the clock says
    assert len(Tokenizer(folder).encode("a cat")) > len(before.encode("a cat"))
    assert Tokenizer(folder).decode(Tokenizer(folder).encode("a cat")) == "a cat"


def test_a_tokenizer_that_is_a_link_to_nothing_is_told_at_its_use_and_at_a_save(talking_model, tmp_path):
    folder = shutil.copytree(talking_model, tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to("gone")
    checkpoint = Checkpoint.from_hugging_face(folder)
    assert checkpoint.tokenizer_path == folder
    for use in (Tokenizer(folder).encode, lambda text: checkpoint.save(tmp_path / text)):
        with pytest.raises(TrtlabError, match=r"tokenizer\.json is a link to gone, which is missing"):
            use("text")
