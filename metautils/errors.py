"""What a reader can mend, told apart from a fault of the package.

The command line prints the sentence of a `ReaderError` and nothing else. Whatever else goes wrong
is a fault of the package, or of the reader's own code, and keeps its traceback.
"""

from __future__ import annotations


class ReaderError(Exception):
    """What was asked for cannot be done; the message says in one sentence what to do instead."""


class BadArgument(ReaderError, ValueError):
    """A number or a name does not fit, or does not fit the data."""


class Diverged(ReaderError, FloatingPointError):
    """A training is lost: its numbers are no longer finite."""
