"""What other systems do otherwise, each simulated: Macs, Windows, a shared machine, a container."""

import ast
import builtins
import multiprocessing
import os
import pathlib
import pickle
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, numbered, paint, read_json, tiny_body, tiny_classifier, train
from PIL import Image

from metautils import classifier, cli, data, finetune, pretrained, results
from metautils.checkpoint import CHECKPOINT
from metautils.data import archive, folder, labelled
from metautils.data.bank import cached
from metautils.files import load_safely

# A method that is trained in a moment, on images in colour of any size.
QUICK = """
from torch import nn

from metautils.learners.base import Method, Preset
from metautils.learners.protonet import ProtoNet


def make(problem):
    return ProtoNet(nn.Sequential(nn.Flatten(), nn.Linear(problem.image.numel(), 4)))


METHODS = {"mine": Method("Mine", make, {"quick": Preset(3, 2, 1, 2, episodes=3)}, any_ways=True)}
"""


def small_resnet(weights: object = None, kind: str = "resnet50") -> torch.nn.Module:
    """A body in place of a ResNet-50."""
    return tiny_body()


def fill(root: Path, names: list[str], images: int = 5) -> Path:
    """A folder of six classes or more."""
    for seed, name in enumerate(names):
        paint(root, images, [name], seed)
    return root


# A Mac, where there is no /proc


def test_no_proc(tmp_path, monkeypatch, short_runs):
    def without_proc(whole):
        def wrapped(path, *arguments, **named):
            if str(path).startswith("/proc"):
                raise FileNotFoundError(2, "No such file or directory", str(path))
            return whole(path, *arguments, **named)

        return wrapped

    for owner, name in [(Path, "open"), (Path, "read_text"), (builtins, "open"), (os, "stat")]:
        monkeypatch.setattr(owner, name, without_proc(getattr(owner, name)))
    monkeypatch.setattr(platform, "processor", lambda: "arm")
    monkeypatch.setattr(pretrained, "body", small_resnet)
    told = f"arm, {os.cpu_count()} cores"
    assert results.provenance(torch.device("cpu"))["device"] == told
    assert train(tmp_path / "few") == 0
    finetune.run(paint(tmp_path / "photos"), tmp_path / "fine", finetune.Recipe(16, epochs=1), None)
    for run in ("few", "fine"):
        assert read_json(tmp_path / run / "record.json")["device"] == told


# A pipe on Windows, whose encoding lacks letters

# A name of bytes that are no letters is possible on Linux alone.
NAMES = ["é", "日本", "✓", *([os.fsdecode(b"\xff")] if sys.platform == "linux" else []), "a", "b"]
COMMANDS = """
import sys
import warnings

warnings.filterwarnings("error", category=EncodingWarning, module="metautils|book|helpers|_own_")
import book
from metautils import cli, pretrained
from test_systems import small_resnet

pretrained.body = small_resnet
few, fine = "few-日本", "fine-✓"
for command in [
    ["--help"],
    ["train", "./mine-日本-é.py", "--data", "photos-✓", "--out", few, "--device", "cpu"],
    ["evaluate", few, "--data", "photos-✓", "--device", "cpu"],
    ["data", "photos-✓"],
    ["data", "gone-日本-é"],
    ["finetune", "--data", "photos-✓", "--out", fine, "--weights", "none", "--size", "32",
     "--epochs", "1", "--device", "cpu"],
    ["classify", fine, "photos-✓/日本/0.png"],
    ["classify", fine, "photos-✓", "--csv", "answers-日本.csv"],
    ["results"],
]:
    try:
        status = cli.main(command)
    except SystemExit as done:
        status = done.code
    print(command[0], "ends with", status)
book.build = lambda folder: folder
print("book ends with", book.main(["site-日本-é"]))
"""
TOLD = {"cp1252": (r"\u65e5\u672c", "é"), "cp932": ("日本", r"\xe9")}


@pytest.mark.parametrize("encoding", TOLD)
def test_pipe_without_some_letters(tmp_path, encoding):
    """All commands come to their end; a letter that cannot be told is told by its number.

    Nor is any file opened in an encoding that the system chooses.
    """
    photos = fill(tmp_path / "photos-✓", NAMES)
    Image.open(photos / "日本" / "1.png").convert("P").save(photos / "日本" / "1.png")
    (tmp_path / "mine-日本-é.py").write_text(QUICK, encoding="utf-8")
    (tmp_path / "commands.py").write_text(COMMANDS, encoding="utf-8")
    paths = map(str, (ROOT, ROOT / "tests", ROOT / "tools"))
    more = {"PYTHONPATH": os.pathsep.join(paths), "METAUTILS_CACHE": str(tmp_path / "cache")}
    more |= {"PYTHONUTF8": "0", "PYTHONIOENCODING": encoding}
    done = subprocess.run(
        [sys.executable, "-X", "warn_default_encoding", "commands.py"],
        cwd=tmp_path, env=os.environ | more, capture_output=True,
    )  # fmt: skip
    out, err = (text.decode(encoding) for text in (done.stdout, done.stderr))
    assert done.returncode == 0, err
    ends = [line for line in out.splitlines() if " ends with " in line]
    names = ["--help", "train", "evaluate", "data", "data", "finetune", "classify", "classify"]
    names += ["results"]
    status = dict.fromkeys(range(10), 0) | {4: 2}
    assert ends == [f"{n} ends with {status[k]}" for k, n in enumerate([*names, "book"])]
    japan, accent = TOLD[encoding]
    assert f"record in few-{japan}" in out
    assert f"{japan}/1.png is of mode P and is read as RGB." in out
    assert (tmp_path / "answers-日本.csv").read_bytes().count("日本/1.png".encode()) == 1
    assert "日本" in (tmp_path / "fine-✓" / "report.html").read_text(encoding="utf-8")
    assert f"The book is built: site-{japan}-{accent}" in out
    assert f"metautils: 'gone-{japan}-{accent}' is neither a folder" in err.replace("\\\\", "\\")


def unnamed_encodings(text: str) -> list[int]:
    """Lines that open a text file, or talk with a process, without saying in which encoding."""
    found = []
    for node in filter(lambda x: isinstance(x, ast.Call), ast.walk(ast.parse(text))):
        name = ast.unparse(node.func).rsplit(".", 1)[-1]
        said = {word.arg: ast.unparse(word.value) for word in node.keywords}
        binary = any("b" in str(getattr(x, "value", "")) for x in node.args[:2])
        opens = name in ("read_text", "write_text", "TextIOWrapper", "NamedTemporaryFile")
        opens |= name == "open" and not binary and ast.unparse(node.func) != "Image.open"
        if (opens or said.keys() & {"text", "universal_newlines"}) and "encoding" not in said:
            found.append(node.lineno)
    return found


def test_every_file_is_opened_in_an_encoding_of_ours():
    for part in ("metautils", "tools", "experiments"):
        for path in (ROOT / part).rglob("*.py"):
            assert unnamed_encodings(path.read_text(encoding="utf-8")) == [], path


def test_unnamed_encodings_are_seen():
    text = "p.open()\nopen(p, 'rb')\np.read_text()\nImage.open(p)\nrun(x, text=True)\np.open('xb')"
    assert unnamed_encodings(text) == [1, 3, 5]


# Folders on macOS and Windows


class Backwards:
    """A listing of a folder in the reverse order."""

    whole = staticmethod(os.scandir)

    def __init__(self, path: str = ".") -> None:
        with self.whole(path) as entries:
            self.entries = iter(sorted(entries, key=lambda entry: entry.name, reverse=True))

    def __enter__(self):
        return self.entries

    def __exit__(self, *error: object) -> None:
        pass

    def __next__(self) -> os.DirEntry:
        return next(self.entries)

    def __iter__(self):
        return self.entries


@pytest.fixture
def another_system(monkeypatch):
    """From when this is called, folders are listed backwards, and paths compared like Windows'."""

    def start():
        iterdir, listdir = Path.iterdir, os.listdir
        monkeypatch.setattr(os, "scandir", Backwards)
        monkeypatch.setattr(os, "listdir", lambda path=".": sorted(listdir(path), reverse=True))
        monkeypatch.setattr(Path, "iterdir", lambda path: iter(sorted(iterdir(path), reverse=True)))
        less = lambda a, b: str(a).lower() < str(b).lower()  # noqa: E731
        monkeypatch.setattr(pathlib.PurePath, "__lt__", less)

    return start


def everything_read(root):
    """What each reader of folders makes of this one."""
    bank, split = folder.bank(root, 8), labelled.load(root)
    parts = data.folder.load(root, 8)
    stored = archive.images(root.parent, root.name, ".png", "L", "Photos")
    return (
        bank.names,
        bank.digest,
        [(part.samples, part.targets) for part in split[:3]],
        [part.names for part in parts],
        [name for name, _ in stored],
    )


@pytest.mark.usefixtures("two_cases")
def test_folders_are_read_alike_everywhere(tmp_path, another_system):
    """Upper and lower case, as this system tells them apart; whatever order it lists them in."""
    root = fill(tmp_path / "photos", ["B", "a", "a b", "Cat", "cat", "_c", "é", "E"])
    for name in ("a", "Cat"):
        (root / name / "0.png").rename(root / name / "X.PNG")
        (root / name / "1.png").rename(root / name / "x.png")
        (root / name / "10").mkdir()
        (root / name / "2.png").rename(root / name / "10" / "2.png")
    here = everything_read(root)
    another_system()
    assert everything_read(root) == here
    assert here[0] == ("B", "Cat", "E", "_c", "a", "a b", "cat", "é")


# Processes that are started anew, as on macOS and Windows, where nothing is inherited


def test_images_are_read_by_processes_that_are_spawned(split, monkeypatch):
    """Whatever these need is sent to them."""
    net, before = tiny_classifier(), multiprocessing.get_start_method()
    here = classifier.features(net, split.validation)
    multiprocessing.set_start_method("spawn", force=True)
    try:
        there = classifier.features(net, split.validation, workers=1)
    finally:
        multiprocessing.set_start_method(before, force=True)
    assert all(map(torch.equal, here.tensors, there.tensors))
    crops = classifier.batches(split.train, 4, classifier.to_train(net, True)).dataset
    assert pickle.loads(pickle.dumps(crops))[0][0].shape == (3, 16, 16)


# Folders that belong to others


@pytest.fixture
def read_only(tmp_path, monkeypatch):
    """A folder in which nothing can be made; a test may run as one who may do everything."""
    place = tmp_path / "theirs"
    place.mkdir()

    def refusing(whole):
        def wrapped(path, *arguments, **named):
            if place in Path(path).parents:
                raise PermissionError(13, "Permission denied", str(path))
            return whole(path, *arguments, **named)

        return wrapped

    for owner, name in [(Path, "open"), (Path, "mkdir"), (os, "mkdir"), (os, "makedirs")]:
        monkeypatch.setattr(owner, name, refusing(getattr(owner, name)))
    monkeypatch.setattr(Path, "write_bytes", refusing(Path.write_bytes))
    return place


def test_cache_that_belongs_to_others(read_only, monkeypatch, short_runs, tmp_path, capsys):
    monkeypatch.setenv("METAUTILS_CACHE", str(read_only / "cache"))
    with pytest.warns(UserWarning, match="will be made again next time: .*Permission denied"):
        assert torch.equal(cached("numbers", lambda: numbered(2)).images, numbered(2).images)
    assert train(tmp_path / "run") == 0
    capsys.readouterr()
    assert cli.main(["data", "omniglot"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"metautils: Omniglot is not in {read_only}")
    assert err.count("\n") == 1


@pytest.mark.parametrize("command", ["train", "finetune"])
def test_out_that_belongs_to_others(read_only, short_runs, tmp_path, capsys, command):
    """Told before any training."""
    out = read_only / "run"
    if command == "train":
        assert train(out) == 2
    else:
        photos = paint(tmp_path / "photos")
        assert cli.main(["finetune", "--data", str(photos), "--out", str(out)]) == 2
    sentence = f"metautils: {out} cannot be written to (Permission denied): choose another folder."
    assert capsys.readouterr() == ("", f"{sentence}\n")


# Two at once


def at_once(place: Path, barrier: object) -> None:
    """Build a cache, train and fine-tune, beside another process that does the same."""
    os.environ["METAUTILS_CACHE"] = str(place / "cache")
    pretrained.body = small_resnet
    both = ["--data", str(place / "photos"), "--device", "cpu", "--out"]
    few, fine = ([*both, str(place / name)] for name in ("few", "fine"))
    fine += ["--weights", "none", "--size", "16", "--epochs", "2"]
    barrier.wait()
    bank = cached("numbers", lambda: numbered(*[50] * 200))
    assert bank.digest == numbered(*[50] * 200).digest
    for command in (["train", str(place / "mine.py"), *few], ["finetune", *fine]):
        barrier.wait()
        assert cli.main(command) == 0


def test_two_processes_at_once(tmp_path, monkeypatch):
    """Both end well, and leave what one alone leaves."""
    monkeypatch.setenv("METAUTILS_CACHE", "")  # so that both are put back
    monkeypatch.setattr(pretrained, "body", None)
    fill(tmp_path / "photos", list("abcdef"))
    (tmp_path / "mine.py").write_text(QUICK, encoding="utf-8")
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2, timeout=100)
    other = context.Process(target=at_once, args=(tmp_path, barrier))
    other.start()
    at_once(tmp_path, barrier)
    other.join()
    assert other.exitcode == 0
    left = {name: {p.name for p in (tmp_path / name).iterdir()} for name in ("few", "fine")}
    assert left["few"] == {CHECKPOINT, "record.json"}
    assert left["fine"] == {"all_layers.pt", "model.pt", "record.json", "report.html"}
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["numbers.pt"]
    few, fine = (read_json(tmp_path / name / "record.json") for name in left)
    shutil.rmtree(tmp_path / "few")
    at_once(tmp_path, context.Barrier(1))
    alone = read_json(tmp_path / "few" / "record.json")
    assert alone["evaluations"] == few["evaluations"]
    assert len(fine["stage_two"]) == 2
    assert load_safely(tmp_path / "fine" / "model.pt")["classes"] == list("abcdef")
