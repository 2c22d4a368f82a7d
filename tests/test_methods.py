"""Every method can be made and trained as its learner's file says, and a reader's own is found."""

import json
import re
import sys

import pytest
import torch
from helpers import OWN_METHOD, blobs, own_method, tiny_body, told_in_one_line, train

from metautils import methods, pretrained
from metautils.episode import Episode
from metautils.evaluate import evaluate
from metautils.learners import baseline
from metautils.learners.base import Problem
from metautils.sampling import EpisodeSampler
from metautils.train import meta_train


@pytest.mark.parametrize(
    ("names", "settings"),
    [
        (("protonet", "matching"), ((5, 1), (5, 5), (20, 1), (20, 5))),
        (("relation",), ((5, 3), (20, 3))),
        (("maml", "fomaml", "anil", "meta_sgd", "meta_lstm", "reptile", "imaml"), ((4, 3),)),
    ],
)
def test_settings_that_a_learner_is_tested_in(names, settings):
    """Of one that was trained in 4 ways with 3 shots."""
    assert all(methods.known()[name].tests(4, 3) == settings for name in names)


@pytest.mark.parametrize("method", methods.known())
@pytest.mark.parametrize("name", ["quick", "full"])
def test_presets_are_sound(method, name):
    """The real ones, with the real network, on images of the real size."""
    made = methods.known()[method]
    preset = made.presets[name]
    assert preset.episodes >= 600
    learner = made.make(Problem(torch.Size([1, 28, 28]), preset.ways, 12))
    x = torch.rand(1, preset.ways * preset.shots, 1, 28, 28)
    y = torch.arange(preset.ways).repeat(1, preset.shots)
    predictions = learner.eval()(x, y, torch.rand(1, 2, 1, 28, 28))
    assert predictions.shape == (1, 2, preset.ways)
    assert predictions.isfinite().all()


def small(monkeypatch, method, problem):
    """The learner of a method, with a tiny body if that is pretrained, and of two inner steps."""
    monkeypatch.setattr(pretrained, "body", lambda weights: tiny_body())
    monkeypatch.setattr(baseline, "STEPS", 2)
    learner = methods.known()[method].make(problem)
    for name in {"steps", "test_steps"} & vars(learner).keys():
        setattr(learner, name, min(2, getattr(learner, name)))
    return learner


@pytest.mark.parametrize("method", methods.known())
@pytest.mark.parametrize(("size", "channels"), [(28, 1), (28, 3), (32, 3), (64, 1), (84, 3)])
def test_images_of_every_size_are_learned_from(monkeypatch, method, size, channels):
    """A whole learner answers a tiny task, and each of its pieces sends gradients back."""
    learner = small(monkeypatch, method, Problem(torch.Size([channels, size, size]), 2, 2))
    labels = torch.arange(2)[None]
    support, queries = torch.rand(2, 1, 2, channels, size, size)
    predictions = learner(support, labels, queries)
    assert predictions.shape == (1, 2, 2)
    for loss, *_ in learner.pieces(Episode(support, labels, queries, labels, labels)):
        loss.backward()
    assert any(p.grad is not None and p.grad.any() for p in learner.parameters())
    with torch.no_grad():
        assert learner.eval()(support, labels, queries).shape == (1, 2, 2)


@pytest.mark.parametrize("method", methods.known())
def test_float64_is_kept_where_it_is_the_default(monkeypatch, float64, method):
    """From the images to the predictions, in training and evaluation."""
    bank = blobs(classes=3, images=4, size=28)
    learner = small(monkeypatch, method, Problem(torch.Size([1, 28, 28]), 3, 3))
    episodes = EpisodeSampler(bank, 3, 1, 1, tasks=2, rotate=True)
    e = episodes.sample()
    assert e.support_x.dtype == torch.float64
    meta_train(learner, episodes, 1, validation=episodes, validation_episodes=2, progress=False)
    assert learner(e.support_x, e.support_y, e.query_x).dtype == torch.float64
    (score,) = evaluate(learner, bank, [(3, 1)], queries=1, episodes=2)
    assert 0 <= score.accuracy <= 100


def test_every_learners_file_is_known():
    names = set(methods.known())
    assert {"protonet", "matching", "relation", "maml", "anil", "meta_lstm", "baseline"} <= names
    assert all(set(method.presets) == {"quick", "full"} for method in methods.known().values())


@pytest.mark.parametrize("name", methods.known())
def test_known_method_is_found(name):
    assert methods.find(name) is methods.known()[name]


@pytest.mark.parametrize("name", ["protone", "", "mine", "Protonet"])
def test_unknown_name_is_told_with_those_there_are(name):
    sentence = f"^'{name}' is no method: name one of .*protonet.*, or a file .* such as ./mine.py.$"
    told_in_one_line(lambda: methods.find(name), sentence)


def test_method_in_a_file_of_the_readers_own(tmp_path):
    path = own_method(tmp_path)
    found = methods.find(str(path))
    assert (found.title, found.any_ways) == ("Nearest mean", True)
    learner = found.make(Problem(torch.Size([1, 8, 8]), 3, 12))
    x, y = torch.rand(1, 3, 1, 8, 8), torch.arange(3)[None]
    assert learner(x, y, x).argmax(-1).tolist() == [[0, 1, 2]]
    assert path.name not in methods.known()


def test_file_of_the_readers_own_may_hold_a_dataclass_and_any_name(tmp_path):
    """Also that of a module which others import."""
    lines = "from __future__ import annotations\n\nfrom dataclasses import dataclass\n"
    lines += f"{OWN_METHOD}\n@dataclass\nclass Note:\n    text: str = ''\n"
    (tmp_path / "json.py").write_text(lines)
    assert methods.find(str(tmp_path / "json.py")).title == "Nearest mean"
    assert sys.modules["json"] is json


OWN_FILES_THAT_ARE_NONE = pytest.mark.parametrize(
    ("text", "sentence"),
    [
        pytest.param(None, r"mine\.py does not exist: check the name", id="missing"),
        pytest.param("x = 1", r"mine\.py lists 0 methods: give it one, METHODS", id="no METHODS"),
        pytest.param("METHODS = [1]", r"mine\.py lists 0 methods: give it one", id="a list"),
        pytest.param("METHODS = {'mine': 1}", r"mine\.py lists 0 methods: give", id="a number"),
        pytest.param("METHODS = {}", r"mine\.py lists 0 methods: give it one", id="empty"),
        pytest.param(
            f"{OWN_METHOD}\nMETHODS['second'] = METHODS['mine']\n",
            r"mine\.py lists 2 methods: give it one",
            id="two",
        ),
    ],
)


@OWN_FILES_THAT_ARE_NONE
def test_file_without_a_method_is_told(tmp_path, text, sentence):
    path = tmp_path / "mine.py"
    if text is not None:
        path.write_text(text)
    told_in_one_line(lambda: methods.find(str(path)), sentence)


@OWN_FILES_THAT_ARE_NONE
def test_file_without_a_method_is_told_on_the_command_line(tmp_path, capsys, text, sentence):
    if text is not None:
        (tmp_path / "mine.py").write_text(text)
    assert train(tmp_path / "run", method=str(tmp_path / "mine.py")) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(rf"metautils: .*{sentence}.*\n", err)
    assert not (tmp_path / "run").exists()
