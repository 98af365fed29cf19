"""One step on every rank: whose logits come back, whose error is raised, and that no rank is left behind."""

from __future__ import annotations

import signal
import threading

import pytest
import torch

from trtlab import Mapping
from trtlab.parallel.comm import RankFailed
from trtlab.parallel.ranks import RankGroup
from trtlab.parallel.step_inputs import Chunk, StepInputs

STEP = StepInputs((Chunk(0, 0, (1, 2), (0,)),))


class Part:
    """A rank that sums with its neighbours and hands on; ``work`` runs first, to fail, wait or look."""

    def __init__(self, rank, mapping, work=lambda: None):
        self.rank, self.mapping, self.work = rank, mapping, work
        self.closed = self.copied = 0

    def run(self, step, comm):
        assert step is STEP
        self.work()
        x = torch.tensor(0.0) if self.mapping.pp_rank(self.rank) == 0 else comm.receive()
        x = comm.all_reduce(x + self.rank)
        if self.mapping.pp_rank(self.rank) == self.mapping.pp_size - 1:
            return x
        comm.send(x)
        return None

    def copy_blocks(self, copies):
        self.copied += len(copies)

    def close(self):
        self.closed += 1


def group_of(mapping, **work):
    return RankGroup([Part(rank, mapping, work.get(f"rank{rank}", lambda: None)) for rank in mapping.ranks], mapping)


@pytest.mark.parametrize(("tp", "pp", "expected"), [(1, 1, 0), (2, 1, 1), (1, 3, 3), (2, 2, 2 * (0 + 1) + 2 + 3)])
def test_the_logits_are_those_of_the_last_stage(tp, pp, expected):
    group = group_of(Mapping(tp_size=tp, pp_size=pp))
    assert float(group.run(STEP)) == float(group.run(STEP)) == expected
    group.close()


def test_a_single_rank_runs_in_the_callers_thread():
    seen = []
    group_of(Mapping(), rank0=lambda: seen.append(threading.current_thread())).run(STEP)
    assert seen == [threading.current_thread()]


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), ValueError("a bad number")], ids=repr)
@pytest.mark.parametrize("failing", range(4))
def test_the_error_is_that_of_the_rank_that_failed_and_the_next_step_runs(failing, error):
    def fail():
        raise error

    group = group_of(Mapping(tp_size=2, pp_size=2), **{f"rank{failing}": fail})
    with pytest.raises(type(error), match=str(error)) as caught:
        group.run(STEP)
    assert not isinstance(caught.value, RankFailed)
    group.ranks[failing].work = lambda: None
    assert float(group.run(STEP)) == 7
    group.close()


def test_after_an_interrupt_no_rank_is_still_in_the_step():
    inside, leave = threading.Event(), []

    def slow():
        inside.set()
        threading.Event().wait(0.2)
        leave.append(True)

    group = group_of(Mapping(tp_size=2))
    group.run(STEP)  # starts the threads
    group.ranks[1].work = slow
    main = threading.main_thread()

    def interrupt():
        inside.wait()
        threading.Event().wait(0.05)  # until the group waits for its ranks
        signal.pthread_kill(main.ident, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        group.run(STEP)
    assert leave == [True]
    thread.join()
    group.ranks[1].work = lambda: None
    assert float(group.run(STEP)) == 1
    group.close()


def test_blocks_are_copied_on_every_rank_and_each_is_closed_once():
    group = group_of(Mapping(pp_size=2))
    parts = group.ranks
    group.copy_blocks([(0, 1), (2, 3)])
    group.close()
    group.close()
    assert [(part.copied, part.closed) for part in parts] == [(2, 1), (2, 1)]
