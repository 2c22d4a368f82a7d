"""What a reader can mend is told apart from faults of the package, by its type alone."""

import ast
import builtins

import pytest
from helpers import ROOT

from metautils.checkpoint import CheckpointMismatch
from metautils.errors import BadArgument, Diverged, ReaderError
from metautils.files import DataError

PACKAGE = ROOT / "metautils"

# Modules that raise plain errors: what these check is in the hands of whoever calls them in Python,
# and nothing on the command line leads to it. There it would be a fault of the package.
CALLED_FROM_PYTHON = {
    "adapt", "episode", "nets", "plots", "results", "evaluate",
    "data.bank", "data.folder", "data.glyphs", "data.quadratics",
    "learners.learned_optimizer", "learners.maml", "learners.matching_net", "learners.meta_lstm",
}  # fmt: skip


def plain_errors(text: str) -> list[str]:
    """The built-in exceptions that a module raises itself."""
    raised = [node.exc for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Raise)]
    names = [ast.unparse(x.func if isinstance(x, ast.Call) else x) for x in raised if x]
    return [x for x in names if isinstance(getattr(builtins, x, None), type) and x != "SystemExit"]


def test_what_the_command_line_leads_to_raises_the_readers_errors():
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        found[name] = plain_errors(path.read_text(encoding="utf-8"))
    assert {name for name, errors in found.items() if errors} <= CALLED_FROM_PYTHON
    assert set().union(*found.values()) <= {"ValueError", "FileNotFoundError"}


def test_plain_errors_are_seen():
    text = "raise ValueError('x')\nraise OSError\nraise DataError('x')\ntry: f()\nexcept: raise"
    assert plain_errors(text) == ["ValueError", "OSError"]


@pytest.mark.parametrize(
    ("error", "plain"),
    [
        (BadArgument, ValueError),
        (CheckpointMismatch, ValueError),
        (DataError, RuntimeError),
        (Diverged, FloatingPointError),
    ],
)
def test_readers_errors_are_caught_as_the_plain_ones_too(error, plain):
    assert issubclass(error, ReaderError)
    assert issubclass(error, plain)
    assert not issubclass(plain, ReaderError)
