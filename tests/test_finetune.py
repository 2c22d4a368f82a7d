"""Fine-tuning trains what it says, goes on where it was stopped, and ends in an honest test."""

import errno
import json
import math
import os
import re
import shutil
import time
from contextlib import suppress
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    COLOURS,
    flat,
    paint,
    same_weights,
    tiny_body,
    tiny_classifier,
    told_in_one_line,
    weights_of,
)
from PIL import Image
from torch.optim import SGD

import metautils.files
from metautils import classifier, cli, finetune, pretrained
from metautils.checkpoint import CheckpointMismatch
from metautils.classifier import MODEL, Classifier
from metautils.data import labelled
from metautils.files import load_safely
from metautils.finetune import Recipe, l2_sp, stage_one, stage_two

RECIPE = Recipe(
    size=16, batch=4, probe_epochs=20, probe_lr=0.05, epochs=3, lr=3e-3, step=2, decay=0.01
)


def interrupted(call, work):
    """Run this training until it is stopped in a step of stage two, counted from 1."""
    calls, whole = count(1), SGD.step

    def step(self, *arguments, **named):
        if next(calls) == call:
            raise KeyboardInterrupt
        return whole(self, *arguments, **named)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SGD, "step", step)
        work()


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


# Stage one: the head


def network(kind):
    torch.manual_seed(0)
    if kind == "tiny":
        return tiny_classifier()
    return Classifier(pretrained.body(None), tuple(COLOURS), 32)


@pytest.mark.parametrize("kind", ["tiny", "ResNet-50"])
def test_stage_one_changes_the_head_alone(split, kind):
    """Not a bit of the body: neither weights nor statistics nor the count of their batches."""
    net = network(kind).train()
    body, head = weights_of(net.body), weights_of(net.head)
    rows = stage_one(net, split, RECIPE)
    assert same_weights(net.body.state_dict(), body)
    assert not any(map(torch.equal, net.head.state_dict().values(), head.values()))
    assert [row.number for row in rows] == list(range(1, 21))
    if kind == "tiny":
        assert max(row.validation_accuracy for row in rows) == 100
        assert classifier.test(net, split.test).accuracy == 100


def test_stage_one_follows_its_seed_alone(split):
    ends = []
    for before, seed in ((1, 3), (2, 3), (2, 4)):
        net = tiny_classifier()
        torch.manual_seed(before)
        stage_one(net, split, replace(RECIPE, seed=seed))
        ends.append(weights_of(net))
    assert same_weights(ends[0], ends[1])
    assert not same_weights(ends[1], ends[2])


def body_calls(net, split, out):
    """How often stage one asks the body, and the head that it ends with."""
    calls = []
    hook = net.body.register_forward_hook(lambda *_: calls.append(1))
    stage_one(net, split, RECIPE, out)
    hook.remove()
    return len(calls), weights_of(net.head)


def test_features_are_kept_for_a_resumed_training(tmp_path, split):
    expected = body_calls(tiny_classifier(), split, None)
    assert expected[0] == 5 + 2  # batches of four of 18 and of 6 images
    assert body_calls(tiny_classifier(), split, tmp_path)[0] == 7
    again, head = body_calls(tiny_classifier(), split, tmp_path)
    assert again == 0
    assert same_weights(head, expected[1])
    assert names_in(tmp_path) == ["features.pt"]


@pytest.mark.parametrize("changed", ["body", "order", "statistics", "images", "size"])
def test_features_of_something_else_are_not_used(tmp_path, split, photos, changed):
    body_calls(tiny_classifier(), split, tmp_path)
    net = tiny_classifier(seed=5 if changed == "body" else 0, size=12 if changed == "size" else 16)
    if changed == "order":  # of the filters, so that all their numbers are there
        net.body[0].weight.data = net.body[0].weight.data.flip(0)
    if changed == "statistics":
        net.body[1].running_mean += 0.1
    other = labelled.load(photos, seed=1) if changed == "images" else split
    calls, head = body_calls(net, other, tmp_path)
    assert calls == 7
    assert same_weights(head, body_calls(net, other, None)[1])


# Stage two: all layers


def last(out):
    """Weights after the last epoch of stage two, which need not be the best."""
    return load_safely(out / "all_layers.pt")["net"]


def test_stage_two_changes_all_layers(tmp_path, split):
    net = tiny_classifier()
    before = weights_of(net)
    rows = stage_two(net, split, RECIPE, tmp_path)
    assert [row.number for row in rows] == [1, 2, 3]
    assert [name for name, x in last(tmp_path).items() if torch.equal(x, before[name])] == []
    kept = load_safely(tmp_path / "all_layers.pt")["best"]
    assert same_weights(net.state_dict(), kept)


@pytest.mark.parametrize(("pull", "decay"), [(None, 0.01), (0.5, 0), (0.0, 0)])
def test_rates_of_stage_two_and_its_decay(monkeypatch, split, pull, decay):
    """The pull takes the place of the decay; the body learns at a tenth of the head's rate."""
    seen, net = [], tiny_classifier()
    monkeypatch.setattr(finetune, "fit", lambda *arguments: seen.extend(arguments))
    stage_two(net, split, replace(RECIPE, pull=pull))
    groups, penalty = seen[3].param_groups, seen[7]
    assert [group["lr"] for group in groups] == pytest.approx([3e-3, 3e-2])
    assert [group["weight_decay"] for group in groups] == [decay] * 2
    assert [group["momentum"] for group in groups] == [0.9] * 2
    owners = [net.body.parameters(), net.head.parameters()]
    assert [list(map(id, group["params"])) for group in groups] == [
        list(map(id, owner)) for owner in owners
    ]
    assert (penalty is None) == (pull is None)
    if penalty is not None:  # at the start the body is where it is pulled to
        head = float(flat(list(net.head.parameters())).square().sum())
        assert float(penalty(net).detach()) == pytest.approx(0.01 / 2 * head)


def test_pull_keeps_the_body_near_its_start(tmp_path, split):
    far = {}
    for pull in (None, 0.0, 300.0):
        net, out = tiny_classifier(), tmp_path / str(pull)
        start = {f"body.{name}": w.detach().clone() for name, w in net.body.named_parameters()}
        stage_two(net, split, replace(RECIPE, pull=pull), out)
        far[pull] = float(flat([last(out)[name] - w for name, w in start.items()]).norm())
    assert far[300.0] < 0.2 * min(far[None], far[0.0])
    assert far[300.0] > 0


def test_l2_sp_by_hand():
    torch.manual_seed(0)
    net = tiny_classifier().double()
    start = {f"body.{name}": torch.randn_like(w) for name, w in net.body.named_parameters()}
    value = l2_sp(net, start, 0.3, 0.02)
    expected = 0.0
    for name, w in net.named_parameters():
        for k, x in enumerate(w.detach().flatten().tolist()):
            near = x - float(start[name].flatten()[k]) if name.startswith("body.") else x
            expected += (0.3 if name.startswith("body.") else 0.02) / 2 * near**2
    assert float(value.detach()) == pytest.approx(expected)
    value.backward()
    for name, w in net.named_parameters():
        slope = 0.3 * (w - start[name]) if name in start else 0.02 * w
        torch.testing.assert_close(w.grad, slope.detach())


@pytest.mark.parametrize("workers", [0, 1])
def test_stage_two_resumes_bit_identical(tmp_path, split, workers):
    """With crops at random, whichever process makes them."""
    whole, resumed = tiny_classifier(), tiny_classifier()
    rows = stage_two(whole, split, RECIPE, tmp_path / "whole", workers)
    cut = tmp_path / "cut"
    interrupted(8, lambda: stage_two(tiny_classifier(), split, RECIPE, cut, workers))
    assert len(load_safely(cut / "all_layers.pt")["notes"]["rows"]) == 1
    again = stage_two(resumed, split, RECIPE, cut, workers)
    assert [row.train_loss for row in again] == [row.train_loss for row in rows]
    assert same_weights(resumed.state_dict(), whole.state_dict())
    assert same_weights(last(tmp_path / "whole"), last(cut))


def test_pull_goes_on_to_where_the_body_was_at_first(tmp_path, split):
    """Not to where it was when it was stopped, which a notebook may have kept."""
    net, recipe, cut = tiny_classifier(), replace(RECIPE, pull=1.0), tmp_path / "cut"
    stage_two(tiny_classifier(), split, recipe, tmp_path / "whole")
    interrupted(6, lambda: stage_two(net, split, recipe, cut))
    net.zero_grad()
    with suppress(CheckpointMismatch):  # to refuse such a network is as good
        stage_two(net, split, recipe, cut)
        assert same_weights(last(cut), last(tmp_path / "whole"))


# The whole recipe


@pytest.fixture
def bodies(monkeypatch):
    """Small bodies in place of a ResNet-50, another for each name of weights; what was asked."""
    asked = []

    def body(weights="imagenet"):
        asked.append(weights)
        return tiny_body(pretrained.FEATURES, seed=len(str(weights)))

    monkeypatch.setattr(pretrained, "body", body)
    return asked


@pytest.mark.parametrize("weights", [None, "imagenet"])
def test_run_leaves_a_classifier_and_a_record(tmp_path, photos, bodies, weights, capsys):
    out = tmp_path / "new" / "out"
    t = finetune.run(photos, out, RECIPE, weights)
    kept = ["features.pt"] if weights else []
    assert names_in(out) == ["all_layers.pt", *kept, MODEL, "record.json", "report.html"]
    record = json.loads((out / "record.json").read_text())
    expected = {
        "data": str(photos),
        "classes": list(COLOURS),
        "images": {"train": 18, "validation": 6, "test": 6},
        "weights": weights,
        "recipe": asdict(RECIPE),
        "test": {
            "right": t.right,
            "accuracy": t.accuracy,
            "interval": list(t.interval),
            "balanced": t.balanced,
            "majority": 100 / 3,
        },
        "confusion": t.confusion.tolist(),
        "surest_errors": [t.files[k] for k in t.surest_errors()],
        "split": {"seed": 0, "groups": None, "notes": []},
    }
    assert {name: record[name] for name in expected} == expected
    assert ("stage_one" in record) == (weights is not None)
    assert [row["number"] for row in record["stage_two"]] == [1, 2, 3]
    assert {"device", "threads", "torch", "commit", "minutes"} <= record.keys()
    assert "images: 18 train 6 validation 6 test" in capsys.readouterr().out
    net = classifier.load(out / MODEL)
    torch.testing.assert_close(classifier.test(net, labelled.load(photos).test).chances, t.chances)
    if weights:
        assert t.accuracy == 100


@pytest.mark.parametrize("weights", [None, "imagenet"])
def test_run_goes_on_where_it_was_stopped(tmp_path, photos, bodies, weights):
    """In epoch 2; afterwards a finished one answers again without any training."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"

    def run(out):
        torch.manual_seed(0)
        finetune.run(photos, out, RECIPE, weights)
        record = json.loads((out / "record.json").read_text())
        del record["minutes"]
        for row in record.get("stage_one", []) + record["stage_two"]:
            del row["seconds"]
        return record, load_safely(out / MODEL)["weights"]

    record, end = run(whole)
    interrupted(8, lambda: run(cut))
    assert not (cut / MODEL).exists()
    again = run(cut)
    (cut / MODEL).unlink()
    kept = (cut / "all_layers.pt").read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(SGD, "step")
        finished = run(cut)
    assert again[0] == finished[0] == record
    assert all(same_weights(weights, end) for _, weights in (again, finished))
    assert (cut / "all_layers.pt").read_bytes() == kept
    assert same_weights(last(whole), last(cut))


@pytest.fixture
def clock(monkeypatch):
    """Each look at the clock is half a minute after the one before."""
    ticks = count(0, 30)
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))


@pytest.mark.parametrize("weights", [None, "imagenet"])
def test_minutes_are_those_of_the_whole_run(tmp_path, photos, bodies, clock, weights):
    """However often it was stopped, and when a finished one answers again."""

    def minutes(out):
        finetune.run(photos, out, RECIPE, weights)
        return json.loads((out / "record.json").read_bytes())["minutes"]

    whole = minutes(tmp_path / "whole")
    # Half a minute for each epoch and for the test, and for the features where there are some.
    assert whole == 0.5 * (3 + 1 + (20 + 1 if weights else 0))
    cut = tmp_path / "cut"
    for step in (8, 4):
        interrupted(step, lambda: minutes(cut))
    assert minutes(cut) == whole
    assert minutes(cut) == whole


def test_test_and_training_are_told_apart(tmp_path, photos, bodies, monkeypatch):
    """A finished run that answers again was not trained by what it is tested by."""
    told = {}
    monkeypatch.setattr(finetune.results, "provenance", lambda device: told.copy())
    for commit, expected in (("old", "old"), ("new", "old")):
        told |= dict.fromkeys(("device", "threads", "torch", "commit"), commit)
        finetune.run(photos, tmp_path, RECIPE, None)
        record = json.loads((tmp_path / "record.json").read_bytes())
        assert record["commit"] == commit
        assert set(record["trained_by"].values()) == {expected}


@pytest.mark.parametrize("kept", [[], {"of": 1}])
def test_features_that_are_something_else_are_made_again(tmp_path, split, kept):
    torch.save(kept, tmp_path / "features.pt")
    assert body_calls(tiny_classifier(), split, tmp_path)[0] == 7
    assert body_calls(tiny_classifier(), split, tmp_path)[0] == 0


def test_run_follows_its_seed_alone(tmp_path, photos, bodies):
    """With the same body, whatever was drawn before."""
    for seed, name in ((1, "a"), (2, "b")):
        torch.manual_seed(seed)
        finetune.run(photos, tmp_path / name, RECIPE, None)
    ends = [load_safely(tmp_path / name / MODEL)["weights"] for name in "ab"]
    assert same_weights(*ends)


@pytest.mark.parametrize("changed", ["recipe", "images", "classes", "number of classes", "weights"])
def test_another_run_does_not_go_on_with_the_checkpoint(tmp_path, photos, bodies, changed):
    """As many images of as many classes are not the same images and classes yet."""
    out, other, recipe, weights = tmp_path / "out", photos, RECIPE, "imagenet"
    finetune.run(photos, out, RECIPE)
    if changed == "recipe":
        recipe = replace(RECIPE, lr=1e-3)
    elif changed == "images":
        other = paint(tmp_path / "photos", seed=1)
    elif changed == "classes":
        other = paint(tmp_path / "photos", names=("ant", "bee", "cat"))
    elif changed == "number of classes":
        other = paint(tmp_path / "photos", 15, names=("ant", "bee"))
    else:
        weights = "another.pt"
    before = (out / "all_layers.pt").read_bytes()
    with pytest.raises(CheckpointMismatch, match=r"all_layers\.pt") as caught:
        finetune.run(other, out, recipe, weights)
    assert "\n" not in str(caught.value)
    assert (out / "all_layers.pt").read_bytes() == before


def copied(photos, to):
    """A copy whose files have other times than the first."""
    shutil.copytree(photos, to)
    for k, path in enumerate(sorted(to.rglob("*.png"))):
        os.utime(path, (k, k))
    return to


def test_run_goes_on_with_a_copy_of_its_images(tmp_path, photos, bodies):
    """Elsewhere and of other times; neither features nor epochs are computed anew."""
    out = tmp_path / "out"
    interrupted(8, lambda: finetune.run(photos, out, RECIPE))
    kept = (out / "features.pt").read_bytes()
    copy = copied(photos, tmp_path / "elsewhere" / "photos")
    first = finetune.run(copy, out, RECIPE)
    assert (out / "features.pt").read_bytes() == kept
    record = json.loads((out / "record.json").read_text())
    assert [row["number"] for row in record["stage_two"]] == [1, 2, 3]
    whole = finetune.run(photos, tmp_path / "whole", RECIPE)
    assert torch.equal(first.chances, whole.chances)
    assert same_weights(last(out), last(tmp_path / "whole"))
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(SGD, "step")  # finished, so that no step is left
        assert finetune.run(photos, out, RECIPE).right == whole.right


def test_changed_picture_is_named_alone(tmp_path, photos, bodies):
    """In a sentence of a length that does not grow with the number of images."""
    out, copy = tmp_path / "out", copied(photos, tmp_path / "photos")
    finetune.run(photos, out, RECIPE)
    (file, _), *_ = labelled.load(copy).train.samples
    Image.open(file).rotate(180).save(file)
    before = (out / "all_layers.pt").read_bytes()
    name = Path(file).relative_to(copy).as_posix()
    with pytest.raises(
        CheckpointMismatch, match=rf"all_layers\.pt was made with .*{name}="
    ) as told:
        finetune.run(copy, out, RECIPE)
    assert str(told.value).count(".png") == 1
    assert len(str(told.value)) < 500
    assert (out / "all_layers.pt").read_bytes() == before


def test_notes_on_modes_are_told_but_not_all_of_many(tmp_path, bodies, capsys):
    root = paint(tmp_path / "photos", 5)
    for path in sorted(root.glob("*/*"))[:8]:
        Image.open(path).convert("P").save(path)
    finetune.run(root, tmp_path / "out", replace(RECIPE, epochs=1), None)
    out = capsys.readouterr().out
    assert out.count("is of mode P and is read as RGB.") == 5
    assert "... and 3 more that are read as RGB." in out


def test_files_that_are_passed_over_are_told(tmp_path, bodies, capsys):
    root = paint(tmp_path / "photos", 5)
    (root / "labels.csv").write_text("words")
    finetune.run(root, tmp_path / "out", replace(RECIPE, epochs=1), None)
    assert "passed over: labels.csv.\n" in capsys.readouterr().out


# The split, the weights of classes, the report


def files_of(record):
    return {part: set(names) for part, names in record["files"].items()}


def test_split_is_another_seeds_matter(tmp_path, photos, bodies):
    """That of the training changes no part; the record lists the files of each."""
    recipe, records = replace(RECIPE, epochs=1), []
    for seed, split_seed in ((0, 0), (1, 0), (0, 1)):
        out = tmp_path / f"{seed}{split_seed}"
        finetune.run(photos, out, replace(recipe, seed=seed), None, split_seed=split_seed)
        records.append(json.loads((out / "record.json").read_text()))
    first, other, again = map(files_of, records)
    assert first == other != again
    assert sum(map(len, first.values())) == len(set.union(*first.values())) == 30
    assert {len(part) for part in first.values()} == {18, 6}
    assert [record["split"]["seed"] for record in records] == [0, 0, 1]


def test_groups_stay_together_in_a_run(tmp_path, bodies, capsys):
    root = paint(tmp_path / "photos", 12)
    for path in sorted(root.glob("*/*.png")):
        path.rename(path.with_name(f"film{int(path.stem) // 3}-{path.name}"))
    finetune.run(root, tmp_path / "out", replace(RECIPE, epochs=1), None, groups=r"(\w+/film\d)-")
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    films = [{name.split("-")[0] for name in names} for names in record["files"].values()]
    assert sum(map(len, films)) == len(set.union(*films)) == 12
    assert record["split"]["groups"] == r"(\w+/film\d)-"


def rare(root):
    """Two classes that overlap, of which one is rare."""
    random = torch.Generator().manual_seed(0)
    for name, images, shift in (("common", 60, 0), ("rare", 8, 22)):
        (root / name).mkdir(parents=True)
        for k in range(images):
            level = float(110 + shift + 14 * torch.randn((), generator=random))
            noise = level + 40 * torch.rand(12, 12, 3, generator=random)
            Image.fromarray(noise.byte().numpy()).save(root / name / f"{k}.png")
    return root


def test_class_weights_find_more_of_a_rare_class(tmp_path):
    """In both stages, and by which epoch is kept."""
    split, found = labelled.load(rare(tmp_path / "photos")), {}
    for weighted in (False, True):
        recipe = replace(RECIPE, class_weights=weighted, epochs=4, batch=16, lr=1e-2)
        for stage in (stage_one, stage_two):
            net = tiny_classifier()
            net.classes, net.head = ("common", "rare"), torch.nn.Linear(8, 2)
            stage(net, split, recipe)
            found[stage.__name__, weighted] = classifier.test(net, split.train).recalls.tolist()
    for stage in ("stage_one", "stage_two"):
        assert found[stage, True][1] >= found[stage, False][1] + 30
        assert min(found[stage, True]) > 50


def test_run_with_other_class_weights_does_not_go_on(tmp_path, photos, bodies):
    finetune.run(photos, tmp_path, RECIPE, None)
    with pytest.raises(CheckpointMismatch, match="class_weights"):
        finetune.run(photos, tmp_path, replace(RECIPE, class_weights=True), None)


def test_report_is_of_this_run(tmp_path, photos, bodies):
    t = finetune.run(photos, tmp_path, RECIPE, command="python -m metautils finetune --what")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert f"<p class=big>{t.accuracy:.1f} %</p>" in text
    assert "finetune --what" in text and "Stage one" in text and "Stage two" in text
    assert text.count("data:image/jpeg") == len(t.labels) - t.right


# What is told before any training


def no_room(monkeypatch):
    free = SimpleNamespace(free=(600 << 20) - 1)
    monkeypatch.setattr(metautils.files.shutil, "disk_usage", lambda path: free)


@pytest.mark.parametrize(
    ("out", "sentence"),
    [
        ("file/out", "out cannot be written to .*: choose another folder"),
        ("file", "file cannot be written to .*: choose another folder"),
        ("/proc/x", "/proc/x cannot be written to .*: choose another folder"),
        ("full", "full has room for 599 MB, but 600 MB are needed: free some space"),
    ],
)
def test_bad_folder_is_told_before_anything_is_done(tmp_path, monkeypatch, bodies, out, sentence):
    monkeypatch.delattr(labelled, "load")
    (tmp_path / "file").write_text("")
    if out == "full":
        no_room(monkeypatch)
    told_in_one_line(lambda: finetune.run(tmp_path / "photos", tmp_path / out, RECIPE), sentence)
    assert bodies == []
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["file"]


def test_bad_images_are_told_before_any_training(tmp_path, bodies):
    root = paint(tmp_path / "photos", 3)
    (root / "red" / "x.jpg").write_text("words")
    told_in_one_line(lambda: finetune.run(root, tmp_path / "out", RECIPE), r"red/x\.jpg is no read")
    assert bodies == []
    assert names_in(tmp_path / "out") == []


@pytest.mark.parametrize(("file", "left"), [(1, []), (2, ["features.pt"])])
def test_disk_that_fills_up_leaves_no_half_file(tmp_path, photos, bodies, monkeypatch, file, left):
    """While the first or the second file is written."""
    calls, save = count(1), torch.save

    def fills(value, target):
        if next(calls) < file:
            return save(value, target)
        target.write(b"PK half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", fills)
    told_in_one_line(
        lambda: finetune.run(photos, tmp_path / "out", RECIPE),
        r"\.pt could not be written .*No space left on device.*: free some space",
    )
    assert names_in(tmp_path / "out") == left


# The command line, with a real ResNet-50


def command(*arguments):
    return cli.main(list(map(str, arguments)))


SHORT = ("--weights", "none", "--size", 32, "--epochs", 1, "--device", "cpu")


@pytest.fixture(scope="module")
def tuned(photos, tmp_path_factory):
    """The folder that a short fine-tuning leaves."""
    out = tmp_path_factory.mktemp("tuned")
    assert command("finetune", "--data", photos, "--out", out, *SHORT, "--no-mirror") == 0
    return out


def test_finetune_does_what_was_asked(tuned, photos):
    record = json.loads((tuned / "record.json").read_text())
    asked = {"size": 32, "epochs": 1, "mirror": False, "seed": 0, "batch": 32, "pull": None}
    assert record["command"].startswith("python -m metautils finetune --data ")
    assert record["recipe"] == asdict(Recipe()) | asked
    assert record["data"] == str(photos)
    assert record["weights"] is None
    assert len(record["stage_two"]) == 1
    assert sum(map(sum, record["confusion"])) == 6


def test_classify_tells_the_three_likeliest(tuned, photos, capsys):
    images = [photos / "red" / "0.png", photos / "blue" / "1.png"]
    assert command("classify", tuned, *images) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for line, image in zip(out.splitlines(), images, strict=True):
        assert line.startswith(f"{image}: ")
        told = re.findall(r"(\w+) (\d+\.\d) %", line)
        assert sorted(name for name, _ in told) == sorted(COLOURS)
        chances = [float(chance) for _, chance in told]
        assert chances == sorted(chances, reverse=True)
        assert math.fsum(chances) == pytest.approx(100, abs=0.2)


def says(capsys, arguments, sentence):
    """Status 2 and one line on stderr, but for a bar that was wiped out before."""
    assert command(*arguments) == 2
    line = capsys.readouterr().err.rsplit("\r", 1)[-1]
    assert re.fullmatch(rf"metautils: .*{sentence}.*\n", line)


@pytest.mark.parametrize(
    ("data", "more", "sentence"),
    [
        ("gone", (), "gone is no folder: name one that holds a subfolder for each class"),
        ("one", (), r"one has 1 subfolder\(s\) of images: a classifier needs two or more"),
        ("bad", (), r"bad/red/x\.jpg is no readable image: mend or remove it"),
        ("good", ("--weights", "gone.pt"), r"gone\.pt does not exist"),
        ("good", ("--weights", "good/red/0.png"), r"good/red/0\.png is damaged, or not written"),
        ("good", ("--l2-sp", 0.1), "--l2-sp pulls to pretrained weights, so it needs other"),
        ("good", ("--out", "bad/red/x.jpg"), r"x\.jpg cannot be written to .*: choose another"),
        ("good", ("--out", "good/red/new"), r"new lies in good and would be taken for a class"),
        ("good", ("--weights", "none", "--l2-sp", -1), "needs other --weights"),
    ],
)
def test_finetune_tells_what_is_wrong(tmp_path, monkeypatch, capsys, data, more, sentence):
    monkeypatch.chdir(tmp_path)
    for name in ("good", "bad"):
        paint(tmp_path / name, 3)
    paint(tmp_path / "one", names=["red"])
    (tmp_path / "bad" / "red" / "x.jpg").write_text("words")
    says(capsys, ["finetune", "--data", data, "--out", "out", *SHORT, *more], sentence)
    assert not list(tmp_path.glob("out/*"))


def test_classify_tells_what_is_wrong(tmp_path, tuned, photos, capsys):
    image, text = photos / "red" / "0.png", tmp_path / "x.jpg"
    text.write_text("words")
    says(capsys, ["classify", tmp_path, image], rf"{MODEL} does not exist")
    says(capsys, ["classify", tuned, text], r"x\.jpg is no readable image")
    (tmp_path / MODEL).write_bytes(b"half")
    says(capsys, ["classify", tmp_path, image], rf"{MODEL} is damaged")
    torch.save({"classes": ["a", "b"], "size": 16, "weights": {}}, tmp_path / MODEL)
    says(capsys, ["classify", tmp_path, image], MODEL)


def test_interrupted_finetune_says_how_to_go_on(tmp_path, photos, capsys, monkeypatch):
    def interrupt(*arguments, **named):
        raise KeyboardInterrupt

    monkeypatch.setattr(finetune, "run", interrupt)
    assert command("finetune", "--data", photos, "--out", tmp_path, *SHORT) == 130
    assert capsys.readouterr().err == "\nStopped. Give the same command again to go on.\n"
