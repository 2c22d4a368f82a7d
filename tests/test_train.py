"""Training learns, chooses by validation, and survives every way of being interrupted."""

import json
import math
import multiprocessing
import os
import random
import signal
import time
from contextlib import nullcontext
from itertools import count

import pytest
import torch
from helpers import (
    EVERY,
    STEPS,
    Scripted,
    blobs,
    convolutions_round,
    in_parts,
    nan,
    run,
    same_weights,
    source,
    tiny,
)
from torch import nn

import metautils.train
from metautils.checkpoint import CHECKPOINT, CheckpointMismatch, load_weights
from metautils.data.regression import SINUSOIDS, Family, RegressionSampler
from metautils.files import load_safely, save_atomically
from metautils.learners.base import Learner
from metautils.learners.protonet import ProtoNet
from metautils.sampling import EpisodeSampler
from metautils.train import History, meta_train


def facts(history):
    return history.loss, history.accuracy, history.validation


def infinite(learner, loss):
    return loss * math.inf


def spoil(learner, loss):
    with torch.no_grad():
        learner.spare[1] = math.inf
    return loss


# Learning


def test_loss_falls_and_accuracy_rises():
    history = meta_train(tiny(), source(), 150, lr=1e-2, progress=False)
    first, last = slice(0, 15), slice(-15, None)
    assert len(history.loss) == len(history.accuracy) == 150
    assert sum(history.loss[last]) < 0.5 * sum(history.loss[first])
    assert sum(history.accuracy[last]) / 15 > 95 > sum(history.accuracy[first]) / 15
    assert history.validation == []
    assert history.seconds > 0


def test_learning_rate_follows_the_cosine(monkeypatch):
    rates, step = [], torch.optim.Adam.step

    def noted(self, *arguments, **named):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *arguments, **named)

    monkeypatch.setattr(torch.optim.Adam, "step", noted)
    meta_train(tiny(), source(), 10, lr=0.02, progress=False)
    expected = [0.01 * (1 + math.cos(math.pi * t / 10)) for t in range(10)]
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize(
    ("scores", "best"), [((10, 90, 50, 60), 1), ((10, 20, 30, 40), 3), ((70, 70, 5, 70), 0)]
)
@pytest.mark.parametrize("stored", [False, True])
def test_ends_with_the_weights_that_did_best_on_validation(
    monkeypatch, tmp_path, scores, best, stored
):
    seen = []

    def scripted(learner, sampler, episodes):
        seen.append({name: x.clone() for name, x in learner.state_dict().items()})
        return torch.full((episodes,), float(scores[len(seen) - 1]))

    monkeypatch.setattr(metautils.train, "episode_accuracy", scripted)
    learner, history = run(tmp_path if stored else None)
    assert history.validation == [(5 * k + 5, s) for k, s in enumerate(scores)]
    assert same_weights(learner.state_dict(), seen[best])
    assert not any(same_weights(seen[best], seen[k]) for k in range(4) if k != best)
    if stored:
        fresh = tiny(seed=3)
        load_weights(fresh, tmp_path / CHECKPOINT)
        assert same_weights(fresh.state_dict(), seen[best])


def test_without_validation_the_last_weights_count(tmp_path):
    learner = tiny()
    meta_train(learner, source(), 12, every=5, out=tmp_path, progress=False)
    state = load_safely(tmp_path / CHECKPOINT)
    assert state["notes"]["step"] == 12
    assert same_weights(learner.state_dict(), state["net"])


def test_validation_sees_the_same_episodes_each_time_and_trains_nothing():
    class Notes(ProtoNet):
        asked = ()

        def forward(self, support_x, support_y, query_x):
            if not self.training:
                self.asked += ((float(support_x.sum()), float(query_x.sum())),)
            return super().forward(support_x, support_y, query_x)

    learner = Notes(tiny().embed)
    _, history = run(learner=learner)
    asked = learner.asked
    assert len(asked) == 4 * 6
    assert all(asked[k] == asked[k % 6] for k in range(24))
    assert len(set(asked)) == 6
    assert history.loss == meta_train(tiny(), source(), STEPS, progress=False).loss


def test_trains_in_training_mode():
    learner = tiny().eval()
    before = learner.embed[2].running_mean.clone()
    meta_train(learner, source(), 1, progress=False)
    assert not torch.equal(learner.embed[2].running_mean, before)


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"every": 0}, {"lr": 0.0}, {"lr": -1.0}])
def test_numbers_must_be_positive(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=rf"{name}={wrong[name]}.*all must be above 0"):
        run(**wrong)


# Interruption


@pytest.mark.parametrize("at", [1, 5, 6, 13, 20])
def test_interrupted_and_resumed_ends_bit_identical(tmp_path, at):
    expected, history = run(tmp_path / "whole")
    calls, loss = 0, ProtoNet.loss

    class Stopped(ProtoNet):
        def loss(self, predictions, query_y):
            nonlocal calls
            calls += 1
            if calls == at:
                raise KeyboardInterrupt
            return loss(self, predictions, query_y)

    Stopped.__name__ = ProtoNet.__name__  # a checkpoint knows its learner
    learner = tiny(dropout=0.2)
    learner.__class__ = Stopped
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", learner)
    started = at > EVERY  # otherwise there is no checkpoint, and all begins anew
    assert (tmp_path / "cut" / CHECKPOINT).exists() == started
    learner = tiny(dropout=0.2, seed=4 if started else 0)
    resumed, again = run(tmp_path / "cut", learner, scramble=77 if started else None)
    assert same_weights(resumed.state_dict(), expected.state_dict())
    assert facts(again) == facts(history)
    states = [load_safely(tmp_path / name / CHECKPOINT) for name in ("whole", "cut")]
    for part in ("net", "best"):
        assert same_weights(states[0][part], states[1][part])
    assert torch.equal(*(state["notes"]["episodes"] for state in states))


def test_twice_the_same_without_interruption():
    first, second = run(), run()
    assert same_weights(first[0].state_dict(), second[0].state_dict())
    assert facts(first[1]) == facts(second[1])


def test_finished_run_given_again_changes_nothing(tmp_path):
    learner, history = run(tmp_path)
    before = (tmp_path / CHECKPOINT).read_bytes()
    again, told = run(tmp_path, tiny(seed=8), scramble=1)
    assert same_weights(again.state_dict(), learner.state_dict())
    assert facts(told) == facts(history)
    assert told.seconds == pytest.approx(history.seconds)
    assert (tmp_path / CHECKPOINT).read_bytes() == before


def train_and_leave(out, die=0):
    """In a process of its own: a training, killed while it writes its checkpoint number `die`."""
    torch.set_num_threads(1)
    save, saves = torch.save, count(1)

    def killed_while_writing(value, file):
        if next(saves) == die:
            file.write(b"PK half a checkpoint")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        save(value, file)

    torch.save = killed_while_writing
    learner = tiny(dropout=0.2)
    choose = EpisodeSampler(blobs(seed=9), 3, 1, 2, seed=5)
    length = {"steps": 150, "every": 3, "validation_episodes": 5, "progress": False}
    history = meta_train(learner, source(), validation=choose, out=out, **length)
    torch.save = save
    told = {name: x for name, x in vars(history).items() if name != "seconds"}
    torch.save({"weights": learner.state_dict(), "facts": told}, out / "end.pt")


def start(out, die=0):
    """A fork has torch loaded already; one that starts anew would need seconds for that."""
    process = multiprocessing.get_context("fork").Process(target=train_and_leave, args=(out, die))
    process.start()
    return process


def ended(process):
    process.join(120)
    return process.exitcode


@pytest.mark.skipif(os.name != "posix", reason="only there are forks and SIGKILL")
def test_killed_again_and_again_ends_bit_identical(tmp_path):
    """SIGKILL while a checkpoint is written, then at random moments; no process gets a warning."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    reference = start(whole)
    process = start(cut, die=4)
    assert ended(process) == -signal.SIGKILL
    (left,) = [path.name for path in cut.iterdir() if path.name != CHECKPOINT]
    assert left.startswith(f".{CHECKPOINT}.")  # half a file, under a name nobody reads
    assert left.endswith(".partial")
    assert load_safely(cut / CHECKPOINT)["notes"]["step"] == 9

    chance, reached = random.Random(0), [9]
    for _ in range(2):
        process = start(cut)
        time.sleep(chance.uniform(0.0, 0.4))
        process.kill()
        process.join()
        reached.append(load_safely(cut / CHECKPOINT)["notes"]["step"])
    assert reached == sorted(reached)
    assert ended(start(cut)) == 0
    assert ended(reference) == 0
    ends = [load_safely(folder / "end.pt") for folder in (whole, cut)]
    assert same_weights(ends[0]["weights"], ends[1]["weights"])
    assert ends[0]["facts"] == ends[1]["facts"]
    assert len(ends[0]["facts"]["loss"]) == 150
    for path in cut.glob(".*.partial"):
        os.utime(path, (0, 0))
    save_atomically(1, cut / CHECKPOINT)  # removes what lies there for longer than a day
    assert {path.name for path in cut.iterdir()} == {CHECKPOINT, "end.pt"}


# What must not be written, and what must not be read


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        (nan, r"^The loss became nan at step 8, so training stopped\."),
        (infinite, r"^The loss became inf at step 8, so training stopped"),
        (spoil, r"^The weights are no longer finite after step 10, so training stopped"),
    ],
)
def test_bad_numbers_stop_training_and_keep_the_last_good_checkpoint(tmp_path, what, sentence):
    path, before = tmp_path / CHECKPOINT, []

    def note(learner, loss):
        before.append(path.read_bytes())
        return what(learner, loss)

    with pytest.raises(FloatingPointError, match=sentence) as caught:
        run(tmp_path, Scripted(8, note))
    told = str(caught.value)
    assert f"The last good checkpoint stays in {path}." in told
    assert "Try a smaller learning rate than 0.001" in told
    assert "\n" not in told
    assert path.read_bytes() == before[0]
    assert list(tmp_path.iterdir()) == [path]
    state = load_safely(path)
    assert state["notes"]["step"] == 5
    assert all(x.isfinite().all() for x in state["best"].values() if x.is_floating_point())


def test_bad_numbers_without_a_folder_promise_no_checkpoint():
    with pytest.raises(FloatingPointError, match="The loss became nan at step 2") as caught:
        run(learner=Scripted(2, nan))
    assert "checkpoint" not in str(caught.value)


def test_bad_pixels_stop_training():
    bank = blobs()
    images = bank.images.float()
    images[:] = math.nan
    episodes = EpisodeSampler(type(bank)(images, bank.counts, bank.names), 3, 1, 2)
    with pytest.raises(FloatingPointError, match="loss became nan at step 1.*values in the images"):
        meta_train(tiny(), episodes, 5, progress=False)


def test_tasks_in_parts_end_like_all_at_once(monkeypatch):
    """But for rounding, in single precision and without weights whose gradient is 0."""
    monkeypatch.setattr(metautils.train, "fast_autocast", lambda device: nullcontext())
    ends = []
    for at_once in (None, 1, 2):
        learner = Scripted(0, nan)
        learner.embed[1].bias = None
        learner.at_once = at_once
        history = meta_train(learner, source(tasks=3), 8, progress=False)
        assert learner.calls == 8 * {None: 1, 1: 3, 2: 2}[at_once]
        ends.append((history.loss, history.accuracy, learner.state_dict()))
    for loss, accuracy, weights in ends[1:]:
        assert loss == pytest.approx(ends[0][0], rel=1e-4)
        assert accuracy == pytest.approx(ends[0][1])
        torch.testing.assert_close(weights, ends[0][2], rtol=1e-3, atol=1e-5)


def test_no_convolution_rounds_on_the_way_back():
    """The derivatives of a learner's inner steps are made there, and round no less than they."""
    seen = []

    def watch(self, loss):
        loss.register_hook(lambda slope: seen.append(convolutions_round()))
        return loss

    meta_train(Scripted(1, watch), source(), 1, progress=False)
    assert seen == [False]
    assert convolutions_round()


class Line(Learner):
    """Predicts theta x for each task, whatever the support set."""

    def __init__(self):
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(()))

    def forward(self, support_x, support_y, query_x):
        return self.theta * query_x


def test_regression_has_a_loss_and_no_accuracy(tmp_path, capsys):
    doubled = Family("doubled", 1, ((2.0, 2.0),), lambda x, a: a * x[..., 0])
    learner = Line()
    episodes = RegressionSampler(doubled, 2, tasks=3)
    history = meta_train(learner, episodes, 60, lr=0.1, every=25, out=tmp_path)
    assert learner.theta.item() == pytest.approx(2, abs=0.1)
    assert history.loss[-1] < 0.01 * history.loss[0]
    assert (len(history.loss), history.accuracy, history.validation) == (60, [], [])
    assert "accuracy" not in capsys.readouterr().err
    other = RegressionSampler(SINUSOIDS, 2, tasks=3)
    with pytest.raises(CheckpointMismatch, match="family=doubled, not sinusoids"):
        meta_train(Line(), other, 60, lr=0.1, every=25, out=tmp_path)


# What is told on the way


def test_progress_bar_shows_loss_and_accuracy_and_can_be_silent(capsys):
    run()
    assert capsys.readouterr() == ("", "")
    run(progress=True)
    told = capsys.readouterr().err
    assert "train" in told
    assert f"/{STEPS} " in told


def test_history_is_plain_values(tmp_path):
    _, history = run(tmp_path)
    assert json.loads(json.dumps(vars(history)))["loss"] == history.loss
    assert len(history.validation) == STEPS // EVERY
    assert History() == History([], [], [], 0.0)
    assert os.listdir(tmp_path) == [CHECKPOINT]


# Pieces and updates


class Weighed(Line):
    """Tasks one by one; the gradient of each is far above 1."""

    at_once = 1

    def loss(self, predictions, query_y):
        return 100 * super().loss(predictions, query_y)

    def pieces(self, episode):
        return in_parts(super().pieces, episode, self.at_once)


def updates(monkeypatch, episodes=4, at_once=1, **outer):
    """Rate and gradient at every step of Adam, and the history."""
    learner, seen, step = Weighed(), [], torch.optim.Adam.step
    learner.at_once = at_once

    def noted(self, *arguments, **named):
        seen.append((self.param_groups[0]["lr"], learner.theta.grad.item()))
        return step(self, *arguments, **named)

    doubled = Family("doubled", 1, ((2.0, 2.0),), lambda x, a: a * x[..., 0])
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", noted)
        history = meta_train(
            learner,
            RegressionSampler(doubled, 2, tasks=3),
            episodes,
            lr=0.1,
            progress=False,
            **outer,
        )
    return seen, history


def test_update_once_an_episode_or_after_each_piece(monkeypatch):
    """With one rate of the cosine for all pieces of an episode."""
    once, history = updates(monkeypatch)
    each, pieces = updates(monkeypatch, each_piece=True)
    assert (len(once), len(each)) == (4, 12)
    cosine = [0.05 * (1 + math.cos(math.pi * t / 4)) for t in range(4)]
    assert [rate for rate, _ in once] == pytest.approx(cosine)
    assert [rate for rate, _ in each] == pytest.approx([r for r in cosine for _ in range(3)])
    assert len(history.loss) == len(pieces.loss) == 4
    # The same start: at the first episode the first piece is a share of the whole, and
    # after it theta has moved towards 2, which makes the other two smaller.
    assert 0 > each[0][1] > once[0][1]
    assert pieces.loss[0] < history.loss[0]


@pytest.mark.parametrize("each", [True, False])
def test_loss_of_an_episode_is_that_of_all_its_pieces(monkeypatch, each):
    """While theta stays at 0 both ways of updating see the same pieces, each of them once."""
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self, *arguments, **named: None)
    seen, history = updates(monkeypatch, 1, each_piece=each)
    whole, expected = updates(monkeypatch, 1, at_once=None)
    assert history.loss == pytest.approx(expected.loss)
    assert sum(slope for _, slope in seen) == pytest.approx(whole[0][1])


@pytest.mark.parametrize("each", [True, False])
@pytest.mark.parametrize("clip", [0.5, 1e6])
def test_clip_bounds_the_gradient_that_adam_sees(monkeypatch, each, clip):
    """And leaves what is below it, as None leaves all."""
    free, _ = updates(monkeypatch, each_piece=each)
    bound, _ = updates(monkeypatch, each_piece=each, clip=clip)
    assert min(abs(slope) for _, slope in free[:3]) > 1
    expected = math.copysign(min(abs(free[0][1]), clip), free[0][1])
    assert bound[0][1] == pytest.approx(expected, rel=1e-4)
    assert all(abs(slope) <= clip * (1 + 1e-5) for _, slope in bound)
    if clip == 1e6:
        assert bound == free
