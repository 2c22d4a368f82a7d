"""Sphinx extension: in a docstring, |x| is a norm, not the name of a substitution."""

from __future__ import annotations

from typing import Any

from sphinx.application import Sphinx


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
    app.connect("autodoc-process-docstring", escape_bars, priority=600)
    return {"parallel_read_safe": True}
