"""Sphinx extension: the reference lists every learner, and |x| in a docstring is a norm."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

from metautils import learners

LEARNERS = Path(learners.__path__[0])  # this file is copied to where the site is built
SECTION = """## {title}

```{{eval-rst}}
.. automodule:: metautils.learners.{name}
   :members:
```
"""


def list_learners(app: Sphinx, page: str, source: list[str]) -> None:
    """A section for each file of learners, titled by what its first line names."""
    if "@LEARNERS@" in source[0]:
        sections = [
            SECTION.format(title=ast.get_docstring(ast.parse(path.read_bytes())).split(" (")[0],
                           name=path.stem)
            for path in sorted(LEARNERS.glob("[a-z]*.py"))
            if path.stem != "base"
        ]  # fmt: skip
        source[0] = source[0].replace("@LEARNERS@", "\n".join(sections))


def escape_bars(
    app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]
) -> None:
    """Escape each bar outside backticks; lines that give a type keep theirs, `int | None`."""
    for number, line in enumerate(lines):
        if not line.lstrip().startswith((":type", ":rtype")):
            pieces = line.split("`")
            pieces[::2] = [piece.replace("|", r"\|") for piece in pieces[::2]]
            lines[number] = "`".join(pieces)


def setup(app: Sphinx) -> dict[str, bool]:
    """Come after napoleon, which turns sections such as Args into fields."""
    app.connect("source-read", list_learners)
    app.connect("autodoc-process-docstring", escape_bars, priority=600)
    return {"parallel_read_safe": True}
