"""What several tests share: the root, a fresh build of the site, folders of data, no network."""

from __future__ import annotations

import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

if TYPE_CHECKING:
    from playwright.sync_api import Browser

    from metautils.data.labelled import Split

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
pytest.register_assert_rewrite("helpers")  # so that a failed check tells its values


def pytest_configure() -> None:
    """Start the kernel of a notebook once more if it dies before it has said anything.

    Kernels that start at the same time may choose the same port.
    """
    try:
        from nbval import kernel
    except ImportError:  # where only the package is tested
        return
    once = kernel.start_new_kernel

    def twice(*args: object, **kwargs: object) -> object:
        try:
            return once(*args, **kwargs)
        except RuntimeError:
            return once(*args, **kwargs)

    kernel.start_new_kernel = twice


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest comes first, so that no process is left alone with it at the end."""
    items.sort(key=lambda item: (item.path.suffix != ".ipynb", not item.get_closest_marker("book")))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """On tensors as small as these, threads wait for one another longer than they work."""
    import torch  # not above, as collecting the book's tests needs none of it

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the site, built from nothing with every warning an error."""
    folder = tmp_path_factory.mktemp("book")
    command = [sys.executable, ROOT / "tools" / "book.py", folder]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"the book does not build:\n{done.stdout}\n{done.stderr}"
    return folder / "_build" / "html"


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """A browser of this machine, without a window."""
    from playwright.sync_api import sync_playwright  # only the book's tests have it

    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        pytest.skip(f"there is no browser: none of {', '.join(BROWSERS)} is installed")
    with sync_playwright() as play:
        # --no-sandbox: continuous integration runs as root, where the sandbox cannot start.
        options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = play.chromium.launch(executable_path=executable, args=options)
        yield browser
        browser.close()


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a cache of the test's own, where no folder of data is named."""
    monkeypatch.setenv("METAUTILS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("METAUTILS_DATA", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def two_cases(tmp_path: Path) -> None:
    """A system that tells upper case from lower case in names of files."""
    (tmp_path / "case").mkdir()
    if (tmp_path / "CASE").exists():
        pytest.skip("names that differ in their case alone are one name here")
    (tmp_path / "case").rmdir()


@pytest.fixture
def float64() -> Iterator[None]:
    """New tensors are float64 where nothing else is said."""
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture(scope="module")
def real_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of real data sets, named to all tests of a module, with a cache of their own."""
    from helpers import real_data

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METAUTILS_DATA", str(real_data()))
        patch.setenv("METAUTILS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield real_data()


@pytest.fixture(
    params=[urllib.error.URLError("no route to host"), TimeoutError("timed out")],
    ids=["no route", "timeout"],
)
def offline(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that fails, in one of two ways."""

    def fail(*arguments, **named):
        raise request.param

    monkeypatch.setattr(urllib.request, "urlopen", fail)


@pytest.fixture
def short_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Presets of a moment, narrow networks, glyphs ready at once, no cache of the user's."""
    from helpers import quick_preset, small_glyphs

    import metautils.evaluate
    from metautils import data, runs
    from metautils.learners import (
        baseline,
        maml,
        mann,
        matching_net,
        meta_lstm,
        protonet,
        relation_net,
        snail,
    )  # fmt: skip
    from metautils.learners.relation_net import RelationModule
    from metautils.nets import Conv4

    convolutional = baseline, mann, maml, matching_net, meta_lstm, protonet, relation_net, snail
    for module in convolutional:
        monkeypatch.setattr(module, "Conv4", lambda *a, **k: Conv4(*a, **(k | {"width": 4})))
    monkeypatch.setattr(relation_net, "RelationModule", partial(RelationModule, 4))
    monkeypatch.setattr(metautils.evaluate, "IMAGES_AT_ONCE", 100)
    monkeypatch.setattr(runs, "train", partial(runs.train, validation_episodes=4))
    quick_preset(monkeypatch, 3, 4, 1, 2, 3)
    monkeypatch.setenv("METAUTILS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("METAUTILS_DATA", raising=False)
    monkeypatch.setattr(data.glyphs, "load", small_glyphs)


@pytest.fixture(scope="session")
def many_classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 25 classes of 6 small images each, so that 5 are for testing."""
    root = tmp_path_factory.mktemp("many_classes")
    random = np.random.default_rng(0)
    for k in range(25):
        (root / f"class{k:02d}").mkdir()
        for n in range(6):
            pixels = random.integers(0, 256, (12, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / f"class{k:02d}" / f"{n}.png")
    return root


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of ten images: 18 to learn from, 6 for validation, 6 for the test."""
    from helpers import paint

    # A part gets a fifth of a class only about; of these pictures it gets just that.
    return paint(tmp_path_factory.mktemp("data") / "photos", seed=218)


@pytest.fixture(scope="session")
def split(photos: Path) -> Split:
    """The three parts of `photos`."""
    from metautils.data import labelled

    return labelled.load(photos)
