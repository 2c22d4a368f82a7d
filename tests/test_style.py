"""The style of the code, in files and in the cells of the chapters."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import nbformat

from portable import TITLE

RUFF = [sys.executable, "-m", "ruff", "check", "--no-cache", "--quiet", "--output-format=concise"]


def ruff(root: Path, *options: str) -> str:
    return subprocess.run([*RUFF, *options], cwd=root, capture_output=True, text=True).stdout


def test_code_is_clean(root: Path):
    assert ruff(root, ".") == ""


def test_cells_use_only_names_that_exist(root: Path):
    # The first cell imports a name only to see whether it is there.
    allowed = 'lint.pyflakes.allowed-unused-imports=["metautils.BOOK"]'
    rules = ("--isolated", "--select=F,E7,E9", "--config", allowed)
    assert ruff(root, *rules, "notebooks") == ""


def test_cells_fit_on_half_a_screen(root: Path):
    for path in (root / "notebooks").glob("*.ipynb"):
        cells = nbformat.read(path, as_version=4).cells
        code = [TITLE.sub("", c.source) for c in cells if c.cell_type == "code"]
        long = [source for source in code if source.count("\n") > 30]
        assert long == [], f"{path.name}: split these cells"
