"""Runs an emitted network, the one that TensorRT compiles, with torch on the CPU, in the network's own types."""

from __future__ import annotations

from collections import abc
from collections.abc import Sequence

import torch

from trtlab.config.build import BuildConfig
from trtlab.config.mapping import Mapping
from trtlab.config.model import ModelConfig
from trtlab.config.session import SessionConfig
from trtlab.parallel.comm import Comm
from trtlab.runtime.backend import Backend
from trtlab.tensorrt.bindings import HIDDEN_OUTPUT, HIDDEN_STATES
from trtlab.tensorrt.emit.emission import Emission, emit
from trtlab.tensorrt.run.plan_rank import Runner, slot_backend


class InterpreterRunner(Runner):
    """A ``Runner`` over one rank's emitted network."""

    device = torch.device("cpu")

    def __init__(self, emission: Emission) -> None:
        self._network = emission.read()
        self._table = emission.bindings

    def run(self, profile: str, inputs: dict[str, torch.Tensor], comm: Comm) -> dict[str, torch.Tensor]:
        if self._table.first.name == HIDDEN_STATES:
            inputs = {HIDDEN_STATES: comm.receive(), **inputs}
        outputs = self._network.run(inputs, comm=comm)
        if self._table.result.name == HIDDEN_OUTPUT:
            comm.send(outputs[HIDDEN_OUTPUT])
        return {name: tensor for name, tensor in outputs.items() if name not in self._table.caches}

    def close(self) -> None:
        del self._network


def interpreter_backend(
    config: ModelConfig,
    build: BuildConfig,
    mapping: Mapping,
    ranks: Sequence[abc.Mapping[str, torch.Tensor]],
    session: SessionConfig | None = None,
) -> Backend:
    """Open a backend that interprets the networks that TensorRT compiles; ``ranks`` are the tensors of each rank."""
    build = build.resolve(config)
    emissions = [emit(config, build, mapping, rank, weights) for rank, weights in enumerate(ranks)]
    runners = [InterpreterRunner(emission) for emission in emissions]
    return slot_backend("interpreter", runners, [emission.bindings for emission in emissions], build, mapping, session)
