"""The sweep's rows are TensorRT-LLM's, and its arithmetic is the published one."""

import csv
import math

import pytest
import torch

import trtlab
from trtlab import bench, tiny


@pytest.fixture(scope="module")
def session():
    bounds = trtlab.BuildConfig(max_batch_size=2, max_seq_len=64, max_input_len=32)
    engine = trtlab.Checkpoint.from_hugging_face(tiny.llama_dir()).build(bounds, plan=False)
    with engine, engine.session(device="cpu") as opened:
        yield opened


@pytest.fixture
def clock(monkeypatch):
    """Runs that take 1, 2, 3 ... seconds."""
    ticks = iter(range(1, 1000))

    def fake(call, device):
        call()
        return float(next(ticks))

    monkeypatch.setattr(bench, "timed", fake)


def test_tokens_per_second_are_those_generated_over_the_mean_latency(session, clock):
    (row,) = trtlab.benchmark(session, [2], [(8, 4)], warm_up=1, num_runs=3).rows  # counted: 2, 3 and 4 s
    assert row.latency_ms == 3000
    assert row.tokens_per_sec == 2 * 4 / 3
    assert (row.percentile95_ms, row.percentile99_ms) == (4000, 4000)


def test_the_line_has_the_published_columns_in_their_order(session, clock):
    (row,) = trtlab.benchmark(session, [1], [(8, 4)], warm_up=0, num_runs=1).rows
    words = row.line.split()
    assert words[0] == "[BENCHMARK]"
    assert (
        words[1::2]
        == (
            "model_name world_size num_heads num_kv_heads num_layers hidden_size vocab_size precision batch_size "
            "input_length output_length gpu_peak_mem(gb) tokens_per_sec percentile95(ms) percentile99(ms) latency(ms) "
            "compute_cap"
        ).split()
    )
    assert dict(zip(words[1::2], words[2::2], strict=True))["latency(ms)"] == "1000"


def test_published_rows_follow_from_their_latency():
    for batch, outputs, latency_s, published in ((1, 128, 2.623671, 48.79), (16, 128, 3.477232, 588.97)):
        assert round(batch * outputs / latency_s, 2) == published


def test_every_length_is_crossed_with_every_batch(session, clock, tmp_path):
    sweep = trtlab.benchmark(session, [1, 2], [(8, 4), (16, 2)], warm_up=0, num_runs=1)
    assert [(r.input_length, r.output_length, r.batch_size) for r in sweep.rows] == [
        (8, 4, 1),
        (8, 4, 2),
        (16, 2, 1),
        (16, 2, 2),
    ]
    with sweep.to_csv(tmp_path / "sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["batch_size"] for row in rows] == ["1", "2", "1", "2"]


def test_a_cell_that_runs_out_of_memory_says_so_and_the_next_goes_on(session, monkeypatch):
    run = session._loop.backend.ranks.run

    def starved(step):
        if any(chunk.slot == 1 for chunk in step.chunks):
            raise torch.cuda.OutOfMemoryError("no memory")
        return run(step)

    monkeypatch.setattr(session._loop.backend.ranks, "run", starved)
    first, second = trtlab.benchmark(session, [2, 1], [(8, 4)], warm_up=0, num_runs=1).rows
    assert math.isnan(first.tokens_per_sec)
    assert "tokens_per_sec OOM" in first.line
    assert second.tokens_per_sec > 0


@pytest.mark.parametrize(("batch", "lengths"), [(3, (8, 4)), (1, (33, 4)), (1, (32, 33))])
def test_a_cell_beyond_the_bounds_is_refused_before_anything_runs(session, batch, lengths, monkeypatch):
    monkeypatch.setattr(session, "generate", None)
    with pytest.raises(trtlab.ConfigError, match="beyond the engine's bounds"):
        trtlab.benchmark(session, [batch], [lengths])


def test_a_duel_counts_run_by_run():
    duel = bench.Duel("x", 10, ours_s=(1.0, 2.0, 4.0), theirs_s=(2.0, 6.0, 4.0))
    assert duel.ratio == 2.0


@pytest.mark.parametrize("name", ["gone/sweep.csv", "n" * 300, "a\0b", ".", ""])
def test_a_table_that_cannot_be_written_says_why(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(trtlab.ConfigError) as caught:
        bench.Benchmark(()).to_csv(name)
    assert caught.value.remedy and list(tmp_path.iterdir()) == []


def test_a_table_is_written_into_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert bench.Benchmark(()).to_csv("~/sweep.csv") == tmp_path / "sweep.csv"
    assert (tmp_path / "sweep.csv").exists()
