"""Threads that exchange tensors: sums and parts in rank order, stages in a line, no rank left waiting."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from trtlab import Mapping
from trtlab.parallel.comm import Solo, thread_group


def on_every_rank(mapping, work):
    """``work(rank, comm)`` on a thread a rank; the results in rank order. A rank that waits for ever fails the test."""
    comms = thread_group(mapping)
    with ThreadPoolExecutor(len(comms)) as pool:
        futures = [pool.submit(work, rank, comm) for rank, comm in enumerate(comms)]
        return [future.result(timeout=20) for future in futures]


def test_all_reduce_sums_over_the_tensor_parallel_group_alone():
    results = on_every_rank(
        Mapping(tp_size=3, pp_size=2), lambda rank, comm: comm.all_reduce(torch.tensor([10.0**rank]))
    )
    assert [float(x) for x in results] == [111.0] * 3 + [111000.0] * 3


def test_all_reduce_gives_every_rank_the_same_bits():
    parts = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0))
    results = on_every_rank(Mapping(tp_size=4), lambda rank, comm: comm.all_reduce(parts[rank]))
    expected = ((parts[0] + parts[1]) + parts[2]) + parts[3]
    assert all(torch.equal(x, expected) for x in results)


def test_all_gather_lays_parts_side_by_side_in_rank_order():
    results = on_every_rank(Mapping(tp_size=3), lambda rank, comm: comm.all_gather(torch.full((2, 1), float(rank))))
    assert all(x.tolist() == [[0.0, 1.0, 2.0]] * 2 for x in results)


def test_many_rounds_do_not_mix():
    def work(rank, comm):
        return [float(comm.all_reduce(torch.tensor(float(n * (rank + 1))))) for n in range(300)]

    assert on_every_rank(Mapping(tp_size=4), work) == [[10.0 * n for n in range(300)]] * 4


def test_send_reaches_the_same_place_of_the_next_stage():
    def work(rank, comm):
        if rank < 2:
            return comm.send(torch.tensor(rank))
        received = int(comm.receive())
        if rank < 4:
            comm.send(torch.tensor(received + 10))
        return received

    assert on_every_rank(Mapping(tp_size=2, pp_size=3), work) == [None, None, 0, 1, 10, 11]


@pytest.mark.parametrize("broken", range(4))
def test_a_rank_that_fails_wakes_all_that_wait_for_it(broken):
    mapping = Mapping(tp_size=2, pp_size=2)
    comms = thread_group(mapping)
    outcome: list[str] = [""] * 4

    def work(rank):
        comm = comms[rank]
        try:
            if rank == broken:
                raise ValueError("broken")
            x = comm.receive() if rank >= 2 else torch.ones(1)
            x = comm.all_reduce(x)
            if rank < 2:
                comm.send(x)
            outcome[rank] = "done"
        except (ValueError, RuntimeError) as error:
            comm.abort()
            outcome[rank] = type(error).__name__

    threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert not any(thread.is_alive() for thread in threads)
    assert outcome[broken] == "ValueError"
    assert outcome[broken ^ 1] == "RankFailed"


def test_a_single_rank_is_its_own_group():
    x = torch.ones(2)
    assert Solo().all_reduce(x) is x and Solo().all_gather(x) is x
    with pytest.raises(AssertionError):
        Solo().send(x)
    with pytest.raises(AssertionError):
        Solo().receive()
