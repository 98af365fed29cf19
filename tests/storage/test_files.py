"""Folders and files are replaced completely or not at all: after an error, on a full disk, after a kill."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from trtlab import BuildConfig, Checkpoint, CheckpointError, Engine, EngineError, TrtlabError
from trtlab.storage.files import replacing, write_safetensors
from trtlab.storage.lazy import LazyTensor, in_memory, open_safetensors


def ours(name: str) -> bool:
    return name in ("config.json", "data")


def fill(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(json.dumps({"marker": text}))
    (folder / "data").write_text(text)


def replace(folder: Path):
    return replacing(folder, ours=ours, marker="marker", error=CheckpointError)


def test_a_new_folder_appears_whole_with_its_parents(tmp_path, files_of):
    with replace(tmp_path / "a" / "b") as scratch:
        fill(scratch, "new")
        assert not (tmp_path / "a" / "b").exists()
    assert set(files_of(tmp_path)) == {"a/b/config.json", "a/b/data"}


def test_an_old_folder_is_replaced_and_none_of_it_is_left(tmp_path, files_of):
    for text in ("old", "new"):
        with replace(tmp_path / "x") as scratch:
            fill(scratch, text)
            if text == "old":
                (scratch / "data").rename(scratch / "data")
    assert files_of(tmp_path) == {"x/config.json": b'{"marker": "new"}', "x/data": b"new"}
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


@pytest.fixture
def no_exchange(monkeypatch):
    """A system that cannot exchange two folders in one step."""
    monkeypatch.setattr("trtlab.storage.files._exchange", lambda *_: False)


def test_without_an_atomic_exchange_two_renames_do(tmp_path, files_of, no_exchange):
    test_an_old_folder_is_replaced_and_none_of_it_is_left(tmp_path, files_of)


def test_without_an_atomic_exchange_a_link_is_replaced_too(tmp_path, no_exchange):
    test_a_link_is_replaced_and_what_it_points_to_stays(tmp_path)


KILLED_AT_EACH_LINE = """
import json, os, signal, sys
from pathlib import Path
from trtlab import CheckpointError
from trtlab.storage import files
place, can_exchange = Path(sys.argv[1]), sys.argv[2] == "exchange"
if not can_exchange:
    files._exchange = lambda *_: False
def save(text):
    with files.replacing(place / "x", ours=lambda _: True, marker="marker", error=CheckpointError) as scratch:
        (scratch / "config.json").write_text(json.dumps({"marker": text}))
        (scratch / "data").write_text(text)
def save_until(line):
    def count(frame, event, _):
        nonlocal line
        if frame.f_code.co_filename.startswith(os.path.dirname(files.__file__)):
            line -= event == "line"
            if line == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return count
    sys.settrace(count)
    save("new")
    os._exit(0)
seen, line = [], 0
while not seen or seen[-1][0] != 0:
    save("old")
    assert os.listdir(place) == ["x"], os.listdir(place)
    line += 1
    child = os.fork()
    if child == 0:
        save_until(line)
    status = os.waitpid(child, 0)[1]
    hidden = not (place / "x").exists()
    files.finish_replacement(place / "x", error=CheckpointError)
    texts = {json.loads((place / "x" / "config.json").read_text())["marker"], (place / "x" / "data").read_text()}
    seen.append((status, hidden, *texts))
print(json.dumps(seen))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork")
@pytest.mark.parametrize("way", ["exchange", "two renames"])
def test_a_kill_at_any_line_leaves_the_old_folder_or_the_new_one_and_the_next_save_collects_the_rest(way, tmp_path):
    process = in_another_process(KILLED_AT_EACH_LINE, tmp_path, way)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    seen = json.loads(output)
    assert len(seen) > 40 and {status for status, *_ in seen[:-1]} == {signal.SIGKILL}
    texts = [text for _, _, *texts in seen for text in texts]
    assert len(texts) == len(seen), "a folder is never a mixture"
    assert texts == sorted(texts, reverse=True) and {*texts} == {"old", "new"}
    assert any(hidden for _, hidden, *_ in seen) == (way == "two renames")


def test_a_folder_that_a_killed_process_hid_is_found_by_whoever_opens_it(saved, random_model, tmp_path, files_of):
    saved.build(BuildConfig(), plan=False).save(tmp_path / "engine")
    saved.save(tmp_path / "ckpt-2")
    before = files_of(tmp_path)
    for name, load in (("ckpt", Checkpoint.load), ("engine", Engine.load)):
        (tmp_path / name).rename(tmp_path / f".{name}.partial-old")
        load(tmp_path / name)
        assert files_of(tmp_path) == before


def test_an_interrupt_between_the_two_renames_leaves_the_old_folder(tmp_path, files_of, no_exchange, monkeypatch):
    with replace(tmp_path / "x") as scratch:
        fill(scratch, "old")
    before, rename = files_of(tmp_path), Path.rename

    def interrupted(self, target):
        if self.name.endswith(".partial"):
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), replace(tmp_path / "x") as scratch:
        fill(scratch, "new")
    assert files_of(tmp_path) == before and [p.name for p in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), SystemExit(1), CheckpointError("x")])
def test_an_error_midway_leaves_the_old_folder_as_it_was(error, tmp_path, files_of):
    with replace(tmp_path / "x") as scratch:
        fill(scratch, "old")
    before = files_of(tmp_path)
    with pytest.raises(type(error)), replace(tmp_path / "x") as scratch:
        fill(scratch, "new")
        raise error
    assert files_of(tmp_path) == before and [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_system_error_midway_is_explained(tmp_path):
    with pytest.raises(CheckpointError, match=r"No space left.*free some space"), replace(tmp_path / "x"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert list(tmp_path.iterdir()) == []


FOREIGN = {
    "another file beside": {"config.json": '{"marker": 1}', "thesis.tex": "x"},
    "a config of something else": {"config.json": '{"editor": "vi"}'},
    "a config that is damaged": {"config.json": '{"marker"'},
    "no config": {"data": "precious"},
    "a hidden file": {"config.json": '{"marker": 1}', ".git": "x"},
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_folder_is_refused_and_nothing_in_it_is_lost(name, tmp_path, files_of):
    folder = tmp_path / "x"
    folder.mkdir()
    for file, text in FOREIGN[name].items():
        (folder / file).write_text(text)
    before = files_of(tmp_path)
    with pytest.raises(CheckpointError, match="may replace") as caught, replace(folder) as scratch:
        fill(scratch, "new")
    assert caught.value.remedy and files_of(tmp_path) == before


def test_a_folder_within_is_foreign(tmp_path):
    (tmp_path / "x" / "sub").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="sub"), replace(tmp_path / "x"):
        pass


@pytest.mark.parametrize("name", ["x", "x/y"])
def test_a_file_in_the_way_is_refused(name, tmp_path):
    (tmp_path / "x").write_text("precious")
    with (
        pytest.raises(CheckpointError, match=r"x is a file, not a folder|y cannot be written") as caught,
        replace(tmp_path / name),
    ):
        pass
    assert caught.value.remedy and (tmp_path / "x").read_text() == "precious"


def test_a_link_to_nothing_in_the_way_is_refused(tmp_path):
    (tmp_path / "x").symlink_to("gone")
    with (
        pytest.raises(CheckpointError, match="x is a link to gone, which is missing; remove the link"),
        replace(tmp_path / "x"),
    ):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("name", ["n" * 300, "a\0b", "half\ud800", "", "~no-such-user/x", "/"])
def test_a_name_that_no_folder_can_have_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError) as caught, replace(name):
        pass
    assert caught.value.remedy and list(tmp_path.iterdir()) == []


FORBIDDEN = """
import os, sys
from pathlib import Path
from trtlab import CheckpointError
from trtlab.storage.files import replacing
if os.getuid() == 0:
    os.setuid(65534)
for name in sys.argv[2:]:
    try:
        with replacing(Path(sys.argv[1], name), ours=lambda _: True, marker="marker", error=CheckpointError) as scratch:
            (scratch / "config.json").write_text('{"marker": 1}')
    except CheckpointError as error:
        print(name, error.what.replace(sys.argv[1], ""), error.remedy, sep="; ")
"""


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_a_folder_of_another_user_is_refused_and_unchanged(files_of):
    with tempfile.TemporaryDirectory() as place:  # pytest's own folders are closed to other users
        for name in ("closed", "readable", "sticky", "hidden"):
            Path(place, name, "x").mkdir(parents=True)
            fill(Path(place, name, "x"), "old")
        Path(place, "hidden", "x").rename(Path(place, "hidden", ".x.partial-old"))
        before = files_of(Path(place))
        for name, mode in {".": 0o755, "closed/x": 0, "sticky": 0o1777, "readable": 0o555, "hidden": 0o555}.items():
            Path(place, name).chmod(mode)
        names = ["closed/x", "readable/x", "readable/new", "hidden/x", *["sticky/x"] * (os.getuid() == 0)]
        process = in_another_process(FORBIDDEN, place, *names)
        output, errors = process.communicate(timeout=60)
        for name in ("closed/x", "readable", "hidden"):
            Path(place, name).chmod(0o755)
        assert files_of(Path(place)) == before, "and nothing is left beside"
    lines = [
        "closed/x; /closed/x cannot be written: Permission denied; choose a writable place",
        "readable/x; /readable/x cannot be written: Permission denied; choose a writable place",
        "readable/new; /readable/new cannot be written: Permission denied; choose a writable place",
        "hidden/x; /hidden/x was being replaced when its process was killed; its content is in .x.partial-old beside "
        f"it; rename {place}/hidden/.x.partial-old to x, as a user who may",
        "sticky/x; /sticky/x could not be written: Operation not permitted; "
        "nothing was changed; free some space or choose another place",
    ]
    assert output.splitlines() == lines[: len(names)], errors


def test_an_empty_folder_may_be_filled(tmp_path):
    (tmp_path / "x").mkdir()
    with replace(tmp_path / "x") as scratch:
        fill(scratch, "new")
    assert (tmp_path / "x" / "data").read_text() == "new"


def test_a_link_is_replaced_and_what_it_points_to_stays(tmp_path):
    with replace(tmp_path / "real") as scratch:
        fill(scratch, "old")
    (tmp_path / "link").symlink_to("real")
    with replace(tmp_path / "link") as scratch:
        fill(scratch, "new")
    assert (tmp_path / "real" / "data").read_text() == "old"
    assert (tmp_path / "link" / "data").read_text() == "new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "real"]


def test_a_new_folder_has_the_rights_that_mkdir_gives(tmp_path):
    (tmp_path / "plain").mkdir()
    with replace(tmp_path / "x") as scratch:
        fill(scratch, "new")
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "plain").stat().st_mode


# --- safetensors

dtypes = st.sampled_from(
    [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.bool, torch.int64]
)
shapes = st.lists(st.integers(0, 5), max_size=3)


@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8"), min_size=1, max_size=8), st.tuples(dtypes, shapes), max_size=6
    )
)
def test_what_is_written_is_what_the_library_reads(tmp_path, specs):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        n: torch.randint(0, 100, s, generator=generator).to(d) for n, (d, s) in specs.items() if n != "__metadata__"
    }
    seen = []
    write_safetensors(
        tmp_path / "f", {n: in_memory(t) for n, t in tensors.items()}, on_tensor=lambda t: seen.append(t.nbytes)
    )
    for found in (load_file(tmp_path / "f"), {n: t.read() for n, t in open_safetensors(tmp_path / "f").items()}):
        assert found.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
    assert sum(seen) == sum(tensor.nbytes for tensor in tensors.values())


def test_views_and_parameters_are_written_by_their_values(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    parts = {"turned": base.T, "cut": base[:, 1:3], "learned": torch.nn.Parameter(base.clone())}
    write_safetensors(tmp_path / "f", {name: in_memory(tensor) for name, tensor in parts.items()})
    found = load_file(tmp_path / "f")
    assert all(torch.equal(found[name], tensor) for name, tensor in parts.items())


def test_one_tensor_is_in_memory_at_a_time(tmp_path):
    readings, most = [], []

    def read():
        most.append(sum(reference() is not None for reference in readings))
        tensor = torch.ones(4)
        readings.append(weakref.ref(tensor))
        return tensor

    write_safetensors(tmp_path / "f", {str(i): LazyTensor((4,), torch.float32, read) for i in range(5)})
    assert most == [0] * 5


def test_a_file_that_is_replaced_while_open_or_removed_is_noticed(tmp_path):
    write_safetensors(tmp_path / "f", {"x": in_memory(torch.zeros(4))})
    opened = open_safetensors(tmp_path / "f")
    assert opened["x"].read().tolist() == [0.0] * 4
    write_safetensors(tmp_path / "g", {"x": in_memory(torch.ones(4))})
    (tmp_path / "g").replace(tmp_path / "f")
    with pytest.raises(CheckpointError, match="changed since it was opened") as caught:
        opened["x"].read()
    assert caught.value.remedy
    (tmp_path / "f").unlink()
    with pytest.raises(CheckpointError, match="f is gone: it was there when its folder was opened"):
        opened["x"].read()


# --- saving through it all


@pytest.fixture
def saved(random_model, tmp_path):
    checkpoint = Checkpoint.from_hugging_face(random_model())
    checkpoint.save(tmp_path / "ckpt")
    return checkpoint


@pytest.mark.parametrize("after", [0, 1, 3, 7])
def test_a_full_disk_leaves_the_old_checkpoint_whole(after, saved, tmp_path, files_of, monkeypatch):
    before = files_of(tmp_path)
    writes = iter(range(1000))

    def full(value):
        if next(writes) >= after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return memoryview(value.contiguous().reshape(-1).view(torch.uint8).numpy())

    monkeypatch.setattr("trtlab.storage.files.raw_bytes", full)
    with pytest.raises(CheckpointError, match=r"No space left on device.*nothing was changed") as caught:
        saved.save(tmp_path / "ckpt")
    assert caught.value.remedy
    with pytest.raises(EngineError, match=r"No space left"):
        saved.build(BuildConfig(), plan=False).save(tmp_path / "engine")
    assert files_of(tmp_path) == before
    Checkpoint.load(tmp_path / "ckpt")


def in_another_process(code: str, *words: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


KILLED = """
import sys, time
from trtlab import Checkpoint
from trtlab.storage.lazy import LazyTensor
checkpoint = Checkpoint.from_hugging_face(sys.argv[1])
slow = {}
def later(read):
    def slowly():
        print("tensor", flush=True)
        time.sleep(0.3)
        return read()
    return slowly
for name, tensor in checkpoint.tensors.items():
    slow[name] = LazyTensor(tensor.shape, tensor.dtype, later(tensor.read))
import dataclasses
dataclasses.replace(checkpoint, tensors=slow).save(sys.argv[2])
"""


def test_a_file_that_the_system_cuts_off_leaves_the_old_checkpoint_whole(saved, random_model, tmp_path, files_of):
    resource = pytest.importorskip("resource", reason="Windows has no resource limits")
    before = files_of(tmp_path)
    other, usual = Checkpoint.from_hugging_face(random_model(seed=5)), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, usual[1]))
    try:
        with pytest.raises(CheckpointError, match="could not be written: File too large"):
            other.save(tmp_path / "ckpt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert files_of(tmp_path) == before


def test_a_kill_midway_leaves_the_old_checkpoint_whole(saved, random_model, tmp_path, files_of):
    before = files_of(tmp_path / "ckpt")
    process = in_another_process(KILLED, random_model(seed=5), tmp_path / "ckpt")
    for _ in range(4):
        assert process.stdout.readline() == "tensor\n"
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert files_of(tmp_path / "ckpt") == before
    assert Checkpoint.load(tmp_path / "ckpt").parameters == saved.parameters
    assert [path.name.startswith(".ckpt-") for path in tmp_path.iterdir()].count(True) == 1
    saved.save(tmp_path / "ckpt")
    assert files_of(tmp_path / "ckpt") == before
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt"], "what the dead process left is gone"


def test_what_living_saves_and_others_hold_is_left_alone(tmp_path):
    for name in (".x-not-ours", ".x-abcdefgh", ".y-abcdefgh.partial"):
        (tmp_path / name).mkdir()
    with replace(tmp_path / "x") as first:
        with replace(tmp_path / "x") as second:
            assert first.is_dir() and first != second
            fill(second, "second")
        fill(first, "first")
    assert (tmp_path / "x" / "data").read_text() == "first"
    assert {path.name for path in tmp_path.iterdir()} == {"x", ".x-not-ours", ".x-abcdefgh", ".y-abcdefgh.partial"}


def test_a_folder_that_cannot_be_written_is_named(saved, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="cannot be written") as caught:
        saved.save(tmp_path / "file" / "ckpt")
    assert caught.value.remedy


def test_each_kind_of_folder_replaces_only_its_own(saved, random_model, tmp_path, files_of):
    engine = saved.build(BuildConfig(), plan=False)
    engine.save(tmp_path / "engine")
    before = files_of(tmp_path)
    source = files_of(random_model())
    for save, place in (
        (saved.save, tmp_path / "engine"),
        (engine.save, tmp_path / "ckpt"),
        (saved.save, random_model()),
        (engine.save, random_model()),
    ):
        with pytest.raises(TrtlabError, match="may replace") as caught:
            save(place)
        assert caught.value.remedy == "choose a new folder"
    assert files_of(tmp_path) == before and files_of(random_model()) == source
    saved.save(tmp_path / "ckpt")
    engine.save(tmp_path / "engine")
    assert Engine.load(tmp_path / "engine").config == engine.config


def test_saving_over_its_own_source_is_safe_and_the_old_object_says_so(saved, tmp_path):
    from trtlab import Mapping

    opened = Checkpoint.load(tmp_path / "ckpt")
    expected = {name: tensor.read().clone() for name, tensor in opened.tensors.items()}
    opened.save(tmp_path / "ckpt", Mapping(tp_size=2))
    again = Checkpoint.load(tmp_path / "ckpt")
    assert all(torch.equal(again.tensors[name].read(), tensor) for name, tensor in expected.items())
    with pytest.raises(CheckpointError, match=r"changed since it was opened.*open its folder again"):
        opened.save(tmp_path / "other")
    with pytest.raises(TrtlabError, match="changed since it was opened"):
        opened.build(BuildConfig(), plan=False).save(tmp_path / "engine")
