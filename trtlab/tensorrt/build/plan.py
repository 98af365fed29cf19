"""Compiles an emitted network into a plan, with profiles, targets and flags, and records facts about the build."""

from __future__ import annotations

import re
import time
from collections import abc
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from trtlab.config.build import BuildConfig
from trtlab.config.mapping import Mapping
from trtlab.config.model import ModelConfig
from trtlab.errors import EngineError
from trtlab.hardware import gpus
from trtlab.interrupts import hold_interrupts
from trtlab.tensorrt.bindings import profiles
from trtlab.tensorrt.build.watch import BuildLog, Watch, Writer, run_watched
from trtlab.tensorrt.emit.emission import Emission, emit
from trtlab.tensorrt.emit.quantized import check_algorithm, quantized_types
from trtlab.tensorrt.library import Capability, Library, library
from trtlab.tensorrt.log import log

# The layers whose types decide on which GPUs a plan runs; a cast or a norm in float32 runs on all.
COMPUTING = ("matrix_multiply", "attention_input", "quantize")


@dataclass(frozen=True)
class PlanRecord:
    """Facts about one built plan; ``activation_bytes`` are by profile, as in TensorRT's log."""

    flavour: str
    version: str
    targets: tuple[str, ...]  # compute capabilities; empty: all that the library supports by default
    dtypes: tuple[str, ...]  # of its products, attentions and quantizers
    digest: str  # SHA-256, in hexadecimal
    plan_bytes: int
    weight_bytes: int
    activation_bytes: abc.Mapping[str, int]
    weight_streaming: bool
    seconds: float


def build_plan(
    config: ModelConfig,
    build: BuildConfig,
    mapping: Mapping,
    rank: int,
    weights: abc.Mapping[str, torch.Tensor],
    stream: BinaryIO,
    *,
    timing_cache: Path | None = None,
) -> PlanRecord:
    """Compile one rank and write its plan to a file.

    Args:
        config: The model.
        build: The engine's bounds and the plan's targets.
        mapping: How the model is split over ranks.
        rank: The rank to compile.
        weights: The rank's tensors by name; they stay unchanged.
        stream: A binary file open for writing. It stays empty after an interrupt.
        timing_cache: A file with TensorRT's timing cache, read if it exists and written.

    Raises:
        EngineError: when a target does not support the network (before the build starts), or TensorRT refuses it.
        MissingDependency: without TensorRT.
        KeyboardInterrupt: after an interrupt, at TensorRT's next callback.
    """
    resolved = build.resolve(config)
    check_algorithm(config)
    check_targets(library(), resolved, quantized_types(config))
    check_heads(config, resolved)
    return compile_plan(emit(config, resolved, mapping, rank, weights), stream, timing_cache=timing_cache)


def compile_plan(emission: Emission, stream: BinaryIO, *, timing_cache: Path | None = None) -> PlanRecord:
    """Compile an emitted network; see ``build_plan``."""
    trt_library, build = emission.library, emission.build
    targets = check_targets(trt_library, build)
    writer, watch, messages = Writer(trt_library.trt, stream), Watch(trt_library.trt), BuildLog()
    with hold_interrupts():  # in a callback of TensorRT an interrupt would be lost
        settings = builder_config(emission, targets, watch)
        cache = use_timing_cache(trt_library, settings, timing_cache)
    started = time.monotonic()

    def work() -> bool:
        return bool(emission.builder.build_serialized_network_to_stream(emission.network, settings, writer.native))

    with log(trt_library.trt).forwarded_to(messages):
        complete = run_watched(work, watch, "building plan")
    if writer.error is not None:
        raise EngineError(f"the plan could not be written: {writer.error}") from writer.error
    if not complete:
        raise EngineError(f"TensorRT could not build the plan: {messages.cause()}", remedy=remedy_for(build))
    if cache is not None and timing_cache is not None:
        timing_cache.write_bytes(bytes(cache.serialize()))
    return PlanRecord(
        flavour=trt_library.flavour,
        version=trt_library.version,
        targets=tuple(f"{major}.{minor}" for major, minor in targets),
        dtypes=tuple(sorted({layer.precision for layer in emission.read() if layer.kind in COMPUTING})),
        digest=writer.digest.hexdigest(),
        plan_bytes=writer.bytes_written,
        weight_bytes=messages.weight_bytes,
        activation_bytes=dict(zip((p.name for p in profiles(build)), messages.activation_bytes, strict=False)),
        weight_streaming=build.weight_streaming,
        seconds=round(time.monotonic() - started, 3),
    )


def check_targets(trt_library: Library, build: BuildConfig, types: Iterable[str] = ()) -> tuple[Capability, ...]:
    """Check that the library can build on this machine, and that every target can run the plan.

    Args:
        trt_library: The TensorRT that will build.
        build: The resolved settings.
        types: Types that the network computes in, beside its own.

    Returns:
        The targets as numbers.

    Raises:
        EngineError: when the library cannot build on this machine, or a target cannot run the plan.
    """
    cards = gpus()
    here = capability(cards[0].compute_capability) if cards else None
    if not (verdict := trt_library.builds(here)):
        raise EngineError("no plan can be built here", got=verdict.reason, remedy="build with plan=False")
    targets = tuple(capability(text) for text in build.compute_capabilities)
    used = {build.dtype or "float32", *types}
    for target in targets:
        if trt_library.flavour == "tensorrt" and target != here:
            raise EngineError(
                f"{trt_library.title} compiles for this machine's GPU only",
                got=f"compute_capabilities {target[0]}.{target[1]}",
                remedy="leave compute_capabilities empty, or build with TensorRT for RTX",
            )
        if not (verdict := trt_library.runs_on(target, used)):
            raise EngineError(verdict.reason, remedy="change dtype or compute_capabilities in BuildConfig")
        if trt_library.flavour == "tensorrt_rtx" and target not in trt_library.targets:
            names = ", ".join(f"{major}.{minor}" for major, minor in trt_library.targets)
            raise EngineError(f"a plan cannot be pinned to compute capability {target[0]}.{target[1]}", expected=names)
    return targets


def check_heads(config: ModelConfig, build: BuildConfig) -> None:
    """Refuse a head size that TensorRT's low-precision attention does not support, before the build starts."""
    if build.dtype != "float32" and config.head_size % 8:
        raise EngineError(
            f"TensorRT cannot build {build.dtype} attention with head_size {config.head_size}",
            expected="a multiple of 8",
            remedy='build with dtype="float32", or plan=False',
        )


def capability(text: str) -> Capability:
    """Parse a compute capability: ``"8.9"`` gives ``(8, 9)``."""
    match = re.fullmatch(r"(\d+)\.(\d)", text)
    if match is None:
        raise EngineError("unknown compute capability", got=repr(text), expected="a number such as 8.9")
    return int(match[1]), int(match[2])


def builder_config(emission: Emission, targets: tuple[Capability, ...], watch: Watch) -> Any:
    """TensorRT's settings for a build: profiles, flags, targets, optimization level, progress monitor."""
    trt, build, builder = emission.library.trt, emission.build, emission.builder
    config = builder.create_builder_config()
    for profile in profiles(build):
        native = builder.create_optimization_profile()
        bounds = [profile.dims(which) for which in ("min", "opt", "max")]
        for binding in emission.bindings.inputs:
            native.set_shape(binding.name, *(trt.Dims(binding.sized(dims)) for dims in bounds))
        config.add_optimization_profile(native)
    # With TF32 TensorRT rounds the operands of float32 products to ten bits of mantissa; a float32 plan must be exact.
    config.clear_flag(trt.BuilderFlag.TF32)
    if build.weight_streaming:
        config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    if build.optimization_level is not None:
        config.builder_optimization_level = build.optimization_level
    if targets and emission.library.flavour == "tensorrt_rtx":
        config.num_compute_capabilities = len(targets)
        for index, (major, minor) in enumerate(targets):
            config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{major}{minor}"), index)
    config.progress_monitor = watch.native
    return config


def use_timing_cache(trt_library: Library, settings: Any, path: Path | None) -> Any:
    """Set the build's timing cache and return it; None for TensorRT for RTX, which times no kernels."""
    if path is None or trt_library.flavour != "tensorrt":
        return None
    cache = settings.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    settings.set_timing_cache(cache, ignore_mismatch=False)
    return cache


def remedy_for(build: BuildConfig) -> str | None:
    """What most often helps after a refused build."""
    if build.compute_capabilities:
        return "build without compute_capabilities, or with another dtype"
    return "read the whole log: logger trtlab.tensorrt at level DEBUG"
