"""The command line trains, tests, and ends with one sentence where it cannot."""

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from helpers import ROOT, blobs
from PIL import Image

import metautils.evaluate
from metautils import cli, data, methods, results, runs
from metautils.checkpoint import CHECKPOINT
from metautils.data.bank import Parts, split_classes
from metautils.learners import baseline, maml, matching_net, meta_lstm, protonet, relation_net
from metautils.learners.base import Preset, Problem
from metautils.learners.relation_net import RelationModule
from metautils.nets import Conv4, classifier
from metautils.sampling import EpisodeSampler

KNOWN = methods.known().items()


@pytest.fixture(autouse=True)
def short(monkeypatch, tmp_path):
    """Presets of a moment, narrow networks, glyphs ready at once, no cache of the user's."""
    for module in (baseline, maml, matching_net, meta_lstm, protonet, relation_net):
        monkeypatch.setattr(module, "Conv4", lambda *a, **k: Conv4(*a, **(k | {"width": 4})))
    for module in (maml, meta_lstm):
        monkeypatch.setattr(module, "classifier", lambda body, _, ways: classifier(body, 4, ways))
    monkeypatch.setattr(relation_net, "RelationModule", partial(RelationModule, 4))
    monkeypatch.setattr(metautils.evaluate, "IMAGES_AT_ONCE", 100)
    monkeypatch.setattr(cli.runs, "train", partial(runs.train, validation_episodes=4))
    preset(monkeypatch, 3, 4, 1, 2, 3)
    monkeypatch.setenv("METAUTILS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("METAUTILS_DATA", raising=False)
    monkeypatch.setattr(data.glyphs, "load", small)


def preset(monkeypatch, *numbers):
    """The quick preset of every method; those that adapt take two tasks at a time."""
    steps, ways, shots, queries, episodes = numbers
    for name, method in methods.known().items():
        tasks = 1 if method.any_ways else 2
        quick = Preset(steps, ways, shots, queries, tasks, episodes)
        monkeypatch.setitem(methods.known(), name, replace(method, presets={"quick": quick}))


def small(seed=0) -> Parts:
    return split_classes(blobs(classes=14, images=8, size=16, seed=seed), (6, 3, 5))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of 25 classes of 6 small images each, so that 5 are for testing."""
    root = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for k in range(25):
        (root / f"class{k:02d}").mkdir()
        for n in range(6):
            pixels = random.integers(0, 256, (12, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / f"class{k:02d}" / f"{n}.png")
    return root


def train(out, *more, method="protonet"):
    return cli.main(["train", method, "--out", str(out), "--device", "cpu", *map(str, more)])


def again(out, *more):
    return cli.main(["evaluate", str(out), "--device", "cpu", *map(str, more)])


def load(path):
    return json.loads(path.read_text())


def test_training_writes_a_whole_record(tmp_path, capsys):
    assert train(tmp_path / "run", "--seed", "3") == 0
    record = load(tmp_path / "run" / "record.json")
    assert set(results.FIELDS) <= set(record)
    expected = {
        "method": "protonet", "learner": "distance=squared_euclidean",
        "data": "glyphs", "tested_on": "glyphs",
        "split": "classes", "classes": {"train": 6, "validation": 3, "test": 5},
        "rotations": "classes", "seed": 3, "steps": 3, "preset": "quick",
        "train": {"ways": 4, "shots": 1, "queries": 2, "tasks": 1, "transductive": False},
    }  # fmt: skip
    assert {name: record[name] for name in expected} == expected
    # Five test classes turned are twenty, and eight images leave room for 5 shots, 3 queries.
    rows = [(e["ways"], e["shots"], e["queries"], e["episodes"]) for e in record["evaluations"]]
    assert rows == [(5, 1, 3, 3), (5, 5, 3, 3), (20, 1, 3, 3), (20, 5, 3, 3)]
    told = capsys.readouterr().out
    assert len(record["baseline"]) == 4
    assert not any(e["transductive"] for e in record["evaluations"] + record["baseline"])
    for e in record["evaluations"] + record["baseline"]:
        line = f"{e['ways']}-way {e['shots']}-shot: {e['accuracy']:.2f} ± {e['ci95']:.2f} %"
        assert line in told
    assert str(tmp_path / "run" / "record.json") in told
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {CHECKPOINT, "record.json"}


def test_same_command_again_gives_the_same_numbers(tmp_path):
    """The first run resumed, and another in a fresh folder, end where the first ended."""
    runs = []
    for out in ("a", "a", "b"):
        assert train(tmp_path / out) == 0
        runs.append(load(tmp_path / out / "record.json"))
    for run in runs:
        del run["minutes"]
    assert runs[0] == runs[1] == runs[2]


def test_folder_of_photos(tmp_path, photos):
    assert train(tmp_path, "--data", str(photos)) == 0
    record = load(tmp_path / "record.json")
    assert record["data"] == str(photos)
    assert record["classes"] == {"train": 16, "validation": 4, "test": 5}
    assert record["rotations"] == "none"
    assert [(e["ways"], e["shots"]) for e in record["evaluations"]] == [(5, 1), (5, 5)]
    assert {e["queries"] for e in record["evaluations"]} == {1}


@pytest.mark.parametrize("rotations", ["none", "classes", "episode"])
def test_evaluate_scores_again(tmp_path, rotations, capsys):
    train(tmp_path)
    trained = load(tmp_path / "record.json")
    capsys.readouterr()
    assert cli.main(["evaluate", str(tmp_path), "--rotations", rotations, "--device", "cpu"]) == 0
    second = load(tmp_path / f"record-glyphs-{rotations}.json")
    assert capsys.readouterr().out.startswith("trained\n  5-way 1-shot: ")
    assert {e["rotations"] for e in second["evaluations"] + second["baseline"]} == {rotations}
    same = set(second) - {"evaluations", "baseline"}
    assert {name: second[name] for name in same} == {name: trained[name] for name in same}
    if rotations == "classes":
        assert second == trained
    else:
        assert [e["ways"] for e in second["evaluations"]] == [5, 5]
    assert load(tmp_path / "record.json") == trained


def test_evaluate_uses_the_trained_weights(tmp_path):
    train(tmp_path)
    command = ["evaluate", str(tmp_path), "--rotations", "classes", "--device", "cpu"]
    assert cli.main(command) == 0
    path = tmp_path / "record-glyphs-classes.json"
    first = load(path)["evaluations"]
    state = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    state["best"] = {name: torch.zeros_like(x) for name, x in state["best"].items()}
    torch.save(state, tmp_path / CHECKPOINT)
    assert cli.main(command) == 0
    assert {e["accuracy"] for e in load(path)["evaluations"]} == {20.0, 5.0}
    assert load(path)["evaluations"] != first


def test_baseline_compares_class_means_of_the_pixels(tmp_path):
    train(tmp_path)
    baseline = load(tmp_path / "record.json")["baseline"]
    sampler = EpisodeSampler(small().test.with_rotations(), 5, 5, 3)
    right = []
    for _ in range(3):
        e = sampler.sample()
        means = e.support_x[0].flatten(1).view(5, 5, -1).mean(1)
        nearest = torch.cdist(e.query_x[0].flatten(1), means).argmin(1)
        right.append(100 * float((nearest == e.query_y[0]).float().mean()))
    assert (baseline[1]["ways"], baseline[1]["shots"]) == (5, 5)
    assert baseline[1]["accuracy"] == pytest.approx(sum(right) / 3, abs=1e-3)


def test_evaluate_on_another_set(tmp_path):
    train(tmp_path)
    command = ["evaluate", str(tmp_path), "--data", "digits", "--device", "cpu"]
    assert cli.main(command) == 0
    record = load(tmp_path / "record-digits-none.json")
    assert (record["data"], record["tested_on"]) == ("glyphs", "digits")
    rows = [(e["ways"], e["shots"], e["queries"]) for e in record["evaluations"]]
    assert rows == [(5, 1, 15), (5, 5, 15)]


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


ADAPTING = pytest.mark.parametrize(
    "method", [n for n, m in methods.known().items() if not m.any_ways]
)


@ADAPTING
def test_learner_that_adapts(tmp_path, method, capsys):
    """Trained and tested with as many classes and images as asked for, and inductively anew."""
    assert train(tmp_path, "--ways", 3, "--shots", 2, method=method) == 0
    record = load(tmp_path / "record.json")
    assert set(results.FIELDS) <= set(record)
    assert record["method"] == method
    assert record["rotations"] == "episode"
    sizes = {"ways": 3, "shots": 2, "queries": 2, "tasks": 2}
    together = method != "meta_lstm"  # whose queries never help one another in a test
    assert record["train"] == sizes | {"transductive": together}
    assert "steps=" in record["learner"]
    assert ("transductive=True" in record["learner"]) == together
    rows = [(e["ways"], e["shots"], e["queries"], e["episodes"]) for e in record["evaluations"]]
    assert rows == [(3, 2, 6, 3)]
    assert [e["transductive"] for e in record["evaluations"]] == [together]
    assert [e["transductive"] for e in record["baseline"]] == [False]
    how = ", transductive" if together else ""
    assert f"3-way 2-shot{how}: " in capsys.readouterr().out
    state = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    assert state["best"]["net.head.weight"].shape == (3, 4)

    assert again(tmp_path, "--rotations", "episode") == 0
    same = load(tmp_path / "record-glyphs-episode.json")
    assert same["evaluations"] == record["evaluations"]
    assert again(tmp_path, "--rotations", "episode", "--inductive") == 0
    other = load(tmp_path / "record-glyphs-episode-inductive.json")
    assert [e["transductive"] for e in other["evaluations"]] == [False]
    assert other["baseline"] == record["baseline"]
    assert other["evaluations"][0]["ways"] == 3
    assert "3-way 2-shot: " in capsys.readouterr().out


COMPARING = pytest.mark.parametrize("method", [name for name, m in KNOWN if m.any_ways])


@COMPARING
@pytest.mark.parametrize("shots", [1, 2])
def test_learner_that_compares(tmp_path, method, shots):
    """Tested in other ways than trained with, and where it may be, with other shots."""
    assert train(tmp_path, "--ways", 3, "--shots", shots, method=method) == 0
    record = load(tmp_path / "record.json")
    assert set(results.FIELDS) <= set(record)
    assert (record["method"], record["rotations"]) == (method, "classes")
    sizes = {"ways": 3, "shots": shots, "queries": 2, "tasks": 1}
    assert record["train"] == sizes | {"transductive": False}
    told = {
        "protonet": "distance=squared_euclidean",
        "matching": "scale=10.0",
        "relation": "objective=task_loss",
    }
    told |= {"baseline": "fit=linear_head", "baseline_pp": "fit=cosine_head"}
    told |= dict.fromkeys(["centroid", "resnet50"], "fit=nearest_centroid")
    assert record["learner"] == told[method]
    expected = [(5, 1), (5, 5), (20, 1), (20, 5)]
    if method == "relation":
        expected = [(5, shots), (20, shots)]
    for rows in (record["evaluations"], record["baseline"]):
        assert [(e["ways"], e["shots"]) for e in rows] == expected
        assert not any(e["transductive"] for e in rows)


@COMPARING
def test_learner_that_compares_is_evaluated_again(tmp_path, method):
    """On the same episodes with the same end; upright, five classes allow 5 ways only."""
    train(tmp_path, "--shots", 2, method=method)
    record = load(tmp_path / "record.json")
    assert again(tmp_path, "--rotations", "classes") == 0
    assert load(tmp_path / "record-glyphs-classes.json") == record
    assert again(tmp_path) == 0
    rows = load(tmp_path / "record-glyphs-none.json")["evaluations"]
    shots = [2] if method == "relation" else [1, 5]
    assert [(e["ways"], e["shots"]) for e in rows] == [(5, k) for k in shots]


def test_relation_on_photos(tmp_path, photos):
    """In colour, and on maps of 21x21."""
    assert train(tmp_path, "--data", str(photos), "--shots", 2, method="relation") == 0
    record = load(tmp_path / "record.json")
    assert [(e["ways"], e["shots"]) for e in record["evaluations"]] == [(5, 2)]
    state = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    assert state["best"]["relate.rest.8.weight"].shape == (8, 4 * 5 * 5)


def test_relation_on_images_of_another_size(tmp_path, capsys, photos, monkeypatch):
    """Its dense layers fit maps of one size; told as another network."""
    train(tmp_path, method="relation")
    capsys.readouterr()
    large = split_classes(blobs(classes=8, size=32), (3, 2, 3))
    monkeypatch.setattr(data.folder, "load", lambda path, seed: large)
    says(capsys, ["evaluate", tmp_path, "--data", photos, "--device", "cpu"], "another network")


def test_relation_on_images_too_small(tmp_path, capsys, monkeypatch):
    """Told before any training."""
    parts = split_classes(blobs(classes=14, size=12), (6, 3, 5))
    monkeypatch.setattr(data.folder, "load", lambda path, seed: parts)
    arguments = ["train", "relation", "--data", tmp_path, "--out", tmp_path / "run"]
    says(capsys, arguments, "Maps of 3x3 cannot be halved twice: they must be 4x4.")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("names", "settings"),
    [
        (("protonet", "matching"), ((5, 1), (5, 5), (20, 1), (20, 5))),
        (("relation",), ((5, 3), (20, 3))),
        (("maml", "fomaml", "anil", "meta_sgd", "meta_lstm", "reptile"), ((4, 3),)),
    ],
)
def test_settings_that_a_learner_is_tested_in(names, settings):
    """Of one that was trained in 4 ways with 3 shots."""
    assert all(methods.known()[name].tests(4, 3) == settings for name in names)


def test_training_inductively(tmp_path):
    assert train(tmp_path, "--inductive", method="maml") == 0
    record = load(tmp_path / "record.json")
    assert "transductive=False" in record["learner"]
    assert [(e["ways"], e["transductive"]) for e in record["evaluations"]] == [(4, False)]


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


@pytest.mark.parametrize("method", ["protonet", "maml"])
def test_ways_and_shots_of_training(tmp_path, method):
    assert train(tmp_path, "--ways", 2, "--shots", 3, method=method) == 0
    trained = load(tmp_path / "record.json")["train"]
    assert (trained["ways"], trained["shots"]) == (2, 3)


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


@pytest.mark.parametrize("method", methods.known())
@pytest.mark.parametrize("name", ["quick", "full"])
def test_presets_are_sound(monkeypatch, method, name):
    """The real ones, with the real network, on images of the real size."""
    monkeypatch.undo()
    made = methods.known()[method]
    preset = made.presets[name]
    assert preset.episodes >= 600
    learner = made.make(Problem(torch.Size([1, 28, 28]), preset.ways, 12))
    x = torch.rand(1, preset.ways * preset.shots, 1, 28, 28)
    y = torch.arange(preset.ways).repeat(1, preset.shots)
    predictions = learner.eval()(x, y, torch.rand(1, 2, 1, 28, 28))
    assert predictions.shape == (1, 2, preset.ways)
    assert predictions.isfinite().all()


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
    says(capsys, ["train", "protonet", "--data", tmp_path, "--out", tmp_path / "run"], sentence)
    assert not (tmp_path / "run").exists()


def test_few_test_classes_make_one_task_of_all(tmp_path, monkeypatch):
    few = split_classes(blobs(classes=8, size=16), (4, 2, 2))
    monkeypatch.setattr(data.folder, "load", lambda path, seed: few)
    assert train(tmp_path / "run", "--data", str(tmp_path)) == 0
    rows = [(e["ways"], e["shots"]) for e in load(tmp_path / "run" / "record.json")["evaluations"]]
    assert rows == [(2, 1), (2, 5)]


def test_set_for_testing_only_cannot_train(tmp_path, capsys):
    sentence = "digits leaves no class for train: choose a set with more."
    says(capsys, ["train", "protonet", "--data", "digits", "--out", tmp_path], sentence)


def test_too_few_images(tmp_path, capsys, monkeypatch):
    preset(monkeypatch, 3, 4, 1, 20, 3)
    sentence = "has 8 images but 1 shots and 20 queries need 21: ask for fewer or drop the class."
    says(capsys, ["train", "protonet", "--out", tmp_path], sentence)


def test_checkpoint_of_another_run(tmp_path, capsys):
    train(tmp_path)
    capsys.readouterr()
    sentence = "was made with seed=0, not 1: give the same settings"
    says(capsys, ["train", "protonet", "--out", tmp_path, "--seed", 1], sentence)


def test_test_set_of_other_channels(tmp_path, capsys, photos):
    train(tmp_path)
    capsys.readouterr()
    command = ["evaluate", tmp_path, "--data", photos, "--device", "cpu"]
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


def test_device_that_is_none(tmp_path, capsys):
    for name in ("abacus", "cuda:99"):
        with pytest.raises(SystemExit) as stopped:
            train(tmp_path, "--device", name)
        assert stopped.value.code == 2
        assert f"'{name}' is no device of this machine: try cpu" in capsys.readouterr().err


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
