"""Everything runs on a device that is not the CPU: a pretend one, and a GPU where there is one.

The package runs on the pretend one without float64, so that it runs on a Mac's too. These tests
want a process of their own, see test_device.py.
"""

import copy
import re
from collections.abc import Iterator
from dataclasses import replace

import pretend
import pytest
import torch
from helpers import (
    blind,
    blobs,
    quick_preset,
    same_weights,
    stop_in,
    tiny,
    tiny_body,
    weights_of,
)
from torch import nn
from torch.nn import functional as F

import ondevice
from metautils import classifier, finetune, methods, pretrained, runs
from metautils.adapt import SGD, Adam, adapt
from metautils.checkpoint import device_of
from metautils.data.quadratics import QuadraticSampler
from metautils.data.regression import (
    SINUSOIDS,
    GaussianProcessSampler,
    LinearSampler,
    RegressionSampler,
)
from metautils.evaluate import coverage95, log_likelihood, squared_errors
from metautils.exact import dmmse, gp_posterior, ridge
from metautils.finetune import Recipe
from metautils.learners import baseline
from metautils.learners.base import Learner, Problem
from metautils.learners.imaml import IMAML
from metautils.learners.in_context import InContext
from metautils.learners.learned_optimizer import FromScratch, LSTMOptimizer
from metautils.learners.maml import FOMAML, MAML
from metautils.learners.meta_sgd import MetaSGD
from metautils.learners.neural_process import AttentiveNeuralProcess, ConditionalNeuralProcess
from metautils.learners.reptile import Reptile
from metautils.nets import mlp
from metautils.sampling import EpisodeSampler
from metautils.train import meta_train

REAL = ["cuda"] if torch.cuda.is_available() else []
RECIPE = Recipe(size=16, batch=4, epochs=2, pull=0.1)


OLD = "this torch is too old to have a device that is written in Python"
pretending = pytest.mark.skipif(pretend.setup is None, reason=OLD)


@pytest.fixture(params=[pytest.param(pretend.NAME, marks=pretending), *REAL])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of a device that is not the CPU."""
    if request.param != pretend.NAME:
        yield request.param
    else:
        with pretend.device(float64=False) as name:
            yield name


# The pretend device refuses what a real one refuses, and computes what the CPU computes


@pytest.fixture
def pretended() -> Iterator[str]:
    if pretend.setup is None:
        pytest.skip(OLD)
    with pretend.device() as name:
        yield name


def test_the_device_computes_as_the_cpu(pretended):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
    there, x = copy.deepcopy(net).to(pretended), torch.rand(5, 1, 6, 6)
    for each in (net, there):
        optimizer = torch.optim.Adam(each.parameters(), 0.1)
        for _ in range(3):
            each(x.to(device_of(each))).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert {w.device.type for w in there.state_dict().values()} == {pretended}
    assert same_weights({k: w.cpu() for k, w in there.state_dict().items()}, net.state_dict())


def test_the_device_changes_tensors_in_place(pretended):
    x = torch.arange(6.0).to(pretended).view(2, 3)
    x[1, :2] = -1
    x[:, [2]] += torch.ones((), device="cpu")
    assert x.tolist() == [[0, 1, 3], [-1, -1, 6]]
    assert x.unsqueeze_(0).shape == (1, 2, 3) and x.squeeze_().T.shape == (3, 2)
    x.data = torch.ones(4).to(pretended)
    assert x.shape == (4,) and x.tolist() == [1] * 4
    x = torch.arange(8.0).to(pretended).view(2, 4)
    assert f"{x.sum():.1f} {x.shape}" == "28.0 torch.Size([2, 4])"


MISTAKES = {
    "add": lambda here, there: here + there,
    "linear": lambda here, there: F.linear(there, here),
    "stack": lambda here, there: torch.stack([here, there]),
    "index": lambda here, there: here[there.long()],
    "in place": lambda here, there: there.add_(here),
    "sum on the CPU": lambda here, there: torch.zeros(()).add_(there.sum()),
    "stack of numbers": lambda here, there: torch.stack([here.sum(), there.sum()]),
    "put": lambda here, there: there.__setitem__(torch.tensor([0, 1]), here),
    "put by a mask": lambda here, there: there.__setitem__(there == 0, here.flatten()),
    "numpy": lambda here, there: there.numpy(),
    "generator": lambda here, there: torch.rand_like(there, generator=torch.Generator()),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_the_device_refuses(pretended, mistake):
    there = torch.zeros(2, 2).to(pretended)
    with pytest.raises((RuntimeError, TypeError)):
        mistake(torch.zeros(2, 2), there)


@pretending
def test_the_device_without_float64_has_none():
    with pretend.device(float64=False) as name:
        x = torch.zeros(2).to(name)
        with pytest.raises(TypeError, match="float64"):
            x.double()
        assert x.cpu().double().dtype == torch.float64


def test_random_numbers_of_the_device_are_its_own(pretended):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    first = torch.rand(3, device=pretended)
    assert torch.equal(torch.rand(3), expected)  # the CPU's did not move
    torch.manual_seed(0)
    assert torch.equal(torch.rand(3, device=pretended), first)


# The package


def finite(net: nn.Module, device: str) -> bool:
    weights = net.state_dict().values()
    return all(w.device.type == device and bool(w.isfinite().all()) for w in weights)


def shorten(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a method take few steps in a test's task."""
    method = methods.known()[name]

    def make(problem: Problem) -> Learner:
        learner = method.make(problem)
        if hasattr(learner, "test_steps"):
            learner.test_steps = min(learner.test_steps, 2)
        return learner

    monkeypatch.setattr(baseline, "STEPS", 3)
    monkeypatch.setitem(methods.known(), name, replace(method, make=make))
    narrow(monkeypatch)


def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A body of one convolution in place of a ResNet-50."""
    monkeypatch.setattr(pretrained, "body", lambda *_: tiny_body())


@pytest.mark.usefixtures("short_runs")
@pytest.mark.parametrize("name", methods.known())
def test_every_method_trains_and_is_tested(device, name, tmp_path, monkeypatch):
    quick_preset(monkeypatch, 2, 4, 1, 2, 2)
    shorten(name, monkeypatch)
    record = runs.train(name, "glyphs", tmp_path, device=device, validation_episodes=2)
    again = runs.evaluate_again(tmp_path, device=device, rotations="none")
    assert record["steps"] == 2 and again.exists()


ON_WAVES = {
    "MAML": lambda: MAML(mlp(width=8), 0.01),
    "MAML, one by one": lambda: MAML(mlp(width=8), 0.01, vectorise=False),
    "FOMAML": lambda: FOMAML(mlp(width=8), 0.01),
    "iMAML": lambda: IMAML(mlp(width=8), 0.01),
    "Reptile": lambda: Reptile(mlp(width=8), 0.01),
    "Meta-SGD": lambda: MetaSGD(mlp(width=8), 0.01),
    "in context": lambda: InContext(1, length=10, width=8),
    "conditional": lambda: ConditionalNeuralProcess(width=8),
    "attentive": lambda: AttentiveNeuralProcess(width=8),
}


@pytest.mark.parametrize("make", ON_WAVES.values(), ids=ON_WAVES)
def test_regression(device, make):
    learner = make().to(device)
    waves = RegressionSampler(SINUSOIDS, 5, 5, 3, device=device)
    meta_train(learner, waves, 2, progress=False)
    assert finite(learner, device)
    assert squared_errors(learner, waves, 6).isfinite().all()


def test_distributions(device):
    learner = AttentiveNeuralProcess(width=8).to(device)
    tasks = GaussianProcessSampler(5, 5, 3, device=device)
    for judge in (log_likelihood, coverage95):
        assert judge(learner, tasks, 6).isfinite().all()


def test_exact_answers(device):
    """The same numbers as on the CPU, where the targets lie."""
    weights = torch.randn(4, 3)
    here, there = (
        LinearSampler(3, 5, 5, 2, device=d, noise=0.1, weights=weights).sample()
        for d in ("cpu", device)
    )
    for answer in (
        lambda *task: ridge(*task, 0.1),
        lambda *task: dmmse(*task, weights.to(task[0].device), 0.1),
        lambda *task: gp_posterior(*task, 1.0, 0.1)[1],
    ):
        found, expected = (answer(e.support_x, e.support_y, e.query_x) for e in (there, here))
        assert found.device.type == device
        assert torch.equal(found.cpu(), expected)


def test_learned_optimizer(device):
    optimizer = LSTMOptimizer().to(device)
    learner = FromScratch(lambda: nn.Linear(4, 1, bias=False), optimizer, steps=4, truncation=2)
    problems = QuadraticSampler(4, tasks=3, device=device)
    meta_train(learner, problems, 2, progress=False, clip=1.0, each_piece=True)
    assert finite(learner, device)
    episode = problems.sample()
    assert learner.losses(episode.support_x, episode.support_y).shape == (3, 5)


@pytest.mark.parametrize(
    "inner", [SGD(0.1), SGD(0.1, 0.9), Adam(0.1)], ids=["SGD", "momentum", "Adam"]
)
def test_inner_loop(device, inner):
    net, x = mlp(inputs=3).to(device), torch.rand(6, 3).to(device)
    f = adapt(net, lambda f: f(x).square().mean(), inner, steps=2)
    f(x).square().mean().backward()
    assert all(w.grad.device.type == device for w in net.parameters())
    assert f(x).device.type == device


def lesson(device: str) -> EpisodeSampler:
    return EpisodeSampler(blobs().to(device), 3, 1, 2, tasks=2, rotate=True)


def test_stopped_training_ends_as_one_that_was_not(device, tmp_path):
    """Dropout draws from the device's own random numbers."""
    length = {"steps": 8, "every": 3, "progress": False}
    whole, cut = tiny(dropout=0.4).to(device), tiny(dropout=0.4).to(device)
    torch.manual_seed(1)
    history = meta_train(whole, lesson(device), out=tmp_path / "whole", **length)
    torch.manual_seed(1)
    stop_in(cut, 6)
    with pytest.raises(KeyboardInterrupt):
        meta_train(cut, lesson(device), out=tmp_path / "cut", **length)
    torch.manual_seed(2)
    assert meta_train(cut, lesson(device), out=tmp_path / "cut", **length).loss == history.loss
    assert same_weights(weights_of(cut), weights_of(whole))


def test_fine_tuning(device, tmp_path, photos, monkeypatch):
    """With both stages, as the probe of such a body leaves something to be learned."""
    monkeypatch.setattr(pretrained, "body", lambda *_: blind(tiny_body()))
    monkeypatch.setattr(finetune, "ROOM", 1)
    first = finetune.run(photos, tmp_path, RECIPE, device=device)
    assert (tmp_path / finetune.CHECKPOINT).exists()
    again = finetune.run(photos, tmp_path, RECIPE, device=device)  # goes on from its end
    assert again.right == first.right
    image = next((photos / "red").iterdir())
    loaded = classifier.load(tmp_path / classifier.MODEL)
    here, there = loaded.classify(image), copy.deepcopy(loaded).to(device).classify(image)
    assert here == pytest.approx(there)


# The book


@pytest.mark.parametrize("name", ondevice.CHAPTERS)
def test_every_cell_of_a_chapter(pretended, name):
    """At small sizes; what the results should be is not asked here."""
    ondevice.run(name, pretended)


def test_a_cell_with_tensors_on_two_devices_is_found(pretended, monkeypatch):
    cell = 'device = "cuda" if torch.cuda.is_available() else "cpu"\n'
    cell += "torch.rand(3).to(device) + torch.rand(3)"
    monkeypatch.setattr(ondevice, "cells", lambda name: ["import torch", cell])
    monkeypatch.setitem(ondevice.SMALL, "x", {})
    with pytest.raises(RuntimeError, match="same device"):
        ondevice.run("x", pretended)


def test_what_cannot_be_cut_any_more_is_told():
    with pytest.raises(ValueError, match=re.escape("holds no 'tasks=200, steps=1200'")):
        ondevice.smaller("01_concepts", ["x = 1"])
