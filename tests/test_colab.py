"""The first cell of a chapter, run where metautils is missing: what happens on Colab."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import nbformat
import pytest

import notebooks

pytestmark = [
    pytest.mark.book,
    pytest.mark.skipif(
        os.name != "posix" or not shutil.which("git"),
        reason="the first cell needs git, as on Colab",
    ),
]
IGNORED = (
    *(".git", ".venv", ".versions", "_build", "__pycache__"),
    *("runs", "dist", "node_modules", ".*_cache"),
)
FILES = ("metautils", "records", "numpy", "torch")
RUN_CELL = """
import json, pathlib, sys
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
shell.run_cell(pathlib.Path(sys.argv[1]).read_text()).raise_error()
"""
REPORT = """
import json, numpy, torch, metautils
from metautils import data, results
bank = data.load("glyphs").train
print(json.dumps({
    "metautils": metautils.__file__, "numpy": numpy.__file__, "torch": torch.__file__,
    "images": len(bank.images), "records": str(results.folder()),
    "published": len(results.published("omniglot")),
}))
"""


@pytest.fixture
def checkout(root: Path, tmp_path: Path) -> Path:
    """The working tree as a repository of its own, what is not committed yet included."""
    copy = tmp_path / "checkout"
    shutil.copytree(root, copy, ignore=shutil.ignore_patterns(*IGNORED))
    who = ["-c", "user.name=test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=0"]
    for command in (["init", "-q"], ["add", "-A"], [*who, "commit", "-q", "-m", "as it is"]):
        subprocess.run(["git", *command], cwd=copy, check=True)
    return copy


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """An environment that has all but metautils, as Colab has."""
    folder = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    # Python 3.11 adds an old setuptools, which would hide the outer one that torch wants.
    pip = [folder / "bin" / "python", "-m", "pip", "uninstall", "-q", "-y", "setuptools"]
    subprocess.run(pip, check=True, capture_output=True)
    # A line in a .pth file adds the folder but does not read the .pth files in it, so the
    # editable metautils of the outer environment stays unknown.
    outer = sysconfig.get_path("purelib")
    (packages_of(folder) / "outer.pth").write_text(f"{outer}\n")
    return folder


def packages_of(environment: Path) -> Path:
    return Path(sysconfig.get_path("purelib", vars={"base": str(environment)}))


def settings(checkout: Path) -> dict[str, str]:
    """The repository's address leads to the checkout; building needs no network."""
    own = {
        "GIT_CONFIG_COUNT": "2",
        "GIT_CONFIG_KEY_0": f"url.{checkout.as_uri()}.insteadOf",
        "GIT_CONFIG_VALUE_0": notebooks.repository(),
        "GIT_CONFIG_KEY_1": "safe.directory",
        "GIT_CONFIG_VALUE_1": "*",
        "PIP_NO_BUILD_ISOLATION": "0",  # pip reads any value as: build with what is installed
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_ROOT_USER_ACTION": "ignore",
    }
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "GIT_"))}
    return kept | own


@pytest.fixture
def run(checkout: Path, bare: Path, tmp_path: Path) -> Callable[..., CompletedProcess[str]]:
    """Run a piece of Python there, in an empty folder."""

    def run(code: str, *arguments: Path) -> CompletedProcess[str]:
        command = [bare / "bin" / "python", "-c", code, *arguments]
        return subprocess.run(
            command, cwd=tmp_path, env=settings(checkout), capture_output=True, text=True
        )

    return run


@pytest.fixture
def cell(tmp_path: Path) -> Path:
    """The first cell of the first chapter, as it is stored."""
    notebook = nbformat.read(notebooks.notebook_of(notebooks.chapters()[0]), as_version=4)
    path = tmp_path / "cell.py"
    path.write_text(notebooks.code_cells(notebook)[0].source)
    return path


def install_another(environment: Path) -> None:
    """The package of the same name that the registry has, as pip would leave it."""
    packages = packages_of(environment)
    (packages / "metautils").mkdir()
    (packages / "metautils" / "__init__.py").write_text("")
    told = packages / "metautils-0.0.1.dist-info"
    told.mkdir()
    (told / "METADATA").write_text("Metadata-Version: 2.1\nName: metautils\nVersion: 0.0.1\n")
    (told / "INSTALLER").write_text("pip\n")
    files = ("metautils/__init__.py", *(f"{told.name}/{x}" for x in ("METADATA", "INSTALLER")))
    (told / "RECORD").write_text("".join(f"{file},,\n" for file in (*files, f"{told.name}/RECORD")))


def test_another_package_of_the_same_name_gives_way(run, cell: Path, bare: Path):
    """In the same session, though its module was loaded before ours was there."""
    install_another(bare)
    assert run("import metautils").returncode == 0
    done = run(RUN_CELL + "from metautils.episode import Episode", cell)
    assert done.returncode == 0, done.stdout + done.stderr


def test_first_cell_installs_metautils_and_nothing_else(run, cell: Path, bare: Path):
    before = {path.name for path in packages_of(bare).iterdir()}
    assert run("import metautils").returncode != 0
    first = run(RUN_CELL, cell)
    assert first.returncode == 0, first.stdout + first.stderr
    added = {path.name for path in packages_of(bare).iterdir()} - before
    assert {name.split("-")[0] for name in added} == {"metautils"}, first.stdout + first.stderr

    report = run(REPORT)
    assert report.returncode == 0, report.stderr
    found = json.loads(report.stdout)
    inside = {name for name in FILES if Path(found[name]).is_relative_to(packages_of(bare))}
    assert inside == {"metautils", "records"}  # torch and numpy are those that were there
    assert found["images"] and found["published"]

    again = run(RUN_CELL, cell)
    assert (again.returncode, again.stdout.strip(), again.stderr.strip()) == (0, "", "")
