"""What `make gpu` does: parts that may fail without one another, within its time."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pretend
import pytest
from helpers import ROOT, read_json

import gpu
from metautils import results


def run(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "tools" / "gpu.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_every_chapter_and_benchmark_is_a_part():
    files = [*ROOT.glob("book/[0-9][0-9]_*.md"), *ROOT.glob("benchmarks/*.py")]
    parts = [Path(part).stem for part in (*gpu.TOGETHER, *gpu.ALONE)]
    assert sorted(parts) == sorted([*(file.stem for file in files), "tests", "record"])


@pytest.mark.skipif(pretend.setup is None, reason="this torch has no devices written in Python")
def test_a_record_of_the_pretend_device(tmp_path):
    before = {path: path.read_bytes() for path in results.folder().iterdir()}
    done = run("--device", "pretend", "--only", "record", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    record = read_json(tmp_path / "protonet_glyphs_gpu.json")
    assert set(results.FIELDS) <= set(record) and record["steps"] == 2
    assert {path: path.read_bytes() for path in results.folder().iterdir()} == before


def test_without_a_gpu_a_sentence_says_what_can_be_tried(monkeypatch, capsys):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    assert gpu.main() == 2
    told = capsys.readouterr().out
    assert told.startswith("There is no GPU") and "--device pretend" in told


def test_packages_that_were_carried_along_are_found(monkeypatch):
    """Where `PYTHONPATH` names their folder, a part must look there too, after our own."""
    monkeypatch.setenv("PYTHONPATH", "/carried")
    assert gpu.search_path().split(os.pathsep) == [str(ROOT), "/carried"]
    monkeypatch.delenv("PYTHONPATH")
    assert gpu.search_path() == str(ROOT)


def test_parts_end_apart(tmp_path, monkeypatch, capsys):
    """One fails, one takes too long, one comes too late; the table tells, and the rest is there."""
    programs = {
        "good": "print('done')",
        "bad": "raise SystemExit(1)",
        "slow": "import time; time.sleep(60)",
        "late": "print('never')",
    }
    fake = tmp_path / "fake.py"
    fake.write_text(f"import sys; exec({programs!r}[sys.argv[2]])")
    monkeypatch.setattr(gpu, "__file__", str(fake))
    monkeypatch.setattr(gpu, "TOGETHER", ["good", "bad"])
    monkeypatch.setattr(gpu, "ALONE", ["slow", "late"])
    monkeypatch.setattr(gpu, "LIMIT", 15)
    began = time.monotonic()
    assert gpu.everything("pretend", tmp_path, tmp_path) == 1
    assert time.monotonic() - began < 30
    (table,) = read_json(tmp_path / "gpu.json")["tables"]
    outcome = {row[0]: row[1] for row in table["rows"]}
    assert outcome["good"] == "passed" and outcome["bad"].startswith("failed, see ")
    assert outcome["slow"] == outcome["late"] == "no time left"
    assert (tmp_path / "good.log").read_text() == "done\n"
    assert "bad\tfailed" in capsys.readouterr().out
