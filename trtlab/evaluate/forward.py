"""Runs whole texts through a checkpoint in torch, on the CPU: one layer's weights are in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from trtlab.checkpoint import Checkpoint
from trtlab.model.decoder import residual_stream
from trtlab.model.names import EMBEDDING, LAYER_PREFIX, POSITIONS, layer_name
from trtlab.model.op_set import Ops
from trtlab.model.rope import rotary_table
from trtlab.model.weights import Embedding, LayerWeights, ModelWeights, final_norm, layer_weights, lm_head
from trtlab.ops.paged import BlockTables, NewTokens, PackedBatch, PagedCache
from trtlab.ops.torch import TorchOps, spread
from trtlab.parallel.comm import Solo

CPU = torch.device("cpu")
HALF = (torch.float16, torch.bfloat16)


class ForwardPass:
    """The decoder on some texts, in float32; a quantized checkpoint's integers, FP8 numbers and scales are its own.

    Args:
        checkpoint: The model, quantized or not.
        rows: The token ids of each text; each text is read alone.
    """

    def __init__(self, checkpoint: Checkpoint, rows: Sequence[Sequence[int]]) -> None:
        self._checkpoint = checkpoint
        self._config = checkpoint.config
        self._rows = rows
        self._longest = max(map(len, rows))
        self._rotary = spread(rotary_table(self._config, self._longest), torch.float32, CPU)
        self._tables = BlockTables.apart(1, self._longest)

    @torch.inference_mode()
    def layers(self) -> Iterator[list[Tensor]]:
        """The hidden states ``[tokens, hidden]`` of each text after each layer."""
        hidden = self._embedded()
        for index in range(self._config.num_hidden_layers):
            parts = layer_weights(self._config, self._read(layer_name(index, "")), index, index)
            heads = (self._config.num_attention_heads, self._config.num_key_value_heads)
            model = ModelWeights(*heads, (parts,), None, None, None)
            cache = self._cache(parts)
            hidden = [residual_stream(self._ops(len(x), cache), self._config, model, x) for x in hidden]
            yield hidden

    @torch.inference_mode()
    def logits(self, hidden: Sequence[Tensor]) -> Iterator[Tensor]:
        """The logits ``[tokens, vocab]`` of each text from its hidden states after the last layer."""
        outside = (name for name in self._checkpoint.tensors if not name.startswith(LAYER_PREFIX))
        tensors = self._read(*outside)
        norm, head = final_norm(self._config, tensors), lm_head(self._config, tensors)
        for x in hidden:
            ops = self._ops(len(x))
            yield ops.logits(ops.linear(ops.norm(x, norm), head), self._config.vocab_size)

    def _embedded(self) -> list[Tensor]:
        tensors = self._read(EMBEDDING, POSITIONS)
        hidden = []
        for row in self._rows:
            ops, ids = self._ops(len(row)), torch.tensor(row)
            x = ops.embedding(ids, Embedding(EMBEDDING, tensors[EMBEDDING]))
            if POSITIONS in tensors:
                x = ops.add(x, ops.position_embedding(ids, Embedding(POSITIONS, tensors[POSITIONS])))
            hidden.append(x)
        return hidden

    def _read(self, *prefixes: str) -> dict[str, Tensor]:
        """The tensors whose names begin with a prefix; float16 and bfloat16 become float32."""
        stored = {name: t.read() for name, t in self._checkpoint.tensors.items() if name.startswith(prefixes)}
        return {name: tensor.float() if tensor.dtype in HALF else tensor for name, tensor in stored.items()}

    def _ops(self, tokens: int, cache: PagedCache | None = None) -> Ops[Tensor]:
        batch = PackedBatch([NewTokens(0, 0, tokens)], self._rotary, self._tables, CPU)
        return TorchOps(batch, cache or self._cache(None), Solo(), every_token=True)

    def _cache(self, layer: LayerWeights | None) -> PagedCache:
        """A cache of one layer for one text, quantized as the layer says."""
        scales = None if layer is None else layer.kv_scales
        return PagedCache(
            layers=1,
            kv_heads=self._config.num_key_value_heads,
            num_blocks=1,
            tokens_per_block=self._longest,
            head_size=self._config.head_size,
            dtype=torch.float32,
            device=CPU,
            scales=() if scales is None else (scales,),
        )
