"""Compiles a network into a plan: profiles, targets, flags; and the record of what the build told."""

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
from trtlab.tensorrt.bindings import profiles
from trtlab.tensorrt.build.watch import Heard, Watch, Writer, run_watched
from trtlab.tensorrt.emit.emission import Emission, emit
from trtlab.tensorrt.emit.quantized import check_algorithm, quantized_types
from trtlab.tensorrt.library import Capability, Library, library
from trtlab.tensorrt.log import log

# The layers whose types decide where a plan can run; a cast or a norm in float32 is possible everywhere.
COMPUTING = ("matrix_multiply", "attention_input", "quantize")


@dataclass(frozen=True)
class PlanRecord:
    """What a build tells of a plan; ``activation_bytes`` by profile, as TensorRT's log states them."""

    flavour: str
    version: str
    targets: tuple[str, ...]  # compute capabilities; empty: all that the library serves by default
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
    """Compile one rank and write its plan to ``stream``, a binary file open for writing.

    The weights stay as they are, and the same call can be made again. An interrupt stops at TensorRT's next callback
    and is raised as KeyboardInterrupt; ``stream`` then holds nothing. Raises EngineError, before the wait where that
    can be known, when a target does not take the network or TensorRT refuses it; MissingDependency without TensorRT.
    """
    resolved = build.resolve(config)
    check_algorithm(config)
    check_targets(library(), resolved, quantized_types(config))
    check_heads(config, resolved)
    return compile_plan(emit(config, resolved, mapping, rank, weights), stream, timing_cache=timing_cache)


def compile_plan(emission: Emission, stream: BinaryIO, *, timing_cache: Path | None = None) -> PlanRecord:
    """Compile an emitted network; see ``build_plan``."""
    found, build = emission.library, emission.build
    targets = check_targets(found, build)
    writer, watch, heard = Writer(found.trt, stream), Watch(found.trt), Heard()
    settings = builder_config(emission, targets, watch)
    cache = use_timing_cache(found, settings, timing_cache)
    started = time.monotonic()

    def work() -> bool:
        return bool(emission.builder.build_serialized_network_to_stream(emission.network, settings, writer.native))

    with log(found.trt).heard_by(heard):
        done = run_watched(work, watch, "building plan")
    if writer.error is not None:
        raise EngineError(f"the plan could not be written: {writer.error}") from writer.error
    if not done:
        raise EngineError(f"TensorRT could not build the plan: {heard.cause()}", remedy=remedy_for(build))
    if cache is not None and timing_cache is not None:
        timing_cache.write_bytes(bytes(cache.serialize()))
    return PlanRecord(
        flavour=found.flavour,
        version=found.version,
        targets=tuple(f"{major}.{minor}" for major, minor in targets),
        dtypes=tuple(sorted({layer.precision for layer in emission.read() if layer.kind in COMPUTING})),
        digest=writer.digest.hexdigest(),
        plan_bytes=writer.bytes_written,
        weight_bytes=heard.weight_bytes,
        activation_bytes=dict(zip((p.name for p in profiles(build)), heard.activation_bytes, strict=False)),
        weight_streaming=build.weight_streaming,
        seconds=round(time.monotonic() - started, 3),
    )


def check_targets(found: Library, build: BuildConfig, types: Iterable[str] = ()) -> tuple[Capability, ...]:
    """The targets as numbers. EngineError if this library cannot build here or one of them cannot run the plan.

    ``types`` are those that the network computes in beside its own.
    """
    cards = gpus()
    here = capability(cards[0].compute_capability) if cards else None
    if not (verdict := found.builds(here)):
        raise EngineError("no plan can be built here", got=verdict.reason, remedy="build with plan=False")
    targets = tuple(capability(text) for text in build.compute_capabilities)
    used = {build.dtype or "float32", *types}
    for target in targets:
        if found.flavour == "tensorrt" and target != here:
            raise EngineError(
                f"{found.title} compiles for the GPU at hand",
                got=f"compute_capabilities {target[0]}.{target[1]}",
                remedy="leave compute_capabilities empty, or build with TensorRT for RTX",
            )
        if not (verdict := found.runs_on(target, used)):
            raise EngineError(verdict.reason, remedy="change dtype or compute_capabilities in BuildConfig")
        if found.flavour == "tensorrt_rtx" and target not in found.targets:
            names = ", ".join(f"{major}.{minor}" for major, minor in found.targets)
            raise EngineError(f"a plan cannot be pinned to compute capability {target[0]}.{target[1]}", expected=names)
    return targets


def check_heads(config: ModelConfig, build: BuildConfig) -> None:
    """Refuse heads that TensorRT's low-precision attention cannot tile; it says so only in the middle of a build."""
    if build.dtype != "float32" and config.head_size % 8:
        raise EngineError(
            f"TensorRT builds no {build.dtype} attention with heads of {config.head_size}",
            expected="a head_size that 8 divides",
            remedy='build with dtype="float32", or plan=False',
        )


def capability(text: str) -> Capability:
    """(8, 9) from "8.9"."""
    match = re.fullmatch(r"(\d+)\.(\d)", text)
    if match is None:
        raise EngineError("a compute capability is a number such as 8.9", got=repr(text))
    return int(match[1]), int(match[2])


def builder_config(emission: Emission, targets: tuple[Capability, ...], watch: Watch) -> Any:
    """TensorRT's settings for a build: profiles, flags, targets, level, progress."""
    trt, build, builder = emission.library.trt, emission.build, emission.builder
    config = builder.create_builder_config()
    for profile in profiles(build):
        native = builder.create_optimization_profile()
        bounds = [profile.dims(which) for which in ("min", "opt", "max")]
        for binding in emission.bindings.inputs:
            native.set_shape(binding.name, *(trt.Dims(binding.sized(dims)) for dims in bounds))
        config.add_optimization_profile(native)
    # TensorRT would compute float32 products with ten bits of mantissa; a float32 plan is asked for to be exact.
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


def use_timing_cache(found: Library, settings: Any, path: Path | None) -> Any:
    """Give the build a timing cache and hand it back; TensorRT for RTX has none, and times nothing."""
    if path is None or found.flavour != "tensorrt":
        return None
    cache = settings.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    settings.set_timing_cache(cache, ignore_mismatch=False)
    return cache


def remedy_for(build: BuildConfig) -> str | None:
    """What most often mends a refused build."""
    if build.compute_capabilities:
        return "try without compute_capabilities, or another dtype"
    return "logger trtlab.tensorrt at level DEBUG has the whole log"
