"""Make the notebooks from the book's text: book/NN_slug.md -> notebooks/NN_slug.ipynb.

    python tools/notebooks.py run [NAME ...]    execute chapters (all, or those that start so)
    python tools/notebooks.py sync              carry edits over; execute only where code changed

What is stored is portable Markdown (tools/portable.py), with outputs; the site is built from the
text with the same outputs (tools/book.py). In the text, @REPOSITORY@ stands for the address in
_config.yml and @RUN_TIME@ for the measured time of the stored run. Notebooks are never edited by
hand; tests/test_notebooks.py compares.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import jupytext
import nbformat
import papermill
from nbformat import NotebookNode

import portable
from metautils.shown import form_for_site

ROOT = Path(__file__).resolve().parents[1]
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python", "pygments_lexer": "ipython3"},
}


def chapters(names: Sequence[str] = ()) -> list[Path]:
    """The text of every chapter, or of those whose file name starts with one of `names`."""
    texts = sorted((ROOT / "book").glob("[0-9][0-9]_*.md"))
    return [t for t in texts if not names or t.name.startswith(tuple(names))]


def notebook_of(text: Path) -> Path:
    """Where the executed pair of a chapter's text lies."""
    return ROOT / "notebooks" / f"{text.stem}.ipynb"


def stored(text: Path) -> NotebookNode:
    """The executed pair of a chapter's text."""
    return nbformat.read(notebook_of(text), as_version=4)


def repository() -> str:
    """The address of the repository, from the one place where it is written."""
    return portable.config()["repository"]["url"]


def in_words(seconds: float | None) -> str:
    """A measured time as a reader says it."""
    if seconds is None:
        return "not yet measured"
    if seconds < 100:
        return f"{round(seconds)} seconds"
    return f"{round(seconds / 60)} minutes"


def render(text: Path, seconds: float | None) -> NotebookNode:
    """The portable notebook that a chapter's text says, without outputs."""
    return portable.notebook(read(text, seconds), f"notebooks/{text.stem}")


def read(text: Path, seconds: float | None) -> NotebookNode:
    """A chapter's text as a notebook of MyST, without outputs."""
    notebook = jupytext.read(text, fmt="md:myst")
    words = {"@REPOSITORY@": repository(), "@RUN_TIME@": in_words(seconds)}
    for position, cell in enumerate(notebook.cells):
        # Made from the position, so that the same text gives the same file.
        cell.id = f"{text.stem[:2]}-{position:03d}"
        for placeholder, value in words.items():
            cell.source = cell.source.replace(placeholder, value)
    metadata = METADATA | {"metautils": {"run_seconds": seconds}}
    return nbformat.v4.new_notebook(cells=notebook.cells, metadata=metadata)


def for_site(text: Path) -> NotebookNode:
    """The notebook from which the site makes a chapter's page: the text, with stored outputs."""
    old = stored(text)
    page = read(text, old.metadata.metautils.run_seconds)
    if bare_code(page) != bare_code(old):
        raise ValueError(f"{text.stem} is stored with other code than its text has: make sync")
    take_outputs(page, old)
    for cell in code_cells(page):
        for output in cell.outputs:
            if html := form_for_site(output.get("data", {})):
                output.data, output.metadata = {"text/html": html}, {}
        if title := portable.TITLE.match(cell.source):
            cell.source = cell.source[title.end() :]
            if "hide-cell" in cell.metadata.get("tags", []):
                inside = title[1][0].lower() + title[1][1:]
                prompts = {f"code_prompt_{v.lower()}": f"{v} {inside}" for v in ("Show", "Hide")}
                cell.metadata["mystnb"] = prompts
    return page


def execute(notebook: NotebookNode) -> tuple[NotebookNode, float]:
    """Run a notebook as a reader would, in an empty folder; also the seconds it took."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "source.ipynb"), Path(folder, "target.ipynb")
        nbformat.write(notebook, source)
        start = time.perf_counter()
        papermill.execute_notebook(
            source, target, kernel_name="python3", cwd=folder, progress_bar=False
        )
        return nbformat.read(target, as_version=4), time.perf_counter() - start


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """The cells that are executed."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def take_outputs(notebook: NotebookNode, executed: NotebookNode) -> None:
    """Copy outputs alone: what the executor noted about times and versions stays behind."""
    for cell, done in zip(code_cells(notebook), code_cells(executed), strict=True):
        kept = [output for output in joined(done.outputs) if not is_progress_bar(output)]
        cell.outputs, cell.execution_count = kept, done.execution_count


def is_progress_bar(output: NotebookNode) -> bool:
    """Whether this is what a bar left behind: lines drawn over each other on stderr."""
    return output.get("name") == "stderr" and "\r" in output.text


def joined(outputs: Sequence[NotebookNode]) -> list[NotebookNode]:
    """Neighbouring pieces of one stream as one: where a kernel cuts is an accident of timing."""
    whole: list[NotebookNode] = []
    for output in outputs:
        last = whole[-1] if whole else None
        if last and output.output_type == "stream" == last.output_type and output.name == last.name:
            last.text += output.text
        else:
            whole.append(output)
    return whole


def store(notebook: NotebookNode, path: Path) -> None:
    """Write in one step, so that an interruption leaves the old file or the new one."""
    nbformat.validate(notebook)
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    nbformat.write(notebook, temporary)
    temporary.replace(path)


def run(text: Path) -> None:
    """Execute a chapter and store it with its outputs and its measured time.

    That time is the least of all runs of the same cells: what else the machine had to do while
    they ran is not the chapter's. (Delete the notebook to measure anew.)
    """
    print(f"{text.stem}: executing", flush=True)
    executed, seconds = execute(render(text, None))
    least = round(seconds)
    if notebook_of(text).exists() and bare_code(old := stored(text)) == bare_code(executed):
        least = min(least, old.metadata.metautils.run_seconds)
    notebook = render(text, least)
    take_outputs(notebook, executed)
    store(notebook, notebook_of(text))
    print(f"{text.stem}: executed in {in_words(seconds)}, at best in {in_words(least)}")


def bare_code(notebook: NotebookNode) -> list[str]:
    """The code alone, without the titles of hidden cells."""
    return [portable.TITLE.sub("", cell.source) for cell in code_cells(notebook)]


def sync(text: Path) -> None:
    """Bring a chapter's notebook up to its text; run it only if a line of code is another."""
    path = notebook_of(text)
    if not path.exists():
        return run(text)
    old = stored(text)
    new = render(text, old.metadata.metautils.run_seconds)
    if bare_code(old) != bare_code(new):
        return run(text)
    take_outputs(new, old)
    if new == old:
        print(f"{text.stem}: up to date")
    else:
        store(new, path)
        print(f"{text.stem}: text carried over, outputs kept")
    return None


def main() -> int:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("verb", choices=["run", "sync"])
    parser.add_argument("names", nargs="*", help="how the names of chapters start, such as 06")
    arguments = parser.parse_args()
    texts = chapters(arguments.names)
    for text in texts:
        try:
            {"run": run, "sync": sync}[arguments.verb](text)
        except papermill.PapermillExecutionError as error:
            print(f"{text.stem}: {error}", file=sys.stderr)
            return 1
    if not texts:
        print(f"No chapter in book/ starts with {' or '.join(arguments.names)}.", file=sys.stderr)
    return 0 if texts else 1


if __name__ == "__main__":
    raise SystemExit(main())
