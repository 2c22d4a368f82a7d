"""The methods by name, from what each learner's file says of how it is made and trained."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import sys
from functools import cache
from pathlib import Path

from metautils import learners
from metautils.files import DataError, reading
from metautils.learners.base import Method


@cache
def known() -> dict[str, Method]:
    """Every method of the package.

    Example:
        >>> known()["protonet"].title
        'Prototypical Networks'
    """
    found: dict[str, Method] = {}
    for module in pkgutil.iter_modules(learners.__path__):
        learner = importlib.import_module(f"{learners.__name__}.{module.name}")
        found |= getattr(learner, "METHODS", {})
    return found


def find(name: str) -> Method:
    """A method of the package, or the one in a file of the reader's own, such as `./mine.py`.

    Raises:
        DataError: if there is none of this name, or the file lists none or several in METHODS.
    """
    if name in known():
        return known()[name]
    if not name.endswith(".py"):
        raise DataError(
            f"{name!r} is no method: name one of {', '.join(known())}, or a file with one of your "
            "own, such as ./mine.py."
        )
    return _from_file(Path(name))


def _from_file(path: Path) -> Method:
    with reading(path):
        path.open("rb").close()
    # A name that hides no other module, under which a dataclass of the file finds its own.
    spec = importlib.util.spec_from_file_location(f"_own_{path.stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    listed = getattr(module, "METHODS", {})
    methods = list(listed.values()) if isinstance(listed, dict) else []
    methods = [each for each in methods if isinstance(each, Method)]
    if len(methods) != 1:
        raise DataError(
            f'{path} lists {len(methods)} methods: give it one, METHODS = {{"mine": Method(...)}}, '
            "as metautils/learners/protonet.py has."
        )
    return methods[0]
