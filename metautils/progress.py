"""Progress bars, one kind for all: lively for who watches, sparing in a file."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

SPARING = 10.0  # seconds between two lines in a file


def progress_bar(items: Iterable | None = None, *, show: bool = True, **told: Any) -> Any:
    """A bar of tqdm on stderr that disappears at its end.

    Args:
        items: what is gone through.
        show: whether there is a bar at all.
        told: as tqdm takes it, such as `desc` and `total`.

    Example:
        >>> list(progress_bar([1, 2], show=False))
        [1, 2]
    """
    between = SPARING if _is_file(sys.stderr) else 0.1
    return tqdm(
        items, disable=not show, leave=False, mininterval=between, maxinterval=between, **told
    )


def _is_file(stream: Any) -> bool:
    """Whether every line stays: in a file or a pipe, not in a terminal or a notebook."""
    return isinstance(stream, io.TextIOWrapper) and not stream.isatty()
