"""Every public object has a card: the same facts as text and as HTML, and nothing that changes between runs."""

import re
from html import unescape

import pytest

import trtlab
from trtlab import tiny
from trtlab.card import Card, Shown, Table, bar, count, html, size, text
from trtlab.published import SHAPES, V100

from ..models import normal_weights, random_texts, small_config


@pytest.fixture(scope="module")
def objects():
    checkpoint = trtlab.Checkpoint.from_hugging_face(tiny.llama_dir())
    engine = checkpoint.build(trtlab.BuildConfig(max_batch_size=2, max_seq_len=64, dtype="float32"))
    machine = trtlab.machine()
    with engine, engine.session(backend="torch", device="cpu") as session:
        of_tensorrt = machine.builds_plans and {
            "layers": engine.layers,
            "network": engine.network(),
            "comparison": engine.compare(checkpoint, [5, 6, 7], steps=1),
        }
        yield {
            **(of_tensorrt or {}),
            "checkpoint": checkpoint,
            "config": checkpoint.config,
            "engine": engine,
            "session": session,
            "completion": session.generate([5, 6, 7], trtlab.SamplingParams(max_new_tokens=4)),
            "benchmark": trtlab.benchmark(session, [1], [(4, 2)], warm_up=0, num_runs=1),
            "machine": machine,
            "estimate": trtlab.estimate(SHAPES["LLaMA-2-7B"]),
            "published": V100,
        }


NAMES = [
    *"checkpoint config engine session completion benchmark machine estimate published".split(),
    *(pytest.param(name, marks=pytest.mark.tensorrt) for name in ("layers", "network", "comparison")),
]


@pytest.mark.parametrize("name", NAMES)
def test_a_card_says_more_than_a_class_name(objects, name):
    shown = trtlab.card(objects[name])
    assert shown.facts or shown.tables
    assert isinstance(objects[name], Shown)


@pytest.mark.parametrize("name", NAMES)
def test_text_and_html_hold_the_same_words(objects, name):
    page = unescape(re.sub(r"<[^>]+>", " ", objects[name]._repr_html_()))
    for word in set(re.findall(r"[\w.]+", repr(objects[name]))) - {"─"}:
        if word.strip("─"):
            assert word in page, word


@pytest.mark.parametrize("name", NAMES)
def test_a_card_holds_no_address_and_no_style(objects, name):
    shown = repr(objects[name]) + objects[name]._repr_html_()
    assert not re.search(r"0x[0-9a-f]{6,}", shown)
    assert "<script" not in shown and "<style" not in shown and " id=" not in shown
    assert shown == repr(objects[name]) + objects[name]._repr_html_()


def test_what_a_user_typed_cannot_become_markup():
    shown = Card("<b>", (("<i>", "<script>"),), (Table(("<u>",), (("<p>",),)),), next="<a>")
    for tag in ("<i>", "<script>", "<u>", "<a>"):
        assert tag not in html(shown)
        assert tag in text(shown)


def test_text_of_any_file_can_be_shown():
    """A folder's name that is no UTF-8, half a character in a JSON file, a sequence that would clear the screen."""
    shown = Card("\udcff", (("\ud800", "a\x1b[2Jb\x9b"),), (Table(("ü\tz",), (("\0\x7f",),)),), next="\r")
    for drawn in (text(shown), html(shown)):
        drawn.encode()
        assert r"\udcff" in drawn and r"\ud800" in drawn and r"a\x1b[2Jb\x9b" in drawn and r"\x00\x7f" in drawn
        assert "ü\tz" in drawn and "\r" not in drawn


def test_columns_align_by_their_heads():
    shown = text(Card("t", tables=(Table(("name", " number"), (("a", "1"), ("bbb", "22"))),)))
    assert shown.splitlines()[-2:] == ["  a          1", "  bbb       22"]


@pytest.mark.parametrize(
    ("nbytes", "shown"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (3 << 30, "3.00 GiB"), (5 << 40, "5120.00 GiB")],
)
def test_sizes_are_binary(nbytes, shown):
    assert size(nbytes) == shown


@pytest.mark.parametrize(("number", "shown"), [(7, "7"), (4.2e6, "4.20 M"), (8.03e9, "8.03 B"), (1500, "1.50 K")])
def test_counts_are_decimal(number, shown):
    assert count(number) == shown


@pytest.mark.parametrize(
    ("share", "shown"), [(0, ""), (1, "━━━━"), (0.5, "━━"), (2, "━━━━"), (-1, ""), (3 / 8, "━╸"), (1e-9, "╸")]
)
def test_bars_have_halves_and_stay_in_range(share, shown):
    assert bar(share, 4) == shown


def test_a_bar_is_no_black_block_in_html():
    shown = html(Card("t", tables=(Table(("name", ""), (("a", bar(0.3)), ("b", ""))),)))
    assert re.search(r"<td style=[^>]*color:#\w+[^>]*>━", shown)
    assert "█" not in shown


def checkpoint_of(**changes):
    config = small_config(**changes)
    return trtlab.Checkpoint.from_weights(config, normal_weights(config))


@pytest.mark.parametrize(
    "changes",
    [
        {"max_position_embeddings": 64},
        {"max_position_embeddings": 4096},
        {"max_position_embeddings": 4096, "sliding_window": 48},
    ],
)
def test_the_next_line_of_a_checkpoint_works(changes):
    checkpoint = checkpoint_of(**changes)
    call = trtlab.card(checkpoint).next
    length = min(2048, *changes.values())
    assert call == f"engine = checkpoint.build(BuildConfig(max_batch_size=8, max_seq_len={length}))"
    call = call.removeprefix("engine = ").replace("))", "), plan=False)")
    eval(call, {"checkpoint": checkpoint, "BuildConfig": trtlab.BuildConfig}).close()


def test_the_next_line_of_what_becomes_no_plan_builds_without_one():
    config = small_config(hidden_size=64, head_size=16, intermediate_size=64)
    plain = trtlab.Checkpoint.from_weights(config, normal_weights(config))
    quant = trtlab.QuantConfig("W4A8_AWQ", group_size=64)
    quantized = plain.quantize(quant, calibration=random_texts((9,)))
    calls = trtlab.card(quantized).next
    call = calls[calls.index("checkpoint.build(") :]
    assert call == "checkpoint.build(BuildConfig(max_batch_size=8, max_seq_len=64), plan=False)"
    eval(call, {"checkpoint": quantized, "BuildConfig": trtlab.BuildConfig}).close()


def test_what_was_opened_shows_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    checkpoint = checkpoint_of()
    assert "folder" not in dict(trtlab.card(checkpoint).facts)
    for place, shown in (("here", "here"), (tmp_path.parent / "home" / "it", "~/it"), (tmp_path.parent / "x", "")):
        monkeypatch.setenv("HOME", str(tmp_path.parent / "home"))
        saved = trtlab.Checkpoint.load(checkpoint.save(place))
        opened = trtlab.Engine.load(saved.build(plan=False).save(f"{place}_engine"))
        assert dict(trtlab.card(saved).facts)["folder"] == (shown or str(place))
        assert dict(trtlab.card(opened).facts)["folder"] == f"{shown or place}_engine"


def test_both_sizes_of_the_cache_are_said():
    """An engine in bfloat16 stores half of what a session on a CPU, which computes in float32, allocates."""
    checkpoint = checkpoint_of(dtype="bfloat16", num_key_value_heads=4)
    with checkpoint.build(trtlab.BuildConfig(max_seq_len=33), plan=False) as engine:
        rows = {row[0]: row[1] for row in trtlab.card(engine).tables[0].rows}
        with engine.session(backend="torch", device="cpu") as session:
            pool = dict(trtlab.card(session).facts)["KV pool"]
            assert size(session.kv_cache.pool.nbytes) == rows["KV cache on a CPU, in float32"] == "256.00 KiB"
    assert rows["KV cache of 512 tokens in bfloat16, each rank"] == "128.00 KiB"
    assert "256.00 KiB in float32, where the engine has bfloat16" in pool
    with checkpoint_of().build(plan=False) as engine, engine.session(backend="torch", device="cpu") as session:
        assert "float32" not in dict(trtlab.card(session).facts)["KV pool"]
