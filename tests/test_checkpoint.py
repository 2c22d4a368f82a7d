"""A checkpoint is gone on with only by the run that wrote it, and damage is told."""

import pytest
import torch
from helpers import (
    LENGTH,
    STEPS,
    Scripted,
    interrupt,
    judge,
    nan,
    run,
    same_weights,
    source,
    tiny,
    weights_of,
)
from torch import nn

from metautils.checkpoint import CHECKPOINT, CheckpointMismatch, Training, digest, load_weights
from metautils.files import DataError
from metautils.learners.protonet import cosine
from metautils.train import meta_train

# The state of a training


def training(path=None, seed=0, settings=None):
    """Of a layer, by SGD with momentum, at a rate that halves after every step."""
    torch.manual_seed(seed)
    net = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    return Training(net, optimizer, schedule, settings or {"lr": 0.1}, path)


def learn(t, steps):
    """So many steps on random inputs of the global generator."""
    for _ in range(steps):
        t.net(torch.randn(4, 3)).square().sum().backward()
        t.optimizer.step()
        t.optimizer.zero_grad()
        t.schedule.step()


def test_training_goes_on_as_if_it_had_never_stopped(tmp_path):
    """In weights, momentum, rate and random numbers; the notes come back as they were given."""
    whole, path = training(), tmp_path / "new" / "x.pt"
    learn(whole, 2)
    whole.path = path
    whole.save(step=2, history={"loss": [0.5, 0.25]})
    learn(whole, 3)
    expected = torch.rand(3)
    resumed = training(path, seed=1)
    torch.manual_seed(5)
    assert resumed.resume() == {"step": 2, "history": {"loss": [0.5, 0.25]}}
    learn(resumed, 3)
    assert same_weights(resumed.net.state_dict(), whole.net.state_dict())
    assert resumed.schedule.get_last_lr() == whole.schedule.get_last_lr() == [0.1 / 2**5]
    assert torch.equal(torch.rand(3), expected)


def test_training_without_a_checkpoint_begins_anew(tmp_path):
    assert training().resume() is None
    assert training(tmp_path / "x.pt").resume() is None
    training().save(step=1)
    assert list(tmp_path.iterdir()) == []


def test_best_weights_are_those_of_the_highest_merit(tmp_path):
    """The first of equals; a merit is compared place by place. A resumed training knows them."""
    t, seen = training(tmp_path / "x.pt"), []
    for at, merit in enumerate([(50.0, -2.0), (50.0, -1.0), (50.0, -1.0), (40.0, 9.0)]):
        learn(t, 1)
        seen.append(weights_of(t.net))
        assert t.try_out(merit, at) == (at < 2)
    assert (t.merit, t.best_at) == ((50.0, -1.0), 1)
    t.save()
    other = training(tmp_path / "x.pt", seed=1)
    assert other.resume() == {}
    assert (other.merit, other.best_at) == ((50.0, -1.0), 1)
    assert not other.try_out((50.0, -1.0), 9)
    for each in (t, other):
        assert same_weights(each.net.state_dict(), seen[3])
        each.finish()
        assert same_weights(each.net.state_dict(), seen[1])


def test_training_that_was_never_tried_ends_as_it_began():
    t = training()
    before = weights_of(t.net)
    learn(t, 2)
    t.finish()
    assert same_weights(t.net.state_dict(), before)


def test_gradients_of_an_interruption_are_dropped():
    t = training()
    t.net(torch.ones(1, 3)).sum().backward()
    again = Training(t.net, t.optimizer, t.schedule, {})
    assert all(p.grad is None for p in again.net.parameters())


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"lr": 0.2}, "lr=0.1, not 0.2"),
        ({"lr": 0.1, "more": None, "clip": 1.0}, "clip=None, not 1.0"),
        ({}, "lr=0.1, not None"),
    ],
)
def test_settings_are_compared_one_by_one(tmp_path, settings, told):
    training(tmp_path / "x.pt").save()
    other = training(tmp_path / "x.pt")
    other.settings = settings
    with pytest.raises(CheckpointMismatch, match=f"was made with {told}: give the same settings"):
        other.resume()


def test_difference_inside_a_setting_is_named_alone(tmp_path):
    """One file among many is told, not all that there are."""
    files = {f"red/{k}.png": f"hash {k}" for k in range(500)}
    training(tmp_path / "x.pt", settings={"train": files}).save()
    other = training(tmp_path / "x.pt", settings={"train": files | {"red/77.png": "new"}})
    with pytest.raises(CheckpointMismatch, match=r"train\.red/77\.png=hash 77, not new") as caught:
        other.resume()
    assert len(str(caught.value)) < 300 + len(str(tmp_path))


def test_training_that_failed_tells_what_stays(tmp_path):
    with pytest.raises(FloatingPointError, match=r"^It broke, so training stopped\. Rest\.$"):
        training().stop("It broke", "Rest.")
    sentence = r"^It broke, so training stopped\. The last good checkpoint stays in .*x\.pt\. Rest"
    with pytest.raises(FloatingPointError, match=sentence):
        training(tmp_path / "x.pt").stop("It broke", "Rest.")


# Resuming a meta-training


def stopped(tmp_path):
    """A folder with a checkpoint at step 5."""
    learner = Scripted(8, interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, learner)
    return tmp_path / CHECKPOINT


def refuses(path, learner, sentence, error=CheckpointMismatch, episodes=None, **changed):
    """Resuming fails with the sentence, and neither learner nor file are other than before."""
    bytes_before = path.read_bytes()
    before = {name: x.clone() for name, x in learner.state_dict().items()}
    with pytest.raises(error, match=sentence) as caught:
        length = LENGTH | changed
        meta_train(learner, episodes or source(), validation=judge(), out=path.parent, **length)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert same_weights(learner.state_dict(), before)
    assert path.read_bytes() == bytes_before
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("network", "sentence"),
    [
        (nn.Linear(16, 9), r"embed\.1\.weight' has shape \(8, 16\) there and \(9, 16\) here"),
        (nn.Linear(16, 8, bias=False), r"embed\.1\.bias' has shape \(8,\) there and None here"),
        (
            nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 8)),
            r"embed\.1\.0\.weight' has shape None there and \(8, 16\) here",
        ),
    ],
)
def test_checkpoint_of_another_network(tmp_path, network, sentence):
    path, learner = stopped(tmp_path), Scripted(0, nan)
    learner.embed[1] = network
    refuses(path, learner, "belongs to another network: '" + sentence)
    before = {name: x.clone() for name, x in learner.state_dict().items()}
    with pytest.raises(CheckpointMismatch, match=sentence):
        load_weights(learner, path)
    assert same_weights(learner.state_dict(), before)


@pytest.mark.parametrize(
    "changed",
    [
        {"steps": 21},
        {"lr": 0.002},
        {"every": 4},
        {"validation_episodes": 7},
        {"clip": 1.0},
        {"each_piece": True},
    ],
)
def test_checkpoint_of_other_settings(tmp_path, changed):
    (name,) = changed
    sentence = rf"was made with {name}=\S+, not {changed[name]}: give the same settings"
    refuses(stopped(tmp_path), Scripted(0, nan), sentence, **changed)


class Other(Scripted):
    """A learner of another kind with the same weights."""


def test_checkpoint_of_another_learner(tmp_path):
    """Of another class, or with other settings than weights."""
    path, other, changed = stopped(tmp_path), Other(0, nan), Scripted(0, nan)
    changed.distance = cosine
    refuses(path, other, r"was made with learner=Scripted\(.*, not Other\(.*: give the same")
    refuses(path, changed, r"distance=squared_euclidean\), not .*distance=cosine\): give the same")
    run(tmp_path, Scripted(0, nan))


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"seed": 3}, "seed=0, not 3"),
        ({"ways": 4}, "ways=3, not 4"),
        ({"shots": 2}, "shots=1, not 2"),
        ({"queries": 1}, "queries=2, not 1"),
        ({"tasks": 1}, "tasks=2, not 1"),
        ({"rotate": True}, "rotate=False, not True"),
        ({"bank_seed": 1}, "bank="),
    ],
)
def test_checkpoint_of_other_episodes(tmp_path, changed, sentence):
    path = stopped(tmp_path)
    refuses(path, Scripted(0, nan), f"was made with {sentence}", episodes=source(**changed))


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_truncated_checkpoint(tmp_path, share):
    path = stopped(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    refuses(path, Scripted(0, nan), "is damaged, or not written here: delete it", DataError)
    with pytest.raises(DataError, match="is damaged"):
        load_weights(Scripted(0, nan), path)


@pytest.mark.parametrize("value", [{"weights": torch.ones(2)}, torch.ones(2), None])
def test_file_that_is_no_checkpoint(tmp_path, value):
    path = tmp_path / CHECKPOINT
    torch.save(value, path)
    refuses(path, Scripted(0, nan), "is no checkpoint of a training", DataError)
    with pytest.raises(DataError, match="is no checkpoint of a training"):
        load_weights(Scripted(0, nan), path)


def test_stray_temporary_file_is_no_checkpoint(tmp_path):
    (tmp_path / f".{CHECKPOINT}.123").write_bytes(b"half")
    learner, history = run(tmp_path)
    assert len(history.loss) == STEPS
    assert same_weights(learner.state_dict(), run()[0].state_dict())


def test_load_weights_of_a_missing_file(tmp_path):
    with pytest.raises(DataError, match=r"checkpoint\.pt does not exist"):
        load_weights(tiny(), tmp_path / CHECKPOINT)


def test_digest_sees_every_byte_and_not_the_layout():
    x = torch.arange(24.0).view(1, 2, 3, 4)
    assert digest("a", x) == digest("a", x.to(memory_format=torch.channels_last))
    others = [("b", x), ("a", x.flip(0, 1)), ("a", x.double()), ("a", x, x), ("a", x.nextafter(-x))]
    assert len({digest("a", x), *(digest(*each) for each in others)}) == 6
    assert digest("a", torch.tensor(1), torch.tensor(True), x.bfloat16())
