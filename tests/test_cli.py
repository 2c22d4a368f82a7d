"""The command line does what it is told, and ends with one sentence where it cannot."""

import ast
import csv
import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import (
    COLOURS,
    OWN_METHOD,
    ROOT,
    blobs,
    paint,
    quick_preset,
    read_json,
    tiny_classifier,
    train,
)

from metautils import classifier, cli, data, finetune, results
from metautils.checkpoint import CHECKPOINT
from metautils.data.bank import split_classes

pytestmark = pytest.mark.usefixtures("short_runs")


def test_data_tells_what_is_there(capsys):
    assert cli.main(["data", "digits"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[0].split(":")[0].strip() == "train"
    assert "0 classes" in lines[0]
    assert "10 classes,   1797 images of 1 x 28 x 28, 174 to 183 a class" in lines[2]


def test_results_prints_the_page(capsys):
    assert cli.main(["results"]) == 0
    assert capsys.readouterr().out == results.page() + "\n"


def test_relation_on_images_of_another_size(tmp_path, capsys, many_classes, monkeypatch):
    """Its dense layers fit maps of one size; told as another network."""
    train(tmp_path, method="relation")
    capsys.readouterr()
    large = split_classes(blobs(classes=8, size=32), (3, 2, 3))
    monkeypatch.setattr(data.folder, "load", lambda path, seed: large)
    says(
        capsys, ["evaluate", tmp_path, "--data", many_classes, "--device", "cpu"], "another network"
    )


def test_relation_on_images_too_small(tmp_path, capsys, monkeypatch):
    """Told before any training."""
    parts = split_classes(blobs(classes=14, size=12), (6, 3, 5))
    monkeypatch.setattr(data.folder, "load", lambda path, seed: parts)
    (tmp_path / "photos").mkdir()
    arguments = ["train", "relation", "--data", tmp_path / "photos", "--out", tmp_path / "run"]
    says(capsys, arguments, "Maps of 3x3 cannot be halved twice: they must be 4x4.")
    assert not (tmp_path / "run").exists()


def test_transductive_run_does_not_go_on_inductively(tmp_path, capsys):
    train(tmp_path, method="maml")
    capsys.readouterr()
    arguments = ["train", "maml", "--out", tmp_path, "--device", "cpu", "--inductive"]
    says(capsys, arguments, "transductive=True")


def test_another_method_in_the_same_folder(tmp_path, capsys):
    train(tmp_path, method="maml")
    capsys.readouterr()
    arguments = ["train", "fomaml", "--out", tmp_path, "--device", "cpu"]
    says(capsys, arguments, "was made with learner=")


@pytest.mark.parametrize("name", ["--ways", "--shots"])
@pytest.mark.parametrize(
    ("value", "told"), [("0", "0 must be"), ("-1", "-1 must be"), ("x", "'x'")]
)
def test_ways_and_shots_must_be_positive(tmp_path, capsys, name, value, told):
    with pytest.raises(SystemExit) as stopped:
        train(tmp_path / "run", name, value, method="maml")
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert f"argument {name}: " in err
    assert told in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("method", "asked", "sentence"),
    [
        ("maml", ["--ways", 6], "Testing needs 6 classes of 2 images or more; there are 5"),
        ("maml", ["--shots", 8], "Testing needs 4 classes of 9 images or more; there are 5"),
        ("maml", ["--shots", 7], "has 8 images but 7 shots and 2 queries need 9: ask for fewer"),
        (
            "protonet",
            ["--ways", 25],
            "25 ways need 25 classes but there are 24: ask for few",
        ),
    ],
)
def test_more_than_there_is(tmp_path, capsys, method, asked, sentence):
    """Told before any training."""
    says(capsys, ["train", method, "--out", tmp_path / "run", "--device", "cpu", *asked], sentence)
    assert not (tmp_path / "run").exists()


def says(capsys, arguments, sentence):
    """Status 2, nothing on stdout, and one line on stderr."""
    assert cli.main(list(map(str, arguments))) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("metautils: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert sentence in err


def test_no_such_set(tmp_path, capsys):
    sentence = "'no-such-set' is neither a folder nor one of glyphs, omniglot, digits, cifar_fs."
    for command in (["data", "no-such-set"], ["train", "protonet", "--data", "no-such-set"]):
        more = ["--out", tmp_path / "run"] if command[0] == "train" else []
        says(capsys, [*command, *more], sentence)
    assert not (tmp_path / "run").exists()


def test_wrong_data_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("METAUTILS_DATA", str(tmp_path / "gone"))
    says(capsys, ["data", "omniglot"], "gone', which is no folder: correct it or unset it")


@pytest.mark.parametrize(
    ("name", "file"), [("omniglot", "images_background"), ("cifar_fs", "train")]
)
def test_set_that_is_not_in_the_data_folder(tmp_path, capsys, monkeypatch, name, file):
    monkeypatch.setenv("METAUTILS_DATA", str(tmp_path))
    says(capsys, ["data", name], f"{file}.zip nor")


def test_folder_never_trained(tmp_path, capsys):
    sentence = f"record.json does not exist: train with --out {tmp_path} first."
    says(capsys, ["evaluate", tmp_path], sentence)


def test_one_test_class_makes_no_task(tmp_path, capsys, monkeypatch):
    """Told before any training."""
    few = split_classes(blobs(classes=8, size=16), (5, 2, 1))
    monkeypatch.setattr(data.folder, "load", lambda path, seed: few)
    sentence = "Testing needs 2 classes of 2 images or more; there are 1, the smallest of 8"
    (tmp_path / "photos").mkdir()
    arguments = ["train", "protonet", "--data", tmp_path / "photos", "--out", tmp_path / "run"]
    says(capsys, arguments, sentence)
    assert not (tmp_path / "run").exists()


def test_set_for_testing_only_cannot_train(tmp_path, capsys):
    sentence = "digits leaves no class for train: choose a set with more."
    says(capsys, ["train", "protonet", "--data", "digits", "--out", tmp_path], sentence)


def test_too_few_images(tmp_path, capsys, monkeypatch):
    quick_preset(monkeypatch, 3, 4, 1, 20, 3)
    sentence = "has 8 images but 1 shots and 20 queries need 21: ask for fewer or drop the class."
    says(capsys, ["train", "protonet", "--out", tmp_path], sentence)


def test_checkpoint_of_another_run(tmp_path, capsys):
    train(tmp_path)
    capsys.readouterr()
    sentence = "was made with seed=0, not 1: give the same settings"
    says(capsys, ["train", "protonet", "--out", tmp_path, "--seed", 1], sentence)


def test_test_set_of_other_channels(tmp_path, capsys, many_classes):
    train(tmp_path)
    capsys.readouterr()
    command = ["evaluate", tmp_path, "--data", many_classes, "--device", "cpu"]
    says(capsys, command, "belongs to another network")


def test_damaged_checkpoint(tmp_path, capsys):
    train(tmp_path)
    capsys.readouterr()
    (tmp_path / CHECKPOINT).write_bytes(b"half")
    says(capsys, ["evaluate", tmp_path], f"{CHECKPOINT} is damaged")


def test_out_that_is_a_file(tmp_path, capsys):
    out = tmp_path / "file"
    out.write_text("")
    assert train(out) == 2
    assert "metautils: " in capsys.readouterr().err


def test_bad_images_do_not_stop_the_good_ones(tmp_path, capsys, photos, monkeypatch):
    """Each bad one gets its sentence, and the status tells that there was one."""
    monkeypatch.setattr(classifier, "load", lambda path: tiny_classifier())
    good = [str(photos / name / "0.png") for name in ("red", "blue")]
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    arguments = ["classify", str(tmp_path), good[0], str(bad), str(tmp_path / "none"), good[1]]
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert [line.split(": ")[0] for line in out.splitlines()] == good
    assert [line[:11] for line in err.splitlines()] == ["metautils: "] * 2
    assert str(bad) in err and str(tmp_path / "none") in err
    assert cli.main(["classify", str(tmp_path), *good]) == 0


def test_classify_takes_folders_and_writes_a_table(tmp_path, capsys, photos, monkeypatch):
    """A row for each good image, in any number of batches; the bad ones are told at the end."""
    net = tiny_classifier()
    monkeypatch.setattr(classifier, "load", lambda path: net)
    folder = tmp_path / "mixed"
    shutil.copytree(photos / "red", folder / "more" / "red")
    shutil.copy(photos / "blue" / "3.png", folder / "name, with a comma.png")
    (folder / "bad.png").write_bytes(b"no image")
    (folder / "readme.txt").write_text("no image, nor named like one")
    command = ["classify", "run", str(folder), str(photos / "green" / "0.png"), "--batch", "4"]
    out = tmp_path / "new" / "answers.csv"
    assert cli.main([*command, "--csv", str(out)]) == 2
    told, err = capsys.readouterr()
    assert told == f"12 image(s) in {out}\n"
    assert err.endswith("\n") and err.count("metautils: ") == 1 and "bad.png is no" in err
    with out.open(encoding="utf-8", newline="") as file:
        head, *rows = csv.reader(file)
    assert head == ["file", "answer", "probability", *(f"p_{name}" for name in COLOURS)]
    names = {Path(row[0]).relative_to(tmp_path) for row in rows if "mixed" in row[0]}
    assert len(rows) == 12 and len(names) == 11
    for row in rows:
        expected = net.classify(row[0])
        assert row[1] == next(iter(expected))
        numbers = [expected[name] for name in COLOURS]
        assert [float(x) for x in row[3:]] == pytest.approx(numbers, abs=1e-4)
        assert row[2] == max(row[3:])


def test_classify_prints_a_line_for_each_image_of_a_folder(capsys, photos, monkeypatch):
    monkeypatch.setattr(classifier, "load", lambda path: tiny_classifier())
    assert cli.main(["classify", "run", str(photos / "red"), "--batch", "3"]) == 0
    told, err = capsys.readouterr()
    assert [line.split(": ")[0] for line in told.splitlines()] == [
        str(photos / "red" / f"{k}.png") for k in range(10)
    ]
    assert err == ""


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["photos", "--csv", "photos"], "photos is a folder: name a file"),
        (["photos", "--csv", "file/x.csv"], "file cannot be written to"),
        (["empty"], "empty holds no image: name images, or folders with some in them"),
    ],
)
def test_classify_tells_what_is_wrong_before_any_work(tmp_path, capsys, monkeypatch, more, told):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(classifier, "load", None)
    paint(tmp_path / "photos", 2)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    says(capsys, ["classify", "run", *more], told)


FULL = {
    "torch on a GPU": torch.cuda.OutOfMemoryError("CUDA out of memory."),
    "torch on a CPU": RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9"),
    "torch on Windows": RuntimeError("DefaultCPUAllocator: not enough memory: you tried 9"),
    "Python": MemoryError(),
}


@pytest.mark.parametrize("error", FULL.values(), ids=FULL)
def test_out_of_memory_is_a_sentence_with_flags(tmp_path, capsys, monkeypatch, error, photos):
    def full(*arguments, **named):
        raise error

    monkeypatch.setattr(finetune, "run", full)
    arguments = ["finetune", "--data", photos, "--out", tmp_path]
    says(capsys, arguments, "not enough memory: give a smaller --batch or --size.")


def test_other_runtime_errors_keep_their_traceback(tmp_path, monkeypatch, photos):
    def fault(*arguments, **named):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(finetune, "run", fault)
    with pytest.raises(RuntimeError, match="mat1"):
        cli.main(["finetune", "--data", str(photos), "--out", str(tmp_path)])


def flags() -> set[str]:
    """Every flag of every command."""
    found, parsers = set(), [cli._parser()]
    for parser in parsers:
        for action in parser._actions:
            found |= set(action.option_strings)
            if isinstance(action.choices, dict):
                parsers += action.choices.values()
    return found


def test_every_flag_that_a_message_names_exists():
    named = set()
    for path in (ROOT / "metautils").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            told = isinstance(node, ast.Constant) and isinstance(node.value, str)
            if told and "var(--" not in node.value:  # which is a style sheet's
                named |= set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", node.value))
    assert {"--out", "--batch", "--size"} <= named
    assert named - {"--error-unmatch", "--always", "--dirty"} <= flags()


def test_advice_on_a_run_can_be_followed():
    """What a message asks to make smaller can be given."""
    assert {"--ways", "--shots", "--queries", "--lr", "--batch", "--size", "--epochs"} <= flags()


@pytest.mark.parametrize("flag", ["--lr", "--queries"])
def test_numbers_of_a_training_can_be_given(tmp_path, flag):
    assert train(tmp_path, flag, 2) == 0
    assert read_json(tmp_path / "record.json")["train"][flag[2:]] == 2


@pytest.mark.parametrize("rate", ["0", "-1", "nan", "inf", "fast"])
def test_rate_that_is_none(tmp_path, capsys, rate):
    with pytest.raises(SystemExit) as stopped:
        train(tmp_path, f"--lr={rate}")
    assert stopped.value.code == 2
    assert "--lr" in capsys.readouterr().err


def test_folder_whose_name_is_too_long(tmp_path, capsys):
    says(capsys, ["data", 300 * "x"], "cannot be read (")
    says(capsys, ["finetune", "--data", 300 * "x", "--out", tmp_path / "out"], "cannot be read (")


def test_device_that_is_none(tmp_path, capsys):
    for name in ("abacus", "cuda:99"):
        with pytest.raises(SystemExit) as stopped:
            train(tmp_path, "--device", name)
        assert stopped.value.code == 2
        assert f"'{name}' is no device of this machine: try cpu" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"half", "record.json is damaged, or not written here"),
        (b"\xff", "record.json is damaged, or not written here"),
        (b"{}", "record.json is no record of a training: name the --out folder of one"),
        (b"[1]", "record.json is no record of a training: name the --out folder of one"),
        (None, "record.json cannot be read ("),
    ],
)
def test_record_that_is_none(tmp_path, capsys, content, sentence):
    path = tmp_path / "record.json"
    path.mkdir() if content is None else path.write_bytes(content)
    says(capsys, ["evaluate", tmp_path, "--device", "cpu"], sentence)


def test_files_that_may_not_be_read(tmp_path, capsys, monkeypatch, many_classes):
    """Told by name, whether it is a folder of images, a class of it, a method or a record."""
    (tmp_path / "mine.py").write_text(OWN_METHOD, encoding="utf-8")
    (tmp_path / "record.json").touch()
    locked, opened, listed = [], Path.open, Path.iterdir

    def refuse(whole):
        def wrapped(path, *arguments, **named):
            if path in locked:
                raise PermissionError(13, "Permission denied", str(path))
            return whole(path, *arguments, **named)

        return wrapped

    monkeypatch.setattr(Path, "open", refuse(opened))
    monkeypatch.setattr(Path, "read_bytes", refuse(Path.read_bytes))
    monkeypatch.setattr(Path, "iterdir", refuse(listed))
    out = ["--out", tmp_path / "run"]
    for path, command in [
        (many_classes, ["data", many_classes]),
        (many_classes / "class03", ["data", many_classes]),
        (many_classes, ["finetune", "--data", many_classes, *out]),
        (tmp_path / "mine.py", ["train", tmp_path / "mine.py", *out]),
        (tmp_path / "record.json", ["evaluate", tmp_path]),
    ]:
        locked[:] = [path]
        says(capsys, command, f"{path} cannot be read (Permission denied): check its name")


def test_method_that_is_a_folder(tmp_path, capsys):
    (tmp_path / "mine.py").mkdir()
    command = ["train", tmp_path / "mine.py", "--out", tmp_path / "run"]
    says(capsys, command, "mine.py cannot be read (")


def test_batch_of_one_small_image(tmp_path, capsys):
    paint(tmp_path / "photos")
    command = ["finetune", "--data", tmp_path / "photos", "--out", tmp_path / "out"]
    command += ["--weights", "none", "--size", 32, "--batch", 1, "--device", "cpu"]
    says(capsys, command, "batch=1 with size=32: batch normalisation needs two numbers or more")


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("--seed", 2**63, "is longer than the 64 bits of a seed"),
        ("--seed", -(2**63) - 1, "is longer than the 64 bits of a seed"),
        ("--workers", -1, "-1 must be at least 0"),
    ],
)
def test_number_out_of_range(tmp_path, capsys, option, value, told):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["finetune", "--data", ".", "--out", str(tmp_path), option, str(value)])
    assert stopped.value.code == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("seed", [2**63 - 1, -(2**63)])
def test_longest_seeds(tmp_path, seed):
    assert train(tmp_path, "--seed", seed) == 0


FAULTS = [ValueError, OSError, FileNotFoundError, KeyError, RuntimeError, FloatingPointError]


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_of_the_package_keeps_its_traceback(capsys, monkeypatch, fault):
    """It is none of the reader's, to whom a sentence would say that it is."""

    def broken(*arguments, **named):
        raise fault("a fault")

    monkeypatch.setattr(data, "load", broken)
    with pytest.raises(fault, match="a fault"):
        cli.main(["data", "digits"])
    assert capsys.readouterr().err == ""


def test_results_may_be_read_in_part(monkeypatch):
    """As by `| head`, which closes the pipe when it has seen enough."""
    end, start = os.pipe()
    os.close(end)
    with io.TextIOWrapper(os.fdopen(start, "wb"), encoding="utf-8") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert cli.main(["results"]) == 0


def test_interruption_says_how_to_go_on(capsys, monkeypatch):
    def interrupted(*arguments, **named):
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "load", interrupted)
    assert cli.main(["data", "digits"]) == 130
    assert capsys.readouterr().err == "\nStopped. Give the same command again to go on.\n"


def test_as_a_module():
    command = [sys.executable, "-m", "metautils", "data", "no-such-set"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "metautils: 'no-such-set' is neither a folder nor one of "
        "glyphs, omniglot, digits, cifar_fs.\n"
    )
