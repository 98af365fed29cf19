"""A test says where it runs: the rule of ``conftest.py``, which holds on machines with and without a GPU."""

import pytest
import torch

from trtlab import BuildConfig, Checkpoint, benchmark


@pytest.fixture
def engine(random_model):
    with Checkpoint.from_hugging_face(random_model()).build(BuildConfig(max_seq_len=32), plan=False) as built:
        yield built


def test_a_session_without_a_device_fails_its_test(engine):
    with pytest.raises(AssertionError, match="a test names the device of a session"):
        engine.session(backend="torch")


@pytest.mark.no_gpu
def test_without_a_gpu_the_device_is_the_cpu(engine):
    assert torch.cuda.device_count() == 0
    with engine.session(backend="torch") as session:
        assert session.device == torch.device("cpu")


def test_a_session_on_the_cpu_of_a_machine_with_a_gpu_leaves_the_gpu_alone(engine, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)  # another test may have used the GPU
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: pytest.fail("CUDA is initialized"))
    monkeypatch.delenv("TRTLAB_BACKEND")
    with engine.session(device="cpu") as session:
        (row,) = benchmark(session, [1], [(4, 2)], warm_up=0, num_runs=1).rows
        assert session.backend_reason == "torch on cpu: asked for this device"
    assert (row.compute_cap, row.precision, row.peak_memory_gb) == ("cpu", "float32", 0.0)
