"""The notebooks where they are read outside the site: JupyterLab, nbconvert, a sanitiser."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import bleach
import pytest
from bs4 import BeautifulSoup
from conftest import ROOT
from nbconvert import HTMLExporter
from playwright.sync_api import Browser, Page, Route

import notebooks
from notebooks import stored

pytestmark = pytest.mark.book

each_chapter = pytest.mark.parametrize("text", notebooks.chapters(), ids=lambda text: text.stem)


def formulas(text: Path) -> int:
    """How many formulas the text of a notebook has."""
    cells = [cell.source for cell in stored(text).cells if cell.cell_type == "markdown"]
    return len(re.findall(r"\$\$.+?\$\$|\$.+?\$", "\n\n".join(cells), re.S))


def pictures(text: Path, folded: bool = True) -> list[str]:
    """The alt texts of all stored pictures, those in folded outputs too or not."""
    found = []
    for cell in notebooks.code_cells(stored(text)):
        if folded or not cell.metadata.get("collapsed"):
            for output in cell.outputs:
                page = BeautifulSoup(output.get("data", {}).get("text/html", ""), "html.parser")
                found += [image["alt"] for image in page.find_all("img")]
    return found


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a JupyterLab as it is installed, without any setting of a person."""
    folder = tmp_path_factory.mktemp("lab")
    # All cells at once, so that those below the screen are looked at too.
    tracker = folder / "settings" / "@jupyterlab" / "notebook-extension"
    tracker.mkdir(parents=True)
    (tracker / "tracker.jupyterlab-settings").write_text('{"windowingMode": "none"}')
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {
        "JUPYTER_CONFIG_DIR": "config",
        "JUPYTERLAB_SETTINGS_DIR": "settings",
        "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
        "JUPYTER_RUNTIME_DIR": "runtime",
    }
    options = [
        "--no-browser",
        "--allow-root",
        "--ServerApp.ip=127.0.0.1",
        "--IdentityProvider.token=",
    ]
    options += [f"--ServerApp.port={port}", f"--ServerApp.root_dir={folder / 'notebooks'}"]
    shutil.copytree(ROOT / "notebooks", folder / "notebooks")  # JupyterLab writes beside them
    with open(folder / "log", "w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *options],
            cwd=folder,
            env=os.environ | {name: str(folder / place) for name, place in own.items()},
            stdout=log,
            stderr=log,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(120):
            try:
                urllib.request.urlopen(f"{address}/api", timeout=1).close()
                break
            except OSError:
                time.sleep(0.5)
        else:
            pytest.fail(f"JupyterLab does not start:\n{(folder / 'log').read_text()}")
        yield address
    finally:
        server.terminate()
        server.wait(30)


def open_in_lab(browser: Browser, lab: str, text: Path) -> Page:
    """A notebook as a reader sees it who has not run it, with no network but this machine."""
    tab = browser.new_page(viewport={"width": 1280, "height": 900})

    def pass_own(route: Route) -> None:
        own = route.request.url.startswith((lab, "data:", "blob:"))
        route.continue_() if own else route.abort()

    tab.route("**/*", pass_own)
    tab.goto(f"{lab}/doc/tree/{text.stem}.ipynb")
    tab.wait_for_selector(".jp-Notebook .jp-RenderedMarkdown h1", timeout=60_000)
    return tab


@each_chapter
def test_formulas_and_figures_show_in_jupyterlab(browser: Browser, lab: str, text: Path):
    tab = open_in_lab(browser, lab, text)
    try:
        count = "n => document.querySelectorAll('.jp-Notebook mjx-container').length >= n"
        tab.wait_for_function(count, arg=formulas(text), timeout=60_000)
        assert tab.locator(".jp-Notebook mjx-container").count() == formulas(text)
        assert tab.locator("mjx-merror, [data-mjx-error]").count() == 0
        prose = " ".join(tab.locator(".jp-RenderedMarkdown").all_inner_texts())
        assert "$" not in prose and "\\" not in prose, "a formula that is shown as it is written"
        images = tab.locator(".jp-OutputArea-output img")
        shown = images.evaluate_all("all => all.filter(i => i.naturalWidth).map(i => i.alt)")
        assert shown == pictures(text, folded=False) != []
        folded = sum(bool(c.metadata.get("cellView")) for c in notebooks.code_cells(stored(text)))
        assert tab.locator(".jp-InputPlaceholder").count() == folded
    finally:
        tab.close()


@each_chapter
def test_figures_show_by_nbconvert(text: Path):
    html, _ = HTMLExporter().from_notebook_node(stored(text))
    images = BeautifulSoup(html, "html.parser").select(".jp-OutputArea-output img")
    assert [image["alt"] for image in images] == pictures(text)
    assert all(image["src"].startswith("data:image/png;base64,") for image in images)


@each_chapter
def test_figures_show_when_sanitised(text: Path):
    """As an untrusted Jupyter does: no script, no style, no SVG, no event."""
    kept = []
    for cell in notebooks.code_cells(stored(text)):
        for output in cell.outputs:
            html = bleach.clean(
                output.get("data", {}).get("text/html", ""),
                tags={"a", "div", "img", "p", "table", "td", "tr"},
                attributes={"img": ["alt", "src"]},
                protocols={"data", "https"},
                strip=True,
            )
            kept += BeautifulSoup(html, "html.parser").find_all("img")
    assert [image["alt"] for image in kept] == pictures(text) != []
    assert all(image["src"].startswith("data:image/png;base64,") for image in kept)
