"""A real JupyterLab and a headless Chromium for the browser tests; notebooks are opened as copies in a new folder."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CHROMIUM_OPTIONS = """--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync""".split()
QUIET = {"fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True}
PATIENCE_S = 90  # for a server or a page, on a busy machine
RUN_S = 300  # for all cells of a notebook
# Runs all cells anew, one by one or at once, and returns what went wrong. The command "run all" ends before the cells
# do: at once while the page has no cell yet, and at a cell that raises, although by its tag the kernel goes on.
RUN = """async oneByOne => {
    const panel = jupyterapp.shell.currentWidget, notebook = panel.content;
    const run = command => jupyterapp.commands.execute(`notebook:${command}`);
    const pause = () => new Promise(resolve => setTimeout(resolve, 200));
    const cells = () => notebook.widgets.filter(cell => cell.model.type === 'code');
    const isDone = cell => cell.model.executionCount !== null;
    const wrong = cell => {
        const raises = (cell.model.getMetadata('tags') ?? []).includes('raises-exception');
        const error = cell.model.outputs.toJSON().find(output => output.output_type === 'error');
        if (error && !raises) return `${error.ename}: ${error.evalue}`;
        return raises && !error ? 'a cell with the tag raises-exception raised nothing' : null;
    };
    const problem = () => cells().filter(isDone).map(wrong).find(words => words) ?? null;
    await panel.context.ready;
    await panel.sessionContext.ready;
    while (!cells().length) await pause();
    await run('clear-all-cell-outputs');
    const kernel = panel.sessionContext.session.kernel, deadline = performance.now() + RUN_MS;
    let idle = 10, ended = true; // looks at an idle kernel in a row; whether the last command has ended
    while (!cells().every(isDone) || kernel.status !== 'idle') {
        if (performance.now() > deadline) return 'not done in time';
        if (kernel.status !== 'idle') idle = 0;
        else if (ended && (oneByOne || ++idle > 10)) {
            if (problem()) return problem();
            notebook.activeCellIndex = notebook.widgets.indexOf(cells().find(cell => !isDone(cell)));
            ended = false;
            run(oneByOne ? 'run-cell' : 'run-all-below').finally(() => { ended = true; });
            idle = 0;
        }
        await pause();
    }
    return problem();
}""".replace("RUN_MS", str(1000 * RUN_S))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without Chromium the browser tests are skipped, unless TRTLAB_REQUIRE_BROWSER=1 makes that a failure."""
    if CHROMIUM is None and os.environ.get("TRTLAB_REQUIRE_BROWSER") != "1":
        for item in items:
            if item.get_closest_marker("browser"):
                item.add_marker(pytest.mark.skip(reason="Chromium is not installed"))


@dataclass(frozen=True)
class Lab:
    """A running JupyterLab: its address, and the folder that it serves."""

    url: str
    folder: Path


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """JupyterLab on a free port with separate settings, in a process group that ends with the tests."""
    folder, own = tmp_path_factory.mktemp("notebooks"), tmp_path_factory.mktemp("jupyter")
    settings = own / "user-settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text(json.dumps(QUIET))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = (own / "log").open("wb")
    server = subprocess.Popen(
        [
            *(sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}"),
            *("--allow-root", "--IdentityProvider.token=", "--ServerApp.disable_check_xsrf=True"),
            *(f"--ServerApp.root_dir={folder}", "--LabApp.expose_app_in_browser=True", "--ServerApp.port_retries=0"),
            *(f"--LabApp.user_settings_dir={own / 'user-settings'}", f"--LabApp.workspaces_dir={own / 'workspaces'}"),
        ],
        stdout=log,
        stderr=log,
        start_new_session=True,
        env={**os.environ, "JUPYTER_CONFIG_DIR": str(own), "JUPYTER_RUNTIME_DIR": str(own / "runtime"),
             "IPYTHONDIR": str(own / "ipython"), "TRTLAB_BACKEND": "torch", "CUDA_VISIBLE_DEVICES": "",
             "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_for(f"{url}/api/status", server, own / "log")
        yield Lab(url, folder)
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
        log.close()


def _wait_for(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        assert server.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(url, timeout=2).close()
        except OSError:
            time.sleep(0.2)
        else:
            return
    raise AssertionError(f"JupyterLab did not start: {log.read_text()}")


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """A headless Chromium."""
    from playwright.sync_api import sync_playwright

    assert CHROMIUM, "TRTLAB_REQUIRE_BROWSER=1, and Chromium is not installed"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=CHROMIUM_OPTIONS)
        yield browser
        browser.close()


@pytest.fixture
def open_notebook(lab: Lab, chromium: Any) -> Iterator[Callable[..., Any]]:
    """``open_notebook(path, run=True)`` copies a notebook into JupyterLab, opens it and returns the page.

    ``one_by_one`` runs the cells as a reader does, each after the one before has ended; ``slower`` divides the speed
    of the page's processor.
    """
    pages = []

    def open_copy(
        path: Path, *, run: bool, one_by_one: bool = False, slower: float = 1, width: int = 1280, height: int = 900
    ) -> Any:
        shutil.copy(path, lab.folder / path.name)
        page = chromium.new_page(viewport={"width": width, "height": height})
        pages.append(page)
        page.set_default_timeout(PATIENCE_S * 1000)
        page.goto(f"{lab.url}/lab/tree/{path.name}?reset")
        page.wait_for_function("window.jupyterapp")
        page.evaluate("jupyterapp.restored")
        page.wait_for_selector('.jp-Notebook-ExecutionIndicator[data-status="idle"]')
        page.evaluate("jupyterapp.shell.currentWidget.revealed")  # waits for the cells on a slow machine
        page.context.new_cdp_session(page).send("Emulation.setCPUThrottlingRate", {"rate": slower})
        if run:
            problem = page.evaluate(RUN, one_by_one)
            assert problem is None, f"{path.name}: {problem}"
        return page

    yield open_copy
    for page in pages:
        page.evaluate("jupyterapp.shell.currentWidget?.sessionContext.shutdown()")
        page.close()
