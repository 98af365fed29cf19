"""The card of a machine."""

from __future__ import annotations

from trtlab.card import Card, card, size
from trtlab.machine import Machine


@card.register
def machine_card(machine: Machine) -> Card:
    """The hardware and libraries of a machine, and whether it builds and runs plans."""
    gpus = tuple(
        (f"GPU {i}", f"{gpu.name}, {size(gpu.memory_bytes)}, compute capability {gpu.compute_capability}")
        for i, gpu in enumerate(machine.gpus)
    )
    return Card(
        f"Machine · {machine.system}",
        (
            ("processor", f"{machine.cores} cores, {size(machine.memory_bytes)}"),
            *(gpus or (("GPU", "none: sessions run in torch on the processor"),)),
            ("torch", machine.torch),
            ("TensorRT", machine.tensorrt),
            ("plans", f"build here: {_yes(machine.builds_plans)}, run here: {_yes(machine.runs_plans)}"),
            ("MPI", "mpi4py is installed" if machine.mpi else "none"),
        ),
    )


def _yes(value: bool) -> str:
    return "yes" if value else "no"
