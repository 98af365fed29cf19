"""Networks read back as a whole: ranks, refusals, inputs, tables and names."""

from __future__ import annotations

import json
import threading

import pytest
import torch

from trtlab.config.mapping import Mapping
from trtlab.errors import EngineError
from trtlab.parallel.comm import thread_group

pytestmark = pytest.mark.tensorrt


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_ranks_meet_in_collectives(new_network):
    def network(rank):
        hand = new_network()
        x = hand.input("x", "float32", (-1, 2))
        kinds, reductions = hand.trt.CollectiveOperation, hand.trt.ReduceOperation
        total = hand.net.add_dist_collective(x, kinds.ALL_REDUCE, reductions.SUM, -1, [0, 1])
        total.num_ranks, total.metadata = 2, json.dumps({"operation": "all_reduce", "reduce": "sum"})
        joined = hand.net.add_dist_collective(total.get_output(0), kinds.ALL_GATHER, reductions.NONE, -1, [0, 1])
        joined.num_ranks, joined.metadata = 2, json.dumps({"operation": "all_gather"})
        hand.output(joined)
        return hand.read()

    networks, comms = [network(rank) for rank in range(2)], thread_group(Mapping(tp_size=2))
    inputs, results = [random(3, 2), random(3, 2, seed=1)], [None, None]

    def work(rank):
        results[rank] = networks[rank].run({"x": inputs[rank]}, comm=comms[rank])["y"]

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = torch.cat([inputs[0] + inputs[1]] * 2)
    assert torch.equal(results[0], expected)
    assert torch.equal(results[1], expected)
    with pytest.raises(EngineError, match="exchanges tensors with the other ranks"):
        networks[0].run({"x": inputs[0]})


def test_a_collective_without_metadata_is_refused(by_hand):
    kinds, reductions = by_hand.trt.CollectiveOperation, by_hand.trt.ReduceOperation
    x = by_hand.input("x", "float32", (-1, 2))
    by_hand.output(by_hand.net.add_dist_collective(x, kinds.ALL_REDUCE, reductions.SUM, -1, [0, 1]))
    with pytest.raises(EngineError, match="does not name its operation"):
        by_hand.read()


def test_an_unknown_kind_of_layer_is_named(by_hand):
    layer = by_hand.net.add_topk(by_hand.input("x", "float32", (-1, 4)), by_hand.trt.TopKOperation.MAX, 1, 2)
    layer.name = "best"
    by_hand.output(layer)
    with pytest.raises(EngineError, match="'best' is a TOPK"):
        by_hand.read()


def test_an_unknown_operation_is_named(by_hand):
    layer = by_hand.net.add_unary(by_hand.input("x", "float32", (-1,)), by_hand.trt.UnaryOperation.COSH)
    by_hand.output(layer)
    with pytest.raises(EngineError, match="op=cosh has no kernel"):
        by_hand.run(x=random(2))


def test_a_dynamic_reshape_is_refused(by_hand):
    x = by_hand.input("x", "float32", (-1, 4))
    layer = by_hand.net.add_shuffle(x)
    layer.set_input(1, by_hand.constant("d", torch.tensor([2, -1])))
    by_hand.output(layer)
    with pytest.raises(EngineError, match="takes its shape from a tensor"):
        by_hand.read()


def test_a_constant_that_does_not_come_back_needs_the_table(by_hand):
    by_hand.constant("w", random(2, 2).bfloat16())
    by_hand.output(by_hand.net.add_identity(by_hand.net.get_layer(0).get_output(0)))
    assert by_hand.run().dtype == torch.bfloat16
    by_hand.constants.clear()
    with pytest.raises(EngineError, match="'w' is bfloat16"):
        by_hand.read()


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, r"missing \['x'\]"),
        ({"x": torch.zeros(2, 4), "z": torch.zeros(1)}, r"unknown \['z'\]"),
        ({"x": torch.zeros(2, 5)}, r"float32 \[2, 5\]; expected float32 \[-1, 4\]"),
        ({"x": torch.zeros(2, 4).half()}, "float16"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(by_hand, inputs, message):
    by_hand.output(by_hand.net.add_identity(by_hand.input("x", "float32", (-1, 4))))
    with pytest.raises(EngineError, match=message):
        by_hand.read().run(inputs)


def test_the_table_counts_bytes_and_flops(by_hand):
    operation = by_hand.trt.MatrixOperation
    x, w = by_hand.input("x", "bfloat16", (-1, 8)), by_hand.constant("w", random(3, 8).bfloat16())
    product = by_hand.net.add_matrix_multiply(x, operation.NONE, w, operation.TRANSPOSE)
    product.name = "product"
    by_hand.output(product)
    constant, row = by_hand.read().table({"x": (5, 8)})
    assert (constant.weight_bytes, constant.flops) == (3 * 8 * 2, 0)
    assert (row.name, row.kind, row.precision, row.shape) == ("product", "matrix_multiply", "bfloat16", (5, 3))
    assert row.flops == 2 * 5 * 3 * 8
    with pytest.raises(EngineError, match="'x' has no fixed shape"):
        by_hand.read().table({})


def test_a_layer_is_found_by_its_name_or_its_tensor(by_hand):
    layer = by_hand.net.add_identity(by_hand.input("x", "float32", (-1,)))
    layer.name = "same"
    by_hand.output(layer)
    network = by_hand.read()
    assert network["same"] is network["y"]
    assert [step.name for step, _ in network.steps({"x": random(1)})] == ["same"]
    with pytest.raises(EngineError, match="no layer or tensor named 'other'"):
        network["other"]
