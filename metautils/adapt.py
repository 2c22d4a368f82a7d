"""The differentiable inner loop: gradient steps on any module that keep their own derivative."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.backends import cudnn, mha
from torch.func import functional_call, grad
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode

Named = dict[str, Tensor]
Rate = float | Tensor | Mapping[str, Tensor] | nn.ParameterDict
Rates = Rate | Sequence[Rate] | nn.ParameterList | nn.ModuleList

# Of torch's own containers none says that it is a sequence or a mapping.
_LISTS = (Sequence, nn.ParameterList, nn.ModuleList)
_DICTIONARIES = (Mapping, nn.ParameterDict)


class Adapted:
    """A module seen with parameters of its own: call it as you would call the module.

    Attributes:
        module: whose `forward` is run; its own parameters and buffers are never written.
        parameters: phi, by name, the parameters used instead.
        buffers: by name; what a call changes in them stays here, with this task.
        state: what the optimiser remembers.
        k: how many inner steps were made.

    Example:
        >>> net, x = nn.Linear(2, 1), torch.rand(3, 2)
        >>> f = Adapted(net, {name: 2 * p for name, p in net.named_parameters()}, buffers={})
        >>> torch.allclose(f(x), 2 * net(x))
        True
        >>> own = f.as_module()  # an nn.Linear: to save, to copy, to train on
        >>> torch.equal(own.state_dict()["weight"], 2 * net.weight)
        True
    """

    def __init__(
        self,
        module: nn.Module,
        parameters: Named,
        buffers: Named,
        state: dict[str, Any] | None = None,
        k: int = 0,
    ) -> None:
        self.module, self.parameters, self.buffers = module, parameters, buffers
        self.state, self.k = state or {}, k

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        state = {**self.parameters, **self.buffers}
        output = functional_call(self.module, state, args, kwargs)
        self.buffers = {name: state[name] for name in self.buffers}
        return output

    def as_module(self) -> nn.Module:
        """A copy of the module whose own parameters are phi, and whose buffers are this task's.

        It is a module as any other, with its `state_dict`; no gradient leads back to theta.
        """
        module = copy.deepcopy(self.module)
        own = dict([*module.named_parameters(), *module.named_buffers()])
        with torch.no_grad():
            for name, x in {**self.parameters, **self.buffers}.items():
                own[name].copy_(x)
        return module

    def detach_(self) -> None:
        """Forget how parameters and state came about: later steps do not lead back beyond here.

        Called on what `inner_steps` has just yielded, this truncates backpropagation.
        """
        self.parameters, self.state = _detached(self.parameters), _detached(self.state)


class Optimizer(Protocol):
    """What makes an inner step of a gradient: `SGD`, `Adam`, or an optimiser that was learned.

    Example:
        >>> class Signs:
        ...     def step(self, phi, gradients, state, k, loss):
        ...         new = {name: p - 0.1 * gradients[name].sign() for name, p in phi.items()}
        ...         return new, state
        >>> net, x = nn.Linear(2, 1, bias=False), torch.ones(3, 2)
        >>> f = adapt(net, lambda f: f(x).mean(), Signs())
        >>> torch.allclose(f.parameters["weight"], net.weight - 0.1)
        True
    """

    def step(
        self, phi: Named, gradients: Named, state: dict, k: int, loss: Tensor
    ) -> tuple[Named, dict]:
        """Inner step number `k`, counted from 0: new parameters and state.

        Args:
            phi: the parameters to change, by name.
            gradients: of the inner loss, by name.
            state: what the step before returned; empty at the first.
            k: number of the step.
            loss: the inner loss at phi, a scalar.
        """


class SGD:
    """Gradient descent, `phi <- phi - lr * v` with `v <- momentum * v + gradient`, as in torch.

    Args:
        lr: alpha, above 0: a number or a tensor for all parameters, or a tensor for each by name,
            of the parameter's shape or a scalar. A list holds one such rate for every step. A
            tensor that requires a gradient is learned, and may become negative; the lists and
            dictionaries of `torch.nn` will do, and `_` for each dot of a name, as they allow none.
        momentum: in [0, 1); the velocity starts at 0.
        weight_decay: times phi is added to the gradient, at least 0.
        nesterov: step by `gradient + momentum * v`.

    Raises:
        ValueError: if a rate that is not learned is 0 or below, or another number out of range.

    Example:
        >>> net, x = nn.Linear(2, 1, bias=False), torch.ones(3, 2)  # the gradient of f(x) is 1
        >>> f = adapt(net, lambda f: f(x).mean(), SGD(lr=0.5), steps=3)
        >>> torch.allclose(f.parameters["weight"], net.weight - 3 * 0.5)
        True
    """

    def __init__(
        self,
        lr: Rates,
        momentum: float = 0.0,
        *,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum is {momentum}; it must be at least 0 and below 1.")
        self.lr, self.momentum, self.nesterov = _checked(lr), momentum, nesterov
        self.weight_decay = _checked_decay(weight_decay)

    def step(
        self, phi: Named, gradients: Named, state: dict, k: int, loss: Tensor
    ) -> tuple[Named, dict]:
        """Inner step number `k`, counted from 0: new parameters and state."""
        gradients = _decayed(gradients, phi, self.weight_decay)
        v = along = gradients
        if self.momentum and state:
            v = along = {name: self.momentum * state["v"][name] + g for name, g in v.items()}
        if self.nesterov:
            along = {name: g + self.momentum * v[name] for name, g in gradients.items()}
        new = {name: p - _rate(self.lr, name, k) * along[name] for name, p in phi.items()}
        return new, {"v": v}


class Adam:
    """Adam (Kingma and Ba 2015, algorithm 1), differentiable through both of its averages.

    Args:
        lr: as in `SGD`.
        betas: decay of the averages of the gradient and of its square, each in [0, 1).
        eps: added to the root of the second average.
        weight_decay: times phi is added to the gradient, at least 0.
        decoupled: scale phi by `1 - lr * weight_decay` instead (AdamW, Loshchilov and Hutter 2019).

    Raises:
        ValueError: if a rate that is not learned is 0 or below, or another number out of range.

    Example:
        >>> net, x = nn.Linear(2, 1, bias=False), torch.ones(3, 2)
        >>> f = adapt(net, lambda f: 9 * f(x).mean(), Adam(lr=0.5), steps=3)
        >>> torch.allclose(f.parameters["weight"], net.weight - 3 * 0.5)  # of any gradient's size
        True
    """

    def __init__(
        self,
        lr: Rates,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        weight_decay: float = 0.0,
        decoupled: bool = False,
    ) -> None:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas are {betas}; both must be at least 0 and below 1.")
        self.lr, self.betas, self.eps = _checked(lr), betas, eps
        self.weight_decay, self.decoupled = _checked_decay(weight_decay), decoupled

    def step(
        self, phi: Named, gradients: Named, state: dict, k: int, loss: Tensor
    ) -> tuple[Named, dict]:
        """Inner step number `k`, counted from 0: new parameters and state."""
        rates = {name: _rate(self.lr, name, k) for name in phi}
        if self.decoupled and self.weight_decay:
            phi = {name: p * (1 - rates[name] * self.weight_decay) for name, p in phi.items()}
        else:
            gradients = _decayed(gradients, phi, self.weight_decay)
        zeros = {name: torch.zeros_like(g) for name, g in gradients.items()}
        (b1, b2), m, v = self.betas, state.get("m", zeros), state.get("v", zeros)
        m = {name: b1 * m[name] + (1 - b1) * g for name, g in gradients.items()}
        v = {name: b2 * v[name] + (1 - b2) * g.square() for name, g in gradients.items()}
        c1, c2 = 1 - b1 ** (k + 1), 1 - b2 ** (k + 1)
        new = {
            name: p - rates[name] * (m[name] / c1) / (_root(v[name] / c2) + self.eps)
            for name, p in phi.items()
        }
        return new, {"m": m, "v": v}


class _Grouped:
    """The parameter groups of an optimiser of torch, each moved by a rule of its own."""

    def __init__(self, optimizer: torch.optim.Optimizer, module: nn.Module) -> None:
        names = {id(p): name for name, p in module.named_parameters()}
        self.groups = []
        for k, group in enumerate(optimizer.param_groups):
            inside = [names[id(p)] for p in group["params"] if id(p) in names]
            if len(inside) < len(group["params"]):
                raise ValueError(
                    f"Group {k} of {type(optimizer).__name__} holds parameters that the module "
                    "has not: make the optimiser of module.parameters()."
                )
            if (rule := _rule(type(optimizer), group)) is not None:
                self.groups.append((inside, rule))

    def step(
        self, phi: Named, gradients: Named, state: dict, k: int, loss: Tensor
    ) -> tuple[Named, dict]:
        new, after = dict(phi), {}
        for i, (names, rule) in enumerate(self.groups):
            own = {name: phi[name] for name in names if name in phi}
            part = {name: gradients[name] for name in own}
            moved, after[i] = rule.step(own, part, state.get(i, {}), k, loss)
            new |= moved
        return new, after


def _rule(kind: type, group: Mapping[str, Any]) -> SGD | Adam | None:
    """What moves a parameter group; None for a rate of 0, with which it stays."""
    odd = [key for key in ("dampening", "maximize", "amsgrad") if group.get(key)]
    if kind not in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW) or odd:
        told = f"{kind.__name__} with {odd[0]}={group[odd[0]]}" if odd else kind.__name__
        raise ValueError(
            f"{told} makes no inner steps here: use SGD, Adam or AdamW of torch.optim without "
            "dampening, maximize and amsgrad, or write a step of your own (metautils.adapt."
            "Optimizer)."
        )
    lr, decay = group["lr"], group["weight_decay"]
    if isinstance(lr, float | int) and lr == 0:
        return None
    if kind is torch.optim.SGD:
        return SGD(lr, group["momentum"], weight_decay=decay, nesterov=group["nesterov"])
    # What Adam of a recent torch has as an option, AdamW always does.
    decoupled = group.get("decoupled_weight_decay", kind is torch.optim.AdamW)
    return Adam(lr, group["betas"], group["eps"], weight_decay=decay, decoupled=decoupled)


def inner_steps(
    module: nn.Module,
    loss: Callable[[Adapted], Tensor],
    optimizer: Optimizer | torch.optim.Optimizer,
    *,
    first_order: bool = False,
    only: Collection[str] = (),
    clip: float | None = None,
    allow_unused: bool = False,
) -> Iterator[Adapted]:
    """Yield the module after 0, 1, 2, ... inner steps, without end.

    Each step is `phi <- phi - alpha * grad(loss)(phi)`, starting at the module's own parameters
    theta, or what another optimiser makes of the gradient. What is yielded is a differentiable
    function of theta and of learned rates (Finn et al. 2017, section 2.2).

    Args:
        module: any module; it is left as it was, buffers included.
        loss: of the adapted module, a scalar, such as `lambda f: F.mse_loss(f(x), y)`.
        optimizer: `SGD` or `Adam` of this file, a learned one, or an SGD, Adam or AdamW of
            `torch.optim` over the module's parameters. Of this last the options of every group
            count, not what it remembers; parameters in none of its groups stay as they are.
        first_order: treat the inner gradient as a constant (FOMAML), which is cheaper. Otherwise
            attention is computed by its plain kernel (`SDPBackend.MATH`) and recurrent layers
            without cuDNN: the fused ones have no second derivative.
        only: adapt only these parameters, or the parameters of these submodules (ANIL). Frozen
            ones, with `requires_grad=False`, stay as they are in any case.
        clip: scale the gradient of a step down to this norm, over all adapted parameters.
        allow_unused: leave parameters that take no part in the loss as they are.

    Raises:
        ValueError: if the module has no parameter to adapt or all are frozen, the loss is not a
            scalar or a parameter takes no part in it, the module's parameters change between two
            steps, `clip` is not positive, or the optimiser is another one of torch or of others'
            parameters.
    """
    if clip is not None and clip <= 0:
        raise ValueError(f"clip is {clip}; a norm must be above 0.")
    theta, buffers = dict(module.named_parameters()), dict(module.named_buffers())
    names = _names(theta, only)
    if isinstance(optimizer, torch.optim.Optimizer):
        optimizer = _Grouped(optimizer, module)
    f = Adapted(module, theta, _cloned(buffers))
    while True:
        yield f
        _check_unchanged(module, theta, f.k)
        # A step starts from copies of the buffers, so what was yielded stays as it is.
        with torch.no_grad() if first_order else twice_differentiable(module):
            gradients, value, buffers = _gradient(f, loss, names, allow_unused or f.k > 0)
            gradients = gradients if clip is None else _clipped(gradients, clip)
        phi = {name: f.parameters[name] for name in names}
        phi, state = optimizer.step(phi, gradients, f.state, f.k, value)
        f = Adapted(module, {**f.parameters, **phi}, buffers, state, f.k + 1)


def adapt(
    module: nn.Module,
    loss: Callable[[Adapted], Tensor],
    optimizer: Optimizer | torch.optim.Optimizer,
    steps: int = 1,
    **options: Any,
) -> Adapted:
    """The module after `steps` inner steps; `options` are those of `inner_steps`.

    Raises:
        ValueError: as `inner_steps`, or if `steps` is negative.
    """
    if steps < 0:
        raise ValueError(f"steps is {steps}; it must be at least 0.")
    return next(islice(inner_steps(module, loss, optimizer, **options), steps, None))


def over_tasks(
    task: Callable[..., Tensor | tuple[Tensor, ...]],
    module: nn.Module,
    *batches: Tensor,
    vectorise: bool,
) -> Tensor | tuple[Tensor, ...]:
    """Run `task` on every row of the batches and stack the results: by vmap, or one by one.

    Args:
        task: written for one task; gives a tensor, or a tuple of tensors.
        module: what it adapts.
        batches: tensors whose first dimension counts the tasks.
        vectorise: all tasks at once by `torch.vmap`, or in a loop; equal to rounding.

    Raises:
        ValueError: if the module holds a layer that `vmap` refuses or gets wrong, or does what
            `vmap` cannot, such as draw random numbers or branch on what it computes.
    """
    if not vectorise:
        rows = zip(*(map(_channels_last, batch) for batch in batches), strict=True)
        found = [task(*row) for row in rows]
        if isinstance(found[0], Tensor):
            return torch.stack(found)  # (tasks, ...)
        return tuple(map(torch.stack, zip(*found, strict=True)))  # (tasks, ...) each
    if obstacle := vmap_obstacle(module):
        raise ValueError(obstacle)
    with for_vmap(
        module, "give vectorise=False, which runs the tasks one by one.", len(batches[0])
    ):
        return torch.vmap(task)(*batches)


def vmap_obstacle(module: nn.Module) -> str | None:
    """Why `vmap` refuses the module or gets it wrong, as far as its layers tell; None if not.

    Example:
        >>> vmap_obstacle(nn.Sequential(nn.Linear(3, 3), nn.Tanh())) is None
        True
    """
    told = (_obstacle(name, layer) for name, layer in module.named_modules())
    return next(filter(None, told), None)


@contextmanager
def for_vmap(module: nn.Module, advice: str, rows: int) -> Iterator[None]:
    """Let `vmap` over so many rows run the module rightly, or say in one sentence why it does not.

    Raises:
        ValueError: if `vmap` cannot run what it is given; ends with the advice.
    """
    with ExitStack() as stack:
        # Fused attention has no rule for vmap on a CPU, and what takes its place in evaluation mode
        # no derivative.
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.callback(mha.set_fastpath_enabled, mha.get_fastpath_enabled())
        mha.set_fastpath_enabled(False)
        mode = _ScaledOutside()
        for layer in filter(_may_normalise, module.modules()):
            stack.callback(layer.register_forward_pre_hook(mode.enter, prepend=True).remove)
            stack.callback(layer.register_forward_hook(mode.leave, always_call=True).remove)
        try:
            yield
        except RuntimeError as error:
            if not (said := _of_vmap(str(error), rows)):
                raise
            raise ValueError(f"This cannot be vectorised ({said}): {advice}") from error


def _may_normalise(layer: nn.Module) -> bool:
    """Whether its `forward` may call a normalisation: those of most layers of torch do not."""
    normalises = isinstance(layer, nn.LayerNorm | nn.GroupNorm | _NormBase)
    return normalises or not type(layer).__module__.startswith("torch.nn.")


# Where torch's normalisations take their weight and bias.
_SCALES = {
    F.layer_norm: (2, 3), F.batch_norm: (3, 4), F.instance_norm: (3, 4), F.group_norm: (2, 3),
    torch.layer_norm: (2, 3), torch.batch_norm: (1, 2), torch.instance_norm: (1, 2),
    torch.group_norm: (2, 3),
}  # fmt: skip


class _ScaledOutside(TorchFunctionMode):
    """Torch's normalisations without weight and bias, which are applied to what they return.

    Where a kernel scales as well, its second derivative under `vmap` is wrong, `group_norm` apart.
    In the `forward` of layers alone: a mode sees all that torch does, which costs a tenth of a
    small step.
    """

    depth = 0  # of layers in layers

    def enter(self, *_: Any) -> None:
        """A hook before `forward`, and before other hooks, as `leave` is called in any case."""
        if not self.depth:
            self.__enter__()
        self.depth += 1

    def leave(self, *_: Any) -> None:
        """A hook after `forward`."""
        self.depth -= 1
        if not self.depth:
            self.__exit__(None, None, None)

    def __torch_function__(
        self, function: Callable, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function not in _SCALES:
            return function(*args, **(kwargs or {}))
        args, kwargs, scale = [*args], {**(kwargs or {})}, []
        if "group" in function.__name__ and args:
            # In torch 2.9 and older, vmap knows none of images in channels-last layout.
            args[0] = args[0].contiguous()
        for name, place in zip(("weight", "bias"), _SCALES[function], strict=True):
            held, key = (args, place) if place < len(args) else (kwargs, name)
            scale.append(held[key] if held is args else kwargs.get(name))
            held[key] = None
        return _scaled(function(*args, **kwargs), *scale, last="layer" in function.__name__)


def _scaled(x: Tensor, weight: Tensor | None, bias: Tensor | None, last: bool) -> Tensor:
    """Scaled and shifted, along the last dimensions or by channel."""
    if not last:
        # (channels,) to (channels, 1, ...), beside (n, channels, ...)
        shape = (-1, *[1] * (x.dim() - 2))
        weight, bias = (y if y is None else y.view(shape) for y in (weight, bias))
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


@contextmanager
def twice_differentiable(module: nn.Module) -> Iterator[None]:
    """Kernels whose derivative has a derivative, wherever one is going to be taken."""
    if not torch.is_grad_enabled():
        yield
        return
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if any(isinstance(layer, nn.RNNBase) for layer in module.modules()):
            stack.callback(setattr, cudnn, "enabled", cudnn.enabled)
            cudnn.enabled = False
        yield


def _of_vmap(words: str, rows: int) -> str:
    """What an error of torch says that comes of `vmap`; empty if it has another cause."""
    if "randomness" in words:
        return "it draws random numbers, which the tasks would share"
    if ".item()" in words:
        return "it makes a number of a tensor, or branches on one"
    if "dynamic shape" in words:
        return "it makes a tensor whose size depends on what is computed"
    if "data pointer" in words:
        return "it takes numbers out of a tensor, as .tolist() does; no inner loop allows .numpy()"
    # In place, what the tasks share would have to become as many tensors as there are tasks.
    shapes = re.search(r"shape \[(.*)\] doesn't match the broadcast shape \[(\d+), \1\]", words)
    if "inplace" in words or "in place" in words or (shapes and int(shapes[2]) == rows):
        return "it changes a tensor in place that the tasks share"
    of_vmap = words.startswith("vmap: ") or "atching rule not implemented" in words
    return f"torch says: {words.splitlines()[0].rstrip('.')}" if of_vmap else ""


def _channels_last(x: Tensor) -> Tensor:
    # The layout that convolutions on a CPU are fastest in. An image of one channel is in it and
    # out of it at once; only a copy makes torch take it for what it is, a quarter faster.
    return x.clone(memory_format=torch.channels_last) if x.dim() == 4 else x


def _gradient(
    f: Adapted, loss: Callable[[Adapted], Tensor], names: list[str], allow_unused: bool
) -> tuple[Named, Tensor, Named]:
    """Gradient of the loss for the named parameters, its value, the buffers after the forward."""

    def objective(phi: Named) -> tuple[Tensor, tuple[Tensor, Named]]:
        parameters = {**f.parameters, **phi}
        inner = Adapted(f.module, parameters, _cloned(f.buffers), f.state, f.k)
        value = loss(inner)
        if not isinstance(value, Tensor) or value.dim():
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"The inner loss is {shape}, not a scalar tensor: average it over the support set."
            )
        if not allow_unused:
            _check_used(value, phi)
        return value, (value, inner.buffers)

    phi = {name: f.parameters[name] for name in names}
    gradients, (value, buffers) = grad(objective, has_aux=True)(phi)
    return gradients, value, buffers


def _check_used(loss: Tensor, phi: Named) -> None:
    # grad() gives zeros for a parameter that the loss never saw; its graph tells the difference.
    seen, todo = set(), [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo.extend(parent for parent, _ in node.next_functions)
    leaves = {name: torch.autograd.graph.get_gradient_edge(p).node for name, p in phi.items()}
    unused = [name for name, leaf in leaves.items() if leaf not in seen]
    if unused:
        raise ValueError(
            f"{', '.join(unused)}: no part of the inner loss depends on this. Adapt the others "
            "with only=..., or give allow_unused=True to leave it as it is."
        )


def _names(theta: Named, only: Collection[str]) -> list[str]:
    wanted = [only] if isinstance(only, str) else only
    for one in wanted:
        if not any(name == one or name.startswith(f"{one}.") for name in theta):
            raise ValueError(f"only={one!r} names none of the parameters {', '.join(theta)}.")
    names = [n for n in theta if not wanted or any(f"{n}.".startswith(f"{w}.") for w in wanted)]
    if not names:
        raise ValueError("The module has no parameters, so there is nothing to adapt.")
    # What functional_call has put in place of a parameter is none, and under vmap it does not tell
    # whether it requires a gradient.
    frozen = {n for n, p in theta.items() if isinstance(p, nn.Parameter) and not p.requires_grad}
    learning = [name for name in names if name not in frozen]
    if not learning:
        raise ValueError(
            f"{', '.join(names)}: all that could adapt is frozen, so give some of it "
            "requires_grad_(True), or name other parameters in only=...."
        )
    return learning


def _check_unchanged(module: nn.Module, theta: Named, k: int) -> None:
    before = {name: tuple(p.shape) for name, p in theta.items()}
    now = {name: tuple(p.shape) for name, p in module.named_parameters()}
    for name in {**before, **now}:
        if before.get(name) != now.get(name):
            raise ValueError(
                f"Before inner step {k + 1} the module's {name!r} has shape {now.get(name)}, at "
                f"the first it was {before.get(name)} (None: missing): build the whole module "
                "before the inner loop, and change none of its parameters inside."
            )


def _detached(x: Any) -> Any:
    if isinstance(x, Mapping):
        return {name: _detached(each) for name, each in x.items()}
    return x.detach() if isinstance(x, Tensor) else x


def _cloned(buffers: Named) -> Named:
    return {name: b.clone() for name, b in buffers.items()}


def _clipped(gradients: Named, most: float) -> Named:
    squares = sum(g.square().sum() for g in gradients.values())
    scale = (most / _root(squares).clamp(min=1e-12)).clamp(max=1)
    return {name: scale * g for name, g in gradients.items()}


def _decayed(gradients: Named, phi: Named, decay: float) -> Named:
    return {n: g + decay * phi[n] for n, g in gradients.items()} if decay else gradients


def _root(x: Tensor) -> Tensor:
    # The root's derivative at 0 is infinite, and times 0 it is not a number: a gradient of
    # exactly 0, as behind a dead ReLU, would spoil the whole meta-gradient.
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1.0).sqrt(), 0.0)


def _rate(lr: Rates, name: str, k: int) -> float | Tensor:
    if isinstance(lr, _LISTS):
        if k >= len(lr):
            raise ValueError(f"There are rates for {len(lr)} steps, but this is step {k + 1}.")
        lr = lr[k]
    if not isinstance(lr, _DICTIONARIES):
        return lr
    for key in (name, name.replace(".", "_")):
        if key in lr:
            return lr[key]
    raise ValueError(f"There is no rate for {name!r}, only for {', '.join(lr)}: add one.")


def _checked(lr: Rates) -> Rates:
    for step in lr if isinstance(lr, _LISTS) else [lr]:
        for rate in step.values() if isinstance(step, _DICTIONARIES) else [step]:
            learned = isinstance(rate, nn.Parameter) or getattr(rate, "requires_grad", False)
            if not learned and not bool((torch.as_tensor(rate, device="cpu") > 0).all()):
                raise ValueError(f"The inner rate is {rate}; it must be above 0.")
    return lr


def _checked_decay(decay: float) -> float:
    if decay < 0:
        raise ValueError(f"weight_decay is {decay}; it must be at least 0.")
    return decay


def _obstacle(name: str, layer: nn.Module) -> str | None:
    where = f"{name or 'The module'} ({type(layer).__name__})"
    if isinstance(layer, _DropoutNd) and layer.p > 0 and layer.training:
        return (
            f"{where} draws random numbers, which vectorised tasks would share: put it into "
            "evaluation mode, or give vectorise=False."
        )
    if isinstance(layer, nn.RNNBase | nn.RNNCellBase | nn.RReLU):
        return f"{where} cannot be vectorised, as vmap runs no such layer: give vectorise=False."
    if isinstance(layer, _NormBase) and layer.training and layer.running_mean is not None:
        return (
            f"{where} cannot be vectorised, as it writes running statistics: use metautils.nets."
            "BatchNorm, or track_running_stats=False, or give vectorise=False."
        )
    return None
