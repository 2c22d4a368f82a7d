"""Fine-tuning trains what it says, goes on where it was stopped, and ends in an honest test."""

import errno
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import time
from contextlib import suppress
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from helpers import (
    COLOURS,
    blind,
    flat,
    paint,
    relative,
    same_weights,
    tiny_body,
    tiny_classifier,
    told_in_one_line,
    weights_of,
)
from PIL import Image
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_info, threadpool_limits
from torch.nn import functional as F
from torch.optim import AdamW

import metautils.files
from metautils import classifier, cli, finetune, pretrained
from metautils.checkpoint import CheckpointMismatch
from metautils.classifier import MODEL, Classifier
from metautils.data import labelled
from metautils.errors import BadArgument
from metautils.evaluate import wilson95
from metautils.files import load_safely
from metautils.finetune import Recipe, between, l2_sp, stage_one, stage_two
from metautils.fit import measure

RECIPE = Recipe(size=16, batch=4, epochs=3, lr=3e-3)


def interrupted(call, work):
    """Run this training until it is stopped in a step of stage two, counted from 1."""
    calls, whole = count(1), AdamW.step

    def step(self, *arguments, **named):
        if next(calls) == call:
            raise KeyboardInterrupt
        return whole(self, *arguments, **named)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(AdamW, "step", step)
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
    probe = stage_one(net, split, RECIPE)
    assert same_weights(net.body.state_dict(), body)
    assert not any(map(torch.equal, net.head.state_dict().values(), head.values()))
    assert same_weights(net.head.state_dict(), probe.head)
    if kind == "tiny":
        assert (probe.accuracy, probe.wrong) == (100, 0)
        assert classifier.test(net, split.test).accuracy == 100


def test_probe_is_fitted_by_one_thread(split, monkeypatch):
    """More of them are many times slower beside other jobs."""
    seen = []
    for name in ("_strength", "_fitted"):
        whole = getattr(finetune, name)

        def noted(*some, whole=whole):
            seen.extend(pool["num_threads"] for pool in threadpool_info())
            return whole(*some)

        monkeypatch.setattr(finetune, name, noted)
    with threadpool_limits(2):
        before = [pool["num_threads"] for pool in threadpool_info()]
        stage_one(tiny_classifier(), split, RECIPE)
        assert [pool["num_threads"] for pool in threadpool_info()] == before
    assert set(seen) == {1} and 2 in before


def test_stage_one_depends_on_nothing_drawn(split):
    ends = []
    for before in (1, 2):
        net = tiny_classifier()
        torch.manual_seed(before)
        stage_one(net, split, RECIPE)
        ends.append(weights_of(net))
    assert same_weights(*ends)


@pytest.mark.parametrize("names", [("ant", "bee"), ("ant", "bee", "cat")])
def test_probe_is_where_its_loss_is_least(tmp_path, names):
    """Of the mean cross-entropy and the weights' squares: its gradient is nothing there.

    Both for two classes, of which scikit-learn keeps one row, and for more; of all images and of
    those for training alone.
    """
    parts = labelled.load(paint(tmp_path / "photos", 10, names))
    net = Classifier(tiny_body(), names, 16)
    probe = stage_one(net, parts, RECIPE)
    rows = [classifier.features(net, part).tensors for part in parts[:2]]
    both = [torch.cat(each) for each in zip(*rows, strict=True)]
    assert probe.strength in finetune.STRENGTHS
    for head, (x, y) in ((probe.head, both), (probe.rehearsed, rows[0])):
        w, b = (head[name].double().requires_grad_() for name in ("weight", "bias"))
        unit = x.double() / 8**0.5  # (images, 8), of length 1
        loss = F.cross_entropy(unit @ w.T * 8**0.5 + b, y, reduction="sum")
        # Two rows of half the difference have half its square.
        size = (1 if len(names) > 2 else 2) * w.square().sum() * 8 / 2
        (loss * probe.strength + size).backward()
        assert float(w.grad.norm()) < 1e-2 * probe.strength
        assert float(b.grad.norm()) < 1e-2 * probe.strength


def test_strength_is_that_of_the_least_loss_on_images_left_out():
    """Labels that tell nothing want a strong penalty, those that are plain a weak one."""
    torch.manual_seed(0)
    x = classifier.OneLength()(torch.randn(60, 8))
    none, plain = torch.arange(60) % 2, (x[:, 0] > 0).long()
    least, most = finetune._strength(x, none), finetune._strength(x, plain)
    assert least[0] <= 1 < 100 <= most[0]
    assert least[1] < 70 and most[1] > 90


@pytest.mark.parametrize("images", [24, 60])
def test_probe_of_few_images_is_the_logistic_regression_on_all_features(images):
    """Fitted along the axes in which they lie, of which there are fewer than features."""
    torch.manual_seed(0)
    y = torch.arange(images) % 3
    x = classifier.OneLength()(torch.randn(images, 40) + torch.randn(3, 40)[y])
    plain = LogisticRegression(C=10 / 40, max_iter=5000, tol=1e-9)
    plain.fit(x.double().numpy(), y.numpy())
    found = finetune._fitted(x, y, 10.0)
    assert relative(found["weight"].double(), torch.from_numpy(plain.coef_)) < 1e-3
    chances = F.linear(x, **found).softmax(1).double()
    torch.testing.assert_close(
        chances, torch.from_numpy(plain.predict_proba(x.double().numpy())), atol=1e-3, rtol=0
    )


def test_class_of_two_images_is_cross_validated_in_two_parts():
    torch.manual_seed(0)
    x = classifier.OneLength()(torch.randn(20, 8))
    assert finetune._strength(x, torch.tensor([0, 0] + [1] * 18))[0] in finetune.STRENGTHS


def test_wrong_are_counted_without_having_been_learned(tmp_path, monkeypatch):
    """With features that tell nothing, the answer is one class for all."""
    parts = labelled.load(paint(tmp_path / "photos", 10))
    net = Classifier(blind(tiny_body()), tuple(COLOURS), 16)
    answers = parts.validation.targets
    wrong = {len(answers) - answers.count(label) for label in range(3)}
    assert min(wrong) > 0 and stage_one(net, parts, RECIPE).wrong in wrong


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


@pytest.mark.parametrize("changed", ["body", "order", "statistics", "images", "size", "scaling"])
def test_features_of_something_else_are_refused(tmp_path, split, photos, changed):
    body_calls(tiny_classifier(), split, tmp_path)
    net = tiny_classifier(seed=5 if changed == "body" else 0, size=12 if changed == "size" else 16)
    if changed == "order":  # of the filters, so that all their numbers are there
        net.body.net[0].weight.data = net.body.net[0].weight.data.flip(0)
    if changed == "statistics":
        net.body.net[1].running_mean += 0.1
    if changed == "scaling":
        net.body.interpolation = "bicubic"
    other = labelled.load(photos, seed=1) if changed == "images" else split
    before = (tmp_path / "features.pt").read_bytes()
    with pytest.raises(CheckpointMismatch, match=r"features\.pt was made with .* to start anew"):
        stage_one(net, other, RECIPE, tmp_path)
    assert (tmp_path / "features.pt").read_bytes() == before


# Stage two: all layers


def last(out):
    """Weights after the last epoch of stage two, which need not be the best."""
    return load_safely(out / "all_layers.pt")["net"]


def learned():
    """A tiny classifier whose body has learned elsewhere."""
    net = tiny_classifier()
    net.body.fixed = True
    return net.train()


def test_stage_two_changes_all_layers(tmp_path, split):
    """But for the statistics of a body that has learned before, which an untrained one learns."""
    for net, still in ((tiny_classifier(), set()), (learned(), STATISTICS)):
        before, out = weights_of(net), tmp_path / str(net.body.fixed)
        rows = stage_two(net, split, RECIPE, None, out)
        assert [row.number for row in rows] == [1, 2, 3]
        assert {name for name, x in last(out).items() if torch.equal(x, before[name])} == still
        kept = load_safely(out / "all_layers.pt")["best"]
        assert same_weights(net.state_dict(), kept)
        if net.body.fixed:  # after a probe it is the end that counts
            stage_two(net, split, RECIPE, stage_one(net, split, RECIPE), tmp_path / "after")
            assert same_weights(net.state_dict(), last(tmp_path / "after"))


STATISTICS = {f"body.net.1.{x}" for x in ("running_mean", "running_var", "num_batches_tracked")}


def test_stage_two_starts_from_the_head_of_the_training_images(split, monkeypatch):
    """The other one knows the validation images, which are to judge."""
    net, starts = learned(), []
    probe = stage_one(net, split, RECIPE)
    monkeypatch.setattr(finetune, "fit", lambda net, *_, **__: starts.append(weights_of(net.head)))
    stage_two(net, split, RECIPE, probe)
    assert same_weights(starts[0], probe.rehearsed)
    assert not same_weights(starts[0], probe.head)


def asked_of_fit(monkeypatch, net, split, recipe):
    """Positional and named arguments of `fit`."""
    seen = []
    monkeypatch.setattr(finetune, "fit", lambda *some, **named: seen.append((some, named)))
    stage_two(net, split, recipe)
    return seen[0]


@pytest.mark.parametrize(("pull", "decay"), [(None, 0.01), (0.5, 0), (0.0, 0)])
def test_rates_of_stage_two_and_its_decay(monkeypatch, split, pull, decay):
    """The head's for the last stage, then halved; a pull takes the place of the decay."""
    net = learned()
    net.body.stages = [["0.weight", "0.bias"], ["1.weight", "1.bias"]]
    some, named = asked_of_fit(monkeypatch, net, split, replace(RECIPE, pull=pull))
    groups, penalty = some[3].param_groups, named["penalty"]
    conv, norm = net.body.net[:2]
    expected = [
        (net.head.weight, 3e-3, decay), (net.head.bias, 3e-3, 0),
        (norm.weight, 3e-3, 0), (norm.bias, 3e-3, 0),
        (conv.weight, 1.5e-3, decay), (conv.bias, 1.5e-3, 0),
    ]  # fmt: skip
    flat_groups = [(w, g["initial_lr"], g["weight_decay"]) for g in groups for w in g["params"]]
    assert [(id(w), *rest) for w, *rest in flat_groups] == [(id(w), *x) for w, *x in expected]
    assert named["clip"] == 1
    assert (penalty is None) == (pull is None)
    if penalty is not None:  # at the start the body is where it is pulled to
        head = float(flat(list(net.head.parameters())).square().sum())
        assert float(penalty(net).detach()) == pytest.approx(0.01 / 2 * head)


@pytest.mark.parametrize(("known", "rate"), [(True, 1e-4), (False, 1e-3)])
def test_rate_by_default(monkeypatch, split, known, rate):
    """An untrained body learns at one rate in all stages."""
    net = learned() if known else tiny_classifier()
    net.body.stages = [["0.weight", "0.bias"], ["1.weight", "1.bias"]]
    some, _ = asked_of_fit(monkeypatch, net, split, replace(RECIPE, lr=None))
    rates = [group["initial_lr"] for group in some[3].param_groups]
    assert rates[:3] == [rate] * 3
    assert rates[3:] == [rate / 2 if known else rate] * 2


def test_rate_rises_and_then_falls_along_a_cosine():
    share = finetune._share_of_rate(100)
    assert [share(k) for k in range(10)] == pytest.approx([0.1 * k for k in range(1, 11)])
    assert [share(k) for k in (10, 55, 100)] == pytest.approx([1, 0.5, 0])
    assert [finetune._share_of_rate(1)(k) for k in range(2)] == [1, 1]


def test_pull_keeps_the_body_near_its_start(tmp_path, split):
    far = {}
    for pull in (None, 0.0, 300.0):
        net, out = tiny_classifier(), tmp_path / str(pull)
        start = {f"body.{name}": w.detach().clone() for name, w in net.body.named_parameters()}
        stage_two(net, split, replace(RECIPE, pull=pull), None, out)
        far[pull] = float(flat([last(out)[name] - w for name, w in start.items()]).norm())
    assert far[300.0] < 0.7 * min(far[None], far[0.0])
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
    rows = stage_two(whole, split, RECIPE, None, tmp_path / "whole", workers)
    cut = tmp_path / "cut"
    interrupted(8, lambda: stage_two(tiny_classifier(), split, RECIPE, None, cut, workers))
    assert len(load_safely(cut / "all_layers.pt")["notes"]["rows"]) == 1
    again = stage_two(resumed, split, RECIPE, None, cut, workers)
    assert [row.train_loss for row in again] == [row.train_loss for row in rows]
    assert same_weights(resumed.state_dict(), whole.state_dict())
    assert same_weights(last(tmp_path / "whole"), last(cut))


def test_pull_goes_on_to_where_the_body_was_at_first(tmp_path, split):
    """Not to where it was when it was stopped, which a notebook may have kept."""
    net, recipe, cut = tiny_classifier(), replace(RECIPE, pull=1.0), tmp_path / "cut"
    stage_two(tiny_classifier(), split, recipe, None, tmp_path / "whole")
    interrupted(6, lambda: stage_two(net, split, recipe, None, cut))
    net.zero_grad()
    with suppress(CheckpointMismatch):  # to refuse such a network is as good
        stage_two(net, split, recipe, None, cut)
        assert same_weights(last(cut), last(tmp_path / "whole"))


# The weights between


def test_weights_between_by_hand(split):
    """The middle of two networks, and what is chosen."""
    net, other = tiny_classifier(), tiny_classifier(seed=3)
    start, end = weights_of(other), weights_of(net)
    rows = between(net, start, split, Recipe())
    assert [row["share"] for row in rows] == [0, 0.25, 0.5, 0.75, 1]
    best = max(rows, key=lambda row: (row["accuracy"], -row["loss"]))
    assert [row for row in rows if row["chosen"]] == [best]
    for row in rows:
        share = row["share"]
        mixed = {k: (1 - share) * start[k].float() + share * x for k, x in end.items()}
        other.load_state_dict(mixed | {k: x for k, x in end.items() if not x.is_floating_point()})
        images = classifier.batches(split.validation, 4, classifier.to_test(net))
        loss, accuracy = measure(other, images)
        assert (row["loss"], row["accuracy"]) == (pytest.approx(loss, rel=1e-2), accuracy)
        if row["chosen"]:
            for name, x in net.state_dict().items():
                torch.testing.assert_close(x, other.state_dict()[name])


@pytest.mark.parametrize(("scores", "share"), [
    ([(2, 50), (1, 60), (3, 70), (2, 70), (1, 60)], 0.75),
    ([(1, 50)] * 5, 0), ([(5, 50), (2, 40), (2, 40), (2, 40), (9, 60)], 1),
])  # fmt: skip
def test_most_right_answers_are_chosen_and_then_the_least_loss(split, monkeypatch, scores, share):
    answers = iter(scores)
    monkeypatch.setattr(finetune, "measure", lambda *_: next(answers))
    rows = between(tiny_classifier(), weights_of(tiny_classifier(seed=3)), split, Recipe())
    assert [row["share"] for row in rows if row["chosen"]] == [share]


# The whole recipe


@pytest.fixture
def bodies(monkeypatch):
    """Small bodies, another for each name of weights; what was asked.

    At first they are blind, so that the probe leaves something to be learned.
    """
    asked = []

    def body(weights=pretrained.LITE0, kind="resnet50"):
        asked.append(weights)
        made = blind(tiny_body(seed=len(str(weights))))
        made.fixed = weights is not None
        return made.train()

    monkeypatch.setattr(pretrained, "body", body)
    return asked


@pytest.mark.parametrize("weights", [None, "any"])
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
        told = record["stage_one"]
        assert told["validation_wrong"] == 4 and told["strength"] in finetune.STRENGTHS
        assert [row["share"] for row in record["choice"]["rows"]] == list(finetune.SHARES)
        assert sum(row["chosen"] for row in record["choice"]["rows"]) == 1


def test_probe_only_leaves_stage_two_out(tmp_path, photos, monkeypatch):
    monkeypatch.setattr(pretrained, "body", lambda *_: tiny_body())
    monkeypatch.setattr(finetune, "stage_two", None)
    tested = finetune.run(photos, tmp_path, replace(RECIPE, epochs=0))
    assert names_in(tmp_path) == ["features.pt", MODEL, "record.json", "report.html"]
    assert tested.accuracy == 100
    probe = stage_one(Classifier(tiny_body(), tuple(COLOURS)), labelled.load(photos), RECIPE)
    assert same_weights(classifier.load(tmp_path / MODEL).head.state_dict(), probe.head)


def spread(root, images, classes=2):
    """Plain colours with a little noise, which a probe tells apart."""
    random = np.random.default_rng(0)
    for k in range(classes):
        (root / f"c{k}").mkdir(parents=True)
        for i in range(images):
            pixels = random.integers(0, 90, (8, 8, 3), dtype=np.uint8)
            pixels[..., k] += 160
            Image.fromarray(pixels).save(root / f"c{k}" / f"{i}.png")
    return root


OPEN = replace(RECIPE, epochs=None)
LEFT_OUT = r"^Stage two is left out, as the probe has 95\.\d % or more right .* --epochs 2 or more"


@pytest.mark.parametrize(("images", "recipe", "rows"), [
    (50, OPEN, 0), (20, OPEN, 20), (50, replace(OPEN, epochs=2), 2),
])  # fmt: skip
def test_stage_two_is_left_out_where_the_probe_is_good_for_sure(
    tmp_path, monkeypatch, capsys, images, recipe, rows
):
    """All of 80 right are enough, all of 32 are not; and who asks for it gets it."""
    monkeypatch.setattr(pretrained, "body", lambda *_: tiny_body())
    finetune.run(spread(tmp_path / "photos", images), tmp_path / "out", recipe)
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert record["stage_one"]["accuracy"] == 100
    assert len(record["stage_two"]) == rows
    assert (record.get("left_out") is None) == (rows > 0) == ("choice" in record)
    assert bool(re.search(LEFT_OUT, capsys.readouterr().out, re.M)) == (rows == 0)
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert ("left out, as the probe has 95." in page) == (rows == 0)
    if not rows:
        probe = stage_one(Classifier(tiny_body(), ("c0", "c1")), labelled.load(tmp_path / "photos"),
                          recipe)  # fmt: skip
        kept = classifier.load(tmp_path / "out" / MODEL)
        assert same_weights(kept.head.state_dict(), probe.head)


def test_stage_two_that_was_begun_is_gone_on_with(tmp_path, monkeypatch):
    """Or refused, if it was of another recipe; its classifier is not replaced by the probe."""
    monkeypatch.setattr(pretrained, "body", lambda *_: tiny_body())
    photos, out = spread(tmp_path / "photos", 50), tmp_path / "out"
    finetune.run(photos, out, replace(OPEN, epochs=2))
    before = (out / MODEL).read_bytes()
    with pytest.raises(CheckpointMismatch, match="epochs=2"):
        finetune.run(photos, out, OPEN)
    assert (out / MODEL).read_bytes() == before


@pytest.mark.parametrize(("right", "counts", "weighted", "lowest"), [
    (100.0, (40, 40), False, wilson95(80, 80)[0]),
    (97.5, (40, 40), False, wilson95(78, 80)[0]),
    (100.0, (76, 4), False, wilson95(80, 80)[0]),
    (100.0, (40, 40), True, wilson95(80, 80)[0]),
    (100.0, (76, 4), True, wilson95(15, 15)[0]),
])  # fmt: skip
def test_how_good_a_probe_is_for_sure(right, counts, weighted, lowest):
    """Where classes count alike, 76 and 4 images tell as much as 2^2 / (1/76 + 1/4) = 15 do."""
    labels = [0] * counts[0] + [1] * counts[1]
    train = SimpleNamespace(targets=labels[::2], classes=("a", "b"))
    split = labelled.Split(train, SimpleNamespace(targets=labels[1::2]), None)
    probe = finetune.Probe(1.0, right, 0, {}, {}, 0.0)
    assert finetune._surely(probe, split, Recipe(class_weights=weighted)) == pytest.approx(lowest)


@pytest.mark.parametrize(("seen", "epochs"), [(1, 2), (60, 3), (1600, 20)])
def test_epochs_by_default_are_as_many_as_the_images_allow(split, monkeypatch, seen, epochs):
    """Of 18 images here, never less than 2 and never more than 20."""
    monkeypatch.setattr(finetune, "SEEN", seen)
    some, _ = asked_of_fit(monkeypatch, learned(), split, replace(RECIPE, epochs=None))
    assert some[5] == epochs


def test_probe_is_saved_before_stage_two(tmp_path, photos, bodies):
    """And the classifier of a finished run stays while the same command runs again."""
    interrupted(1, lambda: finetune.run(photos, tmp_path, RECIPE))
    kept = load_safely(tmp_path / MODEL)
    probe = stage_one(Classifier(pretrained.body(), tuple(COLOURS)), labelled.load(photos), RECIPE)
    assert torch.equal(kept["weights"]["head.weight"], probe.head["weight"])
    finetune.run(photos, tmp_path, RECIPE)
    finished = (tmp_path / MODEL).read_bytes()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(finetune, "stage_two", Mock(side_effect=KeyboardInterrupt))
        finetune.run(photos, tmp_path, RECIPE)
    assert (tmp_path / MODEL).read_bytes() == finished


LONG = replace(RECIPE, epochs=12)


def tune_and_leave(photos, out, moment=0):
    """In a process of its own: the recipe, killed at this of its moments; how many they are."""
    torch.set_num_threads(1)
    seen = count(1)

    def alive(half_written=None):
        if next(seen) == moment:
            if half_written is not None:
                half_written.write(b"PK half a file")
                half_written.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(owner, name):
        whole = getattr(owner, name)

        def work(*some, **named):
            alive(some[1] if name == "save" else None)
            found = whole(*some, **named)
            alive()
            return found

        setattr(owner, name, work)

    for owner, name in ((torch, "save"), (os, "fsync"), (Path, "replace"), (AdamW, "step")):
        counted(owner, name)
    finetune.run(photos, out, LONG)
    (out / "moments").write_text(str(next(seen) - 1))


def exit_code(*arguments):
    """Of a fork, which has torch loaded already; one that starts anew would need seconds."""
    process = multiprocessing.get_context("fork").Process(target=tune_and_leave, args=arguments)
    process.start()
    process.join(120)
    return process.exitcode


@pytest.fixture(scope="module")
def never_killed(photos, tmp_path_factory):
    """The folder of a run, and how many moments there are in it."""
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrained, "body", lambda *_: body_that_has_learned())
        assert exit_code(photos, out) == 0
    return out, int((out / "moments").read_text())


def body_that_has_learned():
    made = blind(tiny_body())
    made.fixed = True
    return made.train()


# KILLS=20 tries more moments than there is time for every day. The second of seed 7 leaves half a
# file, which a checkpoint written under its own name would not survive.
@pytest.mark.skipif(os.name != "posix", reason="only there are forks and SIGKILL")
@pytest.mark.parametrize("seed", range(7, 7 + int(os.environ.get("KILLS", 3))))
def test_killed_and_resumed_run_ends_as_one_that_was_not(
    tmp_path, photos, never_killed, monkeypatch, seed
):
    """SIGKILL at two random moments: in, before and after a step and a file that is written."""
    monkeypatch.setattr(pretrained, "body", lambda *_: body_that_has_learned())
    whole, moments = never_killed
    assert moments > 200
    first, second = random.Random(seed).choices(range(1, moments + 1), k=2)
    assert exit_code(photos, tmp_path, first) == -signal.SIGKILL
    # The second run has fewer moments, as it goes on where the first was stopped.
    assert exit_code(photos, tmp_path, second) in (-signal.SIGKILL, 0)
    for kept in tmp_path.glob("*.pt"):  # whatever bears its name is whole
        assert load_safely(kept)
    assert exit_code(photos, tmp_path) == 0
    ends = [load_safely(out / MODEL)["weights"] for out in (tmp_path, whole)]
    assert same_weights(*ends)
    assert same_weights(last(tmp_path), last(whole))
    told = [json.loads((out / "record.json").read_bytes()) for out in (tmp_path, whole)]
    for name in ("test", "confusion", "files", "recipe"):
        assert told[0][name] == told[1][name]
    left = {path.name for path in tmp_path.iterdir()} ^ set(names_in(whole))
    assert all(name.startswith(".") and name.endswith(".partial") for name in left)


def test_probe_is_kept_where_stage_two_diverges(tmp_path, photos, bodies, capsys):
    tested = finetune.run(photos, tmp_path, replace(RECIPE, lr=1e30))
    out = capsys.readouterr().out
    assert re.search(r"^Warning: The loss was no longer finite .* The probe is kept\.$", out, re.M)
    assert "no longer finite" in json.loads((tmp_path / "record.json").read_text())["diverged"]
    probe = stage_one(Classifier(pretrained.body(), tuple(COLOURS)), labelled.load(photos), RECIPE)
    kept = classifier.load(tmp_path / MODEL)
    assert same_weights(kept.head.state_dict(), probe.head)
    assert same_weights(kept.body.state_dict(), pretrained.body().state_dict())
    assert tested.right == classifier.test(kept, labelled.load(photos).test).right


def test_probe_with_all_images_is_kept_where_stage_two_is_no_better(tmp_path, photos, bodies):
    finetune.run(photos, tmp_path, replace(RECIPE, lr=1e-12))
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["choice"]["rows"][0]["chosen"]
    probe = stage_one(Classifier(pretrained.body(), tuple(COLOURS)), labelled.load(photos), RECIPE)
    assert same_weights(classifier.load(tmp_path / MODEL).head.state_dict(), probe.head)


@pytest.mark.parametrize("weights", [None, "any"])
def test_run_goes_on_where_it_was_stopped(tmp_path, photos, bodies, weights):
    """In epoch 2; afterwards a finished one answers again without any training."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"

    def run(out):
        torch.manual_seed(0)
        finetune.run(photos, out, RECIPE, weights)
        record = json.loads((out / "record.json").read_text())
        del record["minutes"]
        for row in finetune._timed(record):
            del row["seconds"]
        return record, load_safely(out / MODEL)["weights"]

    record, end = run(whole)
    interrupted(8, lambda: run(cut))
    assert (cut / MODEL).exists() == bool(weights)
    again = run(cut)
    (cut / MODEL).unlink()
    kept = (cut / "all_layers.pt").read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AdamW, "step", Mock(side_effect=AssertionError))
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


@pytest.mark.parametrize("weights", [None, "any"])
def test_minutes_are_those_of_the_whole_run(tmp_path, photos, bodies, clock, weights):
    """However often it was stopped, and when a finished one answers again."""

    def minutes(out):
        finetune.run(photos, out, RECIPE, weights)
        return json.loads((out / "record.json").read_bytes())["minutes"]

    whole = minutes(tmp_path / "whole")
    # Half a minute for each epoch and for the test; features, probe and choice where they are.
    assert whole == 0.5 * (3 + 1 + (3 if weights else 0))
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
    out, other, recipe, weights = tmp_path / "out", photos, RECIPE, "any"
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
        weights = "another"
    before = (out / "all_layers.pt").read_bytes()
    with pytest.raises(CheckpointMismatch, match=r"(all_layers|features)\.pt was made") as caught:
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
        patch.setattr(
            AdamW, "step", Mock(side_effect=AssertionError)
        )  # finished, so that no step is left
        assert finetune.run(photos, out, RECIPE).right == whole.right


def test_changed_picture_is_named_alone(tmp_path, photos, bodies):
    """In a sentence of a length that does not grow with the number of images."""
    out, copy = tmp_path / "out", copied(photos, tmp_path / "photos")
    finetune.run(photos, out, RECIPE)
    (file, _), *_ = labelled.load(copy).train.samples
    Image.open(file).rotate(180).save(file)
    before = (out / "all_layers.pt").read_bytes()
    name = Path(file).relative_to(copy).as_posix()
    with pytest.raises(CheckpointMismatch, match=rf"features\.pt was made with .*{name}=") as told:
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
        recipe = replace(RECIPE, class_weights=weighted, epochs=12, batch=16, lr=1e-2)
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
    assert "finetune --what" in text and "Stage two" in text
    assert "right in cross-validation" in text
    assert text.count("data:image/jpeg") == len(t.labels) - t.right


# What is told before any training


def no_room(monkeypatch):
    free = SimpleNamespace(free=(1000 << 20) - 1)
    monkeypatch.setattr(metautils.files.shutil, "disk_usage", lambda path: free)


@pytest.mark.parametrize(
    ("out", "sentence"),
    [
        ("file/out", "out cannot be written to .*: choose another folder"),
        ("file", "file cannot be written to .*: choose another folder"),
        ("/proc/x", "/proc/x cannot be written to .*: choose another folder"),
        ("full", "full has room for 999 MB, but 1000 MB are needed: free some space"),
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


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "levit_128s"])
def test_size_that_a_body_refuses_is_told_before_any_training(tmp_path, photos, monkeypatch, name):
    """By an assertion of timm's or by shapes that do not fit; its own size is taken."""
    made = pretrained.body(None, f"timm:{name}")
    monkeypatch.setattr(pretrained, "body", lambda *_: made)
    monkeypatch.setattr(finetune, "both_stages", Mock(side_effect=KeyError))
    told = rf"^--size 64: timm:{name} was made for images of 224 pixels and refuses others: leave"
    with pytest.raises(BadArgument, match=told):
        finetune.run(photos, tmp_path, replace(RECIPE, size=64))
    assert names_in(tmp_path) == []
    with pytest.raises(KeyError):
        finetune.run(photos, tmp_path, replace(RECIPE, size=None))


def test_size_that_takes_too_much_memory_is_another_matter(monkeypatch):
    net = tiny_classifier(size=32)
    error = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to")
    monkeypatch.setattr(net.body, "forward", Mock(side_effect=error))
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        finetune._check_size(net)


@pytest.mark.parametrize("fixed", [True, False])
def test_a_look_at_the_size_changes_nothing(fixed):
    net = tiny_classifier(size=32)
    net.body.fixed = fixed
    before, state = weights_of(net.train()), torch.get_rng_state()
    finetune._check_size(net)
    assert same_weights(net.state_dict(), before) and torch.equal(torch.get_rng_state(), state)
    assert net.training and net.body.net[1].training != fixed


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
        ("good", ("--weights", "gone.pt"), r"gone\.pt does not exist: name a file of weights, or"),
        ("good", ("--weights", "timm:gone"), "timm knows no body 'gone'"),
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
