"""Meta-training, written once for every method of the book."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from metautils.data.quadratics import QuadraticSampler
from metautils.data.regression import RegressionSampler
from metautils.evaluate import episode_accuracy
from metautils.files import DataError, load_safely, save_atomically
from metautils.learners.base import Learner
from metautils.precision import fast_autocast
from metautils.sampling import EpisodeSampler

CHECKPOINT = "checkpoint.pt"
Sampler = EpisodeSampler | RegressionSampler | QuadraticSampler


class CheckpointMismatch(ValueError):
    """A checkpoint does not belong to this network or this run."""


@dataclass
class History:
    """What happened in training.

    Attributes:
        loss: of every step.
        accuracy: of every step's queries, percent; empty in regression.
        validation: (step, percent on the validation episodes), one for each validation.
        seconds: spent in training and validation, over all resumptions.
    """

    loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0


def meta_train(
    learner: Learner,
    episodes: Sampler,
    steps: int,
    lr: float = 1e-3,
    validation: EpisodeSampler | None = None,
    validation_episodes: int = 100,
    every: int = 100,
    out: str | Path | None = None,
    progress: bool = True,
) -> History:
    """Train a learner on episodes with Adam, its learning rate decayed to 0 along a cosine.

    Every `every` steps the learner is tried on the same validation episodes and a checkpoint is
    written. At the end it holds the weights that did best there, or the last ones where there is
    no validation. If `out` holds a checkpoint of the same run, training goes on from it and
    ends, on a CPU, with the same weights to the last bit as if it had never been interrupted.

    Args:
        learner: any learner of the book, on the device where it is to be trained.
        episodes: what to train on, on the same device.
        steps: updates, one episode each.
        lr: of Adam at the start.
        validation: episodes of validation classes, never of test classes; for classification.
        validation_episodes: how many of them.
        every: steps between validations and checkpoints.
        out: folder for `checkpoint.pt`, which holds the last state and the best weights.
        progress: show a bar with loss and accuracy.

    Raises:
        ValueError: if steps or every is below 1, or the learning rate is not positive.
        FloatingPointError: if the loss is not finite; the last good checkpoint stays.
        CheckpointMismatch: if `out` holds another run or another network.
    """
    if min(steps, every) < 1 or lr <= 0:
        raise ValueError(f"steps={steps}, every={every}, lr={lr}: all must be above 0.")
    path = None if out is None else Path(out) / CHECKPOINT
    run = _Run(learner, episodes, validation, steps, lr, path)
    if path is not None and path.exists():
        run.resume(path)
    run.optimizer.zero_grad()  # an interruption may have left some
    learner.train()
    bar = tqdm(total=steps, initial=run.step, desc="train", disable=not progress, leave=False)
    with bar:
        while run.step < steps:
            run.advance()
            if run.step % every == 0 or run.step == steps:
                run.checkpoint(validation_episodes)
            bar.set_postfix(run.summary(), refresh=False)
            bar.update()
    learner.load_state_dict(run.best)
    return run.history


def load_weights(learner: Learner, path: Path) -> None:
    """Put the best weights of a checkpoint into a learner of the same shape.

    Raises:
        DataError: if the file is missing or damaged.
        CheckpointMismatch: if names or shapes differ; the learner is left as it was.
    """
    weights = _read(path)["best"]
    check_same_network(weights, learner, path)
    learner.load_state_dict(weights)


def check_same_network(weights: dict[str, Tensor], learner: Learner, path: Path) -> None:
    """Compare names and shapes of saved weights with a learner's.

    Raises:
        CheckpointMismatch: at the first difference.
    """
    own = learner.state_dict()
    for name in {**own, **weights}:
        saved, here = (tuple(x[name].shape) if name in x else None for x in (weights, own))
        if saved != here:
            raise CheckpointMismatch(
                f"{path} belongs to another network: {name!r} has shape {saved} there and {here} "
                "here (None: it is missing). Make the learner as it was when the checkpoint was "
                "written, or choose another folder."
            )


def check_same_settings(saved: dict[str, Any], own: dict[str, Any], path: Path) -> None:
    """Compare the settings of a checkpoint with those of the run that would go on with it.

    Raises:
        CheckpointMismatch: at the first difference.
    """
    for name, value in own.items():
        if saved.get(name) != value:
            raise CheckpointMismatch(
                f"{path} was made with {name}={saved.get(name)}, not {value}: give the same "
                "settings to go on with it, or another folder to start anew."
            )


class _Run:
    """The state of a training run: all that a resumed one needs to go on as if never stopped."""

    def __init__(
        self,
        learner: Learner,
        episodes: Sampler,
        validation: EpisodeSampler | None,
        steps: int,
        lr: float,
        path: Path | None,
    ) -> None:
        self.learner, self.episodes, self.validation = learner, episodes, validation
        self.path = path
        self.optimizer = torch.optim.Adam(learner.parameters(), lr)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)
        told = {"steps": steps, "lr": lr, "learner": learner.extra_repr()}
        self.settings = told | episodes.settings
        # The same validation episodes every time, so that two steps can be compared.
        self.first = None if validation is None else validation.generator.get_state()
        self.step, self.best, self.best_accuracy = 0, _copy(learner.state_dict()), -1.0
        self.history = History()
        self.clock = time.perf_counter()

    def advance(self) -> None:
        """One update from one episode."""
        episode = self.episodes.sample()
        total, right = 0.0, []
        pieces = self.learner.pieces(episode)
        while True:
            with fast_autocast(episode.query_x.device):
                piece = next(pieces, None)
            if piece is None:
                break
            loss, predictions, targets = piece
            loss.backward()
            total += float(loss.detach())
            if episode.classes is not None:
                right.append(predictions.argmax(-1) == targets)
            if self.learner.update_each_piece:
                self.update(total)
        if not self.learner.update_each_piece:
            self.update(total)
        self.schedule.step()
        self.step += 1
        self.history.loss.append(total)
        if right:
            self.history.accuracy.append(100 * float(torch.cat(right).float().mean()))

    def update(self, loss: float) -> None:
        """Let Adam take a step along the gradients that have come together."""
        if not math.isfinite(loss):
            self.stop(f"The loss became {loss} at step {self.step + 1}")
        if self.learner.meta_clip is not None:
            clip_grad_norm_(self.learner.parameters(), self.learner.meta_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def checkpoint(self, validation_episodes: int) -> None:
        """Validate, remember the best weights, write everything down."""
        if not all(x.isfinite().all() for x in self.learner.parameters()):
            self.stop(f"The weights are no longer finite after step {self.step}")
        accuracy = float(self.step)  # without validation the latest weights count as the best
        if self.validation is not None:
            self.validation.generator.set_state(self.first)
            values = episode_accuracy(self.learner, self.validation, validation_episodes)
            accuracy = float(values.mean())
            self.history.validation.append((self.step, accuracy))
        if accuracy > self.best_accuracy:
            self.best, self.best_accuracy = _copy(self.learner.state_dict()), accuracy
        now = time.perf_counter()
        self.history.seconds += now - self.clock
        self.clock = now
        if self.path is not None:
            save_atomically(self.state(), self.path)

    def state(self) -> dict[str, Any]:
        return {
            "settings": self.settings,
            "learner": self.learner.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "episodes": self.episodes.generator.get_state(),
            "random": torch.get_rng_state(),
            "step": self.step,
            "best": self.best,
            "best_accuracy": self.best_accuracy,
            "history": vars(self.history),
        }

    def resume(self, path: Path) -> None:
        state = _read(path)
        check_same_network(state["learner"], self.learner, path)
        check_same_settings(state["settings"], self.settings, path)
        self.learner.load_state_dict(state["learner"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.episodes.generator.set_state(state["episodes"])
        torch.set_rng_state(state["random"])
        self.step, self.best = state["step"], state["best"]
        self.best_accuracy, self.history = state["best_accuracy"], History(**state["history"])

    def stop(self, what: str) -> None:
        kept = "" if self.path is None else f" The last good checkpoint stays in {self.path}."
        raise FloatingPointError(
            f"{what}, so training stopped before writing anything.{kept} Try a smaller learning "
            f"rate than {self.settings['lr']}, or look for bad values in the images."
        )

    def summary(self) -> dict[str, str]:
        recent = slice(-50, None)
        loss, accuracy = self.history.loss[recent], self.history.accuracy[recent]
        told = {"loss": f"{sum(loss) / len(loss):.3f}"}
        return told | ({"accuracy": f"{sum(accuracy) / len(accuracy):.1f} %"} if accuracy else {})


def _read(path: Path) -> dict[str, Any]:
    state = load_safely(path)
    if not isinstance(state, dict) or not {"best", "learner", "settings"} <= state.keys():
        raise DataError(f"{path} is no checkpoint of a training: name another file or folder.")
    return state


def _copy(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.detach().clone() for name, x in weights.items()}
