"""Every experiment runs, at a tiny size, and tells when its record is out of date."""

import dataclasses
import io
import json
import sys
import zipfile

import numpy as np
import pytest
import torch
from helpers import ROOT, blobs
from PIL import Image
from torch import nn

from metautils import data, finetune, pretrained, results
from metautils.classifier import Classifier
from metautils.data import labelled
from metautils.data.bank import split_classes
from metautils.learners.protonet import ProtoNet
from metautils.runs import RECORD

sys.path.insert(0, str(ROOT / "experiments"))
import certainty
import family
import one_shot
import recipes
import records
import tasks

EXPERIMENTS = records.known()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """An empty folder to work in, with photographs, and small glyphs in place of all drawings."""
    root = tmp_path_factory.mktemp("experiments")
    random = np.random.default_rng(0)
    for part, images in (("train", 8), ("test", 4)):
        for name in ("cat", "dog"):
            folder = root / "data" / "dogs-vs-cats" / part / name
            folder.mkdir(parents=True)
            for k in range(images):
                pixels = random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{k}.png")
    runs = root / "data" / "omniglot-one-shot" / "all_runs.zip"
    runs.parent.mkdir()
    with zipfile.ZipFile(runs, "w") as file:
        for name, content in one_shot_run(random).items():
            file.writestr(name, content)
    drawings = blobs(classes=18, images=21, size=16)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("METAUTILS_DATA", str(root / "data"))
        patch.setattr(data.glyphs, "load", lambda seed=0: split_classes(drawings, (8, 5, 5)))
        patch.setattr(results, "folder", lambda: root / "results")
        yield root


def one_shot_run(random):
    """The files of a run of three classes and three questions."""
    files = {}
    for name in ("training/class", "test/item"):
        for k in (1, 2, 3):
            png = io.BytesIO()
            Image.fromarray(random.integers(0, 256, (105, 105), dtype=np.uint8)).save(png, "PNG")
            files[f"run01/{name}0{k}.png"] = files[f"run02/{name}0{k}.png"] = png.getvalue()
    for run in ("run01", "run02"):
        lines = (f"{run}/test/item0{k}.png {run}/training/class0{k}.png" for k in (1, 2, 3))
        files[f"{run}/class_labels.txt"] = "\n".join(lines).encode()
    return files


def run(name):
    """The record of an experiment at its tiny size, and of those that it reads first."""
    experiment = EXPERIMENTS[name]
    for other in experiment.after:
        if not (records.RUNS / other / RECORD).exists():
            run(other)
    records.run(name, experiment, torch.device("cpu"), experiment.tiny)
    return json.loads((results.folder() / f"{name}.json").read_text())


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_runs(place, name):
    record = run(name)
    assert record["settings"] == EXPERIMENTS[name].settings | EXPERIMENTS[name].tiny
    assert {"device", "threads", "torch", "commit"} <= record.keys()
    if "tables" in record:
        assert record["what"]
        for table in record["tables"]:
            assert table["rows"]
            assert {len(row) for row in table["rows"]} == {len(table["heads"])}
        assert results.tables(name)
    else:
        assert set(results.FIELDS) <= record.keys()
        assert record["evaluations"]
        assert record["baseline"]
    # A record of other settings is told, with one of them.
    tiny, told = EXPERIMENTS[name].tiny, records.state(name, EXPERIMENTS[name])
    assert told.split("=")[0].removeprefix("made with ") in tiny if tiny else told is None


def test_same_command_again_goes_on(place, capsys):
    """What is finished is not done anew, and the record is the same."""
    first = run("protonet_omniglot")
    again = run("protonet_omniglot")
    assert again == first


def test_records_of_the_book_are_those_of_todays_experiments(monkeypatch):
    """Or the list says why not; nothing is missing."""
    monkeypatch.setattr(results, "folder", lambda: ROOT / "results")
    told = {name: records.state(name, each) for name, each in EXPERIMENTS.items()}
    assert "missing" not in told.values()
    odd = {name: why for name, why in told.items() if why}
    assert odd == {"meta_lstm_omniglot_5w5s": "made with stopped_at=5000, not None"}


def test_listing_and_a_budget_of_minutes(monkeypatch, capsys, tmp_path):
    ran = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(results, "folder", lambda: tmp_path)
    monkeypatch.setattr(records, "run", lambda name, *rest: ran.append(name))
    assert records.main(["--device", "cpu"]) == 0
    listed = capsys.readouterr().out
    assert all(f"{name}: missing" in listed for name in EXPERIMENTS)
    assert listed.count("\n") == len(EXPERIMENTS) + 1
    few = [name for name in EXPERIMENTS if name.startswith("protonet")]
    monkeypatch.setattr(records, "known", lambda: {name: EXPERIMENTS[name] for name in few})
    assert records.main(["--device", "cpu", "--minutes", "9"]) == 0
    # What reads a run that is not there needs that run first, and its minutes.
    assert ran == ["protonet_omniglot", "protonet_omniglot_rotated_per_episode"]
    monkeypatch.setattr(records, "known", lambda: EXPERIMENTS)
    del ran[:]
    assert records.main(["inside_maml", "--device", "cpu"]) == 0
    assert ran == ["maml_omniglot", "inside_maml"]


def test_unknown_name_is_told(capsys):
    assert records.main(["nothing"]) == 2
    assert "no experiment 'nothing'; there are: " in capsys.readouterr().out


@pytest.fixture
def body():
    """A classifier of two stages with batch statistics, as if it had learned elsewhere."""
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    made = pretrained.Body(net, 4, stages=[["0.weight", "0.bias"], ["1.weight", "1.bias"]])
    made.fixed = True
    return Classifier(made, ["cat", "dog"], 32)


def test_recipe_of_the_grid_is_the_packages_own(body):
    own = finetune._groups(body, finetune.Recipe())
    found = recipes.optimizer_of(body, **recipes.OURS)
    assert isinstance(found, torch.optim.AdamW)
    assert len(found.param_groups) == len(own)
    for mine, group in zip(found.param_groups, own, strict=True):
        assert all(a is b for a, b in zip(mine["params"], group["params"], strict=True))
        assert (mine["lr"], mine["weight_decay"]) == (group["lr"], group["weight_decay"])


def test_statistics_of_the_grid_move_where_they_should(place, body):
    split = labelled.load(place / "data" / "dogs-vs-cats")
    recipe = finetune.Recipe(32, 4, 1, mirror=False)
    before = body.body.net[1].running_mean.clone()
    kept = recipes.trained(body, split, recipe, True, recipes.PLAIN)
    assert torch.equal(body.body.net[1].running_mean, before)
    recipes.trained(body, split, recipe, False, recipes.PLAIN)
    assert not torch.equal(body.body.net[1].running_mean, before)
    assert body.body.fixed and len(kept["right"]) == len(split.test)


def test_a_training_that_diverged_counts_as_the_worst():
    assert tasks.spread([3.0, 1.0, None]) == (1.0, 3.0, float("inf"))


def test_three_trainings_on_the_same_tasks_are_no_more_tasks():
    errors = torch.rand(1, 50, generator=torch.Generator().manual_seed(0))
    assert family.cell(errors.expand(3, 50)) == family.cell(errors)


def test_tasks_that_ran_away_are_counted_and_the_median_stays():
    errors = torch.tensor([[0.5, 0.5], [0.5, torch.nan]])
    assert family.cell(errors) == "median 0.50, 25.0 % ran away"


def test_learners_of_the_training_tasks_are_the_chapters_own():
    found = tasks.of_chapter()
    x = torch.rand(2, 10, 1)
    assert {name: kind()(x, x, x).shape for name, kind in found.items()} == {
        "compare": x.shape,
        "read": x.shape,
    }


def test_table_of_the_grid_is_paired_with_the_probe():
    draws = [
        {recipes.START: [1, 0, 0, 1], ("SGD", "moving"): [1, 1, 1, 1]},
        {recipes.START: [1, 0, 1, 0], ("SGD", "moving"): [1, 1, 1, 0]},
    ]
    told = recipes.table({5: draws, 20: draws[:1] * 2})
    assert told["rows"][0] == [*recipes.START, "50.0", "", "50.0", ""]
    # Each image gains, as a mean over draws: 0, 100, 50, 0; and 0, 100, 100, 0 percent.
    assert told["rows"][1] == [
        "SGD", "moving", "87.5", "+37.5 ± 46.9", "100.0", "+50.0 ± 56.6",
    ]  # fmt: skip


def test_tasks_of_one_alphabet():
    drawings = blobs(classes=9, images=8)
    names = tuple(f"set/{'abc'[k // 3]}/character{k}" for k in range(9))
    bank = dataclasses.replace(drawings, names=names).with_rotations()
    e = one_shot.OfOneAlphabet(bank, 6, 1, 5, seed=0)
    for _ in range(20):
        classes, rows = e.indices()
        assert len({names[int(k) % 9].split("/")[1] for k in classes[0]}) == 1
        assert classes.unique().numel() == 6
        assert rows.unique().numel() == 6 * 6
        assert (rows // 8 == classes[..., None]).all()


def test_strangers_are_asked_about_and_not_shown():
    """Of classes that anyone can tell apart every stranger is farther away than every friend."""
    bank = blobs(classes=20, images=21, size=8)
    logits, known = certainty.strangers(ProtoNet(nn.Flatten()), bank, 5, 2, 7, seed=0)
    assert logits.shape == (7, 6 * 15, 5)
    assert known.shape == (7, 6 * 15)
    assert known.sum(1).tolist() == [5 * 15] * 7
    area, let_in = certainty._areas(logits.amax(-1), known)
    assert area > 0.999
    assert let_in < 1
