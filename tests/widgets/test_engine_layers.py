"""EngineLayers without a browser: groups, the figure as a function of data, and the state that Python reads."""

from __future__ import annotations

import pytest
from trtlab.widgets import EngineLayers
from trtlab.widgets.engine_layers import figure
from trtlab.widgets.layer_groups import GROUPINGS, MEASURES, decoder_layer, groups, part

from trtlab import BuildConfig, Checkpoint, Mapping
from trtlab.errors import ConfigError
from trtlab.tensorrt.read.interpreter import LayerRow, LayerTable
from trtlab.tiny import llama_dir


def row(name, kind="elementwise", precision="bfloat16", weight_bytes=0, flops=0):
    return LayerRow(name, kind, precision, (1, 1, 8), weight_bytes, flops)


TABLE = LayerTable(
    (
        row("transformer.vocab_embedding.weight", "constant", weight_bytes=4096),
        row("transformer.layers.0.mlp.fc.weight", "constant", weight_bytes=2048),
        row("transformer.layers.0.mlp.fc:matmul", "matrix_multiply", flops=3_000_000),
        row("transformer.layers.0.mlp.fc:wide", "cast", "float32", flops=1_000_000),
        row("transformer.layers.1.mlp.fc.weight", "constant", weight_bytes=2048),
        row("transformer.layers.1.attention.qkv:cache_k", "kv_cache_update"),
        row("transformer.layers.1.mlp.fc:matmul", "matrix_multiply", flops=2_000_000),
    )
)


@pytest.fixture(scope="module")
def engine():
    bounds = BuildConfig(max_batch_size=4, max_input_len=64, max_seq_len=128)
    return Checkpoint.from_hugging_face(llama_dir()).build(bounds, plan=False)


@pytest.fixture
def layers(engine):
    return EngineLayers(engine)


def click(layers, place, trace=0):
    """Do what the page does when a reader clicks on a bar."""
    layers._live._handle_custom_msg([trace, place], [])


@pytest.mark.parametrize(
    ("name", "kind", "belongs", "where"),
    [
        ("transformer.layers.11.mlp.fc.weight", "constant", "mlp.fc", "layer 11"),
        ("transformer.layers.1.attention.qkv:matmul", "matrix_multiply", "attention.qkv", "layer 1"),
        ("transformer.layers.1.attention.qkv:rotary_q", "rotary_embedding", "attention", "layer 1"),
        ("transformer.layers.1.attention.qkv.scale", "constant", "attention.qkv", "layer 1"),
        ("lm_head:matmul", "matrix_multiply", "lm_head", "outside"),
        ("rotary.cos", "constant", "rotary", "outside"),
    ],
)
def test_a_layer_belongs_to_a_weight_and_to_a_decoder_layer(name, kind, belongs, where):
    assert (part(row(name, kind)), decoder_layer(row(name, kind))) == (belongs, where)


def test_the_longest_bar_comes_first_and_empty_ones_are_left_out():
    assert list(groups(TABLE, "weight bytes", "part")) == ["vocab_embedding", "mlp.fc"]
    assert list(groups(TABLE, "FLOP", "kind")) == ["matrix_multiply", "cast"]


def test_decoder_layers_come_in_their_order():
    rows = [row(f"transformer.layers.{i}.mlp.fc:matmul", flops=i + 1) for i in (10, 2, 0)]
    table = LayerTable((*rows, row("lm_head:matmul", flops=5)))
    assert list(groups(table, "FLOP", "decoder layer")) == ["outside", "layer 0", "layer 2", "layer 10"]


@pytest.mark.tensorrt
@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("by", GROUPINGS)
def test_every_view_adds_up_to_the_whole(engine, measure, by):
    table = engine.layers
    shown = groups(table, measure, by)
    total = sum(map(MEASURES[measure].of, table))
    assert sum(MEASURES[measure].of(row) for rows in shown.values() for row in rows) == total
    picture = figure(table, measure, by)
    factor, _ = MEASURES[measure].unit(max(sum(map(MEASURES[measure].of, rows)) for rows in shown.values()))
    assert sum(sum(bars.x) for bars in picture.data[:-1]) * factor == pytest.approx(total)
    assert len(picture.data[-1].text) == len(shown)


def test_what_is_unknown_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"no such measure.*'watts'.*weight bytes \| FLOP"):
        groups(TABLE, "watts")
    with pytest.raises(ConfigError, match=r"no such grouping.*'colour'"):
        figure(TABLE, by="colour")


def test_the_figure_says_everything_in_words():
    picture = figure(TABLE, "FLOP", "part", selected="mlp.fc", step="a context step of 3 tokens")
    assert picture.layout.title.text == "6.00 M FLOP by part, in a context step of 3 tokens"
    assert picture.layout.xaxis.title.text == "floating-point operations, million"
    assert [bars.name for bars in picture.data[:-1]] == ["bfloat16", "float32"]
    assert picture.layout.yaxis.ticktext == ("<b>▶ mlp.fc</b> ",)
    assert picture.data[-1].text == (" 6.00 M FLOP · 100%",)
    assert [list(bars.x) for bars in picture.data[:-1]] == [[5.0], [1.0]]


def test_a_figure_is_a_function_of_its_data():
    assert figure(TABLE, "FLOP", "kind") == figure(TABLE, "FLOP", "kind")


@pytest.mark.tensorrt
def test_labels_have_room_beside_the_longest_bar(engine):
    picture = figure(engine.layers)
    assert picture.layout.xaxis.range[1] >= 1.3 * max(picture.data[-1].x)


@pytest.mark.tensorrt
def test_a_click_chooses_the_layers_of_a_bar(layers):
    assert layers.selected == "attention.qkv"
    names = list(groups(layers.table))
    for trace in range(len(layers.figure.data)):
        click(layers, names.index("lm_head"), trace)
        assert layers.selected == "lm_head"
        layers.select("mlp.fc")
    click(layers, names.index("lm_head"))
    assert [row.name for row in layers.selection] == ["lm_head.weight", "lm_head:matmul", "lm_head:logits"]
    assert "lm_head: 3 layers" in layers.view.children[-1].value
    assert any("▶ lm_head" in tick for tick in layers.figure.layout.yaxis.ticktext)


@pytest.mark.tensorrt
def test_a_chosen_bar_stays_chosen_while_it_is_there(layers):
    layers.select("lm_head")
    layers.measure.value = "FLOP"
    assert layers.selected == "lm_head"
    layers.by.value = "precision"
    assert layers.selected == "bfloat16"
    with pytest.raises(ConfigError, match=r"no such bar.*'lm_head'.*bfloat16"):
        layers.select("lm_head")


@pytest.mark.tensorrt
def test_steps_stay_within_the_plan_s_profiles(layers):
    one = layers.table.flops
    layers.amount.value = 4
    assert layers.table.flops == pytest.approx(4 * one)
    layers.step.value = "context"
    layers.amount.value = 64
    assert layers.amount.max == 64
    assert layers.amount.description == "tokens"
    layers.step.value = "generation"
    assert (layers.amount.max, layers.amount.value) == (4, 4)
    assert layers.table.flops == pytest.approx(4 * one)


@pytest.mark.tensorrt
def test_the_page_is_sent_the_whole_figure_after_each_change(layers):
    layers.by.value = "kind"
    sent = layers._live.state.get_state()["figure"]
    assert sent["layout"]["title"]["text"] == "8.04 MiB of weights by kind"
    assert sent == layers.figure.to_plotly_json()


@pytest.mark.tensorrt
def test_it_shows_itself_without_a_kernel_and_without_ids(engine, layers):
    shown = layers._repr_mimebundle_()
    assert shown["text/plain"] == (
        "EngineLayers(342 layers, weight bytes by part, a generation step of 1 row, selected attention.qkv: 78 layers)"
    )
    assert "<td" in shown["text/html"]
    assert "transformer.layers.5.attention.qkv.weight" in shown["text/html"]
    assert "application/vnd.jupyter.widget-view+json" in shown
    again = EngineLayers(engine)._repr_mimebundle_()
    assert (again["text/plain"], again["text/html"]) == (shown["text/plain"], shown["text/html"])


@pytest.mark.tensorrt
def test_a_rank_of_several_shows_its_own_layers():
    bounds = BuildConfig(max_batch_size=2, max_input_len=16, max_seq_len=32)
    split = Checkpoint.from_hugging_face(llama_dir()).build(bounds, mapping=Mapping(tp_size=2), plan=False)
    layers = EngineLayers(split, rank=1)
    layers.measure.value, layers.by.value = "layers", "kind"
    layers.select("dist_collective")
    assert len(layers.selection) == 2 * 6 + 1  # after each attention, each MLP and the head
