"""Meta-training, written once for every method of the book."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler

from metautils.checkpoint import CHECKPOINT, Training
from metautils.data.regression import PointSampler
from metautils.errors import BadArgument
from metautils.evaluate import episode_accuracy
from metautils.learners.base import Learner
from metautils.precision import all_digits, fast_autocast
from metautils.progress import progress_bar
from metautils.sampling import EpisodeSampler

Sampler = EpisodeSampler | PointSampler


@dataclass
class History:
    """What happened in training.

    Attributes:
        loss: of every step.
        accuracy: of every step's queries, percent; empty in regression.
        validation: (step, percent on the validation episodes), one for each validation.
        seconds: spent in training and validation, over all resumptions.

    Example:
        >>> history = History(loss=[1.5, 0.5], accuracy=[40.0, 80.0])
        >>> history.loss[-1], history.validation
        (0.5, [])
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
    *,
    clip: float | None = None,
    each_piece: bool = False,
    warm_up: int | None = None,
    body: str | None = None,
) -> History:
    """Train a learner on episodes, the learning rate decayed to 0 along a cosine.

    Theta is moved by Adam, or by what the method has in its place (`Learner.outer_optimizer`).

    Every `every` steps the learner is tried on the same validation episodes and a checkpoint is
    written. At the end it holds the weights that did best there, or the last ones where there is
    no validation. If `out` holds a checkpoint of the same run, training goes on from it and
    ends, on a CPU, with the same weights to the last bit as if it had never been interrupted.

    Args:
        learner: any learner of the book, on the device where it is to be trained.
        episodes: what to train on, on the same device.
        steps: episodes to learn from.
        lr: of the outer steps at the start.
        validation: episodes of validation classes, never of test classes; for classification.
        validation_episodes: how many of them.
        every: steps between validations and checkpoints.
        out: folder for `checkpoint.pt`, which holds the last state and the best weights.
        progress: show a bar with loss and accuracy.
        clip: scale meta-gradients down to this norm.
        each_piece: take an outer step after each of the learner's `pieces`, as in truncated
            backpropagation, not after the last of an episode only.
        warm_up: for what has learned elsewhere: AdamW, whose rate rises in so many steps and falls
            to 0 along a straight line. None: as said above.
        body: the name of what the learner began with, if it has learned elsewhere: who goes on
            with a checkpoint must have begun alike.

    Raises:
        ValueError: if steps or every is below 1, or the learning rate is not positive.
        FloatingPointError: if the loss is not finite; the last good checkpoint stays.
        CheckpointMismatch: if `out` holds another run or another network.

    Example:
        >>> from metautils.data import glyphs
        >>> from metautils.learners.protonet import ProtoNet
        >>> bank = glyphs.generate(alphabets=1, characters=8, drawings=4, size=8)
        >>> learner = ProtoNet(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 4)))
        >>> episodes = EpisodeSampler(bank, ways=5, shots=1, queries=2)
        >>> history = meta_train(learner, episodes, steps=3, progress=False)
        >>> len(history.loss)
        3
    """
    if min(steps, every) < 1 or lr <= 0:
        raise BadArgument(f"steps={steps}, every={every}, lr={lr}: all must be above 0.")
    settings = {
        "steps": steps,
        "lr": lr,
        "clip": clip,
        "each_piece": each_piece,
        "warm_up": warm_up,
        "body": body,
        "every": every,
        "learner": f"{type(learner).__name__}({learner.extra_repr()})",
        **episodes.settings,
        "validation": None if validation is None else validation.settings,
        "validation_episodes": validation_episodes,
    }
    path = None if out is None else Path(out) / CHECKPOINT
    run = _Run(learner, episodes, validation, settings, path)
    learner.train()
    bar = progress_bar(show=progress, total=steps, initial=run.step, desc="train")
    with bar:
        while run.step < steps:
            run.advance()
            if run.step % every == 0 or run.step == steps:
                run.checkpoint(validation_episodes)
            bar.set_postfix(run.summary(), refresh=False)
            bar.update()
    run.training.finish()
    return run.history


def _optimizer(learner: Learner, settings: dict[str, Any]) -> tuple[Optimizer, LRScheduler]:
    """The learner's optimiser and a cosine, or AdamW that warms up."""
    steps, warm_up = settings["steps"], settings["warm_up"]
    if warm_up is None:
        optimizer = learner.outer_optimizer(settings["lr"])
        return optimizer, CosineAnnealingLR(optimizer, steps)
    rise = min(warm_up, max(1, steps // 2))

    def share(step: int) -> float:
        return min((step + 1) / rise, (steps - step) / (steps - rise + 1))

    adam = AdamW(learner.parameters(), settings["lr"])
    return adam, LambdaLR(adam, share)


class _Run:
    """A run of `meta_train`, at some step."""

    def __init__(
        self,
        learner: Learner,
        episodes: Sampler,
        validation: EpisodeSampler | None,
        settings: dict[str, Any],
        path: Path | None,
    ) -> None:
        self.learner, self.episodes, self.validation = learner, episodes, validation
        self.settings = settings
        self.optimizer, self.schedule = _optimizer(learner, settings)
        # The same validation episodes every time, so that two steps can be compared.
        self.first = None if validation is None else validation.generator.get_state()
        self.step, self.history, self.clock = 0, History(), time.perf_counter()
        self.training = Training(learner, self.optimizer, self.schedule, settings, path)
        if (notes := self.training.resume()) is not None:
            self.step, self.history = notes["step"], History(**notes["history"])
            self.episodes.generator.set_state(notes["episodes"])

    def advance(self) -> None:
        """Learn from one episode."""
        episode = self.episodes.sample()
        total, right = 0.0, []
        pieces = self.learner.pieces(episode)
        while True:
            with fast_autocast(episode.query_x.device):
                piece = next(pieces, None)
            if piece is None:
                break
            loss, predictions, targets = piece
            # Here the derivatives of the learner's inner steps are made.
            with all_digits(loss.device):
                loss.backward()
            total += float(loss.detach())
            if episode.classes is not None:
                right.append(predictions.argmax(-1) == targets)  # as the piece's targets
            if self.settings["each_piece"]:
                self.update(total)
        if not self.settings["each_piece"]:
            self.update(total)
        self.schedule.step()
        self.step += 1
        self.history.loss.append(total)
        if right:
            self.history.accuracy.append(100 * float(torch.cat(right).float().mean()))

    def update(self, loss: float) -> None:
        """Take an outer step along the gradients that have come together."""
        if not math.isfinite(loss):
            self.stop(f"The loss became {loss} at step {self.step + 1}")
        if self.settings["clip"] is not None:
            clip_grad_norm_(self.learner.parameters(), self.settings["clip"])
        self.optimizer.step()
        self.optimizer.zero_grad()

    def checkpoint(self, validation_episodes: int) -> None:
        """Validate, remember the best weights, write everything down."""
        if not all(x.isfinite().all() for x in self.learner.parameters()):
            self.stop(f"The weights are no longer finite after step {self.step}")
        merit = float(self.step)  # without validation the latest weights count as the best
        if self.validation is not None:
            self.validation.generator.set_state(self.first)
            values = episode_accuracy(self.learner, self.validation, validation_episodes)
            merit = float(values.mean())
            self.history.validation.append((self.step, merit))
        self.training.try_out((merit,), self.step)
        now = time.perf_counter()
        self.history.seconds += now - self.clock
        self.clock = now
        self.training.save(
            step=self.step,
            history=vars(self.history),
            episodes=self.episodes.generator.get_state(),
        )

    def stop(self, what: str) -> None:
        self.training.stop(
            what,
            f"Try a smaller learning rate than {self.settings['lr']}, or look for bad values in "
            "the images.",
        )

    def summary(self) -> dict[str, str]:
        """What the bar shows: means of the last steps."""
        recent = slice(-50, None)
        loss, accuracy = self.history.loss[recent], self.history.accuracy[recent]
        told = {"loss": f"{sum(loss) / len(loss):.3f}"}
        return told | ({"accuracy": f"{sum(accuracy) / len(accuracy):.1f} %"} if accuracy else {})
