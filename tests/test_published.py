"""The published V100 table against its prediction."""

from __future__ import annotations

import pytest

from trtlab import ConfigError
from trtlab.card import text
from trtlab.cards.estimate import v100_card
from trtlab.memory.estimate import estimate
from trtlab.published import GIB, SHAPES, V100


def test_one_line_of_arithmetic_predicts_all_32_cells() -> None:
    assert (V100.right, len(V100.runs), sum(run.out_of_memory for run in V100.runs)) == (32, 32, 5)


def test_the_bases_are_those_of_the_batch_1_lines() -> None:
    assert [V100.base_gib(tp) for tp in (1, 4)] == pytest.approx([22.455, 21.329], abs=0.0005)


def test_the_printed_peaks_are_matched() -> None:
    printed = [run for run in V100.runs if run.printed_peak_gib is not None]
    assert len(printed) == 3
    assert [V100.peak_gib(run) for run in printed] == pytest.approx([r.printed_peak_gib for r in printed], abs=0.03)


def test_the_base_is_mostly_neither_weights_nor_cache() -> None:
    weights = estimate(SHAPES["LLaMA-2-7B"], quant_algo="W8A16").whole.weight_bytes / GIB
    assert V100.base_gib(1) - weights == pytest.approx(15.9, abs=0.05)


def test_the_v100_card_shows_published_and_predicted_side_by_side() -> None:
    shown = text(v100_card(V100))
    assert "32 of 32" in shown
    assert shown.count("OOM · ") == 5
    assert "wrong" not in shown


@pytest.mark.parametrize(("name", "remedy"), [("Llama-3-8b", "did you mean Llama-3-8B?"), (8, "give a ModelConfig")])
def test_a_shape_of_another_name_lists_those_that_there_are(name, remedy) -> None:
    with pytest.raises(ConfigError, match=r"LLaMA-2-7B \| LLaMA-2-13B") as caught:
        SHAPES[name]
    assert remedy in str(caught.value.remedy)
    assert name not in SHAPES and SHAPES.get(name) is None
