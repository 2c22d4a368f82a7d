"""Build the site: `python tools/book.py [folder]` leaves it in folder/_build/html."""

from __future__ import annotations

import shutil
import subprocess
import sys
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


def write_results() -> None:
    """Write the page that book/results.md includes, from the records in results/."""
    table = subprocess.run(
        [sys.executable, "-m", "metautils", "results"],
        cwd=ROOT,
        check=True,
        stdout=subprocess.PIPE,
        encoding="utf-8",
    ).stdout
    page = ROOT / "book" / "_generated" / "results.md"
    page.parent.mkdir(exist_ok=True)
    page.write_text(table, encoding="utf-8")


def build(folder: Path) -> Path:
    """Build all pages, every warning an error, and return the first page.

    From nothing each time: an incremental build says nothing of warnings in pages it skips.
    """
    site = folder / "_build" / "html"
    shutil.rmtree(site, ignore_errors=True)
    write_results()
    tool = Path(sys.executable).with_name("jupyter-book")
    options = ["build", ".", "--all", "-n", "-W", "--keep-going", "-q", "--path-output"]
    subprocess.run([tool, *options, folder], cwd=ROOT, check=True)
    write_first_page(site)
    return site / "index.html"


def write_first_page(site: Path) -> None:
    """Replace the bare redirect of Jupyter Book by one with a language and a title."""
    # Imported late, so that this file can say what is wrong when run outside the environment.
    import yaml

    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    html = FIRST_PAGE.format(title=config["title"], page=toc["root"] + ".html")
    (site / "index.html").write_text(html, encoding="utf-8")


if __name__ == "__main__":
    try:
        print("The book is built:", build(Path(sys.argv[1] if len(sys.argv) > 1 else ROOT)))
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
