"""Adds single layers to an ``INetworkDefinition``, names them, and keeps their constants alive. Knows no model.

A layer's name is that of its weight, or of the last weight before it, and a suffix.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from trtlab.errors import EngineError
from trtlab.tensorrt import dtypes


class NetworkLayers:
    """Base class of op sets that emit. ``dtype`` is the network's type.

    ``constants`` keeps by name every tensor whose memory the network points to.
    """

    def __init__(self, trt: Any, network: Any, dtype: str) -> None:
        self.constants: dict[str, torch.Tensor] = {}
        self._trt = trt
        self._network = network
        self._dtype = dtypes.to_trt(trt, dtype)
        self._torch_dtype = dtypes.to_torch(dtype)
        self._outputs: dict[str, Any] = {}  # of the constants, by name
        self._names: dict[str, int] = {}
        self._scope = "network"

    def _enter(self, weight_name: str) -> None:
        self._scope = weight_name.removesuffix(".weight")

    def _add(self, suffix: str, layer: Any) -> Any:
        """Name a new layer, with a number if the name is taken, and return its output."""
        base = f"{self._scope}:{suffix}"
        count = self._names[base] = self._names.get(base, 0) + 1
        if layer is None:
            raise EngineError(f"TensorRT refused layer {base}", remedy="read the log: logger trtlab.tensorrt")
        layer.name = base if count == 1 else f"{base}.{count}"
        return layer.get_output(0)

    def _weight(self, name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> Any:
        """Add a constant in the network's type."""
        return self._constant(name, tensor.to(self._torch_dtype), shape)

    def _constant(self, name: str, tensor: torch.Tensor, shape: tuple[int, ...], kind: str | None = None) -> Any:
        """Add a constant by its pointer; a tensor that is used twice (tied embeddings) becomes one constant.

        ``kind`` names a type that torch lacks: ``"int4"``, two values per byte.
        """
        if name not in self._outputs:
            data = self.constants[name] = tensor.detach().contiguous()
            dtype = dtypes.to_trt(self._trt, kind or dtypes.from_torch(data.dtype))
            weights = self._trt.Weights(dtype, data.data_ptr(), math.prod(shape))
            layer = self._network.add_constant(self._trt.Dims(shape), weights)
            layer.name = name
            self._outputs[name] = layer.get_output(0)
        return self._outputs[name]

    def _scalar(self, suffix: str, value: float, rank: int, dtype: torch.dtype) -> Any:
        return self._constant(f"{self._scope}.{suffix}", torch.tensor(value, dtype=dtype).reshape(-1), (1,) * rank)

    def _elementwise(self, suffix: str, operation: str, a: Any, b: Any) -> Any:
        layer = self._network.add_elementwise(a, b, getattr(self._trt.ElementWiseOperation, operation))
        return self._add(suffix, layer)

    def _cast(self, suffix: str, x: Any, dtype: Any) -> Any:
        return x if x.dtype == dtype else self._add(suffix, self._network.add_cast(x, dtype))

    def _reshape(self, suffix: str, x: Any, shape: tuple[int, ...]) -> Any:
        layer = self._network.add_shuffle(x)
        layer.reshape_dims = self._trt.Dims(shape)
        return self._add(suffix, layer)

    def _transpose(self, suffix: str, x: Any, order: tuple[int, ...]) -> Any:
        layer = self._network.add_shuffle(x)
        layer.first_transpose = self._trt.Permutation(order)
        return self._add(suffix, layer)

    def _slice(self, suffix: str, x: Any, axis: int, start: int, size: int) -> Any:
        """Add a slice of one axis; naming the axis keeps the others dynamic."""
        dims = self._trt.Dims
        layer = self._network.add_slice(x, dims((start,)), dims((size,)), dims((1,)))
        layer.axes = dims((axis,))
        return self._add(suffix, layer)

    def _concatenate(self, suffix: str, a: Any, b: Any, axis: int) -> Any:
        layer = self._network.add_concatenation([a, b])
        layer.axis = axis
        return self._add(suffix, layer)

    def _quantize(self, suffix: str, x: Any, scale: torch.Tensor, dtype: Any, axis: int = 1) -> Any:
        """``x / scale`` rounded to ``dtype``; one scale ``[1, 1]``, or one per index of ``axis`` ``[n, 1]``."""
        layer = self._network.add_quantize(x, self._scale(suffix, scale), dtype)
        if scale.numel() > 1:
            layer.axis = axis
        return self._add(suffix, layer)

    def _dequantize(self, suffix: str, q: Any, scale: torch.Tensor, dtype: Any, axis: int = 1) -> Any:
        """``q * scale``; scales as for ``_quantize``, or ``[n, groups]`` for groups along the last of three axes."""
        layer = self._network.add_dequantize(q, self._scale(suffix, scale), dtype)
        if scale.numel() > 1 and scale.shape[1] == 1:
            layer.axis = axis
        return self._add(suffix, layer)

    def _scale(self, suffix: str, scale: torch.Tensor) -> Any:
        rows, groups = scale.shape
        shape = () if scale.numel() == 1 else (rows,) if groups == 1 else (1, rows, groups)
        return self._constant(f"{self._scope}.{suffix}.scale", scale, shape)
