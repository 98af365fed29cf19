"""What is free is what the system says, or less where a container has a limit."""

from __future__ import annotations

import pytest

from trtlab import hardware

MIB = 2**20


@pytest.fixture
def cgroup(monkeypatch, tmp_path):
    """``cgroup(files)`` writes the files of a container, text by name."""
    monkeypatch.setattr(hardware, "CGROUP_ROOT", tmp_path)

    def write(files):
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(text)

    return write


def test_without_a_container_it_is_what_the_system_says(cgroup):
    assert 0 < hardware.free_bytes() <= hardware.memory_bytes()


@pytest.mark.parametrize(
    "files",
    [
        {
            "memory.max": "10485760\n",
            "memory.current": "8388608\n",
            "memory.stat": "anon 1\ninactive_file 1048576\nactive_file 9\n",
        },
        {
            "memory/memory.limit_in_bytes": "10485760\n",
            "memory/memory.usage_in_bytes": "8388608\n",
            "memory/memory.stat": "inactive_file 7\ntotal_inactive_file 1048576\n",
        },
    ],
    ids=["version 2", "version 1"],
)
def test_the_limit_of_a_container_counts_and_droppable_pages_are_free(cgroup, files):
    cgroup(files)
    assert hardware.free_bytes() == 3 * MIB


def test_a_container_without_a_limit_changes_nothing_and_a_full_one_has_nothing(cgroup):
    cgroup({"memory.max": "max\n", "memory.current": "5\n"})
    assert hardware.free_bytes() > MIB
    cgroup({"memory.max": "4\n"})
    assert hardware.free_bytes() == 0
