"""A folder's tokenizer is read once, and again when its files are others."""

from __future__ import annotations

import json
import os
import shutil

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
