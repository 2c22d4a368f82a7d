"""Imports run one way: no module of the package imports one that stands to its right."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from helpers import ROOT

PACKAGE = ROOT / "metautils"

# From left to right. Those of one row do not import one another; a name that ends with a dot
# stands for all modules of a folder, which may, but not in a circle.
ORDER = (
    ("errors", "episode", "progress", "shown"),
    ("files",),
    ("precision", "nets", "exact"),
    ("checkpoint",),
    ("data.",),
    ("pretrained",),
    ("sampling", "adapt", "hypergradients"),
    ("learners.",),
    ("evaluate", "certainty"),
    ("train", "fit"),
    ("methods",),
    ("results",),
    ("classifier",),
    ("plots", "report", "recognise"),
    ("finetune", "runs", "export"),
    ("cli",),
    ("__main__",),
)


def name_of(path: Path) -> str:
    """`data/bank.py` is data.bank; a folder's own file is the folder with a dot, data."""
    name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    return name.removesuffix("__init__")


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
del MODULES[""]


def place(module: str) -> int:
    """The row of a module."""
    found = [k for k, row in enumerate(ORDER) for name in row if stands_for(name, module)]
    assert len(found) == 1, f"{module} has {len(found)} places in ORDER: give it one"
    return found[0]


def stands_for(name: str, module: str) -> bool:
    return module.startswith(name) if name.endswith(".") else module == name


def imports(module: str) -> set[str]:
    """The package's modules that a module imports, wherever in its code."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {known(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports by dots: write the whole name"
            found |= {known(f"{node.module}.{alias.name}", node.module) for alias in node.names}
    return found - {""}


def known(*names: str) -> str:
    """The first of these names that is a module of the package, without the package's name."""
    for name in names:
        inside = name.removeprefix("metautils.")
        if inside != name:
            for module in (inside, f"{inside}."):
                if module in MODULES:
                    return module
    return ""


@pytest.mark.parametrize("module", MODULES)
def test_nothing_is_imported_from_the_right(module):
    for other in imports(module):
        folder = any(name.endswith(".") for name in ORDER[place(other)])
        assert place(other) <= place(module) - (not folder), f"{module} imports {other}"


def test_no_circle():
    """In the folders whose modules may import one another, either."""
    assert set(TopologicalSorter({name: imports(name) for name in MODULES}).static_order())


def test_every_place_is_taken():
    for name in (name for row in ORDER for name in row):
        assert any(stands_for(name, module) for module in MODULES), f"there is no {name}"


def test_imports_are_seen():
    """Of a module, of a name in one, of a folder, of a module in a folder."""
    assert imports("data.digits") == {"data.bank"}
    assert {"data.", "methods", "data.bank", "errors"} <= imports("cli")
    assert imports("methods") == {"learners.", "learners.base", "files"}
