"""The calls into TensorRT's runtime, held against a stand-in that obeys raw addresses and shapes alone.

No plan runs here: that takes a GPU. What is proved is that every tensor is bound where TensorRT will look for it, at
the shape it is told, that cache outputs alias their inputs, and that a replayed graph finds its data where it was.
"""

from __future__ import annotations

import contextlib
import ctypes
from types import SimpleNamespace

import pytest
import torch

from trtlab.config.build import BuildConfig
from trtlab.config.mapping import Mapping
from trtlab.config.quant import QuantConfig
from trtlab.errors import EngineError
from trtlab.parallel.step_inputs import Chunk, StepInputs
from trtlab.tensorrt import dtypes
from trtlab.tensorrt.bindings import bindings, profiles
from trtlab.tensorrt.emit.emission import emit
from trtlab.tensorrt.library import library
from trtlab.tensorrt.run import plan_runner as runtime
from trtlab.tensorrt.run.interpreter_runner import interpreter_backend
from trtlab.tensorrt.run.plan_rank import slot_backend

pytestmark = pytest.mark.tensorrt


def at_address(pointer: int, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The memory that a binding points to."""
    kind = dtypes.to_torch(dtype)
    count = torch.Size(shape).numel()
    raw = (ctypes.c_char * (count * kind.itemsize)).from_address(pointer)
    return torch.frombuffer(raw, dtype=kind, count=count).view(shape)


class Context:
    """Runs the interpreter on whatever lies at the addresses it was given, as TensorRT would."""

    def __init__(self, engine):
        self.engine, self.shapes, self.addresses, self.profile, self.memory = engine, {}, {}, None, None

    def set_optimization_profile_async(self, index, stream):
        self.profile = index
        return True

    def set_device_memory(self, pointer, size):
        self.memory = (pointer, size)

    def set_input_shape(self, name, shape):
        self.shapes[name] = shape
        return True

    def set_tensor_address(self, name, pointer):
        self.addresses[name] = pointer
        return True

    def execute_async_v3(self, stream):
        assert self.memory[1] >= self.engine.device_memory_size_v2
        work = self.bound(dict(self.shapes), dict(self.addresses))
        if self.engine.capturing is not None:
            self.engine.capturing.append(work)
        else:
            self.engine.eager += 1
            work()
        return self.engine.healthy

    def bound(self, shapes, addresses):
        network, table = self.engine.network, self.engine.table
        profile = profiles(self.engine.build)[self.profile]

        def work():
            inputs = {t.name: at_address(addresses[t.name], t.dtype, shapes[t.name]) for t in network.inputs}
            for binding in table.inputs:
                limits = zip(binding.sized(profile.dims("min")), binding.sized(profile.dims("max")), strict=True)
                assert all(low <= n <= high for n, (low, high) in zip(shapes[binding.name], limits, strict=True))
            for present, cache in table.caches.items():
                assert addresses[present] == addresses[cache]
            outputs = network.run(inputs)
            for binding in table.outputs:
                if binding.name not in table.caches:
                    result = outputs[binding.name]
                    at_address(addresses[binding.name], binding.dtype, tuple(result.shape)).copy_(result)

        return work


class Engine:
    device_memory_size_v2 = 64
    weight_streaming_budget_v2 = None

    def __init__(self, emission, build):
        self.network, self.table, self.build = emission.read(), emission.bindings, build
        self.capturing, self.eager, self.replays, self.healthy = None, 0, 0, True

    def create_execution_context(self, strategy):
        return Context(self)

    def get_weight_streaming_automatic_budget(self):
        return 12345


class Stream:
    cuda_stream = 1

    def __init__(self, device=None):
        pass

    def wait_stream(self, other):
        pass

    def synchronize(self):
        pass


@pytest.fixture
def opened(small, bounds, weights_of, monkeypatch):
    """A function that opens a stand-in plan: (runner, engine)."""
    plain = weights_of(small)

    class Graph:
        def __init__(self):
            self.works = []

        def replay(self):
            Graph.engine.replays += 1
            for work in self.works:
                work()

    @contextlib.contextmanager
    def capture(graph, stream):
        Graph.engine.capturing = graph.works
        yield
        Graph.engine.capturing = None

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: Stream())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)

    def open_plan(build=bounds, budget=None, opens=True, config=small, weights=plain):
        build = build.resolve(config)
        engine = Engine(emit(config, build, Mapping(), 0, weights), build)
        Graph.engine = engine
        real = library().trt

        class Trt:
            ILogger = real.ILogger
            ExecutionContextAllocationStrategy = real.ExecutionContextAllocationStrategy

            @staticmethod
            def Runtime(logger):
                return SimpleNamespace(deserialize_cuda_engine=lambda plan: engine if opens else None)

        monkeypatch.setattr(runtime, "library", lambda: SimpleNamespace(trt=Trt))
        table = bindings(config, build, Mapping(), 0)
        return runtime.PlanRunner(b"plan", table, build, torch.device("cpu"), budget), engine

    open_plan.weights = plain
    return open_plan


def steps():
    """Two prompts, then decoding with one slot, two slots, and the same two again and again."""
    yield StepInputs([Chunk(0, 0, [1, 2, 3]), Chunk(2, 0, [9, 8])])
    yield StepInputs([Chunk(0, 3, [4])])
    for i in range(4):
        yield StepInputs([Chunk(0, 4 + i, [5 + i]), Chunk(2, 2 + i, [7 - i])])
    yield StepInputs([Chunk(2, 6, [11]), Chunk(0, 8, [12])])
    yield StepInputs([Chunk(2, 7, [11])], every_token=True)


def test_bound_by_address_the_plan_gives_the_interpreters_logits(small, bounds, opened):
    runner, engine = opened()
    build = bounds.resolve(small)
    ours = slot_backend("tensorrt", [runner], [engine.table], build, Mapping()).ranks
    theirs = interpreter_backend(small, bounds, Mapping(), [opened.weights]).ranks
    for step in steps():
        assert torch.equal(ours.run(step), theirs.run(step))
    assert engine.replays == 3  # of five steps with slots 0 to 2: the first runs, the second is captured as well
    ours.close()


def test_a_quantized_cache_is_written_by_the_rank(small, bounds, weights_of, opened):
    config = small.replace(quantization=QuantConfig(kv_cache_quant_algo="INT8", kv_cache_scales="per_head"))
    weights = weights_of(config)
    for name in weights:
        if "cache_scaling_factor" in name:
            weights[name] = torch.full_like(weights[name], 0.02)
    runner, engine = opened(config=config, weights=weights)
    ours = slot_backend("tensorrt", [runner], [engine.table], bounds.resolve(config), Mapping()).ranks
    theirs = interpreter_backend(config, bounds, Mapping(), [weights]).ranks
    for step in steps():
        assert torch.equal(ours.run(step), theirs.run(step))
    assert engine.replays == 3
    ours.close()


def test_streamed_weights_are_never_captured(small, bounds, opened):
    build = BuildConfig(**{**vars(bounds), "weight_streaming": True})
    runner, engine = opened(build)
    assert engine.weight_streaming_budget_v2 == 12345
    ours = slot_backend("tensorrt", [runner], [engine.table], build.resolve(small), Mapping()).ranks
    for step in steps():
        ours.run(step)
    assert engine.replays == 0
    assert opened(build, budget=99)[1].weight_streaming_budget_v2 == 99


def test_results_do_not_change_when_the_next_step_runs(small, bounds, opened):
    runner, engine = opened()
    ours = slot_backend("tensorrt", [runner], [engine.table], bounds.resolve(small), Mapping()).ranks
    first = ours.run(StepInputs([Chunk(0, 0, [1, 2])]))
    kept = first.clone()
    ours.run(StepInputs([Chunk(0, 2, [3])]))
    assert torch.equal(first, kept)


def test_a_plan_that_does_not_open_or_run_is_an_error(small, bounds, opened):
    with pytest.raises(EngineError, match="could not open the plan on this GPU"):
        opened(opens=False)
    runner, engine = opened()
    engine.healthy = False
    with pytest.raises(EngineError, match="could not run the context profile"):
        slot_backend("tensorrt", [runner], [engine.table], bounds.resolve(small), Mapping()).ranks.run(
            StepInputs([Chunk(0, 0, [1, 2])])
        )
