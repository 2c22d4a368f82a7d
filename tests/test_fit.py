"""Ordinary training learns, keeps its best epoch, and survives being interrupted."""

import math
import sys
import warnings
from contextlib import nullcontext
from functools import partial
from itertools import count

import numpy as np
import pytest
import torch
from helpers import flat, same_weights, weights_of
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR, StepLR
from torch.utils.data import DataLoader, TensorDataset

import metautils.checkpoint
import metautils.fit
import metautils.precision
from metautils.checkpoint import CheckpointMismatch
from metautils.files import DataError, load_safely
from metautils.fit import Epoch, balanced, fit, measure, predict

EPOCHS, BATCHES = 5, 4


def points(seed=0, images=32):
    """Three blobs that lie apart, as features and labels."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(images) % 3
    return 3 * F.one_hot(y, 4) + 0.5 * torch.randn(images, 4, generator=generator), y


def net_of(width=8, seed=0):
    """With dropout, which draws from the global generator, and batch normalisation."""
    torch.manual_seed(seed)
    layers = [nn.Linear(4, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.2)]
    return nn.Sequential(*layers, nn.Linear(width, 3))


def small(net):
    return 1e-3 * sum(w.square().sum() for w in net.parameters())


def validation(x=None, y=None):
    return DataLoader(TensorDataset(*(points(1) if x is None else (x, y))), 8)


def run(path=None, net=None, data=None, held_out=None, lr=0.05, epochs=EPOCHS, **changed):
    """A short training: the network and its rows."""
    net = net or net_of()
    optimizer = SGD(net.parameters(), lr, momentum=0.9)
    torch.manual_seed(7)
    train = DataLoader(data or TensorDataset(*points()), 32 // BATCHES, shuffle=True)
    settings = {"penalty": lambda net: small(net), "settings": {"lr": lr}} | changed
    schedule = StepLR(optimizer, 2 * BATCHES)
    rows = fit(
        net, train, held_out or validation(), optimizer, schedule, epochs, path=path, **settings
    )
    return net, rows


def facts(rows):
    """All but the seconds."""
    return [(r.number, r.train_loss, r.train_accuracy, *score(r)) for r in rows]


def score(row):
    return row.validation_loss, row.validation_accuracy


def at(call, what, whole):
    """The whole function, but for something else in this call, counted from 1."""
    calls = count(1)
    return lambda *a, **k: (what if next(calls) == call else whole)(*a, **k)


def interrupt(*arguments, **named):
    raise KeyboardInterrupt


def stopped(path, owner, name, call, net=None):
    """Interrupt a training in this call of one of the functions that it needs."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owner, name, at(call, interrupt, getattr(owner, name)))
        run(path, net)


def scripted(monkeypatch, *scores):
    """Let the start and the epochs get these losses and accuracies; the weights that got them."""
    seen = []

    def scripted_measure(net, batches, weights):
        seen.append(weights_of(net))
        return scores[len(seen) - 1]

    monkeypatch.setattr(metautils.fit, "measure", scripted_measure)
    return seen


# Learning


def test_learns_what_can_be_learnt():
    net, rows = run(lr=0.3, epochs=12)
    assert [row.number for row in rows] == list(range(1, 13))
    assert rows[-1].train_loss < 0.5 * rows[0].train_loss
    assert rows[0].train_accuracy < 80
    assert rows[-1].validation_accuracy == 100
    assert all(row.seconds > 0 for row in rows)
    assert measure(net, validation())[1] == 100


def test_trains_in_training_mode():
    net = net_of().eval()
    run(net=net, epochs=1)
    assert int(net[1].num_batches_tracked) == BATCHES


def test_row_of_training_is_the_mean_over_images():
    """Batches of 8, 8 and 2 images, with weights that stay as they are."""
    x, y = points(images=18)
    net = net_of().eval()
    net.train = lambda mode=True: net  # no dropout, so that every batch can be reckoned again
    _, (row,) = run(net=net, data=TensorDataset(x, y), lr=1e-12, epochs=1)
    with torch.no_grad():
        logits = net(x)
    assert row.train_loss == pytest.approx(float(F.cross_entropy(logits, y)), rel=2e-2)
    assert row.train_accuracy == pytest.approx(100 * float((logits.argmax(1) == y).float().mean()))


def test_penalty_is_added_to_the_loss(monkeypatch):
    """One step of plain SGD, so that its gradient can be read from the weights."""
    monkeypatch.setattr(metautils.fit, "fast_autocast", lambda device, fp16: nullcontext())
    ends = []
    for penalty in (None, lambda net: 5 * (net.weight - 3).square().sum()):
        torch.manual_seed(0)
        net = nn.Linear(4, 3)
        start, optimizer = net.weight.detach().clone(), SGD(net.parameters(), 0.01)
        train = DataLoader(TensorDataset(*points()), 32)
        fit(net, train, validation(), optimizer, StepLR(optimizer, 1), 1, penalty=penalty)
        ends.append(net.weight.detach())
    assert not torch.equal(ends[0], start)
    torch.testing.assert_close(ends[1] - ends[0], -0.01 * 10 * (start - 3))


def test_last_epoch_is_kept_if_none_is_to_be_chosen(monkeypatch, tmp_path):
    scripted(monkeypatch, *[(1, 70)] * 6)
    net, _ = run(tmp_path / "x.pt", choose=False)
    again, _ = run(tmp_path / "x.pt", choose=False)  # finished before
    last = load_safely(tmp_path / "x.pt")["net"]
    assert same_weights(net.state_dict(), last) and same_weights(again.state_dict(), last)


def noted_rates(monkeypatch):
    """The rate of every step from here on."""
    rates, step = [], SGD.step

    def noted(self, *arguments, **named):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *arguments, **named)

    monkeypatch.setattr(SGD, "step", noted)
    return rates


def test_rates_follow_the_schedule_step_by_step(monkeypatch):
    rates, net = noted_rates(monkeypatch), net_of()
    optimizer = SGD(net.parameters(), 0.1)
    schedule = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    train = DataLoader(TensorDataset(*points()), 32 // BATCHES)
    fit(net, train, validation(), optimizer, schedule, 2)
    assert rates == pytest.approx([0.1 / (1 + step) for step in range(2 * BATCHES)])


@pytest.mark.parametrize("clip", [0.01, 1e9, None])
def test_gradients_keep_a_norm_of_clip_at_most(clip):
    """By one step of plain SGD, which goes as far as its gradient is long."""
    torch.manual_seed(0)
    net = nn.Linear(4, 3)
    start, optimizer = weights_of(net), SGD(net.parameters(), 1.0)
    train = DataLoader(TensorDataset(*points()), 32)
    fit(net, train, validation(), optimizer, StepLR(optimizer, 1), 1, clip=clip)
    moved = float(flat([x - start[name] for name, x in net.state_dict().items()]).norm())
    assert moved == pytest.approx(0.01, rel=1e-3) if clip == 0.01 else moved > 0.1


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        pytest.param([(1, 0), (1, 10), (9, 90), (1, 50), (1, 60), (1, 0)], 2, id="accuracy"),
        pytest.param([(9, 70), (5, 70), (4, 70), (2, 70), (3, 70), (1, 60)], 3, id="loss"),
        pytest.param([(1, 60)] + [(1, 70)] * 5, 1, id="first among equals"),
        pytest.param([(1, k) for k in range(6)], 5, id="last"),
        pytest.param([(1, 70)] * 6, 0, id="start"),
        pytest.param([(math.nan, 90), (1, 10), (1, 5), (1, 5), (1, 5), (1, 5)], 1, id="no start"),
    ],
)
def test_ends_with_the_weights_that_did_best_on_validation(monkeypatch, tmp_path, scores, best):
    seen = scripted(monkeypatch, *scores)
    net, rows = run(tmp_path / "x.pt")
    assert list(map(score, rows)) == scores[1:]
    assert same_weights(net.state_dict(), seen[best])
    assert not any(same_weights(seen[best], seen[k]) for k in range(EPOCHS + 1) if k != best)
    assert same_weights(load_safely(tmp_path / "x.pt")["best"], seen[best])


def test_training_never_makes_validation_worse():
    """All labels of the validation are other ones, so what is learnt is wrong."""
    x, y = points(1)
    wrong, net = validation(x, (y + 1) % 3), net_of()
    start = measure(net, wrong)
    _, rows = run(net=net, held_out=wrong, epochs=8, lr=0.3)
    assert measure(net, wrong) == max(start, *map(score, rows), key=lambda s: (s[1], -s[0]))
    assert measure(net, wrong)[1] > rows[-1].validation_accuracy == 0


@pytest.mark.parametrize(
    ("patience", "epochs"), [(1, 3), (2, 4), (3, 8), (4, 9), (None, 9)], ids=str
)
def test_patience_counts_from_the_best_epoch(monkeypatch, patience, epochs):
    """Epoch 5 is better than epoch 2 by its loss; nothing else is better than what was before."""
    accuracies = (0, 10, 50, 40, 50, 50, 50, 40, 50, 20)
    losses = (1, 1, 1, 1, 1, 0.5, 0.5, 0.1, 2, 1)
    scripted(monkeypatch, *zip(losses, accuracies, strict=True))
    _, rows = run(patience=patience, epochs=9)
    assert len(rows) == epochs


def test_patience_counts_from_the_start_if_no_epoch_is_better(monkeypatch):
    scripted(monkeypatch, (1, 90), (1, 10), (1, 20), (1, 30))
    assert len(run(patience=3)[1]) == 3


# Interruption

PLACES = pytest.mark.parametrize(
    ("owner", "name", "call"),
    [
        pytest.param(
            DataLoader, "__iter__", 6, id="loader"
        ),  # both sets, and once more at the start
        pytest.param(sys.modules[__name__], "small", 2 * BATCHES + 2, id="penalty"),
        pytest.param(SGD, "step", 2 * BATCHES + 3, id="step"),
        pytest.param(metautils.fit, "measure", 4, id="validation"),
        pytest.param(metautils.checkpoint, "save_atomically", 3, id="checkpoint"),
    ],
)


@PLACES
@pytest.mark.parametrize("fresh", [True, False], ids=["new network", "same network"])
def test_interrupted_and_resumed_ends_bit_identical(tmp_path, owner, name, call, fresh):
    whole, rows = run(tmp_path / "whole.pt")
    net = net_of()
    stopped(tmp_path / "cut.pt", owner, name, call, net)
    assert len(load_safely(tmp_path / "cut.pt")["notes"]["rows"]) == 2
    torch.manual_seed(99)
    resumed, again = run(tmp_path / "cut.pt", net_of(seed=5) if fresh else net)
    assert same_weights(resumed.state_dict(), whole.state_dict())
    assert facts(again) == facts(rows)
    ends = [load_safely(tmp_path / name) for name in ("whole.pt", "cut.pt")]
    assert all(same_weights(ends[0][part], ends[1][part]) for part in ("net", "best"))
    assert torch.equal(*(end["random"]["cpu"] for end in ends))
    assert ends[0]["schedule"] == ends[1]["schedule"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cut.pt", "whole.pt"]


def test_interrupted_in_the_first_epoch_leaves_no_checkpoint(tmp_path):
    stopped(tmp_path / "x.pt", SGD, "step", 2)
    assert list(tmp_path.iterdir()) == []


def test_finished_run_given_again_changes_nothing(tmp_path):
    path = tmp_path / "x.pt"
    net, rows = run(path, patience=2)
    before = path.read_bytes()
    again, told = run(path, net_of(seed=5), patience=2)
    assert same_weights(again.state_dict(), net.state_dict())
    assert told == rows
    assert path.read_bytes() == before


# Half precision


@pytest.fixture
def fp16(monkeypatch):
    """A device that computes in float16, as a T4 does."""
    monkeypatch.setattr(metautils.precision, "half", lambda d, fp16=False: fp16 and torch.float16)


@pytest.mark.usefixtures("fp16")
def test_learns_in_float16():
    seen, net = [], net_of()
    net[0].register_forward_hook(lambda layer, x, y: seen.append(y.dtype))
    _, rows = run(net=net, lr=0.3, epochs=12)
    assert set(seen) == {torch.float16}
    assert all(w.dtype == torch.float32 for w in net.parameters())
    assert rows[-1].train_loss < 0.5 * rows[0].train_loss
    assert rows[-1].validation_accuracy == 100


@pytest.mark.usefixtures("fp16")
@pytest.mark.parametrize("factor", [1e-7, 1], ids=["small", "usual"])
def test_gradients_in_float16_are_those_of_float32(factor, tmp_path):
    """Small ones too, which float16 alone would round to 0; and the penalty's, which are added."""

    class Scaled(nn.Linear):
        def forward(self, x):
            return factor * super().forward(x).float()

    torch.manual_seed(0)
    net = Scaled(4, 3, bias=False)
    start, optimizer = net.weight.detach().clone(), SGD(net.parameters(), 0.01 / factor)
    train, schedule = DataLoader(TensorDataset(*points()), 32), StepLR(optimizer, 1)
    options = {"penalty": lambda net: factor * small(net), "path": tmp_path / "x.pt"}
    fit(net, train, validation(), optimizer, schedule, 1, **options)
    end = load_safely(tmp_path / "x.pt")["net"]["weight"]  # the network has its best weights again
    x, y = points()
    w = start.clone().requires_grad_()
    (F.cross_entropy(factor * x @ w.T, y) / factor + 1e-3 * w.square().sum()).backward()
    torch.testing.assert_close(start - end, 0.01 * w.grad, rtol=2e-2, atol=2e-5)


@pytest.mark.usefixtures("fp16")
def test_step_that_overflows_is_left_out(monkeypatch):
    net, whole = net_of(), []
    start, scale = weights_of(net), torch.amp.GradScaler.scale

    def overflowing(self, loss):
        whole.append(float(loss.detach()))
        return scale(self, loss) * (math.inf if len(whole) == 1 else 1)

    monkeypatch.setattr(torch.amp.GradScaler, "scale", overflowing)
    steps = []
    net.register_forward_pre_hook(lambda *_: steps.append(net[0].weight.detach().clone()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch's, where a schedule steps before its optimiser
        _, rows = run(net=net, epochs=1)
    steps = steps[-2 * BATCHES : -BATCHES]  # those of the training
    assert torch.equal(steps[0], steps[1])
    assert torch.equal(steps[0], start["0.weight"])
    assert not torch.equal(steps[1], steps[2])
    assert math.isfinite(rows[0].train_loss)


@pytest.mark.usefixtures("fp16")
def test_gradients_that_are_never_finite_stop_training(tmp_path):
    """The weights stay as they are, so that no loss would tell."""
    path = tmp_path / "x.pt"
    run(path, epochs=1)
    endless = lambda net: (net[0].weight - net[0].weight.detach()).abs().sqrt().sum()  # noqa: E731
    with pytest.raises(FloatingPointError, match="gradients were no longer finite in epoch"):
        run(path, penalty=endless, epochs=20)


@pytest.mark.usefixtures("fp16")
@pytest.mark.parametrize("fresh", [True, False], ids=["new network", "same network"])
def test_interrupted_and_resumed_in_float16_ends_bit_identical(tmp_path, monkeypatch, fresh):
    """The scale of the loss has moved by then: it grows after every two steps without overflow."""
    scaler = partial(torch.amp.GradScaler, "cpu", growth_interval=2)
    monkeypatch.setattr(metautils.fit, "grad_scaler", lambda device: scaler())
    test_interrupted_and_resumed_ends_bit_identical(tmp_path, SGD, "step", 2 * BATCHES, fresh)
    notes = [load_safely(tmp_path / name)["notes"]["scaler"] for name in ("whole.pt", "cut.pt")]
    assert notes[0] == notes[1]
    assert notes[0]["scale"] != 2**16


def test_checkpoint_is_gone_on_with_on_another_device(tmp_path, monkeypatch):
    """From float32 to float16 and back; one that was written before there was a scale, too."""
    path, whole = tmp_path / "x.pt", metautils.precision.half
    for epochs, kind in enumerate((None, torch.float16, None), 1):
        monkeypatch.setattr(metautils.precision, "half", lambda d, fp16=False, k=kind: fp16 and k)
        run(path, epochs=epochs)
    monkeypatch.setattr(metautils.precision, "half", whole)
    state = load_safely(path)
    del state["notes"]["scaler"]
    torch.save(state, path)
    assert len(run(path, epochs=4)[1]) == 4


# What must not be written, and what must not be read


def refuses(path, error, sentence, net=None, **changed):
    """Going on fails in one line that names the file; neither network nor file are changed."""
    before, net = path.read_bytes(), net or net_of(seed=5)
    weights = weights_of(net)
    with pytest.raises(error, match=sentence) as caught:
        run(path, net, **changed)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before
    assert same_weights(net.state_dict(), weights)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [({"lr": 0.1}, "made with lr=0.05, not 0.1"), ({"lr": 0.05, "size": 9}, "size=None, not 9")],
)
def test_checkpoint_of_other_settings(tmp_path, settings, sentence):
    stopped(tmp_path / "x.pt", metautils.fit, "measure", 4)
    refuses(tmp_path / "x.pt", CheckpointMismatch, sentence, settings=settings)


def test_checkpoint_of_another_network(tmp_path):
    stopped(tmp_path / "x.pt", metautils.fit, "measure", 4)
    refuses(tmp_path / "x.pt", CheckpointMismatch, "network", net_of(width=9))


@pytest.mark.parametrize("content", [{"weights": torch.ones(2)}, torch.ones(2), None])
def test_file_that_is_no_checkpoint(tmp_path, content):
    path = tmp_path / "x.pt"
    torch.save(content, path)
    refuses(path, (DataError, CheckpointMismatch), "x.pt")


def test_damaged_checkpoint(tmp_path):
    path = tmp_path / "x.pt"
    run(path, epochs=1)
    path.write_bytes(path.read_bytes()[:-100])
    refuses(path, DataError, "x.pt is damaged")


@pytest.mark.parametrize("call", [2 * BATCHES + 1, 3 * BATCHES], ids=["first batch", "last batch"])
def test_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(tmp_path, monkeypatch, call):
    """In the last batch of an epoch only the validation sees what became of the weights."""
    path = tmp_path / "x.pt"
    run(path, epochs=2)
    before = path.read_bytes()
    spoilt = at(call - 2 * BATCHES, lambda net: math.inf * net[0].weight.sum(), small)
    with pytest.raises(FloatingPointError, match="no longer finite in epoch 3, so") as caught:
        run(path, penalty=spoilt)
    assert f"The last good checkpoint stays in {path}." in str(caught.value)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before


def test_bad_number_in_the_data_stops_without_promising_a_checkpoint():
    x, y = points()
    x[5] = math.nan
    with pytest.raises(FloatingPointError, match="finite in epoch 1") as caught:
        run(data=TensorDataset(x, y))
    assert "checkpoint" not in str(caught.value)


# Predicting


@pytest.mark.parametrize("training", [True, False])
def test_predict_answers_in_order_and_leaves_no_trace(training):
    net = net_of().train(training)
    before, (x, y) = weights_of(net), points(1)
    logits, labels = predict(net, validation())
    assert logits.dtype == torch.float32
    assert not logits.requires_grad
    assert torch.equal(labels, y)
    assert net.training == net[3].training == training
    assert same_weights(net.state_dict(), before)
    with torch.no_grad():
        torch.testing.assert_close(logits, net.eval()(x), atol=5e-2, rtol=5e-2)


def test_measure_by_hand():
    """Two images of which the second is wrong, in batches of one."""
    logits = torch.tensor([[2.0, 0.0], [2.0, 0.0]])
    loss, accuracy = measure(
        nn.Identity(), DataLoader(TensorDataset(logits, torch.tensor([0, 1])), 1)
    )
    assert loss == pytest.approx((math.log(1 + math.exp(-2)) + math.log(1 + math.exp(2))) / 2)
    assert accuracy == 50


def test_table_is_silent_unless_asked(capsys):
    run(epochs=2)
    assert capsys.readouterr() == ("", "")
    _, rows = run(epochs=2, progress=True)
    out, err = capsys.readouterr()
    assert out.splitlines() == [metautils.fit.HEADS, *map(str, rows)]
    assert "epoch 2" in err
    assert {len(line) for line in out.splitlines()} == {len(metautils.fit.HEADS)}


def test_row_of_the_table():
    told = "    3      1.2346     95.8 %      0.5000    100.0 %     12.3"
    assert str(Epoch(3, 1.23456, 95.833, 0.5, 100.0, 12.34)) == told


def test_default_device_plays_no_part(monkeypatch):
    """Batches are shuffled and made on the CPU, and as ever; the network lies where it lies."""
    monkeypatch.setattr(metautils.fit, "fast_autocast", lambda device, fp16: nullcontext())
    ends = []
    for where in ("cpu", "meta"):
        net, (train, held_out) = net_of(), (TensorDataset(*points()), validation())
        optimizer = SGD(net.parameters(), 0.05)
        torch.manual_seed(7)
        loader, schedule = DataLoader(train, 8, shuffle=True), StepLR(optimizer, 2)
        with torch.device(where):
            ends.append(facts(fit(net, loader, held_out, optimizer, schedule, 2)))
    assert ends[0] == ends[1]


# Weights of classes


def test_weights_count_as_copies_would():
    """A step on three images of one class and one of another, which counts three times as much."""
    x, y = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 0, 0, 1])
    copied = torch.tensor([0, 1, 2, 3, 3, 3])
    ends, rows = [], []
    for rows_of, weights in ((torch.arange(4), balanced(y.tolist(), 2)), (copied, None)):
        torch.manual_seed(0)
        net, data = nn.Linear(4, 2), TensorDataset(x[rows_of], y[rows_of])
        optimizer, loader = SGD(net.parameters(), 0.5), DataLoader(data, 6)
        rows += fit(
            net, loader, loader, optimizer, StepLR(optimizer, 1), 1, weights=weights, patience=None
        )
        ends.append(weights_of(net))
    for one, other in zip(ends[0].values(), ends[1].values(), strict=True):
        torch.testing.assert_close(one, other, atol=2e-3, rtol=0)  # bfloat16
    assert facts(rows[:1])[0] == pytest.approx(facts(rows[1:])[0], rel=1e-2)


def test_a_batch_of_common_images_counts_for_less():
    """Else weights would do nothing where a batch holds but one class."""
    steps = []
    for weights in (None, torch.tensor([0.5, 2.0])):
        torch.manual_seed(0)
        net = nn.Linear(4, 2)
        before, optimizer = weights_of(net), SGD(net.parameters(), 0.1)
        loader = DataLoader(TensorDataset(torch.ones(3, 4), torch.zeros(3).long()), 3)
        fit(net, loader, loader, optimizer, StepLR(optimizer, 1), 1, weights=weights)
        steps.append(net.bias.detach() - before["bias"])
    torch.testing.assert_close(steps[1], 0.5 * steps[0])


def test_balanced_accuracy_is_that_of_the_classes():
    """Four of five of one class and neither of two of another are right: 40 %, not 57."""
    answers = torch.tensor([0, 0, 0, 0, 1, 0, 0])
    labels = torch.tensor([0, 0, 0, 0, 0, 1, 1])
    loader = DataLoader(TensorDataset(F.one_hot(answers).float(), labels), 3)
    loss, accuracy = measure(nn.Identity(), loader, balanced(labels.tolist(), 2))
    assert accuracy == pytest.approx(40)
    right, wrong = math.log(1 + math.exp(-1)), math.log(1 + math.exp(1))
    assert loss == pytest.approx(((4 * right + wrong) / 5 + wrong) / 2)
    assert measure(nn.Identity(), loader)[1] == pytest.approx(400 / 7)


def test_balanced_weights_are_those_of_scikit_learn():
    from sklearn.utils.class_weight import compute_class_weight

    labels = [0, 0, 1, 2, 2, 2, 2]
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    assert balanced(labels, 3).tolist() == pytest.approx(expected.tolist())
