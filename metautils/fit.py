"""Ordinary training, epoch by epoch: the best epoch on validation, an early end, exact resume."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from tqdm import tqdm

from metautils.checkpoint import Training, device_of
from metautils.precision import fast_autocast, grad_scaler, on_cpu
from metautils.progress import progress_bar


@dataclass(frozen=True)
class Epoch:
    """A row of a training's table; losses without penalty, accuracies in percent.

    Example:
        >>> print(HEADS)
        epoch  train loss   accuracy  valid. loss  accuracy  seconds
        >>> print(Epoch(1, 0.5, 80.0, 0.75, 70.0, 2.5))
            1      0.5000     80.0 %      0.7500     70.0 %      2.5
    """

    number: int
    train_loss: float
    train_accuracy: float
    validation_loss: float
    validation_accuracy: float
    seconds: float

    def __str__(self) -> str:
        return "{:5d} {:11.4f} {:8.1f} % {:11.4f} {:8.1f} % {:8.1f}".format(*astuple(self))


LEAST_SCALE = 1e-4  # every overflow halves the scale of the loss, and so many are no accident
HEADS = "epoch  train loss   accuracy  valid. loss  accuracy  seconds"


def fit(
    net: nn.Module,
    train: DataLoader,
    validation: DataLoader,
    optimizer: Optimizer,
    schedule: LRScheduler,
    epochs: int,
    patience: int | None = None,
    clip: float | None = None,
    choose: bool = True,
    penalty: Callable[[nn.Module], Tensor] | None = None,
    path: Path | None = None,
    settings: dict[str, Any] | None = None,
    progress: bool = False,
    weights: Tensor | None = None,
) -> list[Epoch]:
    """Train a classifier by cross-entropy and leave it with the weights of its best epoch.

    The best epoch has the highest validation accuracy, and among equals the lowest loss; the
    weights that it starts with count too, so that training never makes validation worse. If
    `path` holds a checkpoint of the same run, training goes on from it and ends, on a CPU, with
    the same weights to the last bit as if it had never been interrupted. Networks run in half
    precision where the device is faster with it, float16 included, see `metautils.precision`.

    Args:
        net: images or features to logits, on the device where it is to be trained.
        train: shuffled batches of inputs and int64 labels.
        validation: batches in any order.
        optimizer: over the parameters to be trained.
        schedule: of its rates, stepped after every batch.
        epochs: at most.
        patience: end after so many epochs without a better one (None: never).
        clip: the largest norm that a gradient keeps (None: any).
        choose: the best epoch; if False, leave the network with the weights of the last.
        penalty: of the network, added to the loss of every batch.
        path: of the checkpoint, written after every epoch.
        settings: what the checkpoint must agree in to be gone on with; each is compared.
        progress: show a bar, and a row for each epoch.
        weights: how much an image of each class counts, `(classes,)`, in losses and accuracies;
            see `balanced`.

    Raises:
        FloatingPointError: if the loss is not finite, or in float16 the gradients never are; the
            last checkpoint stays.
        CheckpointMismatch: if `path` holds another run.
        DataError: if the checkpoint is damaged or cannot be written.
    """
    training = Training(net, optimizer, schedule, settings or {}, path)
    scaler = grad_scaler(device_of(net))
    notes = training.resume()
    rows = [] if notes is None else [Epoch(**row) for row in notes["rows"]]
    if notes is not None and notes.get("scaler"):  # it is empty where nothing was scaled
        scaler.load_state_dict(notes["scaler"])
    if notes is None:
        training.try_out(_merit(*measure(net, validation, weights)), at=0)
    while len(rows) < epochs and (patience is None or len(rows) - training.best_at < patience):
        began = time.perf_counter()
        label = f"epoch {len(rows) + 1}"
        bar = progress_bar(train, show=progress, desc=label)
        learnt = _epoch(training, bar, scaler, clip, penalty, weights)
        held_out = measure(net, validation, weights)
        rows.append(Epoch(len(rows) + 1, *learnt, *held_out, time.perf_counter() - began))
        _end(training, rows, scaler)
        if progress:
            tqdm.write(str(rows[-1]) if len(rows) > 1 else f"{HEADS}\n{rows[-1]}")
    if choose:
        training.finish()
    return rows


def _epoch(
    training: Training,
    bar: tqdm,
    scaler: GradScaler,
    clip: float | None,
    penalty: Callable[[nn.Module], Tensor] | None,
    weights: Tensor | None,
) -> tuple[float, float]:
    """One pass; the mean loss and the accuracy of its batches, each before its step."""
    net, optimizer = training.net, training.optimizer
    device = device_of(net.train())
    loss_sum, right, seen = torch.zeros(3, device=device)
    with bar:
        for k, (x, y) in enumerate(_drawn(bar)):
            x, y = _placed(x, device), y.to(device, non_blocking=True)
            with fast_autocast(device, fp16=True):
                logits = net(x)
            counts = _counts(y, weights)  # (batch,)
            # Over images and not over their weights: a batch of common ones must count for less.
            loss = (counts * F.cross_entropy(logits.float(), y, reduction="none")).mean()
            scaler.scale(loss if penalty is None else loss + penalty(net)).backward()
            # By gradients of their own size again, or not at all where they overflowed.
            if clip is not None:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(net.parameters(), clip)
            before = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            if scaler.get_scale() >= before:  # it falls where there was no step
                training.schedule.step()
            optimizer.zero_grad()
            # Sums stay on the device: a number asked for after every step would make it wait.
            loss_sum += loss.detach() * len(y)
            right += (counts * (logits.detach().argmax(1) == y)).sum()
            seen += counts.sum()
            if not bar.disable and k % 10 == 0:
                mean, percent = loss_sum / seen, 100 * right / seen
                bar.set_postfix_str(f"loss={mean:.3f}, accuracy={percent:.1f} %")
    return float(loss_sum / seen), 100 * float(right / seen)


def _end(training: Training, rows: list[Epoch], scaler: GradScaler) -> None:
    """Remember the last epoch, and its weights if they are the best, and write everything down."""
    row = rows[-1]
    advice = "Try a smaller learning rate, or look for bad values in the images."
    if not math.isfinite(row.train_loss + row.validation_loss):
        training.stop(f"The loss was no longer finite in epoch {row.number}", advice)
    if scaler.get_scale() < LEAST_SCALE:
        training.stop(f"The gradients were no longer finite in epoch {row.number}", advice)
    training.try_out(_merit(row.validation_loss, row.validation_accuracy), at=row.number)
    training.save(rows=[asdict(each) for each in rows], scaler=scaler.state_dict())


@torch.no_grad()
def predict(net: nn.Module, batches: DataLoader, progress: bool = False) -> tuple[Tensor, Tensor]:
    """Logits `(n, classes)` and labels `(n,)` of all inputs, in evaluation mode, on the CPU."""
    was_training, device = net.training, device_of(net)
    net.eval()
    logits, labels = [], []
    for x, y in _drawn(progress_bar(batches, show=progress, desc="predict")):
        with fast_autocast(device, fp16=True):
            logits.append(net(_placed(x, device)).float().cpu())
        labels.append(y.cpu())
    net.train(was_training)
    return torch.cat(logits), torch.cat(labels)


def measure(
    net: nn.Module, batches: DataLoader, weights: Tensor | None = None
) -> tuple[float, float]:
    """Mean cross-entropy and accuracy in percent, in evaluation mode, as `weights` count them."""
    logits, labels = predict(net, batches)
    counts = _counts(labels, weights).double()  # (n,)
    losses, right = F.cross_entropy(logits, labels, reduction="none"), logits.argmax(1) == labels
    return float(counts @ losses.double() / counts.sum()), 100 * float(
        counts @ right.double() / counts.sum()
    )


def balanced(labels: Sequence[int], classes: int) -> Tensor:
    """Weights under which every class counts as much as any other, `(classes,)`, of mean 1.

    The mean is over the images. As scikit-learn's `class_weight="balanced"`.

    Args:
        labels: of the training images; each class has one or more.
        classes: how many there are.

    Example:
        >>> balanced([0, 0, 0, 1], 2)
        tensor([0.6667, 2.0000])
    """
    counts = torch.tensor(labels, device="cpu").bincount(minlength=classes)  # (classes,)
    return len(labels) / (classes * counts)


def _counts(labels: Tensor, weights: Tensor | None) -> Tensor:
    """How much each image counts, `(n,)`."""
    if weights is None:
        return torch.ones(len(labels), device=labels.device)
    return weights.to(labels.device)[labels]


def _merit(loss: float, accuracy: float) -> tuple[float, float]:
    # What is not a number would compare as neither better nor worse.
    return (accuracy, -loss) if math.isfinite(loss) else (-1.0, 0.0)


def _drawn(batches: Iterable) -> Iterator:
    """The batches, shuffled and made on the CPU, whatever torch's default device is."""
    steps = None
    while True:
        with on_cpu():
            steps = iter(batches) if steps is None else steps
            batch = next(steps, None)
        if batch is None:
            return
        yield batch


def _placed(x: Tensor, device: torch.device) -> Tensor:
    """Inputs on the device; images with the channels next to each other in memory."""
    memory = torch.channels_last if x.dim() == 4 else torch.contiguous_format
    return x.to(device, non_blocking=True, memory_format=memory)
