"""Real processes under mpirun: rank 0 quantizes, the others wait, and a failure is everybody's."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from trtlab import MissingDependency, QuantizeError
from trtlab.parallel import launch
from trtlab.parallel.comm import RankFailed
from trtlab.parallel.launch import on_rank_zero

BESIDE = Path(sys.prefix) / "bin" / "mpirun"  # the wheel's, which needs no activated environment
MPIRUN = str(BESIDE) if BESIDE.exists() else shutil.which("mpirun")
SCRIPT = """\
import sys
import torch
from trtlab import Checkpoint, QuantConfig
torch.set_num_threads(1)
source, folder = sys.argv[1:3]
checkpoint = Checkpoint.from_hugging_face(source)
for name, texts in (("failed", []), ("made", [[1, 2, 3, 4, 5]] * 3)):
    try:
        made = checkpoint.quantize(QuantConfig("FP8", "INT8"), calibration=texts, output_dir=f"{folder}/{name}")
        worst = made.report.worst(1)[0]
        print(f"{worst.name} {worst.snr_db:.3f} {made.tensors['lm_head.weight'].read().sum():.4f}")
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
from trtlab.parallel.launch import _mpi_world
print("rank", _mpi_world().Get_rank())
"""


def both_ranks(tmp_path, *arguments):
    """What two processes printed, a line each; they are stopped after three minutes."""
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [MPIRUN, "-n", "2", sys.executable, str(tmp_path / "script.py"), *map(str, arguments)]
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, **root, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False, env=environment)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert sorted(line for line in lines if line.startswith("rank")) == ["rank 0", "rank 1"]
    return [line for line in lines if not line.startswith("rank")]


@pytest.mark.mpi
@pytest.mark.slow
@pytest.mark.skipif(MPIRUN is None or find_spec("mpi4py") is None, reason='needs MPI: pip install "trtlab[mpi]"')
def test_rank_0_writes_for_both_and_its_failure_is_raised_on_both(random_model, tmp_path):
    *failed, first, second = sorted(both_ranks(tmp_path, random_model(), tmp_path))
    assert first == second
    assert first.startswith("transformer.layers.")
    assert sorted(file.name for file in (tmp_path / "made").iterdir()) == [
        "config.json",
        "rank0.safetensors",
        "report.json",
    ]
    assert len(failed) == 2 and failed[0] == failed[1]
    assert failed[0].startswith("QuantizeError: calibration has no texts")
    assert not (tmp_path / "failed").exists()


def test_a_process_alone_does_the_work_and_never_touches_mpi(monkeypatch):
    for name in launch.MPI_SIZES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    done = []
    on_rank_zero(lambda: done.append(1))
    monkeypatch.setenv("PMI_SIZE", "1")  # mpirun -n 1
    on_rank_zero(lambda: done.append(2))
    assert done == [1, 2]


def test_without_mpi4py_the_install_line_is_given(monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(MissingDependency, match="pip install mpi4py mpich"):
        on_rank_zero(lambda: None)


def test_an_error_travels_whole_and_one_that_cannot_by_its_words():
    error = QuantizeError("wrong", got=3, expected="2", remedy="take 2")
    copy = launch._picklable(error)
    assert isinstance(copy, QuantizeError)
    assert str(copy) == str(error)
    error = ValueError(lambda: None)
    assert isinstance(launch._picklable(error), RankFailed)
    assert launch._picklable(None) is None
