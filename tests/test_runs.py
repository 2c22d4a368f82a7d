"""A method trained and tested by its name leaves a record; the same again gives the same."""

import re
import shutil

import pytest
import torch
from helpers import again, blobs, own_method, paint, read_json, small_glyphs, train

from metautils import cli, data, methods, results
from metautils.checkpoint import CHECKPOINT
from metautils.data import folder
from metautils.data.bank import split_classes
from metautils.sampling import EpisodeSampler

KNOWN = methods.known().items()
pytestmark = pytest.mark.usefixtures("short_runs")


def retested(run, how):
    """The record of another test, the name of which tells its data in short."""
    (path,) = run.glob(f"record-{how}.json")
    return path


def test_training_writes_a_whole_record(tmp_path, capsys):
    assert train(tmp_path / "run", "--seed", "3") == 0
    record = read_json(tmp_path / "run" / "record.json")
    assert set(results.FIELDS) <= set(record)
    expected = {
        "method": "protonet", "learner": "distance=squared_euclidean",
        "data": "glyphs", "tested_on": "glyphs",
        "split": "classes", "classes": {"train": 6, "validation": 3, "test": 5},
        "rotations": "classes", "seed": 3, "steps": 3, "preset": "quick",
        "train": {"ways": 4, "shots": 1, "queries": 2, "tasks": 1, "lr": 0.001,
                  "transductive": False},
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
        runs.append(read_json(tmp_path / out / "record.json"))
    for run in runs:
        del run["minutes"]
    assert runs[0] == runs[1] == runs[2]


def test_folder_of_photos(tmp_path, many_classes):
    assert train(tmp_path, "--data", str(many_classes)) == 0
    record = read_json(tmp_path / "record.json")
    assert record["data"] == str(many_classes)
    assert record["classes"] == {"train": 16, "validation": 4, "test": 5}
    assert record["rotations"] == "none"
    assert [(e["ways"], e["shots"]) for e in record["evaluations"]] == [(5, 1), (5, 5)]
    assert {e["queries"] for e in record["evaluations"]} == {1}


@pytest.mark.parametrize("rotations", ["none", "classes", "episode"])
def test_evaluate_scores_again(tmp_path, rotations, capsys):
    train(tmp_path)
    trained = read_json(tmp_path / "record.json")
    capsys.readouterr()
    assert cli.main(["evaluate", str(tmp_path), "--rotations", rotations, "--device", "cpu"]) == 0
    second = read_json(retested(tmp_path, f"glyphs-*-{rotations}"))
    assert capsys.readouterr().out.startswith("trained\n  5-way 1-shot: ")
    assert {e["rotations"] for e in second["evaluations"] + second["baseline"]} == {rotations}
    same = set(second) - {"evaluations", "baseline"}
    assert {name: second[name] for name in same} == {name: trained[name] for name in same}
    if rotations == "classes":
        assert second == trained
    else:
        assert [e["ways"] for e in second["evaluations"]] == [5, 5]
    assert read_json(tmp_path / "record.json") == trained


def test_evaluate_uses_the_trained_weights(tmp_path):
    train(tmp_path)
    command = ["evaluate", str(tmp_path), "--rotations", "classes", "--device", "cpu"]
    assert cli.main(command) == 0
    path = retested(tmp_path, "glyphs-*-classes")
    first = read_json(path)["evaluations"]
    state = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    state["best"] = {name: torch.zeros_like(x) for name, x in state["best"].items()}
    torch.save(state, tmp_path / CHECKPOINT)
    assert cli.main(command) == 0
    assert {e["accuracy"] for e in read_json(path)["evaluations"]} == {20.0, 5.0}
    assert read_json(path)["evaluations"] != first


def test_baseline_compares_class_means_of_the_pixels(tmp_path):
    train(tmp_path)
    baseline = read_json(tmp_path / "record.json")["baseline"]
    sampler = EpisodeSampler(small_glyphs().test.with_rotations(), 5, 5, 3)
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
    record = read_json(retested(tmp_path, "digits-*-none"))
    assert (record["data"], record["tested_on"]) == ("glyphs", "digits")
    rows = [(e["ways"], e["shots"], e["queries"]) for e in record["evaluations"]]
    assert rows == [(5, 1, 15), (5, 5, 15)]


READ = ("lstm", "mann", "snail")
ADAPTING = pytest.mark.parametrize(
    "method", [n for n, m in methods.known().items() if not m.any_ways and n not in READ]
)


@ADAPTING
def test_learner_that_adapts(tmp_path, method, capsys):
    """Trained and tested with as many classes and images as asked for, and inductively anew."""
    assert train(tmp_path, "--ways", 3, "--shots", 2, method=method) == 0
    record = read_json(tmp_path / "record.json")
    assert set(results.FIELDS) <= set(record)
    assert record["method"] == method
    assert record["rotations"] == "episode"
    sizes = {"ways": 3, "shots": 2, "queries": 2, "tasks": 2}
    together = method != "meta_lstm"  # whose queries never help one another in a test
    assert record["train"] == sizes | {"transductive": together, "lr": 1e-3}
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
    same = read_json(retested(tmp_path, "glyphs-*-episode"))
    assert same["evaluations"] == record["evaluations"]
    assert again(tmp_path, "--rotations", "episode", "--inductive") == 0
    other = read_json(retested(tmp_path, "glyphs-*-episode-inductive"))
    assert [e["transductive"] for e in other["evaluations"]] == [False]
    assert other["baseline"] == record["baseline"]
    assert other["evaluations"][0]["ways"] == 3
    assert "3-way 2-shot: " in capsys.readouterr().out


@pytest.mark.parametrize("method", READ)
def test_learner_that_reads(tmp_path, method):
    """As many classes and images as it was trained for, and never one query by another's help."""
    assert train(tmp_path, "--ways", 3, "--shots", 2, method=method) == 0
    record = read_json(tmp_path / "record.json")
    assert (record["method"], record["rotations"]) == (method, "classes")
    assert not record["train"]["transductive"]
    assert record["learner"].startswith("ways=3, ")
    rows = [(e["ways"], e["shots"], e["transductive"]) for e in record["evaluations"]]
    assert rows == [(3, 2, False)]
    assert again(tmp_path, "--rotations", "classes") == 0
    same = read_json(retested(tmp_path, "glyphs-*-classes"))
    assert same["evaluations"] == record["evaluations"]


COMPARING = pytest.mark.parametrize("method", [name for name, m in KNOWN if m.any_ways])


@COMPARING
@pytest.mark.parametrize("shots", [1, 2])
def test_learner_that_compares(tmp_path, method, shots):
    """Tested in other ways than trained with, and where it may be, with other shots."""
    assert train(tmp_path, "--ways", 3, "--shots", shots, method=method) == 0
    record = read_json(tmp_path / "record.json")
    assert set(results.FIELDS) <= set(record)
    assert (record["method"], record["rotations"]) == (method, "classes")
    sizes = {"ways": 3, "shots": shots, "queries": 2, "tasks": 1}
    assert record["train"] == sizes | {"transductive": False, "lr": 1e-3}
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
    record = read_json(tmp_path / "record.json")
    assert again(tmp_path, "--rotations", "classes") == 0
    assert read_json(retested(tmp_path, "glyphs-*-classes")) == record
    assert again(tmp_path) == 0
    rows = read_json(retested(tmp_path, "glyphs-*-none"))["evaluations"]
    shots = [2] if method == "relation" else [1, 5]
    assert [(e["ways"], e["shots"]) for e in rows] == [(5, k) for k in shots]


def test_relation_on_photos(tmp_path, many_classes):
    """In colour, and on maps of 21x21."""
    assert train(tmp_path, "--data", str(many_classes), "--shots", 2, method="relation") == 0
    record = read_json(tmp_path / "record.json")
    assert [(e["ways"], e["shots"]) for e in record["evaluations"]] == [(5, 2)]
    state = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    assert state["best"]["relate.rest.8.weight"].shape == (8, 4 * 5 * 5)


def test_training_inductively(tmp_path):
    assert train(tmp_path, "--inductive", method="maml") == 0
    record = read_json(tmp_path / "record.json")
    assert "transductive=False" in record["learner"]
    assert [(e["ways"], e["transductive"]) for e in record["evaluations"]] == [(4, False)]


@pytest.mark.parametrize("method", ["protonet", "maml"])
def test_ways_and_shots_of_training(tmp_path, method):
    assert train(tmp_path, "--ways", 2, "--shots", 3, method=method) == 0
    trained = read_json(tmp_path / "record.json")["train"]
    assert (trained["ways"], trained["shots"]) == (2, 3)


def test_few_test_classes_make_one_task_of_all(tmp_path, monkeypatch):
    few = split_classes(blobs(classes=8, size=16), (4, 2, 2))
    monkeypatch.setattr(data.folder, "load", lambda path, seed: few)
    (tmp_path / "photos").mkdir()
    assert train(tmp_path / "run", "--data", tmp_path / "photos") == 0
    rows = [
        (e["ways"], e["shots"]) for e in read_json(tmp_path / "run" / "record.json")["evaluations"]
    ]
    assert rows == [(2, 1), (2, 5)]


def test_method_of_the_readers_own(tmp_path, monkeypatch):
    """Trained from `./mine.py`; the same file is found again to go on with, and to evaluate."""
    monkeypatch.chdir(own_method(tmp_path).parent)
    for _ in range(2):
        assert train("run", method="./mine.py") == 0
    record = read_json(tmp_path / "run" / "record.json")
    assert (record["method"], record["rotations"], record["steps"]) == ("./mine.py", "episode", 3)
    # Images are turned in each episode, so that the five test classes stay five.
    assert [(e["ways"], e["shots"]) for e in record["evaluations"]] == [(5, 1)]
    assert again("run", "--rotations", "episode") == 0
    assert read_json(retested(tmp_path / "run", "glyphs-*-episode")) == record
    state = torch.load(tmp_path / "run" / CHECKPOINT, weights_only=True)
    assert state["settings"]["learner"] == "Mine(distance=squared_euclidean)"


# Where a number comes from


def by(monkeypatch, commit):
    """From now on everything is made by this commit on this device."""
    told = {"device": f"device of {commit}", "threads": 3, "torch": "2.0", "commit": commit}
    monkeypatch.setattr(results, "provenance", lambda device: told)
    return told


def made_by(record):
    """By what the test was made, and the training."""
    return {name: record[name] for name in results.MADE_BY}, record["trained_by"]


def test_test_and_training_are_told_apart(tmp_path, monkeypatch):
    old = by(monkeypatch, "old")
    train(tmp_path)
    assert made_by(read_json(tmp_path / "record.json")) == (old, old)
    new = by(monkeypatch, "new")
    again(tmp_path)
    assert made_by(read_json(retested(tmp_path, "glyphs-*-none"))) == (new, old)
    assert train(tmp_path) == 0  # finished before, and tested anew
    assert made_by(read_json(tmp_path / "record.json")) == (new, old)


def test_record_of_an_older_version_can_be_evaluated(tmp_path, monkeypatch):
    old = by(monkeypatch, "old")
    train(tmp_path)
    path = tmp_path / "record.json"
    record = read_json(path)
    del record["trained_by"], record["digests"]
    results.write(record, path)
    new = by(monkeypatch, "new")
    again(tmp_path)
    assert made_by(read_json(retested(tmp_path, "glyphs-*-none"))) == (new, old)


def photo_sets(folder, *seeds):
    """Folders of one name but for its case, with other images in each, in three classes."""
    for seed in seeds:
        yield paint(
            folder / str(seed) / ("photos: now." if seed % 2 else "Photos: now."), seed=seed
        )


def test_folders_of_one_name_have_records_of_their_own(tmp_path, monkeypatch):
    """Under names that every system allows; the same test again replaces its own."""
    monkeypatch.setattr(
        data.folder, "load", lambda path, seed: split_classes(folder.bank(path, 16, 1), (0, 0, 3))
    )
    train(tmp_path / "run")
    sets = list(photo_sets(tmp_path, 1, 2))
    for path in [*sets, *sets]:
        assert again(tmp_path / "run", "--data", path) == 0
    found = sorted((tmp_path / "run").glob("record-*.json"))
    assert len({path.name.lower() for path in found}) == len(found) == 2
    assert all(re.fullmatch(r"record-[Pp]hotos__now\.-\w{8}-none\.json", p.name) for p in found)
    records = list(map(read_json, found))
    assert {r["tested_on"] for r in records} == set(map(str, sets))
    assert len({r["digests"]["test"] for r in records}) == 2
    assert len({r["digests"]["train"] for r in records}) == 1


@pytest.mark.parametrize("more", [(), ("--split", "random")])
def test_glyphs_are_tested_on_omniglot_with_or_without_a_split(tmp_path, monkeypatch, more):
    train(tmp_path)
    asked = []

    def load(split, seed):
        assert split in ("random", "background")
        asked.append(split)
        return small_glyphs(7)

    monkeypatch.setattr(data.omniglot, "load", load)
    assert again(tmp_path, "--data", "omniglot", *more) == 0
    assert asked == ["random"]
    record = read_json(retested(tmp_path, "omniglot-*-none"))
    assert record["tested_on"] == "omniglot, random split"


def test_finished_run_is_not_gone_on_with_on_other_images(tmp_path, capsys, many_classes):
    """With pictures that changed their classes."""
    photos = shutil.copytree(many_classes, tmp_path / "photos")
    assert train(tmp_path / "run", "--data", photos) == 0
    before = read_json(tmp_path / "run" / "record.json")
    first, second = (photos / name / "0.png" for name in folder.load(photos).train.names[:2])
    swapped = first.read_bytes(), second.read_bytes()
    second.write_bytes(swapped[0])
    first.write_bytes(swapped[1])
    capsys.readouterr()
    assert train(tmp_path / "run", "--data", photos) == 2
    assert re.fullmatch(r"metautils: .*was made with bank=.*\n", capsys.readouterr().err)
    assert read_json(tmp_path / "run" / "record.json") == before
    assert again(tmp_path / "run") == 0  # the test's own images and classes are as they were


def test_classes_of_the_training_are_not_tested_on(tmp_path, capsys, many_classes):
    """As they might be where one more class has made the seed divide them otherwise."""
    photos = shutil.copytree(many_classes, tmp_path / "photos")
    assert train(tmp_path / "run", "--data", photos) == 0
    shutil.copytree(many_classes / "class03", photos / "another")
    capsys.readouterr()
    # Named in another way, or with a split that folders do not have, it is the same folder.
    for more in ([], ["--data", f"{photos}/../photos"], ["--split", "random"]):
        assert again(tmp_path / "run", *more) == 2
        assert re.fullmatch(
            r"metautils: .*photos has other classes than in training.*\n", capsys.readouterr().err
        )
    assert len(list((tmp_path / "run").glob("record*"))) == 1


def test_changed_test_images_are_tested_anew(tmp_path, many_classes):
    photos = shutil.copytree(many_classes, tmp_path / "photos")
    train(tmp_path / "run", "--data", photos)
    before = read_json(tmp_path / "run" / "record.json")
    held_out = folder.load(photos).test.names
    (photos / held_out[0] / "0.png").unlink()
    assert train(tmp_path / "run", "--data", photos) == 0
    after = read_json(tmp_path / "run" / "record.json")
    assert after["digests"]["test"] != before["digests"]["test"]
    assert after["digests"]["train"] == before["digests"]["train"]


@pytest.mark.parametrize("out", ["photos", "photos/class00/run", "photos/new", "runs/../photos/x"])
def test_run_does_not_spoil_its_own_images(tmp_path, capsys, many_classes, out):
    """Told before anything is read or written."""
    photos = shutil.copytree(many_classes, tmp_path / "photos")
    (tmp_path / "runs").mkdir()
    before = sorted(photos.rglob("*"))
    assert train(tmp_path / out, "--data", photos) == 2
    sentence = rf"metautils: .*{out} lies in {photos} and would be taken for a class: choose .*\n"
    assert re.fullmatch(sentence, capsys.readouterr().err)
    assert sorted(photos.rglob("*")) == before


def test_sets_as_others_give_them(tmp_path, capsys, many_classes):
    """In parts of classes of their own, with a list of names, and with what a Mac leaves behind."""
    for k, source in enumerate(sorted(many_classes.iterdir())[:15]):
        part = ("train", "val", "test")[k // 5]
        shutil.copytree(source, tmp_path / "photos" / part / source.name)
    (tmp_path / "photos" / "train.csv").write_text("words")
    shutil.copytree(tmp_path / "photos" / "val", tmp_path / "photos" / "__MACOSX" / "val")
    with pytest.warns(UserWarning, match=r"has 1 file\(s\) .* passed over: train.csv\.$") as told:
        assert train(tmp_path / "run", "--data", tmp_path / "photos") == 0
    assert len(told) == 1
    record = read_json(tmp_path / "run" / "record.json")
    assert record["classes"] == {"train": 5, "validation": 5, "test": 5}


def test_preset_that_a_method_has_not(tmp_path, capsys):
    """Told before any training."""
    path = own_method(tmp_path)
    assert train(tmp_path / "run", "--preset", "full", method=str(path)) == 2
    assert capsys.readouterr() == ("", f"metautils: {path} has no preset 'full', only quick.\n")
    assert not (tmp_path / "run").exists()
