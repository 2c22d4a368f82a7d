"""Fine-tuning trains what it says, goes on where it was stopped, and ends in an honest test."""

import errno
import json
import math
import re
from contextlib import suppress
from dataclasses import asdict, replace
from itertools import count
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import flat, same_weights, told_in_one_line, weights_of
from PIL import Image
from torch import nn
from torch.optim import SGD

import metautils.files
from metautils import classifier, cli, finetune, pretrained
from metautils.checkpoint import CheckpointMismatch
from metautils.classifier import MODEL, Classifier
from metautils.classifier import to_test as of_test
from metautils.classifier import to_train as of_train
from metautils.data import labelled
from metautils.evaluate import wilson95
from metautils.files import load_safely
from metautils.finetune import Recipe, l2_sp, stage_one, stage_two

COLOURS = {"blue": (40, 60, 210), "green": (50, 190, 60), "red": (220, 50, 40)}
MEAN, STD = (np.array(x)[:, None, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
RECIPE = Recipe(
    size=16, batch=4, probe_epochs=20, probe_lr=0.05, epochs=3, lr=3e-3, step=2, decay=0.01
)


def paint(root, images=10, names=COLOURS, seed=0):
    """A folder of noisy images, the classes of which differ in their colour."""
    random = np.random.default_rng(seed)
    for name, colour in zip(names, COLOURS.values(), strict=False):
        (root / name).mkdir(parents=True)
        for k in range(images):
            noise = random.integers(-40, 41, (20, 24, 3))
            Image.fromarray((noise + colour).clip(0, 255).astype(np.uint8)).save(
                root / name / f"{k}.png"
            )
    return root


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Three classes of ten images: 18 to learn from, 6 for validation, 6 for the test."""
    return paint(tmp_path_factory.mktemp("data") / "photos")


@pytest.fixture(scope="module")
def split(photos):
    return labelled.load(photos)


def tiny_body(features=8, seed=0):
    """One convolution with batch normalisation; the global generator stays as it is."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [nn.Conv2d(3, features, 1), nn.BatchNorm2d(features), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def tiny(seed=0, size=16):
    torch.manual_seed(0)
    return Classifier(tiny_body(seed=seed), tuple(COLOURS), size, 8)


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


# Images as tensors


@pytest.mark.parametrize("transform", [of_train(16, True), of_test(16)], ids=["train", "test"])
@pytest.mark.parametrize("shape", [(40, 20), (20, 40), (16, 16), (5, 9)])
@pytest.mark.parametrize("level", [0, 255])
def test_images_get_the_size_and_range_of_imagenet(transform, shape, level):
    x = transform(Image.new("RGB", shape, (level,) * 3))
    assert (x.shape, x.dtype) == ((3, 16, 16), torch.float32)
    expected = torch.from_numpy((level / 255 - MEAN) / STD).float().expand_as(x)
    torch.testing.assert_close(x, expected)


def halves(width=64, height=32):
    """Black on the left, white on the right."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, width // 2 :] = 255
    return Image.fromarray(pixels)


def test_test_images_are_the_middle():
    x = of_test(16)(halves(200, 20))
    assert torch.equal(x, of_test(16)(halves(200, 20)))
    assert (x[:, :, 0] < -1).all() and (x[:, :, -1] > 1).all()
    # A pixel of the short side of 20 becomes 17 / 20, of which the crop leaves 16 / 17.
    black = (x[0] < 0).float().mean()
    assert float(black) == pytest.approx(0.5, abs=0.07)


@pytest.mark.parametrize(("mirror", "sides"), [(True, {-1, 1}), (False, {1})])
def test_training_images_are_mirrored_only_if_asked(mirror, sides):
    torch.manual_seed(0)
    crops = [of_train(16, mirror)(halves()) for _ in range(30)]
    slopes = {int((x[..., 8:].mean() - x[..., :8].mean()).sign()) for x in crops}
    assert slopes - {0} == sides  # 0 where the crop holds but one half
    assert len({float(x.mean()) for x in crops}) > 10  # cropped at random


# Classifier


def test_classify_tells_probabilities_highest_first(photos):
    net, path = tiny().train(), photos / "red" / "3.png"
    before = weights_of(net)
    told = net.classify(path)
    assert list(told.values()) == sorted(told.values(), reverse=True)
    assert sum(told.values()) == pytest.approx(1)
    assert same_weights(net.state_dict(), before)
    x = of_test(16)(Image.open(path))[None]
    with torch.no_grad():
        chances = net.eval()(x).softmax(1)[0].tolist()
    assert told == pytest.approx(dict(zip(COLOURS, chances, strict=True)))


def odd(kind):
    """An image that must not be converted carelessly."""
    noise = np.random.default_rng(0).integers(0, 256, (20, 30, 4), dtype=np.uint8)
    if kind == "transparent":
        return Image.fromarray(noise)
    if kind == "16 bits":
        return Image.fromarray(noise[..., 0].astype(np.uint16) << 8)
    return Image.fromarray(noise[..., :3])


@pytest.mark.parametrize("kind", ["plain", "lying", "transparent", "16 bits"])
def test_classify_takes_a_name_or_an_opened_image(tmp_path, kind):
    """And sees the same in both."""
    torch.manual_seed(0)
    net, exif = Classifier(nn.Flatten(), ("a", "b"), 16, 3 * 16 * 16), Image.Exif()
    if kind == "lying":
        exif[0x0112] = 6
    odd(kind).save(tmp_path / "x.png", exif=exif)
    by_name = net.classify(str(tmp_path / "x.png"))
    with Image.open(tmp_path / "x.png") as image:
        assert net.classify(image) == pytest.approx(by_name)


def test_classify_names_a_file_that_is_no_image(tmp_path):
    (tmp_path / "x.jpg").write_text("words")
    told_in_one_line(lambda: tiny().classify(tmp_path / "x.jpg"), r"x\.jpg is no readable image")
    told_in_one_line(lambda: tiny().classify(tmp_path / "y.jpg"), r"y\.jpg is no readable image")


def test_saved_classifier_gives_the_same_answers(tmp_path):
    torch.manual_seed(0)
    net = Classifier(pretrained.body(None), ("a", "b", "c"), 32)
    x = torch.randn(4, 3, 32, 32)
    net.train()(x)  # moves the statistics
    net.save(tmp_path / "x.pt")
    torch.manual_seed(1)
    loaded = classifier.load(tmp_path / "x.pt")
    assert (loaded.classes, loaded.size, loaded.training) == (net.classes, 32, False)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), net.eval()(x))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ([1, 2], "holds no classifier: name the model.pt"),
        ({"weights": {}, "size": 32}, "holds no classifier"),
        ({"classes": list(COLOURS), "size": 16, "weights": tiny().state_dict()}, ""),
    ],
    ids=["list", "without names", "another body"],
)
def test_file_that_holds_no_classifier(tmp_path, content, sentence):
    torch.save(content, tmp_path / "x.pt")
    told_in_one_line(lambda: classifier.load(tmp_path / "x.pt"), rf"x\.pt .*{sentence}")


def test_damaged_or_missing_classifier(tmp_path):
    (tmp_path / "x.pt").write_bytes(b"half")
    told_in_one_line(lambda: classifier.load(tmp_path / "x.pt"), r"x\.pt is damaged")
    told_in_one_line(lambda: classifier.load(tmp_path / "y.pt"), r"y\.pt does not exist")


# Stage one: the head


def network(kind):
    torch.manual_seed(0)
    return tiny() if kind == "tiny" else Classifier(pretrained.body(None), tuple(COLOURS), 32)


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


def test_features_are_those_of_the_body(split):
    net = tiny().train()
    head = net.head
    rows, labels = classifier.features(net, split.validation).tensors
    assert net.head is head
    assert net.training
    assert labels.tolist() == split.validation.targets
    with torch.no_grad():
        x = torch.stack([of_test(16)(split.validation[k][0]) for k in range(6)])
        torch.testing.assert_close(rows, net.body.eval()(x), atol=2e-2, rtol=2e-2)


def test_stage_one_follows_its_seed_alone(split):
    ends = []
    for before, seed in ((1, 3), (2, 3), (2, 4)):
        net = tiny()
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
    expected = body_calls(tiny(), split, None)
    assert expected[0] == 5 + 2  # batches of four of 18 and of 6 images
    assert body_calls(tiny(), split, tmp_path)[0] == 7
    again, head = body_calls(tiny(), split, tmp_path)
    assert again == 0
    assert same_weights(head, expected[1])
    assert names_in(tmp_path) == ["features.pt"]


@pytest.mark.parametrize("changed", ["body", "statistics", "images", "size"])
def test_features_of_something_else_are_not_used(tmp_path, split, photos, changed):
    body_calls(tiny(), split, tmp_path)
    net = tiny(seed=5 if changed == "body" else 0, size=12 if changed == "size" else 16)
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
    net = tiny()
    before = weights_of(net)
    rows = stage_two(net, split, RECIPE, tmp_path)
    assert [row.number for row in rows] == [1, 2, 3]
    assert [name for name, x in last(tmp_path).items() if torch.equal(x, before[name])] == []
    kept = load_safely(tmp_path / "all_layers.pt")["best"]
    assert same_weights(net.state_dict(), kept)


@pytest.mark.parametrize(("pull", "decay"), [(None, 0.01), (0.5, 0), (0.0, 0)])
def test_rates_of_stage_two_and_its_decay(monkeypatch, split, pull, decay):
    """The pull takes the place of the decay; the body learns at a tenth of the head's rate."""
    seen, net = [], tiny()
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
        net, out = tiny(), tmp_path / str(pull)
        start = {f"body.{name}": w.detach().clone() for name, w in net.body.named_parameters()}
        stage_two(net, split, replace(RECIPE, pull=pull), out)
        far[pull] = float(flat([last(out)[name] - w for name, w in start.items()]).norm())
    assert far[300.0] < 0.2 * min(far[None], far[0.0])
    assert far[300.0] > 0


def test_l2_sp_by_hand():
    torch.manual_seed(0)
    net = tiny().double()
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
    whole, resumed = tiny(), tiny()
    rows = stage_two(whole, split, RECIPE, tmp_path / "whole", workers)
    cut = tmp_path / "cut"
    interrupted(8, lambda: stage_two(tiny(), split, RECIPE, cut, workers))
    assert len(load_safely(cut / "all_layers.pt")["notes"]["rows"]) == 1
    again = stage_two(resumed, split, RECIPE, cut, workers)
    assert [row.train_loss for row in again] == [row.train_loss for row in rows]
    assert same_weights(resumed.state_dict(), whole.state_dict())
    assert same_weights(last(tmp_path / "whole"), last(cut))


def test_pull_goes_on_to_where_the_body_was_at_first(tmp_path, split):
    """Not to where it was when it was stopped, which a notebook may have kept."""
    net, recipe, cut = tiny(), replace(RECIPE, pull=1.0), tmp_path / "cut"
    stage_two(tiny(), split, recipe, tmp_path / "whole")
    interrupted(6, lambda: stage_two(net, split, recipe, cut))
    net.zero_grad()
    with suppress(CheckpointMismatch):  # to refuse such a network is as good
        stage_two(net, split, recipe, cut)
        assert same_weights(last(cut), last(tmp_path / "whole"))


def test_last_batch_is_not_a_single_image(split):
    """It has no variance; a validation batch needs none, so nothing is left out there."""
    for part, shuffle, sizes in ((split.train, True, [17]), (split.train, False, [17, 1])):
        loader = classifier.batches(part, 17, of_test(16), shuffle)
        assert [len(y) for _, y in loader] == sizes
    whole = classifier.batches(split.train, 18, of_test(16), True)
    assert [len(y) for _, y in whole] == [18]


# The test


def six_answers():
    """Six images of three classes, of which the second, third and last are wrong."""
    chances = [
        [0.7, 0.2, 0.1],
        [0.6, 0.3, 0.1],
        [0.8, 0.1, 0.1],
        [0.1, 0.8, 0.1],
        [0.2, 0.2, 0.6],
        [0.1, 0.7, 0.2],
    ]
    labels, files = torch.tensor([0, 1, 1, 1, 2, 2]), tuple(f"{k}.png" for k in range(6))
    return classifier.Tested(torch.tensor(chances), labels, files, ("a", "b", "c"))


def test_numbers_of_the_test_by_hand():
    t = six_answers()
    assert (t.right, t.accuracy) == (3, 50)
    assert t.interval == wilson95(3, 6)
    assert t.confusion.tolist() == [[1, 0, 0], [2, 1, 0], [0, 1, 1]]
    assert t.worst() == [2, 5, 1]  # 0.1, 0.2 and 0.3 for the true class
    assert t.worst(2) == [2, 5]
    assert str(t) == "50.0 % of 6 test images, 95 % interval 18.8 to 81.2"


def test_class_that_is_never_answered_has_its_place_in_the_confusion():
    t = replace(six_answers(), chances=torch.eye(3)[[0] * 6], labels=torch.zeros(6).long())
    assert t.confusion.tolist() == [[6, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert t.worst() == []


def test_test_is_what_the_classifier_says_of_each_file(split):
    net = tiny()
    t = classifier.test(net, split.test)
    assert t.classes == tuple(COLOURS)
    assert list(zip(t.files, t.labels.tolist(), strict=True)) == split.test.samples
    for file, chances in zip(t.files, t.chances.tolist(), strict=True):
        told = net.classify(file)
        assert chances == pytest.approx([told[name] for name in COLOURS], abs=0.02)


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
    assert names_in(out) == ["all_layers.pt", *kept, MODEL, "record.json"]
    record = json.loads((out / "record.json").read_text())
    expected = {
        "data": str(photos),
        "classes": list(COLOURS),
        "images": {"train": 18, "validation": 6, "test": 6},
        "weights": weights,
        "recipe": asdict(RECIPE),
        "test": {"right": t.right, "accuracy": t.accuracy, "interval": list(t.interval)},
        "confusion": t.confusion.tolist(),
        "worst": [t.files[k] for k in t.worst()],
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


def test_notes_on_modes_are_told_but_not_all_of_many(tmp_path, bodies, capsys):
    root = paint(tmp_path / "photos", 5)
    for path in sorted(root.glob("*/*"))[:8]:
        Image.open(path).convert("P").save(path)
    finetune.run(root, tmp_path / "out", replace(RECIPE, epochs=1), None)
    out = capsys.readouterr().out
    assert out.count("is of mode P and is read as RGB.") == 5
    assert "... and 3 more that are read as RGB." in out


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
        ("one", (), r"one has 1 subfolder\(s\): a classifier needs two or more"),
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
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(finetune, "run", interrupt)
    assert command("finetune", "--data", photos, "--out", tmp_path, *SHORT) == 130
    assert capsys.readouterr().err == "\nStopped. Give the same command again to go on.\n"
