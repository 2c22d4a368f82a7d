"""Build the site: `python tools/book.py [folder]` leaves it in folder/_build/html."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FIRST_PAGE = """<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="refresh" content="0; url={page}"></head>
<body><p><a href="{page}">{title}</a></p></body>
</html>
"""


def lay_out(tree: Path) -> None:
    """Put what the site is made of into a folder: text, tables of results, chapters with outputs.

    The notebooks in notebooks/ are for readers elsewhere; here each chapter is its MyST text.
    """
    import nbformat

    import notebooks

    for name in ("_config.yml", "_toc.yml"):
        shutil.copy(ROOT / name, tree)
    shutil.copytree(ROOT / "book", tree / "book", ignore=shutil.ignore_patterns("[0-9][0-9]_*.md"))
    (tree / "tools").mkdir()
    shutil.copy(ROOT / "tools" / "docstrings.py", tree / "tools")
    (tree / "notebooks").mkdir()
    for text in notebooks.chapters():
        nbformat.write(notebooks.for_site(text), tree / "notebooks" / f"{text.stem}.ipynb")
    write_results(tree / "book" / "_generated" / "results.md")


def write_results(page: Path) -> None:
    """Write what book/results.md includes, from the records in results/."""
    table = subprocess.run(
        [sys.executable, "-m", "metautils", "results"],
        cwd=ROOT,
        check=True,
        stdout=subprocess.PIPE,
        encoding="utf-8",
        # Where a pipe has another encoding, as on Windows, the child would print in that.
        env=os.environ | {"PYTHONIOENCODING": "utf-8"},
    ).stdout
    page.parent.mkdir(exist_ok=True)
    page.write_text(table, encoding="utf-8")


def build(folder: Path) -> Path:
    """Build all pages, every warning an error, and return the first page.

    From nothing each time: an incremental build says nothing of warnings in pages it skips.
    """
    site = folder / "_build" / "html"
    shutil.rmtree(site, ignore_errors=True)
    tool = Path(sys.executable).with_name("jupyter-book")
    options = ["build", ".", "--all", "-n", "-W", "--keep-going", "-q", "--path-output"]
    with tempfile.TemporaryDirectory() as tree:
        lay_out(Path(tree))
        subprocess.run([tool, *options, folder.resolve()], cwd=tree, check=True)
    for notebook in (site / "_sources" / "notebooks").glob("*.ipynb"):
        # What a page offers to download is the notebook that runs anywhere.
        shutil.copy(ROOT / "notebooks" / notebook.name, notebook)
    write_first_page(site)
    return site / "index.html"


def write_first_page(site: Path) -> None:
    """Replace the bare redirect of Jupyter Book by one with a language and a title."""
    import yaml

    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    html = FIRST_PAGE.format(title=config["title"], page=toc["root"] + ".html")
    (site / "index.html").write_text(html, encoding="utf-8")


def main(arguments: Sequence[str]) -> int:
    """Build into the folder that is named, or here, and say where."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a pipe on Windows may lack letters of a path
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        print("The book is built:", build(Path(arguments[0]) if arguments else ROOT))
    except subprocess.CalledProcessError as error:
        return error.returncode
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
