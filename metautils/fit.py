"""Ordinary training, epoch by epoch: the best epoch on validation, an early end, exact resume."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from tqdm import tqdm

from metautils.files import DataError, load_safely, save_atomically
from metautils.precision import fast_autocast
from metautils.train import check_same_network, check_same_settings


@dataclass(frozen=True)
class Epoch:
    """A row of a training's table; losses without penalty, accuracies in percent."""

    number: int
    train_loss: float
    train_accuracy: float
    validation_loss: float
    validation_accuracy: float
    seconds: float

    def __str__(self) -> str:
        return "{:5d} {:11.4f} {:8.1f} % {:11.4f} {:8.1f} % {:8.1f}".format(*astuple(self))


HEADS = "epoch  train loss   accuracy  valid. loss  accuracy  seconds"


def fit(
    net: nn.Module,
    train: DataLoader,
    validation: DataLoader,
    optimizer: Optimizer,
    schedule: LRScheduler,
    epochs: int,
    patience: int | None = None,
    penalty: Callable[[nn.Module], Tensor] | None = None,
    path: Path | None = None,
    settings: dict[str, Any] | None = None,
    progress: bool = False,
) -> list[Epoch]:
    """Train a classifier by cross-entropy and leave it with the weights of its best epoch.

    The best epoch has the highest validation accuracy, and among equals the lowest loss; the
    weights that it starts with count too, so that training never makes validation worse. If
    `path` holds a checkpoint of the same run, training goes on from it and ends, on a CPU, with
    the same weights to the last bit as if it had never been interrupted.

    Args:
        net: images or features to logits, on the device where it is to be trained.
        train: shuffled batches of inputs and int64 labels.
        validation: batches in any order.
        optimizer: over the parameters to be trained.
        schedule: of its rates, stepped after every epoch.
        epochs: at most.
        patience: end after so many epochs without a better one (None: never).
        penalty: of the network, added to the loss of every batch.
        path: of the checkpoint, written after every epoch.
        settings: what the checkpoint must agree in to be gone on with; each is compared.
        progress: show a bar, and a row for each epoch.

    Raises:
        FloatingPointError: if the loss is not finite; the last checkpoint stays.
        CheckpointMismatch: if `path` holds another run.
        DataError: if the checkpoint is damaged or cannot be written.
    """
    optimizer.zero_grad()  # an interruption may have left some
    run = _Fit(net, optimizer, schedule, path, settings or {})
    if path is not None and path.exists():
        run.resume()
    else:
        run.merits = [_merit(*measure(net, validation))]
    while len(run.rows) < epochs and not run.tired(patience):
        began = time.perf_counter()
        learnt = run.train(train, penalty, progress)
        held_out = measure(net, validation)
        run.end(Epoch(len(run.rows) + 1, *learnt, *held_out, time.perf_counter() - began))
        if progress:
            tqdm.write(str(run.rows[-1]) if len(run.rows) > 1 else f"{HEADS}\n{run.rows[-1]}")
    net.load_state_dict(run.best)
    return run.rows


@torch.no_grad()
def predict(net: nn.Module, batches: DataLoader, progress: bool = False) -> tuple[Tensor, Tensor]:
    """Logits `(n, classes)` and labels `(n,)` of all inputs, in evaluation mode, on the CPU."""
    was_training, device = net.training, _device(net)
    net.eval()
    logits, labels = [], []
    for x, y in tqdm(batches, desc="predict", disable=not progress, leave=False):
        with fast_autocast(device):
            logits.append(net(_placed(x, device)).float().cpu())
        labels.append(y.cpu())
    net.train(was_training)
    return torch.cat(logits), torch.cat(labels)


def measure(net: nn.Module, batches: DataLoader) -> tuple[float, float]:
    """Mean cross-entropy and accuracy in percent, in evaluation mode."""
    logits, labels = predict(net, batches)
    right = (logits.argmax(1) == labels).double().mean()
    return float(F.cross_entropy(logits, labels)), 100 * float(right)


class _Fit:
    """The state of a training: all that a resumed one needs to go on as if never stopped."""

    def __init__(
        self,
        net: nn.Module,
        optimizer: Optimizer,
        schedule: LRScheduler,
        path: Path | None,
        settings: dict[str, Any],
    ) -> None:
        self.net, self.optimizer, self.schedule = net, optimizer, schedule
        self.path, self.settings = path, settings
        self.rows: list[Epoch] = []
        self.merits: list[tuple[float, float]] = []  # of the start, then of each epoch
        self.best = _copy(net.state_dict())

    def train(
        self, batches: DataLoader, penalty: Callable[[nn.Module], Tensor] | None, progress: bool
    ) -> tuple[float, float]:
        """One epoch; the mean loss and the accuracy of its batches, each before its step."""
        self.net.train()
        device = _device(self.net)
        loss_sum, right, seen = torch.zeros((), device=device), torch.zeros((), device=device), 0
        label = f"epoch {len(self.rows) + 1}"
        with tqdm(batches, desc=label, disable=not progress, leave=False) as bar:
            for k, (x, y) in enumerate(bar):
                x, y = _placed(x, device), y.to(device, non_blocking=True)
                with fast_autocast(device):
                    logits = self.net(x)
                loss = F.cross_entropy(logits.float(), y)
                (loss if penalty is None else loss + penalty(self.net)).backward()
                self.optimizer.step()
                self.optimizer.zero_grad()
                # Sums stay on the device: a number asked for after every step would make it wait.
                loss_sum += loss.detach() * len(y)
                right += (logits.detach().argmax(1) == y).sum()
                seen += len(y)
                if progress and k % 10 == 0:
                    mean, percent = loss_sum / seen, 100 * right / seen
                    bar.set_postfix_str(f"loss={mean:.3f}, accuracy={percent:.1f} %")
        self.schedule.step()
        return float(loss_sum) / seen, 100 * float(right) / seen

    def end(self, row: Epoch) -> None:
        """Remember the epoch, and its weights if they are the best, and write everything down."""
        if not math.isfinite(row.train_loss + row.validation_loss):
            kept = "" if self.path is None else f" The last good checkpoint stays in {self.path}."
            raise FloatingPointError(
                f"The loss was no longer finite in epoch {row.number}, so training stopped.{kept} "
                "Try a smaller learning rate, or look for bad values in the images."
            )
        merit = _merit(row.validation_loss, row.validation_accuracy)
        if merit > max(self.merits):
            self.best = _copy(self.net.state_dict())
        self.rows.append(row)
        self.merits.append(merit)
        if self.path is not None:
            save_atomically(self.state(), self.path)

    def tired(self, patience: int | None) -> bool:
        """Whether the best epoch lies further back than the patience reaches."""
        best = self.merits.index(max(self.merits))
        return patience is not None and len(self.rows) - best >= patience

    def state(self) -> dict[str, Any]:
        return {
            "settings": self.settings,
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "random": torch.get_rng_state(),
            "best": self.best,
            "merits": self.merits,
            "rows": [asdict(row) for row in self.rows],
        }

    def resume(self) -> None:
        state = load_safely(self.path)
        if not isinstance(state, dict) or not {"settings", "net", "merits"} <= state.keys():
            raise DataError(f"{self.path} is no checkpoint of a training: name another folder.")
        check_same_settings(state["settings"], self.settings, self.path)
        check_same_network(state["net"], self.net, self.path)
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        torch.set_rng_state(state["random"])
        self.rows = [Epoch(**row) for row in state["rows"]]
        self.best, self.merits = state["best"], state["merits"]


def _merit(loss: float, accuracy: float) -> tuple[float, float]:
    # What is not a number would compare as neither better nor worse.
    return (accuracy, -loss) if math.isfinite(loss) else (-1.0, 0.0)


def _device(net: nn.Module) -> torch.device:
    return next(net.parameters(), torch.empty(0)).device


def _placed(x: Tensor, device: torch.device) -> Tensor:
    """Inputs on the device; images with the channels next to each other in memory."""
    memory = torch.channels_last if x.dim() == 4 else torch.contiguous_format
    return x.to(device, non_blocking=True, memory_format=memory)


def _copy(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.detach().clone() for name, x in weights.items()}
