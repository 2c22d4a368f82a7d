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
)
from torch import nn

from metautils.checkpoint import CHECKPOINT, CheckpointMismatch, load_weights
from metautils.files import DataError
from metautils.learners.protonet import cosine
from metautils.train import meta_train


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
