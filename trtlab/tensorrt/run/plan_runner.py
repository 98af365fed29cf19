"""Makes the calls of TensorRT's runtime, and nothing else: open a plan, bind, run, replay a CUDA graph.

This file needs a GPU that the plan runs on. Everything around it (slots, masks, runs, checks) is shared with the
interpreter and tested on a CPU.
"""

from __future__ import annotations

from collections import abc

import torch

from trtlab.config.build import BuildConfig
from trtlab.config.mapping import Mapping
from trtlab.config.model import ModelConfig
from trtlab.config.session import SessionConfig
from trtlab.errors import EngineError
from trtlab.interrupts import hold_interrupts
from trtlab.parallel.comm import Comm
from trtlab.runtime.backend import Backend
from trtlab.tensorrt import dtypes
from trtlab.tensorrt.bindings import Bindings, bindings, profiles
from trtlab.tensorrt.build.plan import PlanRecord
from trtlab.tensorrt.build.plan_check import check_plan
from trtlab.tensorrt.library import library
from trtlab.tensorrt.log import log
from trtlab.tensorrt.run.plan_rank import Runner, slot_backend


class PlanRunner(Runner):
    """A ``Runner`` over a plan: one execution context per profile, one stream, one block of activation memory.

    ``streaming_budget_bytes`` is how much of the weights stays on the GPU; None lets TensorRT choose.
    """

    def __init__(
        self,
        plan: bytes,
        table: Bindings,
        build: BuildConfig,
        device: torch.device,
        streaming_budget_bytes: int | None = None,
    ) -> None:
        trt = library().trt
        self.device = device
        self._table = table
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._runtime = trt.Runtime(log(trt).native)
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise EngineError("TensorRT could not open the plan on this GPU", remedy="build it again on this machine")
        if build.weight_streaming:  # must be set before a context is created and before its memory size is read
            automatic = self._engine.get_weight_streaming_automatic_budget()
            self._engine.weight_streaming_budget_v2 = (
                automatic if streaming_budget_bytes is None else streaming_budget_bytes
            )
        # The two profiles never run at the same time, so they share their memory.
        size = max(1, int(self._engine.device_memory_size_v2))
        self._memory = torch.empty(size, dtype=torch.uint8, device=device)
        self._buffers: dict[tuple[str, str], torch.Tensor] = {}
        self._contexts = {}
        for index, profile in enumerate(profiles(build)):
            context = self._engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
            context.set_optimization_profile_async(index, self._stream.cuda_stream)
            context.set_device_memory(self._memory.data_ptr(), size)
            self._contexts[profile.name] = context
            largest = profile.dims("max")
            for binding in (*table.inputs, *table.outputs):
                if binding.name not in table.caches and binding not in table.cache_inputs:
                    kind, count = dtypes.to_torch(binding.dtype), torch.Size(binding.sized(largest)).numel()
                    self._buffers[profile.name, binding.name] = torch.empty(count, dtype=kind, device=device)
        self._stream.synchronize()
        # Streamed weights are copied while the plan runs, and a graph would not repeat the copies.
        self._may_capture = not build.weight_streaming
        self._graph: torch.cuda.CUDAGraph | None = None
        self._graph_key: object = None

    def run(self, profile: str, inputs: dict[str, torch.Tensor], comm: Comm) -> dict[str, torch.Tensor]:
        # A generation run of the same shape and slots as the last one is replayed as a CUDA graph.
        # Wait for what the caller queued on torch's stream, such as the zeros of a new cache.
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            bound = {name: self._at_fixed_address(profile, name, tensor) for name, tensor in inputs.items()}
            outputs = self._outputs(profile, inputs)
            key = tuple((name, tensor.data_ptr(), tuple(tensor.shape)) for name, tensor in bound.items())
            if self._graph is not None and key == self._graph_key:
                self._graph.replay()
            else:
                self._bind(profile, bound, outputs)
                self._enqueue(profile)
                if profile == "generation" and self._may_capture:
                    self._capture(key)
            name = self._table.result.name
            outputs[name] = outputs[name].clone()  # the next run overwrites the buffer
        self._stream.synchronize()
        return outputs

    def close(self) -> None:
        self._graph = None
        self._contexts, self._buffers = {}, {}
        self._engine = self._runtime = None
        self._memory = torch.empty(0)

    def _at_fixed_address(self, profile: str, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Copy an input to a fixed address, as a graph needs it; a cache already has one."""
        if any(name == binding.name for binding in self._table.cache_inputs):
            return tensor
        buffer = self._buffers[profile, name][: tensor.numel()].view(tensor.shape)
        buffer.copy_(tensor, non_blocking=True)
        return buffer

    def _outputs(self, profile: str, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The buffers of all outputs that are not caches, in the shapes that follow from these inputs."""
        sizes = {}
        for binding in self._table.inputs:
            for axis, size in enumerate(binding.shape):
                if isinstance(size, str):
                    sizes[size] = inputs[binding.name].shape[axis]
        outputs = {}
        for output in self._table.outputs:
            if output.name not in self._table.caches:
                shape = output.sized(sizes)
                buffer = self._buffers[profile, output.name]
                outputs[output.name] = buffer[: torch.Size(shape).numel()].view(shape)
        return outputs

    def _bind(self, profile: str, bound: dict[str, torch.Tensor], outputs: abc.Mapping[str, torch.Tensor]) -> None:
        context = self._contexts[profile]
        for name, tensor in bound.items():
            context.set_input_shape(name, tuple(tensor.shape))
            context.set_tensor_address(name, tensor.data_ptr())
        for name, tensor in outputs.items():
            context.set_tensor_address(name, tensor.data_ptr())
        for present, cache in self._table.caches.items():
            context.set_tensor_address(present, bound[cache].data_ptr())

    def _enqueue(self, profile: str) -> None:
        if not self._contexts[profile].execute_async_v3(torch.cuda.current_stream(self.device).cuda_stream):
            raise EngineError(
                f"TensorRT could not run the {profile} profile", remedy="read the log: logger trtlab.tensorrt"
            )

    def _capture(self, key: object) -> None:
        """Capture a generation run when it comes a second time; a batch that changes each step is never captured."""
        if key == self._graph_key and self._graph is None:
            self._stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self._stream):
                self._enqueue("generation")
            self._graph = graph
        elif key != self._graph_key:
            self._graph, self._graph_key = None, key


def plan_backend(
    config: ModelConfig,
    build: BuildConfig,
    mapping: Mapping,
    plan: bytes,
    record: PlanRecord,
    device: torch.device,
    session: SessionConfig | None = None,
    streaming_budget_bytes: int | None = None,
) -> Backend:
    """Open a backend for a plan on a GPU.

    Args:
        config: The model.
        build: The bounds that the plan was built with.
        mapping: One rank only.
        plan: The bytes of the plan, as ``Plans.read`` returns them.
        record: The record of the plan's build.
        device: The GPU.
        session: Settings of the pool; None for the defaults.
        streaming_budget_bytes: Bytes of weights that stay on the GPU; None lets TensorRT choose.

    Raises:
        EngineError: before the plan is opened, when it is of another TensorRT, not for this GPU, or one of several.
    """
    check_plan(record, gpu=torch.cuda.get_device_capability(device))
    if len(mapping.ranks) > 1:
        raise EngineError(
            "plans of several ranks do not run in one process yet",
            got=f"{len(mapping.ranks)} ranks",
            remedy='use backend="torch" or "interpreter"',
        )
    resolved = build.resolve(config)
    table = bindings(config, resolved, mapping, 0)
    with hold_interrupts():  # TensorRT logs while it opens a plan, and in its callback an interrupt would be lost
        runner = PlanRunner(plan, table, resolved, device, streaming_budget_bytes)
    return slot_backend("tensorrt", [runner], [table], resolved, mapping, session)
