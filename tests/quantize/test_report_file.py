"""The report beside a saved checkpoint: the same after a round trip, and optional."""

import json
import math

import pytest

from trtlab import Checkpoint, CheckpointError, Mapping, QuantConfig
from trtlab.quantize.report_file import REPORT, read_report, write_report

from .conftest import EVERY_CONFIG


@pytest.fixture(scope="module")
def quantized(checkpoint, texts):
    return checkpoint.quantize(QuantConfig("W8A8_SQ_PER_TENSOR_PLUGIN", "INT8"), calibration=texts)


@pytest.mark.parametrize(("algorithm", "cache"), EVERY_CONFIG)
def test_every_report_comes_back_as_it_was(checkpoint, texts, tmp_path, algorithm, cache):
    quant = QuantConfig(algorithm, cache, group_size=64)
    original = checkpoint.quantize(
        quant, calibration=texts if quant.reads_texts else None, output_dir=tmp_path / "ckpt"
    )
    loaded = Checkpoint.load(tmp_path / "ckpt")
    assert (loaded.report.linears, loaded.report.caches) == (original.report.linears, original.report.caches)
    assert loaded.report.config == loaded.config.quantization
    assert repr(loaded.report) == repr(original.report)


def test_saving_keeps_it_for_every_split(quantized, tmp_path):
    folder = quantized.save(tmp_path / "ckpt", mapping=Mapping(tp_size=2))
    assert Checkpoint.load(folder).report == quantized.report
    assert Checkpoint.load(folder, rank=1).report.worst(5) == quantized.report.worst(5)
    again = Checkpoint.load(folder).save(tmp_path / "again")
    assert Checkpoint.load(again).report == quantized.report


def test_a_folder_without_it_loads(quantized, tmp_path):
    folder = quantized.save(tmp_path / "ckpt")
    (folder / REPORT).unlink()
    assert Checkpoint.load(folder).report is None


def test_an_exact_linear_keeps_its_infinite_ratio(quantized, tmp_path):
    from dataclasses import replace

    rows = tuple(replace(row, snr_db=math.inf) for row in quantized.report.linears)
    write_report(tmp_path, replace(quantized.report, linears=rows))
    assert read_report(tmp_path, quantized.config).linears == rows


@pytest.mark.parametrize(
    "change",
    [
        lambda stored: stored.update(surprise=1),
        lambda stored: stored.pop("caches"),
        lambda stored: stored["linears"][0].update(surprise=1),
        lambda stored: stored["linears"][0].pop("cosine"),
        lambda stored: stored["linears"][0].update(bytes_after="x"),
        lambda stored: stored["linears"][0].update(bytes_before=-1),
        lambda stored: stored["linears"][0].update(name="transformer.layers.9.mlp.fc"),
        lambda stored: stored["caches"][0].update(layer=9),
        lambda stored: stored["caches"][0].update(layer=-1),
    ],
)
def test_a_report_that_is_not_understood_is_refused_with_what_to_do(quantized, tmp_path, change):
    folder = quantized.save(tmp_path / "ckpt")
    stored = json.loads((folder / REPORT).read_text())
    change(stored)
    (folder / REPORT).write_text(json.dumps(stored))
    with pytest.raises(CheckpointError, match="delete the file; the checkpoint works without it"):
        Checkpoint.load(folder)


def test_a_link_to_another_users_report_is_not_read(quantized, tmp_path):
    folder = quantized.save(tmp_path / "ckpt")
    (folder / REPORT).rename(tmp_path / "elsewhere")
    (folder / REPORT).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="outside of the model's folder"):
        Checkpoint.load(folder)
