"""A meta-step of the learned optimisers: metautils beside its peers, by length, and cut short.

Timed are the learned optimiser of Andrychowicz et al. 2016 and the Meta-LSTM. `higher` has neither,
so it is used as it wants optimisers added: the same LSTM by torch's cell, for one parameter after
another. Its users run one task after another; a form that keeps the networks of all tasks as one
tells what is saved by running tasks together from what the inner loop saves. The Meta-LSTM also
runs in plain PyTorch, as public ports have it. Before it is timed, each peer must give our
meta-loss and meta-gradient in double precision. A meta-step is forward and backward, without Adam's
update.

Then what the length of an unroll costs: time, and memory in a process of its own for each case, as
what a meta-step adds to the peak. Last what cutting it short spoils: how far the meta-gradient of a
trained optimiser turns away from the one that runs back through all steps.
"""

import copy
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils import vector_to_parameters

from metautils import results
from metautils.data.quadratics import QuadraticSampler
from metautils.episode import Episode
from metautils.evaluate import interval95
from metautils.learners.base import Learner, task_loss
from metautils.learners.learned_optimizer import (
    FLOOR,
    FromScratch,
    LSTMCell,
    LSTMOptimizer,
    log_sign,
    named,
)
from metautils.learners.meta_lstm import MetaLSTM
from metautils.nets import Conv4, classifier
from metautils.train import meta_train

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # a SyntaxWarning of its own
    import higher

ROUNDS, TOLERANCE = 7, 1e-9
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
STEPS, TRUNCATION, LENGTHS = 100, 20, (5, 10, 20, 50, 100)
CUTS, UNROLLS, BATCHES = (1, 2, 5, 10, 20, 50, 100), (40, 200), 20
OURS, PEER = "metautils", "higher, tasks stacked"

Problem = tuple[nn.Module, Callable[[nn.Module], Tensor]]  # a network and its losses `(tasks,)`
State = tuple[Tensor, ...]


class Case(NamedTuple):
    """A way to make a meta-step: `run` gives the meta-loss, `modules` hold the meta-gradient."""

    run: Callable[[], float]
    modules: list[nn.Module]

    def step(self) -> float:
        for module in self.modules:
            module.zero_grad()
        return self.run()


def gradient(modules: list[nn.Module]) -> Tensor:
    """All gradients in one row; torch's LSTM cell has its weights in two parts and two biases."""
    parts = []
    for m in (each for module in modules for each in module.modules()):
        if isinstance(m, nn.LSTMCell):
            parts += [torch.cat([m.weight_ih.grad, m.weight_hh.grad], 1), m.bias_ih.grad]
        else:
            parts += [p.grad for p in m.parameters(recurse=False)]
    return torch.cat([x.flatten() for x in parts])


# What is trained on.


def cast(e: Episode, dtype: torch.dtype) -> Episode:
    parts = (e.support_x, e.support_y, e.query_x, e.query_y)
    return Episode(*(x.to(DEVICE, dtype if x.is_floating_point() else x.dtype) for x in parts))


def each_task(e: Episode) -> Iterator[tuple[Tensor, ...]]:
    return zip(e.support_x, e.support_y, e.query_x, e.query_y, strict=True)


def quadratic(dtype: torch.dtype) -> nn.Sequential:
    layer = nn.Linear(10, 1, bias=False)
    nn.init.normal_(layer.weight)
    return nn.Sequential(layer).to(DEVICE, dtype)


def quadratics(dtype: torch.dtype) -> tuple[list[nn.Sequential], Episode]:
    torch.manual_seed(0)
    e = QuadraticSampler(dimensions=10, tasks=16).sample()
    return [quadratic(dtype) for _ in range(e.tasks)], cast(e, dtype)


def small_classifiers(dtype: torch.dtype) -> tuple[list[nn.Sequential], Episode]:
    torch.manual_seed(0)
    x, y = torch.rand(4, 128, 64), torch.randint(10, (4, 128))
    nets = [nn.Sequential(nn.Linear(64, 20), nn.Sigmoid(), nn.Linear(20, 10)) for _ in x]
    return [net.to(DEVICE, dtype) for net in nets], cast(Episode(x, y, x, y), dtype)


def images(dtype: torch.dtype) -> tuple[nn.Module, Episode]:
    torch.manual_seed(0)
    y = torch.arange(5)
    x, labels = torch.rand(4, 30, 1, 28, 28), (y.repeat(4, 1), y.repeat_interleave(5).repeat(4, 1))
    net = classifier(Conv4(width=32, norm=partial(nn.BatchNorm2d, momentum=0.95)), 32, 5)
    e = Episode(x[:, :5], labels[0], x[:, 5:], labels[1])
    return net.to(DEVICE, dtype), cast(e, dtype)


# Our meta-steps.


def ours(learner: Learner, e: Episode, at_once: int | None = None) -> Callable[[], float]:
    def run() -> float:
        total = 0.0
        for part in e.parts(at_once):
            for loss, *_ in learner.pieces(part):
                loss = loss * (part.tasks / e.tasks)
                loss.backward()
                total += float(loss.detach())
        return total

    return run


def from_scratch(
    nets: list[nn.Sequential], rule: LSTMOptimizer, steps: int, truncation: int
) -> FromScratch:
    """A learner whose trainings start at these networks, whenever it is run."""
    return FromScratch(partial(next, cycle(nets)), rule, steps, truncation)


# The peers.


def usual(rule: nn.Module) -> nn.Module:
    """A copy of a learned rule with torch's own LSTM cells, of the same weights."""
    rule = copy.deepcopy(rule)
    for name, cell in list(rule.named_children()):
        if isinstance(cell, LSTMCell):
            setattr(rule, name, usual_cell(cell))
    return rule


@torch.no_grad()
def usual_cell(cell: LSTMCell) -> nn.LSTMCell:
    hidden = len(cell.bias) // 4
    inputs = cell.weight.shape[1] - hidden
    new = nn.LSTMCell(inputs, hidden).to(cell.weight)
    new.weight_ih.copy_(cell.weight[:, :inputs])
    new.weight_hh.copy_(cell.weight[:, inputs:])
    new.bias_ih.copy_(cell.bias[:, 0])
    new.bias_hh.zero_()
    return new


def lstm_update(
    rule: nn.Module, p: Tensor, g: Tensor, state: State, loss: Tensor
) -> tuple[Tensor, State]:
    """One parameter's step by the rule of `LSTMOptimizer`."""
    first = rule.first(log_sign(g.flatten()).T, state[:2] or None)
    second = rule.second(first[0], state[2:] or None)
    return p + rule.scale * rule.output(second[0]).view_as(p), (*first, *second)


def cell_update(
    rule: nn.Module, p: Tensor, g: Tensor, state: State, loss: Tensor
) -> tuple[Tensor, State]:
    """One parameter's step by the rule of `MetaLSTMCell`."""
    g, c = g.flatten(), p.flatten()
    f, i = state[2:] or (torch.zeros_like(g), torch.zeros_like(g))
    seen = torch.cat([log_sign(g), log_sign(loss[None]).expand(2, len(g))]).T
    h, memory = rule.first(seen, state[:2] or None)
    f = (torch.cat([h, c[:, None], f[:, None]], 1) @ rule.W_F + rule.b_F).sigmoid()
    i = (torch.cat([h, c[:, None], i[:, None]], 1) @ rule.W_I + rule.b_I).sigmoid()
    return (f * c - i * g).view_as(p), (h, memory, f, i)


class Plain(torch.optim.Optimizer):
    """Never run: `higher` wants an ordinary optimiser behind each differentiable one."""

    def __init__(self, parameters: Iterator[nn.Parameter]) -> None:
        super().__init__(parameters, {})


class Learned(higher.optim.DifferentiableOptimizer):
    """A learned rule that steps one parameter after another, as `higher` has optimisers added."""

    def step(self, loss: Tensor, *args: object, **kwargs: object) -> list[Tensor]:
        self.loss = loss.detach()  # which `_update` is not told
        return super().step(loss, *args, **kwargs)

    def _update(self, grouped_grads: list[list[Tensor]], **kwargs: object) -> None:
        groups = zip(self.param_groups, grouped_grads, self.state, strict=True)
        for group, gradients, states in groups:
            for i, (p, g) in enumerate(zip(group["params"], gradients, strict=True)):
                new, states[i] = group["update"](p, g.detach(), states.get(i, ()), self.loss)
                group["params"][i] = new

    def cut(self) -> None:
        """Truncate: later steps do not lead back beyond here."""
        self._fmodel.update_params([p.detach().requires_grad_() for p in self._fmodel.fast_params])
        for states in self.state:
            for i, state in states.items():
                states[i] = tuple(x.detach() for x in state)


higher.register_optim(Plain, Learned)


def inner_loop(net: nn.Module, update: Callable, **options: bool) -> AbstractContextManager:
    given = {"update": [update]}  # settings of the optimiser itself would be deep-copied
    return higher.innerloop_ctx(net, Plain(net.parameters()), override=given, **options)


def learned_by_higher(
    rule: nn.Module, problems: list[Problem], tasks: int, steps: int, truncation: int
) -> Callable[[], float]:
    """The meta-step of `FromScratch`."""

    def piece(f: nn.Module, inner: Learned, losses: Callable) -> float:
        inner.cut()
        now, total = losses(f), 0.0
        for _ in range(truncation):
            inner.step(now.sum())
            now = losses(f)
            total = total + (now + FLOOR).log().sum()
        total = total / (steps * tasks)
        total.backward()
        return float(total.detach())

    def run() -> float:
        total = 0.0
        for net, losses in problems:
            with inner_loop(net, partial(lstm_update, rule)) as (f, inner):
                total += sum(piece(f, inner, losses) for _ in range(steps // truncation))
        return total

    return run


def one_by_one(nets: list[nn.Sequential], e: Episode) -> list[Problem]:
    def losses(x: Tensor, y: Tensor, f: nn.Module) -> Tensor:
        return task_loss(f(x), y)[None]

    found = zip(nets, e.support_x, e.support_y, strict=True)
    return [(net, partial(losses, x, y)) for net, x, y in found]


def together(nets: list[nn.Sequential], e: Episode) -> list[Problem]:
    """All tasks as one problem."""
    x, y = e.support_x, e.support_y
    layers = [Stack(k) if isinstance(k[0], nn.Linear) else k[0] for k in zip(*nets, strict=True)]

    def losses(f: nn.Module) -> Tensor:
        if y.is_floating_point():
            return (f(x) - y).square().mean((1, 2))
        return F.cross_entropy(f(x).transpose(1, 2), y, reduction="none").mean(1)

    return [(nn.Sequential(*layers), losses)]


class Stack(nn.Module):
    """Dense layers side by side, with weights `(layers, inputs, outputs)`."""

    def __init__(self, layers: list[nn.Linear]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.stack([x.weight.detach().T for x in layers]))
        self.bias = None
        if layers[0].bias is not None:
            self.bias = nn.Parameter(torch.stack([x.bias.detach()[None] for x in layers]))

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return torch.bmm(x, self.weight)
        return torch.baddbmm(self.bias, x, self.weight)


def clipped(gradients: list[Tensor], most: float = 10.0) -> list[Tensor]:
    """Scaled down to a norm, as the Meta-LSTM's are."""
    norm = torch.stack([g.detach().norm() for g in gradients]).norm()
    return [g * (most / norm).clamp(max=1) for g in gradients]


def meta_lstm_by_higher(
    rule: nn.Module, net: nn.Module, e: Episode, steps: int
) -> Callable[[], float]:
    def run() -> float:
        total = 0.0
        for x, y, queries, answers in each_task(e):
            update = partial(cell_update, rule)
            with inner_loop(net, update, copy_initial_weights=False) as (f, inner):
                for _ in range(steps):
                    inner.step(task_loss(f(x), y), grad_callback=clipped)
                loss = task_loss(f(queries), answers) / e.tasks
            loss.backward()
            total += float(loss.detach())
        return total

    return run


def meta_lstm_plain(
    rule: nn.Module, net: nn.Module, row: Tensor, e: Episode, steps: int
) -> Callable[[], float]:
    """As ports to PyTorch have it: phi is a row, and a second network is given its values."""
    net = copy.deepcopy(net)
    weights = dict(net.named_parameters())

    def adapted(x: Tensor, y: Tensor) -> Tensor:
        c, state = row, ()
        for _ in range(steps):
            vector_to_parameters(c.detach(), weights.values())
            loss = task_loss(net(x), y)
            g = torch.autograd.grad(loss, list(weights.values()))
            g = clipped([torch.cat([each.flatten() for each in g])])[0]
            c, state = cell_update(rule, c, g, state, loss.detach())
        return c

    def run() -> float:
        total = 0.0
        for x, y, queries, answers in each_task(e):
            phi = named(adapted(x, y), weights)
            loss = task_loss(functional_call(net, phi, (queries,)), answers) / e.tasks
            loss.backward()
            total += float(loss.detach())
        return total

    return run


# The comparison.


def learned_cases(
    make: Callable[[torch.dtype], tuple[list[nn.Sequential], Episode]],
    dtype: torch.dtype,
    steps: int = STEPS,
    truncation: int = TRUNCATION,
) -> dict[str, Case]:
    nets, e = make(dtype)
    rule = LSTMOptimizer().to(DEVICE, dtype)
    learner, theirs = from_scratch(nets, rule, steps, truncation), usual(rule)
    peer = partial(learned_by_higher, theirs, tasks=e.tasks, steps=steps, truncation=truncation)
    return {
        OURS: Case(ours(learner, e), [rule]),
        "metautils, task by task": Case(ours(learner, e, 1), [rule]),
        PEER: Case(peer(together(nets, e)), [theirs]),
        "higher, task by task": Case(peer(one_by_one(nets, e)), [theirs]),
    }


def meta_lstm_cases(dtype: torch.dtype, steps: int = 5) -> dict[str, Case]:
    net, e = images(dtype)
    learner = MetaLSTM(net, steps).to(DEVICE, dtype)
    rule = usual(learner.cell)
    row = nn.Parameter(torch.cat([p.detach().flatten() for p in net.parameters()]))
    row_too = nn.ParameterList([row])
    return {
        OURS: Case(ours(learner, e), [learner.cell, net]),
        "plain PyTorch": Case(meta_lstm_plain(rule, net, row, e, steps), [rule, row_too]),
        "higher": Case(meta_lstm_by_higher(rule, net, e, steps), [rule, net]),
    }


def check_same(cases: dict[str, Case]) -> None:
    """The meta-loss and the meta-gradient of every case must be the first one's."""
    found = {name: (case.step(), gradient(case.modules)) for name, case in cases.items()}
    loss, g = next(iter(found.values()))
    for name, (other, other_g) in found.items():
        apart = float((other_g - g).norm() / g.norm())
        assert abs(other - loss) <= TOLERANCE * abs(loss), f"{name}: meta-loss {other}, not {loss}"
        assert apart <= TOLERANCE, f"{name}: meta-gradients are {apart:.1g} of their norm apart"


def timed(case: Case) -> float:
    start = time.perf_counter()
    case.step()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def rounds(cases: dict) -> list[dict]:
    """Seconds of each case, in rounds one after another, so that a slow while meets all."""
    for case in cases.values():
        case.step()
    return [{name: timed(case) for name, case in cases.items()} for _ in range(ROUNDS)]


def compared(title: str, make: Callable[[torch.dtype], dict[str, Case]]) -> dict:
    """Medians of interleaved rounds, and of each round's ratio to the first case."""
    check_same(make(torch.float64))
    cases = make(torch.float32)
    first, found = next(iter(cases)), rounds(cases)
    rows = [
        [name, f"{1000 * median(r[name] for r in found):.0f}",
         f"{median(r[name] / r[first] for r in found):.2f} x"]
        for name in cases
    ]  # fmt: skip
    return {"title": title, "heads": ["Meta-step", "Milliseconds", "Time"], "rows": rows}


# The length of an unroll.


def unroll(who: str, steps: int, truncation: int) -> Case:
    return learned_cases(small_classifiers, torch.float32, steps, truncation)[who]


def peak(who: str, steps: int, truncation: int) -> float:
    """MiB that one meta-step adds to the peak of this process."""
    case = unroll(who, steps, truncation)
    if DEVICE.type == "cuda":
        before = torch.cuda.memory_allocated()
        case.step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    unroll(who, 1, 1).step()  # what the libraries set up at first use is no graph
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak is counted from here
    before = resident("VmRSS")
    case.step()
    return resident("VmHWM") - before


def resident(which: str) -> float:
    """MiB of this process, now (VmRSS) or at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(x for x in lines if x.startswith(which)).split()[1]) / 1024


def peak_apart(who: str, steps: int, truncation: int) -> str:
    """`peak` in a process of its own."""
    # Small blocks too go back to the system as soon as they are free.
    environment = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    run = [sys.executable, __file__, who, str(steps), str(truncation)]
    environment = {**os.environ, **environment}
    done = subprocess.run(run, capture_output=True, text=True, check=True, env=environment)
    return f"{float(done.stdout):.0f}"


def by_length() -> dict:
    """Unrolls of K steps: pieces of a training of `STEPS`, and trainings that are no longer."""
    pairs = [(steps, k) for k in LENGTHS for steps in dict.fromkeys((STEPS, k))]
    found = rounds({pair: unroll(OURS, *pair) for pair in pairs})
    rows = []
    for k in LENGTHS:
        cut, whole = (f"{1000 * median(r[t, k] for r in found):.0f}" for t in (STEPS, k))
        mib = [peak_apart(*case) for case in ((OURS, STEPS, k), (PEER, STEPS, k), (OURS, k, k))]
        rows.append([str(k), cut, mib[0], mib[1], whole, mib[2]])
    parts, alone = f"{STEPS} steps in pieces of K", "K steps alone"
    heads = ["K", f"{parts}: milliseconds", "MiB", f"MiB, {PEER}", f"{alone}: milliseconds", "MiB"]
    return {"title": "Length of an unroll, 4 networks 64-20-10", "heads": heads, "rows": rows}


# The bias of truncation.


def trained(unrolls: int) -> FromScratch:
    """A learner in double precision, after a short meta-training in single."""
    torch.manual_seed(0)
    learner = FromScratch(partial(quadratic, torch.float32), LSTMOptimizer(), STEPS, TRUNCATION)
    sampler = QuadraticSampler(device=DEVICE)
    meta_train(
        learner.to(DEVICE), sampler, unrolls, lr=0.01, progress=False, clip=1.0, each_piece=True
    )
    learner.make = partial(quadratic, torch.float64)
    return learner.double()


def cut_gradient(learner: FromScratch, e: Episode, seed: int, truncation: int) -> Tensor:
    torch.manual_seed(seed)  # the same starts for every truncation
    learner.truncation = truncation
    Case(ours(learner, e), [learner.optimizer]).step()
    return gradient([learner.optimizer])


def compared_cuts(learner: FromScratch) -> list[list[str]]:
    """Cosine and ratio of norms, cut short beside whole, for every length."""
    sampler, found = QuadraticSampler(seed=1), {k: ([], []) for k in CUTS}
    for seed in range(BATCHES):
        e = cast(sampler.sample(), torch.float64)
        whole = cut_gradient(learner, e, seed, STEPS)
        for k, (cosines, ratios) in found.items():
            cut = cut_gradient(learner, e, seed, k)
            cosines.append(torch.cosine_similarity(cut, whole, dim=0))
            ratios.append(cut.norm() / whole.norm())
    return [[with_interval(torch.stack(x)) for x in pair] for pair in found.values()]


def with_interval(x: Tensor) -> str:
    return f"{float(x.mean()):.3f} ± {interval95(x):.3f}"


def bias() -> dict:
    found = [compared_cuts(trained(unrolls)) for unrolls in UNROLLS]
    rows = [[str(k), *few, *many] for k, few, many in zip(CUTS, *found, strict=True)]
    heads = [f"{x}, after {n} unrolls" for n in UNROLLS for x in ("Cosine", "Ratio of norms")]
    title = f"Meta-gradients in pieces of K steps beside the whole of {STEPS}, quadratics, "
    title += f"means of {BATCHES} batches with 95% intervals"
    return {"title": title, "heads": ["K", *heads], "rows": rows}


def main() -> None:
    learned = f"{STEPS} steps in pieces of {TRUNCATION}"
    quadratic_title = f"Learned optimiser, 16 quadratics of 10 dimensions, {learned}"
    tables = [
        compared(quadratic_title, partial(learned_cases, quadratics)),
        compared(
            f"Learned optimiser, 4 networks 64-20-10 on 128 points each, {learned}",
            partial(learned_cases, small_classifiers),
        ),
        compared("Meta-LSTM, 4 tasks, 5 steps", meta_lstm_cases),
        by_length(),
        bias(),
    ]
    what = "one meta-step of a learned optimiser; the Meta-LSTM's tasks are 5-way 1-shot of 28x28 "
    what += f"with 5 queries a class, through Conv-4 of width 32; medians of {ROUNDS} interleaved "
    what += "rounds"
    record = {"what": what, "tables": tables, **results.provenance(DEVICE)}
    name = "speed_unrolls" if DEVICE.type == "cpu" else "speed_unrolls_gpu"
    (results.folder() / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    print(*(f"{title}\n{each}\n" for title, each in results.tables(name).items()), sep="\n")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(peak(sys.argv[1], *map(int, sys.argv[2:])))
    else:
        main()
