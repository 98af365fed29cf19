"""Finds TensorRT, checks that it has what this package calls, and tells where it builds and where its plans run."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from trtlab.errors import EngineError, MissingDependency

BINDINGS, LIBRARIES = "tensorrt_rtx_bindings", "onnxruntime_ep_nv_tensorrt_rtx"
INSTALL = (
    "pip install tensorrt-rtx-cu13-bindings==1.7.1.116 onnxruntime-ep-nv-tensorrt-rtx-cu13==0.5.0 (Linux x86-64), "
    "or pip install tensorrt where NVIDIA's package index can be reached"
)

# Every name of TensorRT's module that this package uses, so that an unsuitable TensorRT is refused at once and not in
# the middle of a build. tests/tensorrt/test_library.py reads the sources and fails if one is missing here.
NAMES = (
    "ActivationType.GELU_ERF",
    "ActivationType.GELU_TANH",
    "ActivationType.RELU",
    "ActivationType.SIGMOID",
    "AttentionNormalizationOp.SOFTMAX",
    "Builder.build_serialized_network_to_stream",
    "BuilderFlag.TF32",
    "BuilderFlag.WEIGHT_STREAMING",
    "CausalMaskKind.NONE",
    "CollectiveOperation.ALL_GATHER",
    "CollectiveOperation.ALL_REDUCE",
    "DataType.BF16",
    "DataType.BOOL",
    "DataType.FLOAT",
    "DataType.FP8",
    "DataType.HALF",
    "DataType.INT32",
    "DataType.INT4",
    "DataType.INT8",
    "Dims",
    "ElementWiseOperation.DIV",
    "ElementWiseOperation.EQUAL",
    "ElementWiseOperation.MAX",
    "ElementWiseOperation.MIN",
    "ElementWiseOperation.PROD",
    "ElementWiseOperation.SUB",
    "ElementWiseOperation.SUM",
    "ExecutionContextAllocationStrategy.USER_MANAGED",
    "IBuilderConfig.add_optimization_profile",
    "IBuilderConfig.progress_monitor",
    "ICudaEngine.create_execution_context",
    "ICudaEngine.device_memory_size_v2",
    "ICudaEngine.get_weight_streaming_automatic_budget",
    "ICudaEngine.weight_streaming_budget_v2",
    "IExecutionContext.execute_async_v3",
    "IExecutionContext.set_device_memory",
    "IExecutionContext.set_input_shape",
    "IExecutionContext.set_optimization_profile_async",
    "IExecutionContext.set_tensor_address",
    "ILogger.Severity",
    "INetworkDefinition.add_activation",
    "INetworkDefinition.add_attention_v2",
    "INetworkDefinition.add_cast",
    "INetworkDefinition.add_concatenation",
    "INetworkDefinition.add_constant",
    "INetworkDefinition.add_dequantize",
    "INetworkDefinition.add_dist_collective",
    "INetworkDefinition.add_elementwise",
    "INetworkDefinition.add_gather",
    "INetworkDefinition.add_input",
    "INetworkDefinition.add_kv_cache_update",
    "INetworkDefinition.add_matrix_multiply",
    "INetworkDefinition.add_quantize",
    "INetworkDefinition.add_reduce",
    "INetworkDefinition.add_rotary_embedding",
    "INetworkDefinition.add_select",
    "INetworkDefinition.add_shuffle",
    "INetworkDefinition.add_slice",
    "INetworkDefinition.add_unary",
    "IProgressMonitor",
    "IStreamWriter",
    "KVCacheMode.LINEAR",
    "MatrixOperation.NONE",
    "MatrixOperation.TRANSPOSE",
    "Permutation",
    "ReduceOperation.AVG",
    "ReduceOperation.MAX",
    "ReduceOperation.NONE",
    "ReduceOperation.SUM",
    "Runtime.deserialize_cuda_engine",
    "UnaryOperation.ABS",
    "UnaryOperation.SQRT",
    "Weights",
)
# TensorRT for RTX compiles for several GPUs at once; TensorRT compiles for this machine's GPU only.
NAMES_FOR_RTX = ("ComputeCapability", "IBuilderConfig.set_compute_capability")

Capability = tuple[int, int]


@dataclass(frozen=True)
class Verdict:
    """Yes or no, and why; its truth value is the answer."""

    ok: bool
    reason: str

    def __bool__(self) -> bool:
        return self.ok


@dataclass(frozen=True)
class Library:
    """An installed TensorRT: its module, which of the two products it is, and what that product can do."""

    trt: Any = field(repr=False, compare=False)
    flavour: str  # "tensorrt" or "tensorrt_rtx"
    version: str
    source: str  # the name of the module

    @property
    def title(self) -> str:
        """The product's name and version, for messages."""
        return f"{'TensorRT for RTX' if self.flavour == 'tensorrt_rtx' else 'TensorRT'} {self.version}"

    @property
    def targets(self) -> tuple[Capability, ...]:
        """The compute capabilities that a plan can be built for by name: only TensorRT for RTX has any."""
        if self.flavour != "tensorrt_rtx":
            return ()
        numbers = [name[2:] for name in self.trt.ComputeCapability.__members__ if name.startswith("SM")]
        return tuple((int(number[:-1]), int(number[-1])) for number in numbers)

    def builds(self, gpu: Capability | None) -> Verdict:
        """Whether this library can compile a plan on a machine whose GPU is ``gpu`` (None: no GPU)."""
        if self.flavour == "tensorrt_rtx":
            return Verdict(True, f"{self.title} compiles on a CPU; no GPU is needed")
        if gpu is None:
            return Verdict(False, f"{self.title} compiles only on a GPU; TensorRT for RTX needs none")
        return self.runs_on(gpu)

    def runs_on(self, gpu: Capability, dtypes: Iterable[str] = ()) -> Verdict:
        """Whether a plan of this library, with layers in ``dtypes``, can run on compute capability ``gpu``."""
        name = f"compute capability {gpu[0]}.{gpu[1]}"
        if self.flavour == "tensorrt_rtx" and gpu not in self.targets and gpu[0] < 12:
            served = ", ".join(f"{major}.{minor}" for major, minor in self.targets)
            return Verdict(False, f"{self.title} does not support {name}; it serves {served} and later: use tensorrt")
        if gpu < (7, 5):
            return Verdict(False, f"{self.title} does not support {name}; the oldest it serves is 7.5")
        used = set(dtypes)
        if gpu < (8, 0) and (refused := used & {"float32", "bfloat16", "float8_e4m3fn"}):
            return Verdict(False, f"{name} takes plans in float16 only, and this one has {', '.join(sorted(refused))}")
        if gpu < (8, 9) and "float8_e4m3fn" in used:
            return Verdict(False, f"FP8 needs compute capability 8.9 or later, not {gpu[0]}.{gpu[1]}")
        return Verdict(True, f"{self.title} runs on {name}")


@cache
def library() -> Library:
    """The TensorRT of this environment: ``tensorrt``, else ``tensorrt_rtx``, else the two wheels from PyPI.

    Raises:
        MissingDependency: if there is none.
        EngineError: if it lacks layers that this package emits, or if bindings and libraries are of different releases.
    """
    failures = []
    for source in ("tensorrt", "tensorrt_rtx", BINDINGS):
        if importlib.util.find_spec(source) is None:
            continue
        try:
            release = load_shared_libraries() if source == BINDINGS else ""
            module = importlib.import_module(source)
        except (ImportError, OSError) as error:  # installed, but its shared libraries are missing
            failures.append(f"{source} does not load: {error}")
            continue
        flavour = "tensorrt" if source == "tensorrt" else "tensorrt_rtx"
        candidate = Library(trt=module, flavour=flavour, version=str(module.__version__), source=source)
        if not candidate.version.startswith(release):
            raise EngineError(
                f"TensorRT's bindings are {candidate.version} and its libraries {release}", remedy=INSTALL
            )
        check_names(candidate)
        return candidate
    what = "building, reading or running a TensorRT plan needs TensorRT"
    raise MissingDependency(what, got="; ".join(failures) or None, remedy=INSTALL)


def load_shared_libraries() -> str:
    """Load TensorRT for RTX's libraries from the wheel that bundles them, so that the bindings find them.

    Returns:
        The libraries' release, such as ``"1.7.1.116"``.

    Raises:
        ImportError: when the wheel or one of its files is missing.
        OSError: when a library does not load.
    """
    spec = importlib.util.find_spec(LIBRARIES)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"{LIBRARIES} is not installed")
    folder = Path(spec.submodule_search_locations[0])
    release = ""
    # Each library needs those before it: the parser needs the builder, which needs the CUDA runtime.
    for stem in ("libcudart.so.", "libtensorrt_rtx.so.", "libtensorrt_onnxparser_rtx.so."):
        path = min(folder.glob(f"{stem}*"), default=None)
        if path is None:
            raise ImportError(f"{LIBRARIES} has no {stem}*")
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        release = path.name.removeprefix(stem)
    return release


def check_names(candidate: Library) -> None:
    """Refuse a TensorRT that lacks a name that this package calls, before anything is emitted."""
    needed = NAMES + (NAMES_FOR_RTX if candidate.flavour == "tensorrt_rtx" else ())
    missing = [name for name in needed if not has(candidate.trt, name)]
    if missing:
        raise EngineError(
            f"{candidate.title} lacks {', '.join(missing[:3])}{' and more' if len(missing) > 3 else ''}",
            expected="TensorRT 11 or later, or TensorRT for RTX 1.5 or later",
            remedy="pip install --upgrade tensorrt",
        )


def has(module: ModuleType | Any, dotted: str) -> bool:
    """Whether ``module`` has the attribute path ``dotted``."""
    for part in dotted.split("."):
        if not hasattr(module, part):
            return False
        module = getattr(module, part)
    return True
