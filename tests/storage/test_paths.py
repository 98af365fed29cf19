"""A path is absolute when it is opened; a link is followed only into the same model's files."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from trtlab import CheckpointError, ConfigError
from trtlab.storage.paths import absolute_path, has_file, require_file, require_folder


def test_a_path_is_absolute_and_the_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert absolute_path("model") == absolute_path(Path("./model")) == tmp_path / "model"
    assert absolute_path("~/model") == tmp_path / "home" / "model"
    assert absolute_path(".") == tmp_path


def test_two_dots_behind_a_link_mean_what_the_system_means(tmp_path):
    for name in ("a/b", "c"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "link").symlink_to("a/b")
    assert absolute_path(tmp_path / "link" / ".." / "x") == tmp_path / "a" / "x"
    assert absolute_path(tmp_path / "link" / "..") == tmp_path / "a"
    assert absolute_path(tmp_path / "c" / ".." / "link") == tmp_path / "link", "the last name may be a link"


@pytest.mark.parametrize("path", [None, 3, b"model", ["model"], "", "  ", "~nobody-of-this-name/model"])
def test_what_is_no_path_is_refused_with_what_to_do(path):
    with pytest.raises(ConfigError, match=r"expected a path|unknown user") as caught:
        absolute_path(path, error=ConfigError)
    assert caught.value.remedy


def hub_cache(root: Path) -> Path:
    """A model in Hugging Face's cache: files of a snapshot are links to blobs."""
    model = root / "models--org--name"
    snapshot = model / "snapshots" / "0123abc"
    (snapshot / "original").mkdir(parents=True)
    (model / "blobs").mkdir()
    (model / "blobs" / "feed").write_text("x")
    (snapshot / "config.json").symlink_to("../../blobs/feed")
    (snapshot / "original" / "params.json").symlink_to("../../../blobs/feed")
    return snapshot


def test_links_into_the_same_models_files_are_followed(tmp_path):
    snapshot = hub_cache(tmp_path)
    assert has_file(snapshot / "config.json") and has_file(snapshot / "original" / "params.json")
    (tmp_path / "folder").symlink_to(snapshot)
    assert has_file(tmp_path / "folder" / "config.json"), "the folder itself may be a link"
    (snapshot / "plain").write_text("x")
    (snapshot / "alias").symlink_to("plain")
    assert has_file(snapshot / "alias")


def test_links_out_of_the_model_are_refused(tmp_path):
    snapshot = hub_cache(tmp_path)
    other = hub_cache(tmp_path / "other")
    (tmp_path / "secret").write_text("x")
    (tmp_path / "models--org--name" / "blobs" / "indirect").symlink_to(tmp_path / "secret")
    for number, target in enumerate(
        (
            tmp_path / "secret",
            "../../../secret",
            "../../blobs/indirect",
            other / "config.json",
            tmp_path / "models--org--name" / "snapshots" / "0123abc" / ".." / "other-revision" / "file",
        )
    ):
        link = snapshot / f"link{number}"
        link.symlink_to(target)
        (tmp_path / "models--org--name" / "snapshots" / "other-revision").mkdir(exist_ok=True)
        (tmp_path / "models--org--name" / "snapshots" / "other-revision" / "file").write_text("x")
        with pytest.raises(CheckpointError, match="outside of the model's folder") as caught:
            has_file(link)
        assert str(link) in caught.value.what and caught.value.remedy


def test_a_link_to_nothing_is_said_to_be_one(tmp_path):
    (tmp_path / "config.json").symlink_to("gone")
    with pytest.raises(CheckpointError, match=r"config\.json is a link to gone, which is missing"):
        has_file(tmp_path / "config.json")
    (tmp_path / "folder").symlink_to("gone")
    with pytest.raises(CheckpointError, match=r"folder is not a folder.*a link to gone, which is missing"):
        require_folder(tmp_path / "folder", remedy="x")


def test_a_file_that_is_not_there_is_missing(tmp_path):
    assert not has_file(tmp_path / "config.json") and not has_file(tmp_path / "gone" / "config.json")
    (tmp_path / "file").write_text("x")
    assert not has_file(tmp_path / "file" / "config.json")
    with pytest.raises(CheckpointError, match=r"config\.json is missing; copy"):
        require_file(tmp_path / "config.json")


def circle(folder: Path) -> Path:
    (folder / "one").symlink_to("two")
    (folder / "two").symlink_to("one")
    return folder / "one"


def pipe(folder: Path) -> Path:
    os.mkfifo(folder / "pipe")
    return folder / "pipe"


UNREADABLE = {
    "a folder": (lambda f: f, "is a folder; expected a file"),
    "a circle of links": (circle, "cannot be read: Too many levels of symbolic links"),
    "a name of 300 characters": (lambda f: f / ("n" * 300), "cannot be read: File name too long"),
    "a name with a NUL": (lambda f: f / "a\0b", r"a\\x00b cannot be the name of a file: embedded null byte"),
    "half a character": (lambda f: f / "a\ud800", "cannot be the name of a file"),
    "a pipe": (pipe, "is not a regular file"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_cannot_be_read_is_named_with_the_systems_reason(name, tmp_path):
    make, words = UNREADABLE[name]
    path = make(tmp_path)
    for check in (has_file, require_file):
        with pytest.raises(CheckpointError, match=words) as caught:
            check(path)
        assert caught.value.remedy and len(str(caught.value)) < 600


@pytest.mark.parametrize("name", ["a circle of links", "a name of 300 characters", "a name with a NUL", "a pipe"])
def test_a_folder_that_cannot_be_read_is_named_with_the_systems_reason(name, tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot be|not a folder") as caught:
        require_folder(UNREADABLE[name][0](tmp_path), remedy="try another")
    assert caught.value.remedy


FORBIDDEN = """
import os, sys
from pathlib import Path
from trtlab.errors import TrtlabError
from trtlab.storage.paths import has_file
if os.getuid() == 0:
    os.setuid(65534)
for name in ("closed/config.json", "open/closed.json"):
    try:
        has_file(Path(sys.argv[1], name))
    except TrtlabError as error:
        print(error)
"""


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_a_folder_of_another_user_is_not_said_to_be_empty():
    with tempfile.TemporaryDirectory() as place:  # pytest's own folders are closed to other users
        for name in ("closed/config.json", "open/closed.json"):
            Path(place, name).parent.mkdir()
            Path(place, name).write_text("{}")
        Path(place).chmod(0o755)
        Path(place, "open/closed.json").chmod(0)
        Path(place, "closed").chmod(0)
        process = subprocess.run([sys.executable, "-c", FORBIDDEN, place], capture_output=True, text=True, check=True)
        Path(place, "closed").chmod(0o700)
    lines = process.stdout.splitlines()
    assert len(lines) == 2
    assert all("Permission denied; change its permissions" in line for line in lines), lines
