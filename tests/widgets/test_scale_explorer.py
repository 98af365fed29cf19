"""ScaleExplorer without a browser: its picture, its recipe and its controls."""

import contextlib

import plotly.graph_objects as go
import pytest
from trtlab.widgets import ScaleExplorer
from trtlab.widgets.scale_explorer import python_code
from trtlab.widgets.scale_figure import COLOURS, LINEARS, figure

from trtlab import Checkpoint, QuantConfig
from trtlab.errors import ConfigError, QuantizeError
from trtlab.quantize.study import study
from trtlab.tiny import llama_dir

TEXTS = ["About Mila.\nMila lives at the orchard and works as a doctor.", "One sunny morning, Mila and Tom met."]
SMOOTH = QuantConfig("W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN", "INT8", exclude_modules=("transformer.layers.0.*",))
PROJ = "transformer.layers.4.mlp.proj"


@pytest.fixture(scope="module")
def tiny():
    return Checkpoint.from_hugging_face(llama_dir())


@pytest.fixture(scope="module")
def quantized(tiny):
    return tiny.quantize(SMOOTH, calibration=TEXTS)


@pytest.fixture(scope="module")
def tiny_study(quantized):
    return study(quantized.made_by)


@pytest.fixture
def explorer(quantized, tiny_study, monkeypatch):
    monkeypatch.setattr("trtlab.widgets.scale_explorer.study", lambda _: tiny_study)
    return ScaleExplorer(quantized)


def test_the_study_agrees_with_the_report(quantized, tiny_study):
    rows = tuple(linear.trials[0.5].row for linear in tiny_study.linears if linear.name not in tiny_study.excluded)
    assert rows == quantized.report.linears
    assert tiny_study.caches["split"] == quantized.report.caches
    assert len(tiny_study.linears) == 30
    assert len(tiny_study.excluded) == 5


def test_shares_of_a_histogram_sum_to_one(tiny_study):
    one = tiny_study.linears[9]
    spreads = [one.before, *(trial.after for trial in one.trials.values())]
    assert all(sum(spread.weights) == pytest.approx(1, abs=1e-5) for spread in spreads)
    assert all(sum(spread.activations) == pytest.approx(1, abs=1e-5) for spread in spreads)


def test_an_untouched_explorer_describes_the_recipe_that_it_was_given(explorer):
    assert explorer.recipe == SMOOTH


def test_the_recipe_quantizes_to_what_the_bars_show(explorer, tiny):
    explorer.alpha.value = 0.8
    explorer.scales.value = "per_head"
    explorer.exclude(PROJ)
    assert explorer.recipe == QuantConfig(
        SMOOTH.quant_algo, "INT8", 0.8, kv_cache_scales="per_head", exclude_modules=("transformer.layers.0.*", PROJ)
    )
    report = tiny.quantize(explorer.recipe, calibration=TEXTS).report
    shown = {linear.name: linear.trials[0.8].row for linear in explorer.study.linears}
    assert report.linears == tuple(row for name, row in shown.items() if name not in explorer.excluded)
    assert report.caches == explorer.study.caches["per_head"]


def test_searched_is_an_alpha_too(explorer):
    explorer.alpha.value = "searched"
    assert explorer.recipe.smoothquant_val is None
    assert "alpha searched" in repr(explorer)


def test_a_linear_taken_back_breaks_its_pattern_into_names(explorer):
    explorer.exclude("transformer.layers.0.mlp.fc", excluded=False)
    assert explorer.recipe.exclude_modules == tuple(
        f"transformer.layers.0.{linear}" for linear in ("attention.qkv", "attention.dense", "mlp.gate", "mlp.proj")
    )
    with pytest.raises(ConfigError, match="no such linear"):
        explorer.exclude("layers.9.mlp.proj")


def test_a_click_excludes_and_a_second_one_takes_back(explorer):
    assert explorer.figure.data[4].name == "mlp.proj"
    for expected in (True, False):
        explorer._live._handle_custom_msg([4, 4], [])
        assert (PROJ in explorer.excluded) is expected
        assert explorer.shown.value == PROJ


def test_a_quantized_head_has_a_bar_behind_the_layers_that_a_click_excludes(tiny):
    recipe = QuantConfig("W8A16", quantize_lm_head=True)
    explorer = ScaleExplorer(tiny.quantize(recipe))
    bar = explorer.figure.data[len(LINEARS)]
    assert bar.name == "lm_head"
    assert bar.x[0] > max(x for trace in explorer.figure.data[: len(LINEARS)] for x in trace.x)
    assert explorer.recipe == recipe
    explorer._live._handle_custom_msg([len(LINEARS), 0], [])
    assert explorer.excluded == ("lm_head",)
    assert not tiny.quantize(explorer.recipe).config.quantization.quantizes_head


def test_moving_gives_the_picture_that_is_drawn_anew(explorer):
    explorer.alpha.value = 0.9
    explorer.exclude(PROJ)
    explorer.shown.value = "transformer.layers.2.mlp.fc"
    explorer.scales.value = "merged"
    anew = figure(explorer.study, 0.9, "merged", explorer.study.excluded | {PROJ}, "transformer.layers.2.mlp.fc")
    assert isinstance(anew, go.Figure)
    assert explorer.figure == anew
    assert explorer._live.state.get_state()["figure"] == anew.to_plotly_json()


def test_the_legend_keeps_its_colours_when_a_bar_is_excluded(explorer):
    in_legend = [trace for trace in explorer.figure.data if trace.name in LINEARS and trace.showlegend is None]
    before = [trace.to_plotly_json() for trace in in_legend]
    explorer.exclude("transformer.layers.0.attention.qkv", excluded=False)
    explorer.exclude("transformer.layers.0.attention.qkv")
    assert [trace.name for trace in in_legend] == list(LINEARS)
    assert [trace.marker.color for trace in in_legend] == [COLOURS[kind] for kind in LINEARS]
    assert [trace.to_plotly_json() for trace in in_legend] == before
    assert explorer.figure.data[0].marker.color[0] == "#FFFFFF"


def test_the_picture_fits_a_window_and_what_alpha_moves_is_in_its_upper_half(explorer):
    layout = explorer.figure.layout
    assert layout.height <= 620
    for trace in explorer.figure.data:
        if trace.name in ("after", "as quantized"):
            assert layout[trace.yaxis.replace("y", "yaxis")].domain[0] > 0.3


def test_the_longest_bar_of_the_still_view_is_the_worst_linear_s(explorer):
    rows = explorer.card().tables[0].rows
    decibels, bars = [float(row[1]) for row in rows], [len(row[2]) for row in rows]
    assert decibels == sorted(decibels)
    assert bars == sorted(bars, reverse=True)
    assert bars[0] > bars[-1]


def test_the_progress_of_opening_counts_every_trial(quantized, tiny_study, monkeypatch):
    seen = []

    class Bar(contextlib.nullcontext):
        update = seen.append

    def counted(label, total, *, unit):
        seen.append(-total)
        return Bar(Bar)

    monkeypatch.setattr("trtlab.quantize.study.progress", counted)
    study(quantized.made_by)
    assert seen[0] == -6 * len(tiny_study.alphas)
    assert sum(seen) == 0


def test_smoothing_flattens_the_channels_in_the_picture(tiny_study):
    one = next(linear for linear in tiny_study.linears if linear.name == PROJ)
    tallest = [max(one.trials[alpha].after.channels) for alpha in (0.5, 0.8, 1.0)]
    assert max(one.before.channels) > 4 * tallest[0] > 4 * tallest[1] > 4 * tallest[2]
    assert tallest[2] < 1.01


def test_a_slider_step_quantizes_nothing(explorer, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a slider step shows computed trials and quantizes nothing")

    monkeypatch.setattr("trtlab.quantize.study.quantize_layer", refuse)
    for step in range(1, 8):
        explorer.alpha.value = step / 10
    assert explorer.recipe.smoothquant_val == 0.7


def test_the_button_puts_everything_back(explorer):
    explorer.alpha.value = 0.1
    explorer.exclude(PROJ)
    explorer._back.click()
    assert explorer.recipe == SMOOTH


def test_repr_and_still_view_are_short_and_deterministic(explorer):
    assert repr(explorer).startswith("ScaleExplorer(W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN alpha 0.5 · INT8 KV split, 5")
    bundle = explorer._repr_mimebundle_()
    assert bundle["text/plain"] == repr(explorer)
    assert "QuantConfig(quant_algo=" in bundle["text/html"]
    assert "INT8 KV cache, split" in bundle["text/html"]
    assert "0x" not in bundle["text/html"]


@pytest.mark.parametrize(
    ("quant", "traces"),
    [
        (QuantConfig("W8A16"), 15),
        (QuantConfig("W4A16_AWQ", group_size=64, smoothquant_val=None), 19),
        (QuantConfig("FP8", "FP8"), 19),
        (QuantConfig(None, "INT8", kv_cache_scales="merged"), 2),
        (QuantConfig("W8A8_SQ_PER_CHANNEL", smoothquant_val=0.33), 19),
    ],
)
def test_every_algorithm_has_a_picture_with_the_panels_that_it_fills(tiny, quant, traces):
    explorer = ScaleExplorer(tiny.quantize(quant, calibration=TEXTS[:1] if quant.reads_texts else None))
    assert len(explorer.figure.data) == traces
    assert explorer.recipe == quant
    assert "ScaleExplorer" in explorer._repr_mimebundle_()["text/html"]


def test_a_checkpoint_from_a_folder_is_refused_with_what_to_do(quantized, tmp_path):
    with pytest.raises(QuantizeError, match="a folder does not keep"):
        ScaleExplorer(Checkpoint.load(quantized.save(tmp_path / "saved")))


def test_a_recipe_is_written_as_one_would_type_it():
    assert python_code(QuantConfig("FP8")) == "QuantConfig(quant_algo='FP8')"
