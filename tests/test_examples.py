"""What the docstrings show is true: every example runs, and every public class has one."""

import doctest
import importlib
import inspect
import pkgutil
from types import ModuleType

import pytest
import torch

import metautils

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(metautils.__path__, "metautils.")
    if not module.name.endswith("__main__")  # which would run the command line
)


def public_classes(module: ModuleType) -> list[type]:
    """Those that a module itself defines, but for exceptions."""
    return [
        each
        for name, each in inspect.getmembers(module, inspect.isclass)
        if each.__module__ == module.__name__
        and not name.startswith("_")
        and not issubclass(each, Exception)
    ]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name, empty_cache, monkeypatch, tmp_path):
    """Whatever was drawn before, and without a trace in the folder where one stands."""
    monkeypatch.chdir(tmp_path)
    torch.seed()
    done = doctest.testmod(importlib.import_module(name))
    assert done.failed == 0
    assert {path.name for path in tmp_path.iterdir()} <= {empty_cache.name}


@pytest.mark.parametrize("name", MODULES)
def test_every_public_class_shows_an_example(name):
    for each in public_classes(importlib.import_module(name)):
        text = inspect.cleandoc(each.__doc__ or "")  # its own, not one that it inherits
        told = doctest.DocTestParser().get_examples(text)
        assert "\nExample:\n" in text and told, f"{each.__qualname__} shows no example that runs"
        assert len(told) <= 8, f"the example of {each.__qualname__} is long"
        where = text.index("\nExample:\n")
        assert text.index(">>>") > where, f"{each.__qualname__} has examples in two places"


def test_public_classes_are_found():
    """In modules of folders too; what a module only imports does not count."""
    modules = map(importlib.import_module, MODULES)
    found = {each.__name__ for module in modules for each in public_classes(module)}
    assert {"Episode", "ClassBank", "ProtoNet", "Training", "Recipe"} <= found
    assert not {"DataError", "CheckpointMismatch", "Tensor"} & found
