"""The card of a quantized checkpoint."""

import pytest

import trtlab
from trtlab import Checkpoint, QuantConfig
from trtlab.tiny import llama_dir

TEXTS = ["About Mila.\nMila lives at the orchard and works as a doctor."]


@pytest.fixture(scope="module")
def quantized():
    quant = QuantConfig("W4A16_AWQ", "INT8", group_size=64, exclude_modules=("transformer.layers.0.*",))
    return Checkpoint.from_hugging_face(llama_dir()).quantize(quant, calibration=TEXTS)


def test_the_card_names_algorithms_bytes_and_the_noisiest_linears(quantized):
    shown = repr(quantized)
    plain = Checkpoint.from_hugging_face(llama_dir())
    before, after = plain.nbytes / 2**20, quantized.nbytes / 2**20
    assert "W4A16_AWQ, groups of 64" in shown
    assert "INT8, scales split" in shown
    assert "transformer.layers.0.*" in shown
    assert f"{before:.2f} MiB before, {after:.2f} MiB now ({after / before:.0%})" in shown
    assert quantized.report.worst(1)[0].name.removeprefix("transformer.") in shown
    assert "<table>" in quantized._repr_html_()


def test_the_noisiest_linear_has_the_longest_bar(quantized):
    for table in (*trtlab.card(quantized).tables, trtlab.card(quantized.report).tables[0]):
        place = table.columns.index("noise")
        lengths = [2 * row[place].count("━") + row[place].count("╸") for row in table.rows]
        worst, last = (float(row[1]) for row in (table.rows[0], table.rows[-1]))
        assert lengths[0] == 32 and lengths == sorted(lengths, reverse=True)
        assert abs(lengths[-1] - 32 * 10 ** ((worst - last) / 20)) < 1


def test_a_loaded_checkpoint_shows_its_report_and_offers_what_works(quantized, tmp_path):
    folder = quantized.save(tmp_path / "saved")
    shown = repr(Checkpoint.load(folder))
    assert quantized.report.worst(1)[0].name.removeprefix("transformer.") in shown
    assert "checkpoint.report" in shown
    assert "ScaleExplorer" not in shown
    (folder / "report.json").unlink()
    assert "none: quantize() makes it" in repr(Checkpoint.load(folder))
