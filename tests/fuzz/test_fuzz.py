"""A short run of the fuzzers with a fixed seed, and the faults that they must find."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from . import campaign
from .campaign import case_command, results
from .faults import FAULTS
from .registry import KINDS
from .results import Job

FEW = {"folder": 20, "tokenizer": 8, "template": 4}  # those whose cases take longest
AGAIN = [Job("config", 7, 8), Job("folder", 7, 8)]


@pytest.fixture(scope="module")
def place():
    """The folder for the scratch folders of all processes."""
    with campaign.scratch_folder() as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def every_result(place):
    """The results of a few cases of each kind, of two of them again, and of each fault.

    All run in one process, until the two faults at the end of the table end it; after the first the other goes on.
    """
    cases = [Job(kind, 0, FEW.get(kind, 30)) for kind in KINDS]
    faults = [Job(f"fault: {name}", 0, 1) for name in FAULTS]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(campaign, "scratch_folder", lambda: tempfile.TemporaryDirectory(dir=place))
        return list(results([*cases, *AGAIN, *faults], seed=1))


@pytest.fixture(scope="module")
def short_run(every_result):
    """The results of the cases, without the faults."""
    return [result for result in every_result if result.kind in KINDS]


def test_damaged_inputs_are_opened_or_refused(short_run):
    failures = [f"{case_command(r, 1)}\n{r.failure}\n{r.trace}" for r in short_run if r.failure]
    assert not failures, "\n".join(failures)
    assert {result.kind for result in short_run if "opened" in result.stages} == set(KINDS)
    assert sum("ran" in result.stages for result in short_run) > 20
    assert sum(bool(result.refused) for result in short_run) > 100


def test_a_case_depends_on_nothing_but_its_kind_seed_and_number(short_run):
    *before, config, folder = short_run
    for again in (config, folder):
        (first,) = (result for result in before if (result.kind, result.number) == (again.kind, again.number))
        assert (first.edits, first.stages) == (again.edits, again.stages)


@pytest.fixture(scope="module")
def found(every_result):
    """The failure of each fault."""
    return {result.kind: result.failure for result in every_result if result.kind not in KINDS}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(found, name):
    assert found[f"fault: {name}"].startswith(FAULTS[name][1])


def test_nothing_is_left_of_a_process_that_died(found, place):
    assert list(place.iterdir()) == []
