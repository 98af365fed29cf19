"""Real plans, compiled here without a GPU, and every way in which a build or a plan is refused."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import io
import logging
import os
import signal
import threading
import time

import pytest

import trtlab.tensorrt.build.plan as plan_module
from trtlab.config.mapping import Mapping
from trtlab.errors import ConfigError, EngineError, MissingDependency
from trtlab.parallel.shard import shard, shared_where_possible
from trtlab.storage.lazy import in_memory
from trtlab.tensorrt.build.plan import PlanRecord, build_plan, compile_plan, use_timing_cache
from trtlab.tensorrt.build.plan_check import check_plan
from trtlab.tensorrt.build.watch import BuildLog, Watch
from trtlab.tensorrt.emit.emission import emit
from trtlab.tensorrt.library import Library, library
from trtlab.tensorrt.log import log

pytestmark = pytest.mark.plans


def build(config, bounds, weights, **changes):
    stream = io.BytesIO()
    record = build_plan(config, dataclasses.replace(bounds, **changes), Mapping(), 0, weights, stream)
    return record, stream.getvalue()


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_plan_is_built_in_each_type(small, bounds, weights_of, dtype, streaming):
    config = small.replace(dtype=dtype)
    record, plan = build(config, bounds, weights_of(config), weight_streaming=streaming)
    assert record.digest == hashlib.sha256(plan).hexdigest()
    assert record.plan_bytes == len(plan) > record.weight_bytes > 0
    assert set(record.activation_bytes) == {"context", "generation"}
    assert all(bytes_ > 0 for bytes_ in record.activation_bytes.values())
    assert record.dtypes == (dtype,)
    assert record.weight_streaming is streaming
    assert (record.flavour, record.version) == (library().flavour, library().version)


FAMILIES = {
    "every bias, tied": {"attn_bias": True, "dense_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "q and k norms, wide heads": {"qk_layernorm": True, "head_size": 24},
    "one kv head, gelu": {"num_key_value_heads": 1, "hidden_act": "gelu_pytorch_tanh"},
}


@pytest.mark.parametrize("changes", FAMILIES.values(), ids=FAMILIES)
def test_a_plan_is_built_for_each_family(small, bounds, weights_of, changes):
    config = small.replace(dtype="bfloat16", **changes)
    assert build(config, bounds, weights_of(config))[0].plan_bytes > 0


def test_a_plan_of_one_rank_of_two_is_built(small, bounds, weights_of):
    mapping, config = Mapping(tp_size=2), small.replace(dtype="float16")
    whole = {name: in_memory(tensor) for name, tensor in weights_of(config).items()}
    lazy = shard(config, mapping, 1, whole, shared_where_possible(config, mapping))
    weights = {name: tensor.read() for name, tensor in lazy.items()}
    assert build_plan(config, bounds, mapping, 1, weights, io.BytesIO()).plan_bytes > 0


def test_a_tied_table_is_in_the_plan_once(small, bounds, weights_of):
    config = small.replace(vocab_size=4096, dtype="float16")
    tied = config.replace(tie_word_embeddings=True)
    table = 4096 * config.hidden_size * 2
    separate, shared = build(config, bounds, weights_of(config))[0], build(tied, bounds, weights_of(tied))[0]
    assert separate.weight_bytes - shared.weight_bytes == pytest.approx(table, rel=0.05)


def test_building_changes_no_weight_and_can_be_repeated(small, bounds, weights_of):
    weights, untouched = weights_of(small), weights_of(small)
    first, _ = build(small, bounds, weights)
    second, _ = build(small, bounds, weights)
    assert all((weights[name] == tensor).all() for name, tensor in untouched.items())
    assert (first.weight_bytes, first.activation_bytes) == (second.weight_bytes, second.activation_bytes)


def test_one_emission_can_be_compiled_and_run(small, bounds, weights_of):
    emission = emit(small, bounds, Mapping(), 0, weights_of(small))
    layers = len(emission.read())
    assert compile_plan(emission, io.BytesIO()).plan_bytes > 0
    assert len(emission.read()) == layers


def test_a_plan_can_be_pinned_to_targets(small, bounds, weights_of):
    record, _ = build(small, bounds, weights_of(small), compute_capabilities=("8.9", "12.0"), optimization_level=1)
    assert record.targets == ("8.9", "12.0")


@pytest.mark.parametrize(
    ("targets", "dtype", "message"),
    [
        (("9.0",), "float16", r"does not support compute capability 9\.0.*use tensorrt"),
        (("7.5",), "bfloat16", "7.5 takes plans in float16 only, and this one has bfloat16"),
        (("13.0",), "float16", r"cannot be pinned to compute capability 13\.0; expected 7\.5"),
        (("sm_89",), "float16", "got 'sm_89'; expected a number such as 8.9"),
    ],
)
def test_a_target_that_does_not_fit_is_refused_before_the_wait(
    small, bounds, weights_of, monkeypatch, targets, dtype, message
):
    monkeypatch.setattr(plan_module, "emit", None)  # nothing may be emitted
    with pytest.raises(EngineError, match=message):
        build(small.replace(dtype=dtype), bounds, {}, compute_capabilities=targets)


def test_a_sequence_beyond_the_rotary_range_is_refused(small, bounds, weights_of):
    with pytest.raises(ConfigError, match="max_position_embeddings 128"):
        build(small, bounds, weights_of(small), max_seq_len=129)


def test_full_tensorrt_builds_for_the_gpu_at_hand_only(small, bounds, monkeypatch):
    full = Library(library().trt, "tensorrt", "11.4.0", "tensorrt")
    monkeypatch.setattr(plan_module, "library", lambda: full)
    with pytest.raises(EngineError, match=r"no plan can be built here.*plan=False"):
        build(small, bounds, {})


def test_an_interrupt_stops_the_build_and_writes_nothing(small, bounds, weights_of, monkeypatch):
    deep = small.replace(num_hidden_layers=16)  # seconds of work, whatever the machine
    emission = emit(deep, bounds, Mapping(), 0, weights_of(deep))
    stream = io.BytesIO()
    watches = []

    def noted(trt):
        watches.append(Watch(trt))
        return watches[-1]

    def interrupt():
        while not (watches and watches[0].steps):  # TensorRT is at work, and the main thread waits for it
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(plan_module, "Watch", noted)
        sender = threading.Thread(target=interrupt, daemon=True)
        sender.start()
        with pytest.raises(KeyboardInterrupt):
            compile_plan(emission, stream)
        sender.join()
    assert stream.getvalue() == b""
    assert compile_plan(emission, stream).plan_bytes == len(stream.getvalue()) > 0


class FullDisk(io.RawIOBase):
    def write(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_named(small, bounds, weights_of):
    with pytest.raises(EngineError, match=r"could not be written: .*No space left on device"):
        build_plan(small, bounds, Mapping(), 0, weights_of(small), FullDisk())


def test_heads_that_cannot_be_tiled_are_refused_before_the_wait(small, bounds, weights_of):
    odd = small.replace(head_size=12, dtype="bfloat16")
    with pytest.raises(EngineError, match="bfloat16 attention with head_size 12; expected a multiple of 8"):
        build(odd, bounds, weights_of(odd))
    assert build(odd, bounds, weights_of(odd), dtype="float32")[0].plan_bytes > 0


def test_what_tensorrt_refuses_says_why(small, bounds, weights_of):
    odd = small.replace(head_size=12, dtype="float16")
    stream = io.BytesIO()
    with pytest.raises(EngineError, match=r"TensorRT could not build the plan: .*Myelin.*logger trtlab\.tensorrt"):
        compile_plan(emit(odd, bounds, Mapping(), 0, weights_of(odd)), stream)
    assert stream.getvalue() == b""


def test_the_cause_is_not_the_missing_driver():
    messages = BuildLog()
    messages(logging.ERROR, "[checkMacros.cpp] CUDA driver version is insufficient for CUDA runtime version")
    assert "insufficient" in messages.cause()
    messages(logging.ERROR, "the layer\n  does not fit")
    assert messages.cause() == "the layer does not fit"


def test_warnings_surface_and_information_does_not(caplog):
    severity = library().trt.ILogger.Severity
    with caplog.at_level(logging.WARNING, "trtlab.tensorrt"):
        log(library().trt).write(severity.INFO, "chatter")
        log(library().trt).write(severity.WARNING, "careful")
        with log(library().trt).forwarded_to(messages := BuildLog()):
            log(library().trt).write(severity.ERROR, "broken")
    assert [record.message for record in caplog.records] == ["careful"]
    assert messages.errors == ["broken"]


def test_a_timing_cache_is_for_full_tensorrt_alone(tmp_path):
    assert use_timing_cache(library(), None, tmp_path / "model.cache") is None


RECORD = PlanRecord(
    "tensorrt_rtx", "1.7.1.116", (), ("bfloat16",), hashlib.sha256(b"plan").hexdigest(), 4, 1, {}, False, 1.0
)


@pytest.fixture
def record():
    return dataclasses.replace(RECORD, version=library().version, flavour=library().flavour)


@pytest.mark.parametrize(
    ("changes", "gpu", "message"),
    [
        ({"version": "1.5.0"}, None, r"another TensorRT; got tensorrt_rtx 1\.5\.0; expected"),
        ({"flavour": "tensorrt"}, (8, 9), "another TensorRT"),
        ({"targets": ("8.9",)}, (12, 0), r'capability 8\.9; got a GPU of 12\.0; build with .*"12\.0"'),
        ({}, (9, 0), r"does not support compute capability 9\.0"),
        ({}, (7, 5), "7.5 takes plans in float16 only"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused_before_it_is_opened(record, changes, gpu, message):
    with pytest.raises(EngineError, match=message):
        check_plan(dataclasses.replace(record, **changes), gpu=gpu)


@pytest.mark.parametrize(("plan", "words"), [(b"pla", "got 3 bytes.*expected 4 bytes"), (b"plam", "got 4 bytes")])
def test_a_damaged_plan_is_refused(record, tmp_path, plan, words):
    (tmp_path / "rank0.engine").write_bytes(plan)
    with pytest.raises(EngineError, match=f"rank0.engine is damaged: its digest is not the build's; {words}"):
        check_plan(record, path=tmp_path / "rank0.engine")


def test_without_tensorrt_a_plan_may_lie_there_and_cannot_run(record, monkeypatch):
    def nothing():
        raise MissingDependency("running a plan needs TensorRT")

    monkeypatch.setattr("trtlab.tensorrt.build.plan_check.library", nothing)
    check_plan(record)
    with pytest.raises(MissingDependency):
        check_plan(record, gpu=(8, 9))


def test_a_plan_that_fits_passes(record, tmp_path):
    (tmp_path / "rank0.engine").write_bytes(b"plan")
    check_plan(record, path=tmp_path / "rank0.engine", gpu=(8, 9))
