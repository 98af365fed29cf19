"""Widgets and notebooks in a real JupyterLab, with headless Chromium and a mouse."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

pytestmark = [pytest.mark.browser, pytest.mark.slow]
ENGINE = """\
from trtlab import BuildConfig, Checkpoint
from trtlab.tiny import llama_dir
from trtlab.widgets import EngineLayers
bounds = BuildConfig(max_batch_size=4, max_input_len=64, max_seq_len=128)
layers = EngineLayers(Checkpoint.from_hugging_face(llama_dir()).build(bounds, plan=False))
layers"""
SCALES = """\
from trtlab import Checkpoint, QuantConfig
from trtlab.tiny import EXAMPLES, llama_dir
from trtlab.widgets import ScaleExplorer
quant = QuantConfig("W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN", "INT8")
explorer = ScaleExplorer(Checkpoint.from_hugging_face(llama_dir()).quantize(quant, calibration=list(EXAMPLES)))
explorer"""
BLOCKS = """\
from trtlab import BuildConfig, Checkpoint, SamplingParams, SessionConfig
from trtlab.tiny import EXAMPLES, llama_dir
from trtlab.widgets import KVBlocks
bounds = BuildConfig(max_batch_size=4, max_input_len=64, max_seq_len=128, tokens_per_block=8)
engine = Checkpoint.from_hugging_face(llama_dir()).build(bounds, plan=False)
session = engine.session(SessionConfig(max_tokens_in_paged_kv_cache=384), backend="torch", device="cpu")
blocks, started = KVBlocks(session), False
blocks"""
# A second run starts requests and leaves them to the event loop; every run prints the selection.
READ_BLOCKS = """\
import asyncio
if started and not session.events:
    async def answer(prompt):
        async for _ in session.submit(prompt, SamplingParams(max_new_tokens=24, ignore_eos=True)):
            await asyncio.sleep(0.02)
    tasks = [asyncio.create_task(answer(prompt)) for prompt in EXAMPLES[:6]]
chosen = blocks.selection
started = True
print("chosen:", chosen.step, chosen.block.number, chosen.block.owners, chosen.filled, repr(chosen.text))"""
# Records every title that the picture gets from now on.
RECORD = """() => {
    window.titles = [];
    const look = () => {
        const now = document.querySelector('.js-plotly-plot .gtitle')?.textContent;
        if (now && now !== window.titles.at(-1)) window.titles.push(now);
        requestAnimationFrame(look);
    };
    look();
}"""
READ_SCALES = "print(explorer.recipe, explorer.shown.value)"
READ = 'print("chosen:", layers.selected, len(layers.selection), layers.step.value, layers.amount.value)'
# Moves the focused slider by one step and measures the time until the picture changes.
STEP = """async () => {
    const line = () => document.querySelectorAll('.scatterlayer .js-line')[1].getAttribute('d');
    const before = line(), start = performance.now();
    document.activeElement.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowRight', bubbles: true}));
    while (line() === before && performance.now() - start < 30000) await new Promise(requestAnimationFrame);
    return performance.now() - start;
}"""
# A place on the line of a bar, far from the bar itself.
PLACE = """() => {
    const ticks = [...document.querySelectorAll('.js-plotly-plot .ytick text')];
    const plot = document.querySelector('.js-plotly-plot .nsewdrag').getBoundingClientRect();
    const tick = ticks.find(tick => tick.textContent.includes(NAME)).getBoundingClientRect();
    return [plot.x + plot.width * 0.8, tick.y + tick.height / 2];
}"""


def write(path: Path, *cells: str) -> Path:
    notebook = new_notebook(cells=[new_code_cell(cell) for cell in cells])
    notebook.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    nbformat.write(notebook, path)
    return path


def title(page):
    return page.text_content(".js-plotly-plot .gtitle")


def words(page):
    """The summary above the picture of a ScaleExplorer."""
    return page.text_content(".widget-html-content")


def read_selection(page):
    """Run the last cell and return its output."""
    before = page.locator(".jp-Cell").last.locator(".jp-InputArea-prompt").text_content()
    page.evaluate("""async () => {
        jupyterapp.shell.currentWidget.content.activeCellIndex = 1;
        await jupyterapp.commands.execute('notebook:run-cell');
    }""")
    page.wait_for_function(
        """before => {
            const prompts = [...document.querySelectorAll('.jp-InputArea-prompt')];
            return ![before, '[*]:'].includes(prompts.at(-1).textContent);
        }""",
        arg=before,
    )
    return page.locator(".jp-OutputArea-output").last.text_content()


def click_bar(page, name):
    page.mouse.click(*page.evaluate(PLACE.replace("NAME", repr(name))))
    page.wait_for_function(
        f"[...document.querySelectorAll('.ytick text')].some(tick => tick.textContent.includes('▶ {name}'))"
    )


def middle_of_block(page, number):
    place = page.locator(".barlayer .trace").first.locator(".point path").nth(number).bounding_box()
    return place["x"] + place["width"] / 2, place["y"] + place["height"] / 2


def click_block(page, number):
    page.mouse.click(*middle_of_block(page, number))
    page.wait_for_function(f"document.querySelector('.widget-html-content').textContent.includes('block {number}')")


def test_a_click_on_a_bar_is_read_from_python(open_notebook, tmp_path):
    page = open_notebook(write(tmp_path / "engine_layers.ipynb", ENGINE, READ), run=True)
    page.wait_for_selector(".js-plotly-plot .gtitle")
    page.screenshot(path=tmp_path / "before.png")
    assert title(page) == "8.04 MiB of weights by part"
    assert "chosen: attention.qkv 78 generation 1" in read_selection(page)

    click_bar(page, "lm_head")
    assert "chosen: lm_head 3 generation 1" in read_selection(page)
    assert "lm_head: 3 layers, 640.00 KiB of weights" in page.text_content(".widget-html-content")

    page.click("button:has-text('FLOP')")
    page.wait_for_function("document.querySelector('.gtitle').textContent.includes('FLOP by part')")
    page.click("button:has-text('context')")
    page.wait_for_function("document.querySelector('.gtitle').textContent.includes('context step of 1 token')")
    page.locator(".widget-slider .noUi-handle").first.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function("document.querySelector('.gtitle').textContent.includes('context step of 2 tokens')")
    click_bar(page, "mlp.gate")
    assert "chosen: mlp.gate 18 context 2" in read_selection(page)
    page.screenshot(path=tmp_path / "after.png")


def test_the_alpha_slider_changes_picture_and_recipe(open_notebook, tmp_path):
    page = open_notebook(write(tmp_path / "scale_explorer.ipynb", SCALES, READ_SCALES), run=True, height=1400)
    page.wait_for_selector(".js-plotly-plot .barlayer .point")
    page.screenshot(path=tmp_path / "before.png")
    assert "smoothquant_val=0.5" in read_selection(page)
    before = page.get_attribute(".scatterlayer .js-line >> nth=1", "d"), words(page)

    page.locator(".widget-slider .noUi-handle").first.focus()
    at_rest = []
    for _ in range(6):  # with a pause after each, like a reader who looks at the picture
        at_rest.append(page.evaluate(STEP))
        page.wait_for_timeout(500)
    print("slider to picture, ms:", *map(round, at_rest))  # other work on the machine adds to it
    page.keyboard.press("ArrowLeft")
    page.wait_for_selector(".widget-html-content:has-text('smoothquant_val=0.75')")
    page.keyboard.press("ArrowRight")
    page.wait_for_function("document.querySelector('.widget-readout').textContent.includes('0.80')")
    page.wait_for_function("d => document.querySelectorAll('.scatterlayer .js-line')[1].getAttribute('d') !== d",
                           arg=before[0])  # fmt: skip
    page.wait_for_selector(".widget-html-content:has-text('smoothquant_val=0.8')")
    assert words(page) != before[1]
    assert "smoothquant_val=0.8" in read_selection(page)

    page.click("button:has-text('merged')")
    place = page.locator(".barlayer .point path").nth(4 * 6 + 3).bounding_box()  # mlp.proj of layer 3
    page.mouse.click(place["x"] + place["width"] / 2, place["y"] + place["height"] / 2)
    page.wait_for_function("document.querySelector('.widget-html-content').textContent.includes('1 of 30 excluded')")
    recipe = read_selection(page)
    assert "kv_cache_scales='merged'" in recipe
    assert "exclude_modules=('transformer.layers.3.mlp.proj',)" in recipe
    page.screenshot(path=tmp_path / "after.png")


def test_blocks_fill_while_tokens_come_and_every_step_can_be_read(open_notebook, tmp_path):
    page = open_notebook(write(tmp_path / "kv_blocks.ipynb", BLOCKS, READ_BLOCKS), run=True, height=1200)
    page.wait_for_selector(".js-plotly-plot .gtitle")
    page.evaluate(RECORD)
    page.wait_for_function("""() => {
        const plot = document.querySelector('.js-plotly-plot');
        return plot.querySelector('.main-svg').getBoundingClientRect().width === plot.clientWidth;
    }""")
    assert "chosen: None 0 () 0" in read_selection(page)
    page.wait_for_function("titles.length > 1 && titles.at(-1).startsWith('Now: 0 of 48')")
    titles = page.evaluate("titles")
    print(len(titles), "pictures of 48 steps")  # other work on the machine adds to it
    assert any(title.startswith("Now: ") and " 0 of " not in title for title in titles), (
        f"the picture did not change while requests ran: {titles}"
    )

    page.locator(".widget-slider .noUi-handle").first.focus()
    page.wait_for_function("document.querySelector('.widget-html-content').textContent.includes('0 running')")
    while not title(page).startswith("After step 30"):
        before = title(page)
        page.keyboard.press("ArrowLeft")
        page.wait_for_function("title => document.querySelector('.gtitle').textContent !== title", arg=before)
    labels = page.locator(".textpoint text").all_text_contents()
    assert {label for label in labels if label.strip()} == {"5", "6"}
    chosen = {}
    for number in (place for place, label in enumerate(labels) if label == "6"):
        click_block(page, number)
        assert "After step 30" in title(page)
        chosen[number] = read_selection(page)
        assert f"chosen: 30 {number} (6,) " in chosen[number]
    page.screenshot(path=tmp_path / "after.png")
    assert any("(6,) 8 'One " in read for read in chosen.values()), chosen

    page.mouse.move(*middle_of_block(page, 20))
    click_block(page, 40)  # before plotly looks again for what is under the pointer


def test_a_reloaded_page_keeps_the_picture(open_notebook, tmp_path):
    page = open_notebook(write(tmp_path / "reloaded.ipynb", ENGINE, READ), run=True)
    page.wait_for_selector(".js-plotly-plot .gtitle")
    page.click("button:has-text('kind')")
    page.wait_for_function("document.querySelector('.gtitle').textContent.includes('by kind')")
    page.evaluate("jupyterapp.commands.execute('docmanager:save')")
    page.reload()
    page.wait_for_selector(".js-plotly-plot .gtitle")
    assert title(page) == "8.04 MiB of weights by kind"


def test_a_figure_whose_library_comes_late_is_drawn_and_follows(open_notebook, tmp_path):
    late = """\
import trtlab.widgets.live as live
seconds_later = "await new Promise(resolve => setTimeout(resolve, 3000));"
library = live.get_plotlyjs()
live.get_plotlyjs = lambda: seconds_later + library
"""
    page = open_notebook(write(tmp_path / "late.ipynb", late + ENGINE, READ), run=True)
    page.wait_for_selector(".js-plotly-plot .barlayer .point")
    page.click("button:has-text('kind')")
    page.wait_for_function("document.querySelector('.gtitle').textContent.includes('by kind')")


def test_a_figure_is_as_wide_as_its_place_in_the_page(open_notebook, tmp_path):
    page = open_notebook(write(tmp_path / "wide.ipynb", ENGINE, READ), run=True)
    for width in (1280, 900, 1500):
        page.set_viewport_size({"width": width, "height": 900})
        page.wait_for_function("""() => {
            const plot = document.querySelector('.js-plotly-plot');
            const place = plot?.closest('.jp-OutputArea-output').getBoundingClientRect();
            const picture = plot?.querySelector('.main-svg')?.getBoundingClientRect();
            return picture && Math.abs(place.width - picture.width) < 30 && picture.right <= place.right;
        }""")
