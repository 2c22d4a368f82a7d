"""Records say where a number comes from, and stand beside the published ones."""

import json
import os
import re
import subprocess
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT

from metautils import results
from metautils.evaluate import Evaluation


def record(**changed):
    """A sound record."""
    filled = dict.fromkeys(results.FIELDS, "x")
    evaluation = {"ways": 5, "shots": 1, "accuracy": 98.765, "ci95": 0.123, "rotations": "none"}
    filled |= {
        "method": "ProtoNet",
        "data": "omniglot",
        "tested_on": "omniglot",
        "classes": {"train": 7, "validation": 2, "test": 3},
        "seed": 0,
        "minutes": 1.5,
        "train": {"tasks": 1, "ways": 5, "shots": 1, "queries": 5},
        "baseline": [evaluation],
        "evaluations": [evaluation],
    }
    return filled | changed


TABLE = {"title": "Gather", "heads": ["from", "images a second"], "rows": [["gather", "7,000"]]}
SPEED = {"what": "speed", "tables": [TABLE]}
SPEED |= {"device": "CPU", "threads": 1, "torch": "2", "commit": "abc"}


def paper(**changed):
    """A row of a paper's table."""
    evaluation = {"ways": 5, "shots": 1, "accuracy": 98.1, "ci95": None}
    row = {"method": "Older", "cite": "someone2016", "source": "Someone et al. (2016)"}
    row |= {"status": "paper", "note": "as printed"}
    return row | {"evaluations": [evaluation]} | changed


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A results folder of its own, with one record, one file of other content, no papers."""
    monkeypatch.setattr(results, "folder", lambda: tmp_path)
    results.write(record(), tmp_path / "mine.json")
    (tmp_path / "speed_x.json").write_text(json.dumps(SPEED))
    (tmp_path / "published.json").write_text(json.dumps([paper(data="omniglot")]))
    return tmp_path


def test_write_and_read(elsewhere):
    assert results.read("mine") == record()
    assert (elsewhere / "mine.json").read_text().endswith("}\n")


def test_write_makes_the_folder(tmp_path):
    results.write(record(), tmp_path / "a" / "b" / "x.json")
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["x.json"]


@pytest.mark.parametrize("name", results.FIELDS)
def test_missing_field_is_named_and_nothing_written(tmp_path, name):
    lacking = record()
    del lacking[name]
    with pytest.raises(ValueError, match=f"The record lacks {name}; every field is needed"):
        results.write(lacking, tmp_path / "x.json")
    assert list(tmp_path.iterdir()) == []


def test_failing_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "x.json"
    results.write(record(), path)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        results.write(record(seed=torch.ones(2)), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_unknown_record_names_the_known(elsewhere):
    with pytest.raises(FileNotFoundError, match="no record 'other' in results/; there are: mine"):
        results.read("other")


def test_records_are_those_with_evaluations(elsewhere):
    assert results.records() == {"mine": record()}


@pytest.mark.parametrize("transductive", [True, False])
def test_evaluation_rows_hold_mean_and_interval(transductive):
    values = torch.tensor([90.0, 95.0, 100.0])
    (row,) = results.evaluation_rows([Evaluation(5, 1, 15, values, transductive)], "classes")
    ci95 = row.pop("ci95")
    assert ci95 == pytest.approx(1.96 * 5 / 3**0.5, abs=5e-4)
    assert row == {
        "ways": 5, "shots": 1, "queries": 15, "episodes": 3, "rotations": "classes",
        "transductive": transductive, "accuracy": 95.0,
    }  # fmt: skip


def test_provenance_tells_where_and_with_what():
    told = results.provenance(torch.device("cpu"))
    assert set(told) == {"device", "threads", "torch", "commit"} < set(results.FIELDS)
    assert told["threads"] == torch.get_num_threads()
    assert told["torch"] == torch.__version__
    assert re.fullmatch(r".+, \d+ cores", told["device"])


@pytest.mark.parametrize("wrong", [FileNotFoundError, PermissionError])
def test_provenance_where_the_system_tells_nothing_of_its_processor(monkeypatch, wrong):
    def fails(path, **named):
        raise wrong(path)

    monkeypatch.setattr(results.Path, "read_text", fails)  # as on macOS
    monkeypatch.setattr("platform.processor", lambda: "")
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    told = results.provenance(torch.device("cpu"))["device"]
    assert told == f"arm64, {os.cpu_count()} cores"


@pytest.mark.parametrize(
    "answer", [FileNotFoundError("git"), subprocess.CalledProcessError(128, "git")]
)
def test_commit_is_unknown_without_git(monkeypatch, answer):
    def fails(*arguments, **named):
        raise answer

    monkeypatch.setattr(results, "subprocess", SimpleNamespace(
        run=fails, CalledProcessError=subprocess.CalledProcessError
    ))  # fmt: skip
    assert results.provenance(torch.device("cpu"))["commit"] == "unknown"


def git(folder, *arguments):
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    done = subprocess.run(["git", "-C", folder, *who, *arguments], capture_output=True, check=True)
    return done.stdout.decode().strip()


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """Somebody's repository with one commit, in a folder of which the package lies."""
    package = tmp_path / "lib" / "site-packages" / "metautils"
    package.mkdir(parents=True)
    (package / "results.py").touch()
    (tmp_path / "README").touch()
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "README")
    git(tmp_path, "commit", "-qm", "theirs")
    monkeypatch.setattr(results, "__file__", str(package / "results.py"))
    return tmp_path


def test_commit_of_a_repository_that_does_not_hold_the_package_is_not_named(repository):
    assert results.provenance(torch.device("cpu"))["commit"] == "unknown"


def test_commit_of_the_packages_own_repository_is_named(repository):
    git(repository, "add", ".")
    git(repository, "commit", "-qm", "ours")
    commit = git(repository, "rev-parse", "--short", "HEAD")
    assert results.provenance(torch.device("cpu"))["commit"] == commit
    (repository / "lib" / "site-packages" / "metautils" / "results.py").write_bytes(b"\n")
    assert results.provenance(torch.device("cpu"))["commit"] == f"{commit}-dirty"


OLD = {"device": "old device", "threads": 1, "torch": "1", "commit": "old"}
NEW = {"device": "new device", "threads": 2, "torch": "2", "commit": "new"}


def test_a_training_keeps_what_it_was_made_by(tmp_path):
    path = tmp_path / "record.json"
    assert results.kept(path, NEW) == NEW
    path.write_text(json.dumps(record(**OLD)), encoding="utf-8")  # as older versions wrote it
    assert results.kept(path, NEW) == OLD
    path.write_text(json.dumps(record(**NEW, trained_by=OLD)), encoding="utf-8")
    assert results.kept(path, NEW) == OLD
    path.write_text("[1]", encoding="utf-8")
    assert results.kept(path, NEW) == NEW


def test_a_mac_s_accelerator_is_not_its_processor():
    names = {results.provenance(torch.device(name))["device"] for name in ("cpu", "mps")}
    assert len(names) == 2


def test_page_tells_test_and_training_apart(elsewhere):
    results.write(record(**NEW, trained_by=OLD), elsewhere / "again.json")
    results.write(record(**OLD, trained_by=OLD), elsewhere / "same.json")
    page = results.page()
    assert "| old device, 1 threads; test: new device, 2 threads | 1; test: 2 |" in page
    assert "| `old`; test: `new` |" in page
    assert "| old device, 1 threads | 1 | `old` |" in page


@pytest.mark.parametrize(
    ("row", "setting", "expected"),
    [
        (record(), (5, 1), "98.77 ± 0.12"),  # ours is kept to two digits
        (record(), (20, 1), "-"),
        (paper(), (5, 1), "98.1"),
        (
            paper(evaluations=[{"ways": 20, "shots": 5, "accuracy": 98.9, "ci95": 0.2}]),
            (20, 5),
            "98.9 ± 0.2",
        ),
    ],
)
def test_score(row, setting, expected):
    assert results.score(row, *setting) == expected


def cells(line):
    return [cell.strip() for cell in line.replace("\u00a0", " ").strip("|").split("|")]


def test_table_puts_ours_beside_the_published():
    other = {"ways": 20, "shots": 1, "accuracy": 96.0, "ci95": 0.3}
    theirs = [
        paper(transductive=True),
        paper(status="second-hand", evaluations=[other], transductive=None),
    ]
    head, rule, *lines = results.table({"mine": record()}, theirs).splitlines()
    assert cells(head) == ["Method", "Source", "Queries", "5-way 1-shot", "20-way 1-shot"]
    assert cells(rule) == ["---"] * 5
    ours = ["ProtoNet", "**this book**, `mine`", "inductive", "98.77 ± 0.12", "-"]
    assert cells(lines[0]) == ours
    assert cells(lines[1])[1:] == [
        "Someone et al. (2016), as printed", "transductive", "98.1", "-",
    ]  # fmt: skip
    assert cells(lines[2])[2:] == ["not said", "-", "96.0 ± 0.3"]
    assert cells(lines[2])[1].endswith("as printed, second-hand")
    assert len(lines) == 3


def sound_tables(text):
    """Every table of a Markdown text has as many cells in each row as in its head."""
    tables = [block.splitlines() for block in re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE)]
    for table in tables:
        assert len({len(cells(line)) for line in table}) == 1, table
    return len(tables)


def test_page_of_one_record(elsewhere):
    results.write(record(tested_on="glyphs"), elsewhere / "far.json")
    page = results.page().replace("\u00a0", " ")
    assert sound_tables(page) == 4
    assert "**this book**, `mine`" in page
    assert "| omniglot | glyphs | none | inductive | 98.77 ± 0.12 | - |" in page
    assert "| 1 x 5-way 1-shot, 5 queries |" in page
    assert "| 7 / 2 / 3 |" in page


def test_page_of_the_repository():
    page = results.page()
    assert sound_tables(page) >= 2
    for name in results.records():
        assert f"`{name}`" in page
    measured = [json.loads(path.read_text()) for path in results.folder().glob("*.json")]
    measured = [each for each in measured if "tables" in each]
    assert len(measured) >= 20
    for each in measured:
        assert page.count(f"{each['what']}; {results.trained_by(each)['device']}") == 1


def test_repository_records_are_whole():
    for name, found in results.records().items():
        assert set(results.FIELDS) <= set(found), name
        assert found["evaluations"], name
        for e in found["evaluations"]:
            assert e["episodes"] >= 600, name
            assert 0 < e["ci95"] < 5 < e["accuracy"] <= 100, name


def test_published_rows_are_whole_and_cited():
    rows = json.loads((results.folder() / "published.json").read_text())
    assert rows
    for row in rows:
        assert row["status"] in ("paper", "second-hand")
        assert row["note"]
        assert all(set(e) == {"ways", "shots", "accuracy", "ci95"} for e in row["evaluations"])
    bibliography = ROOT / "book" / "references.bib"
    if not bibliography.exists():
        pytest.skip("book/references.bib is not there")
    keys = set(re.findall(r"^@\w+\{([^,\s]+),", bibliography.read_text(), re.MULTILINE))
    assert {row["cite"] for row in rows} <= keys


def test_published_takes_one_data_set(elsewhere):
    rows = [paper(data="omniglot"), paper(data="other", method="Not this")]
    (elsewhere / "published.json").write_text(json.dumps(rows))
    assert [row["method"] for row in results.published("omniglot")] == ["Older"]
