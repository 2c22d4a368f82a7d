"""Episodes on a body that learned elsewhere: trained, tested, resumed and told as all others."""

from itertools import pairwise

import pytest
import torch
from helpers import again, blobs, paint, quick_preset, read_json, same_weights, tiny_body, train
from torch import nn

from metautils import cli, methods, precision, pretrained, runs
from metautils.checkpoint import CHECKPOINT, load_weights
from metautils.data.bank import as_float
from metautils.errors import BadArgument
from metautils.evaluate import episode_accuracy, evaluate
from metautils.learners import anil
from metautils.learners.base import ON_BODY, Learner, Problem, takes_features
from metautils.learners.baseline import nearest_centroid
from metautils.learners.maml import MAML
from metautils.learners.protonet import ProtoNet, ScaledCosine, cosine
from metautils.nets import LearnedScale, classifier
from metautils.sampling import EpisodeSampler
from metautils.train import meta_train

ABLE = [name for name, method in methods.known().items() if method.on_body]
pytestmark = pytest.mark.usefixtures("short_runs")


@pytest.fixture
def body(monkeypatch):
    """A tiny body in place of the pretrained ones, with fixed statistics as they have."""

    def known(weights=None, kind="resnet50"):
        made = tiny_body()
        made.fixed = True
        return made.train()

    monkeypatch.setattr(pretrained, "body", known)
    monkeypatch.setattr(runs, "ON_BODY", 16)
    return known


def test_who_can_train_a_body():
    assert {"protonet", "matching", "baseline_pp", "anil"} <= set(ABLE)


def test_a_method_that_cannot_is_told_with_those_that_can(tmp_path, capsys):
    assert train(tmp_path / "run", "--body", "efficientnet_lite0", method="maml") == 2
    err = capsys.readouterr().err
    assert err.startswith("metautils: maml trains no --body: only ")
    assert "protonet" in err
    assert not (tmp_path / "run").exists()


def test_body_that_is_none_is_told(tmp_path, capsys):
    assert train(tmp_path / "run", "--body", "gone") == 2
    assert capsys.readouterr().err.startswith("metautils: gone does not exist: name a file of")


@pytest.mark.parametrize("method", ABLE)
def test_training_leaves_a_record_and_a_body(tmp_path, method, body, capsys):
    assert train(tmp_path, "--body", "timm:some", method=method) == 0
    record = read_json(tmp_path / "record.json")
    assert record["body"] == "timm:some"
    assert record["train"]["lr"] == 1e-3
    asked = methods.known()[method].tests(4, 1)  # of training with 4 ways, as `train` asks for
    assert [(e["ways"], e["shots"]) for e in record["evaluations"]] == list(asked)
    made, size = runs.trained_body(tmp_path)
    saved = torch.load(tmp_path / CHECKPOINT, weights_only=True)["best"]
    assert size == 16
    assert same_weights(made.state_dict(), {k: saved[f"embed.1.{k}"] for k in made.state_dict()})
    assert not same_weights(made.state_dict(), body().state_dict())  # it has learned
    statistics = [name for name in made.state_dict() if "running" in name]
    assert statistics
    for name in statistics:  # and yet these are those that it came with
        assert torch.equal(made.state_dict()[name], body().state_dict()[name])
    assert again(tmp_path, "--rotations", record["rotations"]) == 0
    (path,) = tmp_path.glob("record-*.json")
    assert read_json(path)["evaluations"] == record["evaluations"]


def test_run_without_a_body_has_none(tmp_path, capsys):
    assert train(tmp_path) == 0
    capsys.readouterr()
    paint(tmp_path / "things", 1)
    photo = tmp_path / "things" / "red" / "0.png"
    arguments = ["recognise", "--support", tmp_path / "things", "--run", tmp_path, photo]
    assert cli.main(list(map(str, arguments))) == 2
    told = capsys.readouterr().err
    assert f"{tmp_path} holds a small network of its own" in told
    assert "train with --body" in told


def test_own_photos_are_read_as_large_as_the_body_sees_them(tmp_path, body, monkeypatch):
    sizes = []
    load = runs.data.folder.load

    def seen(*arguments, **named):
        sizes.append(named.get("size"))
        return load(*arguments, **named)

    monkeypatch.setattr(runs.data.folder, "load", seen)
    monkeypatch.setattr(runs, "VALIDATED", 3)
    paint_many(tmp_path / "photos")
    assert train(tmp_path / "run", "--data", tmp_path / "photos", "--body", "any") == 0
    assert again(tmp_path / "run") == 0
    assert sizes == [16, 16]


def paint_many(root):
    """Eight classes of photos."""
    for k in range(4):
        paint(root, 10, names=[f"class{2 * k}", f"class{2 * k + 1}"], seed=k)


@pytest.mark.parametrize("method", ABLE)
def test_stopped_training_ends_with_the_same_weights(tmp_path, method, body, monkeypatch):
    """Bit for bit, though images vary by chance, on photos that a folder holds."""
    quick_preset(monkeypatch, 6, 2, 1, 2, 3)
    paint_many(tmp_path / "photos")
    command = ["--data", tmp_path / "photos", "--body", "any"]
    assert train(tmp_path / "whole", *command, method=method) == 0
    sample, calls = EpisodeSampler.sample, []

    def stopped(sampler):
        calls.append(sampler.vary)
        if calls.count(True) == 5:
            raise KeyboardInterrupt
        return sample(sampler)

    with monkeypatch.context() as patch:
        patch.setattr(EpisodeSampler, "sample", stopped)
        assert train(tmp_path / "cut", *command, method=method) == 130
    assert train(tmp_path / "cut", *command, method=method) == 0
    whole, cut = (
        torch.load(tmp_path / x / CHECKPOINT, weights_only=True) for x in ("whole", "cut")
    )
    assert same_weights(whole["net"], cut["net"])
    assert same_weights(whole["best"], cut["best"])
    for name in ("loss", "accuracy", "validation"):
        assert whole["notes"]["history"][name] == cut["notes"]["history"][name]


def test_another_body_in_the_same_folder_is_told(tmp_path, body, capsys):
    assert train(tmp_path, "--body", "any") == 0
    capsys.readouterr()
    assert train(tmp_path, "--body", "other") == 2
    assert "was made with body=any, not other: give the same" in capsys.readouterr().err
    assert train(tmp_path) == 2
    assert "belongs to another network" in capsys.readouterr().err


def test_weights_are_chosen_on_few_images_of_the_validation_classes(tmp_path, body, monkeypatch):
    monkeypatch.setattr(runs, "VALIDATED", 4)
    seen = []

    def noted(learner, episodes, *arguments, **named):
        seen.append((episodes, arguments[2], named))
        return meta_train(learner, episodes, *arguments, **named)

    monkeypatch.setattr(runs, "meta_train", noted)
    assert train(tmp_path, "--body", "any") == 0
    ((episodes, choose, named),) = seen
    assert choose.bank.counts.tolist() == [4] * 12  # three classes, each in four rotations
    assert not set(choose.bank.names) & set(episodes.bank.names)
    assert not episodes.vary  # drawings, which a mirror would make others
    assert (named["warm_up"], named["clip"]) == (30, 1.0)
    assert (
        len(torch.load(tmp_path / CHECKPOINT, weights_only=True)["notes"]["history"]["validation"])
        > 1
    )


# The rate


def rates(steps, warm_up, lr=0.1):
    """Of each step, by the step that AdamW makes without gradients: it shrinks the weights."""
    learner = ProtoNet(nn.Sequential(nn.Flatten(), nn.Linear(16, 2)))
    found, step = [], torch.optim.AdamW.step

    def noted(optimizer, *arguments):
        found.append(optimizer.param_groups[0]["lr"])
        return step(optimizer, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", noted)
        episodes = EpisodeSampler(blobs(), 3, 1, 2)
        meta_train(learner, episodes, steps, lr, progress=False, warm_up=warm_up)
    return found


def test_rate_rises_then_falls_in_a_straight_line():
    found = rates(steps=10, warm_up=4)
    assert found[:4] == pytest.approx([0.025, 0.05, 0.075, 0.1])
    falls = [a - b for a, b in pairwise(found[3:])]
    assert falls == pytest.approx([0.1 / 7] * 6)


def test_short_training_warms_up_in_half_of_it():
    assert max(rates(steps=4, warm_up=30)) == pytest.approx(0.1)
    assert rates(steps=1, warm_up=30) == pytest.approx([0.1])


def test_checkpoints_of_before_go_on(tmp_path):
    """Those that know nothing of a warm-up or of varied images."""

    def go(steps):
        torch.manual_seed(0)
        learner = ProtoNet(nn.Sequential(nn.Flatten(), nn.Linear(16, 2)))
        return meta_train(
            learner, EpisodeSampler(blobs(), 3, 1, 2), steps, out=tmp_path, progress=False
        )

    first = go(3)
    path = tmp_path / CHECKPOINT
    state = torch.load(path, weights_only=True)
    del state["settings"]["warm_up"]
    torch.save(state, path)
    assert go(3).loss == first.loss


# Varied images


def varied(bank, **named):
    return EpisodeSampler(bank, 3, 2, 3, tasks=2, vary=True, **named)


def test_varied_images_are_shifted_or_mirrored_ones_of_the_bank():
    """Each is one of the 18 that an image of 8x8 can become, with its edge repeated."""
    bank = blobs(classes=4, images=6, size=8)
    episode = varied(bank, seed=1).sample()
    plain = EpisodeSampler(bank, 3, 2, 3, tasks=2, seed=1)
    seen = set()
    for x in episode.support_x.flatten(0, 1):
        matches = []
        for image in as_float(bank.images):
            edges = nn.functional.pad(image[None], (1, 1, 1, 1), mode="replicate")[0]
            for dy in range(3):
                for dx in range(3):
                    crop = edges[:, dy : dy + 8, dx : dx + 8]
                    both = (crop, crop.flip(-1))
                    matches += [(dy, dx, m) for m in (0, 1) if torch.equal(x, both[m])]
        assert matches
        seen.add(matches[0])
    assert len(seen) > 4
    assert episode.support_x.shape == plain.sample().support_x.shape


def test_features_cannot_be_varied():
    features = blobs().map(nn.Flatten())
    with pytest.raises(BadArgument, match=r"^Only images can be varied, not \(16,\)\.$"):
        EpisodeSampler(features, 3, 1, 2, vary=True)


def test_varied_images_follow_the_seed_and_the_generator():
    bank = blobs(classes=4, images=6, size=8)
    a, b = varied(bank, seed=3), varied(bank, seed=3)
    assert torch.equal(a.sample().query_x, b.sample().query_x)
    state = a.generator.get_state()
    first = a.sample().query_x
    a.generator.set_state(state)
    assert torch.equal(a.sample().query_x, first)
    assert not torch.equal(a.sample().query_x, first)


def test_varied_images_of_bytes_become_numbers_in_0_to_1():
    bank = blobs(classes=4, images=6, size=8)
    assert bank.images.dtype == torch.uint8
    x = varied(bank).sample().support_x
    assert x.dtype == torch.float32
    assert 0 <= float(x.min()) <= float(x.max()) <= 1
    assert float(x.max()) > 0.1


# The learned factor


def test_factor_is_learned_at_rates_that_suit_pretrained_weights():
    torch.manual_seed(0)
    learner = ProtoNet(nn.Sequential(nn.Flatten(), nn.Linear(16, 8)), ScaledCosine())
    bank = blobs(classes=6, images=8)
    meta_train(learner, EpisodeSampler(bank, 5, 1, 2), 60, lr=1e-4, progress=False, warm_up=10)
    scale = float(learner.distance.scale(torch.ones(())).detach())
    assert abs(scale - 10) > 1
    assert all(
        name.startswith(("embed", "distance.scale")) for name, _ in learner.named_parameters()
    )


def test_factor_starts_as_told():
    a, b = torch.rand(2, 3, 4), torch.rand(2, 5, 4)
    assert torch.allclose(ScaledCosine(7.0)(a, b), 7 * cosine(a, b))
    assert repr(ScaledCosine()) == "ScaledCosine(start=10)"
    assert LearnedScale(2.0).extra_repr() == "start=2"


# Features once


@pytest.mark.parametrize("method", ABLE)
def test_answers_on_features_are_the_same(method, monkeypatch):
    monkeypatch.setattr(precision, "half", lambda *device: None)
    torch.manual_seed(0)
    bank = blobs(classes=6, images=8, size=16)
    embed = tiny_body()
    learner = methods.known()[method].on_body(Problem(torch.Size([3, 16, 16]), 3, 6), embed)
    light, features = learner.on_features(bank)
    sampler = EpisodeSampler(bank, 3, 2, 3, tasks=4)
    whole = sampler.sample()
    few = EpisodeSampler(features, 3, 2, 3, tasks=4).sample()
    with torch.no_grad():
        expected = learner.eval()(whole.support_x, whole.support_y, whole.query_x)
        found = light(few.support_x, few.support_y, few.query_x)
    assert torch.allclose(found, expected, atol=1e-5)
    assert (
        torch.equal(found.argmax(-1), expected.argmax(-1)) or (found - expected).abs().max() < 2e-2
    )


def test_validation_embeds_each_image_once():
    """Where the episodes show more images than there are, and leaves mode and generator right."""
    bank = blobs(classes=4, images=6)
    seen = []

    class Counted(nn.Flatten):
        def forward(self, x):
            seen.append(len(x))
            return super().forward(x)

    learner = ProtoNet(Counted()).train()
    many, few = EpisodeSampler(bank, 3, 1, 2, seed=1), EpisodeSampler(bank, 3, 1, 2, seed=1)
    accuracy = episode_accuracy(learner, many, 20)
    assert sum(seen) == len(bank.images)
    assert learner.training
    del seen[:]
    parts = torch.cat([episode_accuracy(learner, few, 2) for _ in range(10)])
    assert sum(seen) == 20 * 9
    assert torch.allclose(parts, accuracy, atol=1e-3)
    assert torch.equal(many.generator.get_state(), few.generator.get_state())


def test_a_sampler_of_ones_own_draws_images():
    class Darker(EpisodeSampler):
        def sample(self):
            episode = super().sample()
            assert episode.support_x.dim() == 5
            return episode

    learner = ProtoNet(nn.Flatten())
    assert len(episode_accuracy(learner, Darker(blobs(classes=4, images=6), 3, 1, 2), 20)) == 20


def test_loaded_weights_answer_as_the_trained_ones(tmp_path, body):
    assert train(tmp_path, "--body", "any") == 0
    method = methods.known()["protonet"]
    problem = Problem(torch.Size([1, 16, 16]), 4, 24)
    learner = runs._learner(method, problem, 0, "any")
    load_weights(learner, tmp_path / CHECKPOINT)
    bank = blobs(classes=6, images=8, size=16)
    assert evaluate(learner, bank, [(3, 1)], 3, 4)[0].accuracy > 0


def test_recipe_is_gentle():
    for preset in ON_BODY.values():
        assert (preset.lr, preset.clip) == (1e-4, 1.0)


def test_a_forward_of_ones_own_sees_the_images():
    """A subclass may look at them; without one its answers are its parent's, of its own class."""

    class Own(ProtoNet):
        def forward(self, support_x, support_y, query_x):
            assert support_x.dim() == 5
            return super().forward(support_x, support_y, query_x)

    class Same(ProtoNet):
        pass

    bank = blobs(classes=4, images=6)
    for kind, features in ((Own, False), (Same, True)):
        learner = kind(nn.Flatten())
        assert takes_features(learner) == features
        assert len(episode_accuracy(learner, EpisodeSampler(bank, 3, 1, 2), 20)) == 20
        light, _ = learner.on_features(bank)
        assert type(light) is kind
        assert isinstance(light.embed, nn.Identity) and isinstance(learner.embed, nn.Flatten)
    assert not takes_features(Learner())


def test_anil_on_a_body_is_anil():
    """Features once instead of at every inner step: the same predictions and meta-gradients."""
    torch.manual_seed(0)
    bank = blobs(classes=6, images=8)
    body = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh())

    class Unit(nn.Module):
        def forward(self, x):
            return anil.LENGTH * nn.functional.normalize(body(x), dim=-1)

    episode = EpisodeSampler(bank, 3, 2, 4, tasks=2).sample()
    once = anil.FeatureANIL(body, MAML(nn.Linear(8, 3), lr=0.1, steps=3)).double()
    unit = Unit()
    unit.body = body
    whole = anil.ANIL(classifier(unit, 8, 3), lr=0.1, steps=3).double()
    whole.net.head = once.head.net
    x, y, queries = episode.support_x.double(), episode.support_y, episode.query_x.double()
    results = []
    for learner in (once, whole):
        predictions = learner(x, y, queries)
        gradients = torch.autograd.grad(
            learner.loss(predictions, episode.query_y),
            [*body.parameters(), *once.head.parameters()],
        )
        results.append((predictions, *gradients))
    for a, b in zip(*results, strict=True):
        assert float(a.detach().abs().max()) > 0
        torch.testing.assert_close(a, b)


def test_first_step_of_anil_on_a_body_is_the_nearest_centroid():
    """Of one image a class, from a head of zeros."""
    bank = blobs(classes=6, images=8).map(nn.Flatten())
    episode = EpisodeSampler(bank, 3, 1, 5, tasks=4).sample()
    task = episode.support_x, episode.support_y, episode.query_x
    learner = anil._on_body(Problem(torch.Size([16]), 3, 6), nn.Identity())
    learner.head.steps = learner.head.test_steps = 1
    assert torch.equal(learner(*task).argmax(-1), nearest_centroid(*task).argmax(-1))
