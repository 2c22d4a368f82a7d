"""A bar is lively for who watches and sparing in a file."""

import io
import subprocess
import sys

import pytest

from metautils import progress
from metautils.progress import progress_bar

STEPS = """
import time
from metautils.progress import progress_bar
for _ in progress_bar(range(400), desc="train"):
    time.sleep(0.005)
"""


def test_a_file_gets_a_line_each_ten_seconds(tmp_path):
    """Two seconds of steps: the bar at their start, what clears it at their end, no more."""
    with (tmp_path / "log").open("w") as log:
        subprocess.run([sys.executable, "-c", STEPS], stderr=log, check=True, timeout=120)
    lines = [x for x in (tmp_path / "log").read_text().split("\r") if x.strip()]
    assert len(lines) <= 2
    assert "train" in lines[0]


class Terminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


class Notebook(io.StringIO):
    """Like a notebook's stream: neither a terminal nor a file."""


@pytest.mark.parametrize(
    "stream", [Terminal(io.BytesIO()), Notebook()], ids=["terminal", "notebook"]
)
def test_who_watches_sees_it_move(monkeypatch, stream):
    monkeypatch.setattr(sys, "stderr", stream)
    with progress_bar(total=3) as bar:
        assert bar.mininterval < 1


def test_hidden_bar_counts_all_the_same(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO()))
    assert list(progress_bar("abc", show=False)) == ["a", "b", "c"]
    with progress_bar(total=3) as bar:
        assert bar.mininterval == bar.maxinterval == progress.SPARING
