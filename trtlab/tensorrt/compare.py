"""Compares a TensorRT network with torch, result by result, and names the likely cause of a difference."""

from __future__ import annotations

import math
from collections import abc
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from trtlab.card import Shown
from trtlab.config.mapping import Mapping
from trtlab.config.model import ModelConfig
from trtlab.errors import EngineError, RequestError
from trtlab.model.decoder import decoder
from trtlab.model.rope import rotary_table
from trtlab.model.weights import rank_weights
from trtlab.ops.named import NamedOps
from trtlab.ops.paged import BlockTables, NewTokens, PackedBatch, PagedCache
from trtlab.ops.torch import TorchOps, spread
from trtlab.parallel.comm import Solo
from trtlab.parallel.step_inputs import Chunk
from trtlab.tensorrt.emit.emission import Emission
from trtlab.tensorrt.run.batching import Run, plan_inputs, write_updates
from trtlab.tensorrt.run.plan_rank import allocate

# Relative differences that rounding alone explains in a model of a few dozen layers.
TOLERANCES = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
# A difference that grows by this factor within one operation arose there; a smaller growth came from earlier ones.
JUMP = 10.0


@dataclass(frozen=True)
class Difference:
    """The difference between torch and the network in one result; ``step`` 0 is the prompt, 1 the first new token."""

    step: int
    name: str
    max_abs: float
    relative: float  # ||network's - torch's|| / ||torch's||


@dataclass(frozen=True, repr=False)
class NetworkComparison(Shown):
    """All differences in the order of computation; ``same_token`` tells for each step whether top-1 agrees.

    ``recipes`` names how the network's weights and torch's are quantized where that differs. Then a difference is what
    quantization costs and no fault: the tolerance is infinite, and ``reading`` says how far apart the layers are.
    """

    differences: tuple[Difference, ...]
    same_token: tuple[bool, ...]
    tolerance: float
    recipes: tuple[str, str] | None = None

    @property
    def start(self) -> Difference | None:
        """The first result that differs by more than the tolerance; None when all agree."""
        return next((d for d in self.differences if not d.relative <= self.tolerance), None)

    @property
    def factor(self) -> float:
        """By what factor the difference at ``start`` exceeds the largest one before it in the same step."""
        if self.start is None:
            return 1.0
        before = self.step(self.start.step)
        earlier = [d.relative for d in before[: before.index(self.start)]]
        # 1e-6: float32 rounding leaves about this much even in an exact result.
        return self.start.relative / max([*earlier, 1e-6])

    @property
    def jumps(self) -> bool:
        """Whether the difference arose at ``start``; otherwise it grew over several operations."""
        return self.start is not None and not self.factor < JUMP

    def step(self, number: int) -> tuple[Difference, ...]:
        """The differences of one step, layer by layer."""
        return tuple(d for d in self.differences if d.step == number)

    @property
    def layers(self) -> tuple[Difference, ...]:
        """The difference at the end of each layer, over the prompt."""
        return tuple(d for d in self.step(0) if d.name.endswith(".mlp.proj"))

    @property
    def reading(self) -> str:
        """The likely cause of the differences, in one sentence."""
        start = self.start
        if self.recipes is not None:
            distances = [layer.relative for layer in self.layers]
            return (
                f"{self.recipes[0]} against {self.recipes[1]}: the layers differ by {_percent(min(distances))} to "
                f"{_percent(max(distances))}, and {sum(self.same_token)} of {len(self.same_token)} next tokens agree"
            )
        if start is None:
            agree = "and every next token agrees" if all(self.same_token) else "yet a near tie picks another token"
            return f"torch and the network agree within {self.tolerance:g}, {agree}"
        where = f"step {start.step}, {start.name}"
        if start.step > 0:
            return f"the prompt agrees and decoding differs from {where}: the mask, the positions or the KV cache"
        if not self.jumps:
            return f"the difference grows and passes {self.tolerance:g} at {where}: precision"
        factor = float(f"{self.factor:.1g}")
        return f"the difference jumps by a factor of {factor:,.0f} at {where}: {suspect(start.name)}"


def _percent(share: float) -> str:
    return f"{float(f'{100 * share:.2g}'):g} %"


def suspect(name: str) -> str:
    """What may be wrong where a difference arises, by the verb at the end of the result's name."""
    verb = name.partition(":")[2].split(".")[0]
    suspects = {
        "": "this layer's weights, their order, or the config",
        "q": "how query, key and value are split",
        "k": "how query, key and value are split",
        "v": "how query, key and value are split",
        "rotary_q": "rotary embedding: base, scaling or positions",
        "rotary_k": "rotary embedding: base, scaling or positions",
        "attention": "the mask, the softmax scale or the KV cache",
        "activation": "the activation function",
        "multiply": "the gated product: gate and up may be swapped",
    }
    return suspects.get(verb, f"the operation {verb}")


@torch.inference_mode()
def compare(
    emission: Emission,
    config: ModelConfig,
    weights: abc.Mapping[str, torch.Tensor],
    token_ids: Sequence[int],
    *,
    steps: int = 4,
    tolerance: float | None = None,
    recipes: tuple[str, str] | None = None,
) -> NetworkComparison:
    """Run a prompt and ``steps`` more tokens through torch in float32 and through an emitted network.

    Both are fed torch's greedy tokens.

    Args:
        emission: The emitted network, with its own weights in its own dtype.
        config: The model as the checkpoint has it, which may be quantized in another way than the network.
        weights: The whole model's tensors by name, as in the checkpoint.
        token_ids: The prompt.
        steps: New tokens after the prompt.
        tolerance: Largest relative difference that counts as agreement; None for what rounding in the network's dtype
            explains.
        recipes: How the network's weights and those of the checkpoint are quantized, where that differs.

    Raises:
        EngineError: for a network of one rank of several.
        RequestError: for a prompt that does not fit.
    """
    capacity = emission.build.seq_len
    if not 0 < len(token_ids) <= capacity - steps:
        raise RequestError(f"a prompt of {len(token_ids)} tokens and {steps} steps do not fit max_seq_len {capacity}")
    network, result = emission.read(), emission.bindings.result.name
    if any(layer.kind == "dist_collective" for layer in network) or result != "logits":
        raise EngineError("compare() needs a network that is the whole model", remedy="build with Mapping()")
    reference = Reference(config, capacity, weights)
    caches = allocate(emission.bindings, 1, torch.device("cpu"))
    differences: list[Difference] = []
    same_token: list[bool] = []
    past, ids = 0, list(token_ids)
    for step in range(steps + 1):
        expected = reference.run(past, ids)
        every = tuple((token, 0, token) for token in range(len(ids)))
        run = Run("context", 0, (Chunk(0, past, tuple(ids)),), len(ids), every)
        inputs = plan_inputs(run, emission.bindings, capacity)
        got = network.run({**inputs, **caches}, keep=emission.taps.values())
        write_updates(run, emission.bindings, got, caches)
        taps = {name: per_token(got[tensor]) for name, tensor in emission.taps.items()}
        differences += [difference(step, name, value, taps[name]) for name, value in expected.items()]
        logits, ours = list(expected.values())[-1][-1], got[result][0, -1]
        same_token.append(bool(logits.argmax() == ours.argmax()))
        past, ids = past + len(ids), [int(logits.argmax())]
    if recipes is not None:
        tolerance = math.inf
    used = TOLERANCES[emission.build.dtype or "float32"] if tolerance is None else tolerance
    return NetworkComparison(tuple(differences), tuple(same_token), used, recipes)


class Reference:
    """The decoder in torch: float32, one request, every result recorded by name."""

    def __init__(self, config: ModelConfig, capacity: int, weights: abc.Mapping[str, torch.Tensor]) -> None:
        self._config = config
        self._device = torch.device("cpu")
        half = (torch.float16, torch.bfloat16)  # integers, FP8 and scales stay as they are stored
        whole = {name: tensor.float() if tensor.dtype in half else tensor for name, tensor in weights.items()}
        self._weights = rank_weights(config, Mapping(), 0, whole)
        self._rotary = spread(rotary_table(config, capacity), torch.float32, self._device)
        self._tables = BlockTables.apart(1, capacity)
        self._cache = PagedCache(
            layers=config.num_hidden_layers,
            kv_heads=self._weights.kv_heads,
            num_blocks=1,
            tokens_per_block=capacity,
            head_size=config.head_size,
            dtype=torch.float32,
            device=self._device,
            scales=[layer.kv_scales for layer in self._weights.layers if layer.kv_scales is not None],
        )

    def run(self, past: int, ids: Sequence[int]) -> dict[str, torch.Tensor]:
        """All results for some new tokens by name, each ``[tokens, ...]``, the logits last."""
        batch = PackedBatch([NewTokens(0, past, len(ids))], self._rotary, self._tables, self._device)
        results: dict[str, torch.Tensor] = {}
        ops = NamedOps(TorchOps(batch, self._cache, Solo(), every_token=True), results.__setitem__)
        decoder(ops, self._config, self._weights, torch.tensor(ids))
        return results


def per_token(tensor: torch.Tensor) -> torch.Tensor:
    """Convert a tensor of the network, which has a batch axis of size 1, to torch's packed layout ``[tokens, ...]``."""
    return tensor[0].transpose(0, 1) if tensor.dim() == 4 else tensor[0]  # [1, heads, tokens, head_size] or [1, ...]


def difference(step: int, name: str, expected: torch.Tensor, got: torch.Tensor) -> Difference:
    """The largest and the relative difference of one result; a NaN anywhere makes both NaN."""
    error = got.float() - expected.float()
    scale = float(expected.float().norm()) or 1.0
    return Difference(step, name, float(error.abs().max()), float(error.norm()) / scale)
