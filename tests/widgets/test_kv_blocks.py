"""KVBlocks without a browser: the blocks of every step, the picture as a function of data, live and on request."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trtlab.widgets import KVBlocks
from trtlab.widgets.kv_figure import KvView, block_words, kv_figure, label, map_heading
from trtlab.widgets.kv_moment import DRAWN, Moment, cells, history, moment_after, moment_now
from trtlab.widgets.kv_panels import TRACES

from trtlab import BuildConfig, Checkpoint, ConfigError, SamplingParams, SessionConfig
from trtlab.runtime.events import Admission, Block, EventLog, StepEvent, Work
from trtlab.tiny import EXAMPLES, llama_dir

SIZE = 8
LONG = SamplingParams(max_new_tokens=20, ignore_eos=True)


@pytest.fixture(scope="module")
def engine():
    bounds = BuildConfig(max_batch_size=4, max_input_len=64, max_seq_len=96, tokens_per_block=SIZE)
    return Checkpoint.from_hugging_face(llama_dir()).build(bounds, plan=False)


@pytest.fixture
def session(engine):
    with engine.session(
        SessionConfig(max_tokens_in_paged_kv_cache=40 * SIZE), backend="torch", device="cpu"
    ) as session:
        yield session


@pytest.fixture
def blocks(session):
    """A widget that is not live: it reads the session only when a test asks."""
    widget = KVBlocks(session)
    widget.live.value = False
    return widget


def trace(blocks, name):
    return blocks.figure.data[TRACES.index(name)]


def click(blocks, name, place):
    """Do what the page does when a reader clicks."""
    blocks._live._handle_custom_msg([TRACES.index(name), place], [])


def event(step, *blocks, work=(), admitted=(), preempted=(), counts=(0, 0, 0)):
    return StepEvent(step, 0.0, 1.0, work, admitted, preempted, (), (), blocks, *counts)


def log_of(*events, kept=100):
    log = EventLog(kept)
    for one in events:
        log.append(one)
    return log


def filled_places(session):
    """An independent count of the filled places of each block, from the requests themselves."""
    places = {}
    for request in session._loop.scheduler.running:
        for index, number in enumerate(request.chain.blocks):
            places[number] = max(places.get(number, 0), min(SIZE, max(0, request.past - index * SIZE)))
    return places


@settings(max_examples=6, deadline=None)
@given(st.data())
def test_every_step_shows_the_blocks_as_they_were(engine, data):
    reuse, no_evict = data.draw(st.booleans()), data.draw(st.booleans())
    config = SessionConfig(
        max_tokens_in_paged_kv_cache=12 * SIZE,
        enable_block_reuse=reuse,
        capacity_scheduler_policy="GUARANTEED_NO_EVICT" if no_evict else "MAX_UTILIZATION",
    )
    with engine.session(config, backend="torch", device="cpu") as session:
        requests, states = [], []
        for _ in range(20):
            action = data.draw(st.sampled_from(("submit", "fork", "cancel", "step", "step", "step")))
            under_way = [request for request in requests if not request.done]
            if action == "submit":
                ids = data.draw(st.sampled_from((range(3), range(20), range(4, 44))))
                requests.append(session.submit([id + 5 for id in ids], LONG))
            elif action == "fork" and under_way:
                requests.append(session.fork(under_way[0]))
            elif action == "cancel" and under_way:
                under_way[-1].cancel()
            elif action == "step" and session.step():
                taken = {b.number: b for b in session.kv_cache.blocks if b.state != "free"}
                states.append((taken, filled_places(session)))
            now = moment_now(session.kv_cache, range(12))
            assert now.blocks == {b.number: b for b in session.kv_cache.blocks if b.state != "free"}
            assert sum(now.filled.values()) == session.kv_cache.tokens
        for index, (taken, places) in enumerate(states):
            moment = moment_after(session.events, index, SIZE)
            assert moment.blocks == taken
            assert sum(moment.filled.values()) == sum(places.values())
            assert moment.counts(12)[0] == session.events[index].used


def test_the_block_that_is_being_filled_is_known_without_reuse_too(engine):
    config = SessionConfig(max_tokens_in_paged_kv_cache=12 * SIZE, enable_block_reuse=False)
    with engine.session(config, backend="torch", device="cpu") as session:
        session.submit(range(5, 5 + 2 * SIZE + 3), LONG)
        session.step()
        assert moment_after(session.events, 0, SIZE).filled == {0: SIZE, 1: SIZE, 2: 3}


def test_a_fork_is_seen_before_the_next_step(session, blocks):
    request = session.submit(range(5, 15), LONG)
    session.step()
    session.fork(request)
    assert blocks.selection.block == Block(0, (1, 2), token_ids=tuple(range(5, 13)))
    assert "(2 shared)" in blocks.figure.layout.title.text
    session.step()
    now = moment_now(session.kv_cache, range(40))
    assert {b.number: len(b.owners) for b in now.blocks.values()} == {0: 2, 1: 1, 2: 1}
    assert now.filled == {0: 8, 1: 3, 2: 3}


def test_a_block_reads_its_text_and_its_places(session, blocks):
    session.submit("About Mila.\nMila lives at the orchard", LONG)
    session.step()
    ids = session.encode("About Mila.\nMila lives at the orchard")
    assert blocks.selection.text == session.decode(ids[:SIZE])
    blocks.show(block=1)
    assert (blocks.selection.filled, blocks.selection.text) == (len(ids) - SIZE, "")
    hover = trace(blocks, "map").hovertext
    assert hover[0].startswith("<b>block 0</b><br>in use by request 1, full<br><i>About Mila. ⏎")
    assert hover[1] == f"<b>block 1</b><br>in use by request 1, {len(ids) - SIZE} of 8 places filled"
    assert hover[2] == "<b>block 2</b><br>free"


def test_a_step_and_a_block_are_chosen_and_read(session, blocks):
    session.submit(range(5, 15), LONG)
    session.run()
    assert blocks.selection.step is None
    assert blocks.selection.block.state == "cached"
    blocks.step.value = 3
    assert (blocks.selection.step, blocks.selection.block.owners) == (3, (1,))
    click(blocks, "map", 1)
    assert blocks.selection.block.number == 1
    assert blocks.selection.filled == 5
    click(blocks, "computed", 6)
    assert (blocks.step.value, blocks.selection.step) == (6, 6)
    assert blocks.selection.block.state == "used"
    assert "tokens computed" in blocks._details.value
    blocks.show(step=-1)
    assert blocks.selection.step is None


def test_an_unknown_step_or_block_is_refused(session, blocks):
    with pytest.raises(ConfigError, match=r"no such step.*got 0.*none yet"):
        blocks.show(step=0)
    session.submit([5, 6], LONG)
    session.step()
    with pytest.raises(ConfigError, match=r"no such step.*got 1.*0 to 0"):
        blocks.show(step=1)
    with pytest.raises(ConfigError, match=r"no such block.*got 40.*0 to 39"):
        blocks.show(block=40)


def test_the_slider_follows_the_session_only_at_its_right_end(session, blocks):
    session.submit([5, 6], LONG)
    session.step()
    blocks.refresh()
    assert (blocks.step.value, blocks.step.max, blocks._when.value) == (1, 1, "now")
    blocks.step.value = 0
    session.run()
    blocks.refresh()
    assert (blocks.step.value, blocks.step.max, blocks._when.value) == (0, 20, "after step 0")


def test_live_follows_while_steps_run_in_a_task(session):
    blocks = KVBlocks(session)

    async def answer():
        return [piece async for piece in session.submit("About Mila.\n", LONG)]

    with ThreadPoolExecutor(1) as thread:  # this thread can have the event loop of a browser test
        assert thread.submit(asyncio.run, answer()).result()
    deadline = time.monotonic() + 10
    while blocks.step.max != len(session.events):
        assert time.monotonic() < deadline, "the picture did not change in time"
        time.sleep(0.02)
    watcher = blocks._watcher
    blocks.live.value = False
    watcher.join(10)
    assert not watcher.is_alive()
    max_before = blocks.step.max
    session.generate([5, 6])
    time.sleep(0.3)
    assert blocks.step.max == max_before


def test_the_watcher_ends_with_the_session(engine):
    with engine.session(backend="torch", device="cpu") as session:
        blocks = KVBlocks(session)
        session.submit([5, 6], LONG)
        session.step()
    blocks._watcher.join(10)
    assert not blocks._watcher.is_alive()
    assert "0 of" in blocks.figure.layout.title.text  # closing cancelled the request


def test_steps_that_fell_off_are_not_offered(engine):
    config = SessionConfig(max_tokens_in_paged_kv_cache=40 * SIZE, events_kept=5)
    with engine.session(config, backend="torch", device="cpu") as session:
        blocks = KVBlocks(session)
        blocks.live.value = False
        session.submit(range(5, 15), LONG)
        session.run()
        blocks.refresh()
        assert (blocks.step.min, blocks.step.max) == (15, 20)
        blocks.show(step=15, block=0)
        assert blocks.selection.block.owners == (1,)
        assert blocks.selection.filled == SIZE


def test_moving_gives_the_picture_that_is_drawn_anew(session, blocks):
    requests = [session.submit(prompt, LONG) for prompt in EXAMPLES[:3]]
    for _ in range(4):
        session.step()
    session.fork(requests[0])
    session.run()
    for step, block in ((3, 0), (12, 2), (-1, 5), (0, 39)):
        blocks.show(step=step, block=block)
        anew = kv_figure(blocks._view)
        assert blocks.figure == anew
        assert blocks._live.state.get_state()["figure"] == anew.to_plotly_json()


def test_the_picture_says_everything_in_words():
    log = log_of(
        event(0, Block(0, (1,), token_ids=(7,) * 8), Block(1, (1,)), Block(2, (2,)),
              work=(Work(1, 0, 11, True), Work(2, 0, 4, True)),
              admitted=(Admission(1, 0, 0), Admission(2, 1, 0)), counts=(3, 0, 1)),
        event(1, Block(0, (1, 3), token_ids=(7,) * 8), Block(2, ()), Block(3, (3,)),
              work=(Work(1, 11, 1, True), Work(3, 8, 2, True)),
              admitted=(Admission(3, 1, 8),), preempted=(2,), counts=(3, 0, 1)),
    )  # fmt: skip
    view = KvView(4, 8, cells(4, ()), moment_after(log, 1, 8), history(log), chosen=3)
    picture = kv_figure(view)
    by_name = dict(zip(TRACES, picture.data, strict=True))
    assert picture == kv_figure(view)
    assert picture.layout.title.text == "After step 1: 3 of 4 blocks in use (1 shared), 0 cached for reuse, 1 free"
    assert by_name["labels"].text == ("1+3", "1", " ", "3")
    assert by_name["in use"].y == pytest.approx((-0.9, -0.9 * 4 / 8, 0, -0.9 * 2 / 8))
    assert by_name["shared"].y == pytest.approx((-0.9, 0, 0, 0))
    assert by_name["computed"].y == (15, 3)
    assert by_name["reused"].y == (0, 8)
    assert by_name["preempted"].hovertext == ("preempted: 2",)
    assert by_name["cursor of blocks"].x == (0.5, 1.5, 1.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("block", "filled", "words", "sign"),
    [
        (Block(0), 0, "free", ""),
        (Block(0, (), True, (1,)), 0, "cached for reuse", ""),
        (Block(0, (3,)), 5, "in use by request 3, 5 of 8 places filled", "3"),
        (Block(0, (3, 14), token_ids=(1,) * 8), 8, "shared by requests 3, 14, full", "3+14"),
        (Block(0, (3, 14, 15)), 8, "shared by requests 3, 14, 15, full", "×3"),
    ],
)
def test_a_block_has_words_and_a_sign(block, filled, words, sign):
    assert (block_words(block, filled, 8), label(block)) == (words, sign)


def test_of_a_large_pool_the_used_blocks_are_drawn_and_the_picture_says_so():
    few = cells(1_000_000, {5, 700_000})
    assert few == (range(5, 6), range(700_000, 700_001))
    many = cells(1_000_000, range(0, 3000, 2))
    assert len(many) <= DRAWN
    assert [number for cell in many for number in cell][:3000] == list(range(3000))
    log = log_of(event(0, *(Block(n, (1,)) for n in range(3)), work=(Work(1, 0, 20, True),), counts=(3, 0, 999_997)))
    moment = moment_after(log, 0, 8)
    one_each = KvView(1_000_000, 8, cells(1_000_000, moment.blocks), moment, history(log), 0)
    assert map_heading(one_each).endswith("3 of 1,000,000 are drawn, the rest was never used")
    in_runs = KvView(1_000_000, 8, many, moment, history(log), 0)
    assert map_heading(in_runs) == "each cell is 6 blocks; 3,000 of 1,000,000 are drawn, the rest was never used"
    first = dict(zip(TRACES, kv_figure(in_runs).data, strict=True))
    assert first["in use"].y[0] == pytest.approx(-0.9 * 3 / 6)
    assert first["map"].hovertext[0] == "<b>blocks 0 to 5</b><br>3 used, 3 free"


def test_a_pool_of_a_million_blocks_is_not_asked_for_each(engine):
    with engine.session(
        SessionConfig(max_tokens_in_paged_kv_cache=5000 * SIZE), backend="torch", device="cpu"
    ) as session:
        blocks = KVBlocks(session)
        blocks.live.value = False
        session.submit(range(5, 35), LONG)
        session.run()
        blocks.refresh()
        ever_used = {block.number for event in session.events for block in event.blocks}
        assert len(blocks._view.cells) == len(ever_used)
        assert "of 5,000 are drawn" in blocks.figure.layout.annotations[0].text


def test_many_steps_share_bars_that_keep_the_sums():
    log = [event(n, work=(Work(1, n, 3, True),), counts=(n % 5, 1, 2)) for n in range(10, 1000)]
    steps = history(log)
    assert (steps.width, len(steps.used)) == (5, 198)
    assert sum(steps.computed) == 3 * 990
    assert steps.used[0] == 14 % 5
    assert (steps.bar(14), steps.last(0), steps.bar(15)) == (0, 14, 1)


def test_repr_and_still_view_are_short_and_deterministic(session, blocks):
    assert repr(blocks) == "KVBlocks(Now: 0 of 40 blocks in use, 0 cached for reuse, 40 free; block 0: free)"
    session.submit("About Mila.\n", LONG)
    for _ in range(5):
        session.step()
    bundle = blocks._repr_mimebundle_()
    assert bundle["text/plain"] == repr(blocks)
    assert "<td align=right>1 (" in bundle["text/html"]
    assert bundle == {**blocks._repr_mimebundle_()}
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert len(bundle["text/html"]) < 8000
    assert "0x" not in bundle["text/html"]


def test_an_empty_session_has_a_picture(session, blocks):
    assert trace(blocks, "labels").text == (" ",) * 40
    assert Moment(None, {}, {}).block(3) == Block(3)
    assert blocks.card().title.startswith("KVBlocks · Now: 0 of 40")


@pytest.mark.parametrize("content", ["{", None], ids=["damaged", "missing"])
def test_a_block_without_a_readable_tokenizer_reads_its_ids(content, talking_model, edited):
    folder = edited(talking_model)
    (folder / "tokenizer.json").unlink() if content is None else (folder / "tokenizer.json").write_text(content)
    engine = Checkpoint.from_hugging_face(folder).build(BuildConfig(max_seq_len=64), plan=False)
    with engine.session(backend="torch", device="cpu") as session:
        assert not session.has_text
        assert KVBlocks(session)._text((5, 6, 7)) == "5 6 7"
