"""What every training saves and finds again: weights, optimiser, settings, all random numbers."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from metautils.errors import Diverged, ReaderError
from metautils.files import DataError, load_safely, save_atomically

CHECKPOINT = "checkpoint.pt"


class CheckpointMismatch(ReaderError, ValueError):
    """A checkpoint does not belong to this network or this run."""


class Training:
    """The state of a training: all that a resumed one needs to go on as if never stopped.

    Args:
        net: what is trained, on its device.
        optimizer: of its parameters.
        schedule: of the optimiser's rates.
        settings: what another run must agree in to go on with the checkpoint; plain values, or
            dictionaries of them.
        path: of the checkpoint, or None to keep none.

    Attributes:
        best: the weights that did best so far.
        merit: how well they did, a tuple that is compared; None before the first trial.
        best_at: when that was, as told to `try_out`.

    Example:
        >>> net = nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(net.parameters(), 0.1)
        >>> schedule = torch.optim.lr_scheduler.StepLR(optimizer, 10)
        >>> training = Training(net, optimizer, schedule, {"lr": 0.1})
        >>> training.try_out((50.0,), at=1), training.try_out((40.0,), at=2)
        (True, False)
        >>> training.best_at
        1
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: Optimizer,
        schedule: LRScheduler,
        settings: dict[str, Any],
        path: Path | None = None,
    ) -> None:
        self.net, self.optimizer, self.schedule = net, optimizer, schedule
        self.settings, self.path = settings, path
        self.best, self.merit, self.best_at = _copy(net.state_dict()), None, 0
        optimizer.zero_grad()  # an interruption may have left some

    def try_out(self, merit: tuple[float, ...], at: int) -> bool:
        """Remember the weights if they did better than any before; whether they did."""
        better = self.merit is None or merit > self.merit
        if better:
            self.best, self.merit, self.best_at = _copy(self.net.state_dict()), merit, at
        return better

    def save(self, **notes: Any) -> None:
        """Write everything down, with plain values of the caller's beside it.

        Raises:
            DataError: if it cannot be written; the checkpoint before stays.
        """
        if self.path is None:
            return
        state = {name: getattr(self, name).state_dict() for name in PARTS}
        kept = {name: getattr(self, name) for name in KEPT}
        random = _random_states(device_of(self.net))
        save_atomically(state | kept | {"random": random, "notes": notes}, self.path)

    def resume(self) -> dict[str, Any] | None:
        """Take everything up again; returns the caller's notes, or None if there is no checkpoint.

        Raises:
            CheckpointMismatch: if it is of another network or was made with other settings.
            DataError: if it is damaged.
        """
        if self.path is None or not self.path.exists():
            return None
        state = _read(self.path)
        check_same_network(state["net"], self.net, self.path)
        check_same_settings(state["settings"], self.settings, self.path)
        for name in PARTS:
            getattr(self, name).load_state_dict(state[name])
        self.best, self.merit, self.best_at = (state[name] for name in ("best", "merit", "best_at"))
        _set_random_states(state["random"], device_of(self.net))
        return state["notes"]

    def finish(self) -> None:
        """Leave the network with the weights that did best."""
        self.net.load_state_dict(self.best)

    def stop(self, what: str, advice: str) -> None:
        """End a training that has failed.

        Raises:
            FloatingPointError: always.
        """
        kept = "" if self.path is None else f" The last good checkpoint stays in {self.path}."
        raise Diverged(f"{what}, so training stopped.{kept} {advice}")


PARTS = ("net", "optimizer", "schedule")  # with a state of their own
KEPT = ("settings", "best", "merit", "best_at")


def load_weights(net: nn.Module, path: Path) -> None:
    """Put the best weights of a checkpoint into a network of the same shape.

    Raises:
        DataError: if the file is missing or damaged.
        CheckpointMismatch: if names or shapes differ; the network is left as it was.
    """
    weights = _read(path)["best"]
    check_same_network(weights, net, path)
    net.load_state_dict(weights)


def check_same_network(weights: dict[str, Tensor], net: nn.Module, path: Path | str) -> None:
    """Compare names and shapes of saved weights with a network's.

    Raises:
        CheckpointMismatch: at the first difference.
    """
    own = net.state_dict()
    for name in {**own, **weights}:
        saved, here = (tuple(x[name].shape) if name in x else None for x in (weights, own))
        if saved != here:
            raise CheckpointMismatch(
                f"{path} belongs to another network: {name!r} has shape {saved} there and {here} "
                "here (None: it is missing). Make the network as it was when the file was "
                "written, or name another file or folder."
            )


def check_same_settings(saved: dict[str, Any], own: dict[str, Any], path: Path) -> None:
    """Compare the settings of what lies in a file with those of today.

    Raises:
        CheckpointMismatch: with the first that differs.
    """
    difference = _difference(saved, own)
    if difference is not None:
        name, there, here = difference
        raise CheckpointMismatch(
            f"{path} was made with {name}={there}, not {here}: give the same settings to go on "
            "with it, or another folder to start anew."
        )


def _difference(saved: Any, own: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """Name and both values of the first setting that differs."""
    if not (isinstance(saved, dict) and isinstance(own, dict)):
        return None if saved == own else (name, saved, own)
    for key in {**own, **saved}:
        inner = f"{name}.{key}" if name else str(key)
        found = _difference(saved.get(key), own.get(key), inner)
        if found is not None:
            return found
    return None


def _read(path: Path) -> dict[str, Any]:
    state = load_safely(path)
    if not isinstance(state, dict) or not {*PARTS, *KEPT, "random", "notes"} <= state.keys():
        raise DataError(f"{path} is no checkpoint of a training: name another file or folder.")
    return state


def _random_states(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states[device.type] = torch.get_device_module(device).get_rng_state(*_which(device))
    return states


def _set_random_states(states: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type != "cpu" and device.type in states:
        module = torch.get_device_module(device)
        module.set_rng_state(states[device.type], *_which(device))


def _which(device: torch.device) -> tuple[torch.device, ...]:
    """The device, where there may be several of its kind."""
    return () if device.type == "mps" else (device,)


def digest(told: str, *tensors: Tensor) -> str:
    """Sixteen digits that differ where the text or a byte of a tensor differs; for settings.

    Example:
        >>> digest("x", torch.zeros(2)) == digest("x", torch.tensor([0.0, 1e-30]))
        False
    """
    found = hashlib.sha256(told.encode())
    for x in tensors:
        found.update(x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())  # (bytes,)
    return found.hexdigest()[:16]


def device_of(net: nn.Module) -> torch.device:
    """Where a network's parameters lie; the CPU if it has none."""
    return next(net.parameters(), torch.empty(0, device="cpu")).device


def _copy(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.detach().clone() for name, x in weights.items()}
