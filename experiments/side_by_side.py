"""Many meta-trainings side by side on one GPU, each step replayed as a CUDA graph.

A meta-step of a small network is some thousand short kernels, and a GPU spends it waiting for
Python. Recorded once and replayed it needs no Python, and the steps of several trainings fill the
GPU together. On a CPU the same steps are made one training after another.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from metautils.data.bank import as_float
from metautils.episode import Episode
from metautils.learners import matching_net, meta_lstm, protonet
from metautils.learners.base import Learner
from metautils.learners.maml import MAML
from metautils.precision import all_digits, fast_autocast
from metautils.progress import progress_bar
from metautils.sampling import EpisodeSampler

CHUNK = 200  # steps whose episodes are drawn at once
AT_ONCE = 4  # replays of a short step that are sent to the GPU together
SHORT = 3e-3  # seconds; a longer one is sent when the last is done, for else the sender has to wait
WARM_UP = 3  # steps before a graph is recorded, and after it, to see how long it takes


class Training:
    """A learner that learns as by `meta_train`, in steps that ask the device for no number.

    The episodes are of the same kind, but drawn `CHUNK` steps at a time: other ones than
    `meta_train` draws at that seed.
    """

    def __init__(
        self,
        learner: Learner,
        episodes: EpisodeSampler,
        steps: int,
        lr: float,
        clip: float | None = None,
    ) -> None:
        self.learner, self.episodes, self.steps, self.lr, self.clip = (
            learner, episodes, steps, lr, clip,
        )  # fmt: skip
        images = episodes.bank.images
        self.device, self.count, self.started = images.device, 0, time.monotonic()
        turns = range(4 if episodes.rotate else 1)
        self.images = torch.stack([images.rot90(k, (-2, -1)) for k in turns])  # (turns, images, ..)
        self.many = EpisodeSampler(
            episodes.bank, episodes.ways, episodes.shots, episodes.queries,
            episodes.tasks * CHUNK, seed=episodes.generator.initial_seed(),
        )  # fmt: skip
        self.chunk = [x.to(self.device) for x in self.draw()]
        self.done = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.losses = torch.zeros(steps, device=self.device)
        self.rates = torch.empty(steps, device=self.device)
        self.optimizer = torch.optim.Adam(
            learner.parameters(), torch.tensor(lr, device=self.device),
            capturable=self.device.type == "cuda",
        )  # fmt: skip
        self.plan(steps)

    def plan(self, steps: int) -> None:
        """Let the rate fall to 0 along a cosine in so many steps."""
        self.steps = min(max(steps, self.count + 1), len(self.rates))
        share = (torch.arange(len(self.rates)) / self.steps).clamp(max=1)
        self.rates.copy_(self.lr * (1 + (math.pi * share).cos()) / 2)

    def draw(self) -> list[Tensor]:
        """Rows, turns and movements of the images of `CHUNK` steps, on the CPU."""
        many, generator = self.many, self.many.generator
        _, rows = many.indices()  # (CHUNK * tasks, ways, n)
        turns = torch.randint(len(self.images), rows.shape[:2], generator=generator)
        most = self.images.shape[-1] // 8 if self.episodes.vary else 0
        moves = torch.randint(-most, most + 1, (*rows.shape, 2), generator=generator)
        mirrored = torch.rand(rows.shape, generator=generator) < 0.5 * self.episodes.vary
        moves = torch.cat([moves, mirrored[..., None].long()], -1)  # (CHUNK * tasks, ways, n, 3)
        return [x.unflatten(0, (CHUNK, -1)).contiguous() for x in (rows, turns, moves)]

    def episode(self) -> Episode:
        """The episode of the step that is being made."""
        now = self.done % CHUNK
        # (tasks, ways, n), (tasks, ways) and (tasks, ways, n, 3)
        rows, turns, moves = (x.index_select(0, now)[0] for x in self.chunk)
        sizes = [self.episodes.shots, self.episodes.queries]
        parts = []
        for part, moved in zip(rows.split(sizes, 2), moves.split(sizes, 2), strict=True):
            # (tasks, ways, n, ...) to (tasks, ways * n, ...)
            x = as_float(self.seen(part, turns, moved)).flatten(1, 2)
            labels = torch.arange(part.shape[1], device=x.device)[:, None].expand_as(part)
            parts += [x, labels.flatten(1)]
        return Episode(*parts, turns)  # which classes they are is not asked

    def seen(self, rows: Tensor, turns: Tensor, moves: Tensor) -> Tensor:
        """Images as the sampler shows them, `(tasks, ways, n, channels, height, width)`."""
        if not self.episodes.vary:
            return self.images[turns[..., None], rows]
        down, across, mirrored = moves[..., None].unbind(-2)  # (tasks, ways, n, 1) each
        places = torch.arange(self.images.shape[-1], device=rows.device)
        down = (places + down).clamp(0, len(places) - 1)  # (tasks, ways, n, height)
        across = (places + across).clamp(0, len(places) - 1)
        across = torch.where(mirrored == 1, across.flip(-1), across)
        # (tasks, ways, n, height, width, channels), then channels in front
        x = self.images[0][rows[..., None, None], :, down[..., None], across[..., None, :]]
        return x.movedim(-1, -3)

    def step(self) -> None:
        """Learn from one episode."""
        with asking_nothing(self.episodes.ways):
            self.learn()

    def learn(self) -> None:
        """As `step`."""
        self.optimizer.param_groups[0]["lr"].copy_(self.rates.index_select(0, self.done)[0])
        self.optimizer.zero_grad()
        pieces, total = self.learner.pieces(self.episode()), 0.0
        while True:
            with fast_autocast(self.device):
                piece = next(pieces, None)
            if piece is None:
                break
            with all_digits(self.device):
                piece[0].backward()
            total = total + piece[0].detach()
        if self.clip is not None:
            clip_grad_norm_(self.learner.parameters(), self.clip)
        self.optimizer.step()
        self.losses.index_copy_(0, self.done, total.float().view(1))
        self.done += 1

    @property
    def minutes(self) -> float:
        """Since the first step."""
        return (time.monotonic() - self.started) / 60

    def record(self) -> None:
        """Make the first steps, and a graph of one more."""
        self.stream, self.event = torch.cuda.Stream(), torch.cuda.Event()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for _ in range(WARM_UP):
                self.step()
        self.stream.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=self.stream):
            self.step()
        for _ in range(WARM_UP):
            began = time.monotonic()
            with torch.cuda.stream(self.stream):
                self.graph.replay()
            self.stream.synchronize()
        self.at_once = AT_ONCE if time.monotonic() - began < SHORT else 1
        self.count = self.first = 2 * WARM_UP
        self.event.record(self.stream)

    def replay(self, pool: ThreadPoolExecutor, until: float) -> None:
        """Send the next steps to the GPU."""
        with torch.cuda.stream(self.stream):
            if self.count % CHUNK == 0:
                for x, new in zip(self.chunk, self.next.result(), strict=True):
                    x.copy_(new)
                self.fit(until)
            if self.count % CHUNK == 0 or self.count == self.first:
                self.next = pool.submit(self.draw)
            left = min(self.steps - self.count, CHUNK - self.count % CHUNK, self.at_once)
            for _ in range(left):
                self.graph.replay()
            self.count += left
            self.event.record(self.stream)

    def fit(self, until: float) -> None:
        """Plan for as many steps as there will be time for, and no more than were asked for."""
        now = time.monotonic()
        more = (self.count - self.first) / (now - self.started) * (until - now)
        self.plan(int(self.count + more))


def train(
    trainings: Sequence[Training], seconds: float, finished: Callable[[Training], None]
) -> None:
    """Let them all learn; on a GPU side by side and no longer than so many seconds.

    `finished` is told of each as soon as it is.
    """
    for each in trainings:
        each.learner.train()
    if trainings[0].device.type == "cuda":
        _on_gpu(trainings, time.monotonic() + seconds, finished)
    else:
        for each in trainings:
            _on_cpu(each)
            finished(each)


def _on_cpu(training: Training) -> None:
    for k in progress_bar(range(training.steps), show=True, desc="train"):
        if k and k % CHUNK == 0:
            training.chunk = training.draw()
        training.step()
        training.count = k + 1


def _on_gpu(
    trainings: Sequence[Training], until: float, finished: Callable[[Training], None]
) -> None:
    for each in trainings:
        each.record()
    for each in trainings:
        each.started = time.monotonic()
    active = list(trainings)
    with ThreadPoolExecutor(8) as pool:
        while active:
            ready = [x for x in active if x.event.query()]
            for each in ready:
                if each.count < each.steps and time.monotonic() < until:
                    each.replay(pool, until)
                else:
                    active.remove(each)
                    finished(each)
            if not ready:
                time.sleep(1e-4)


@contextmanager
def asking_nothing(ways: int) -> Iterator[None]:
    """No checks that make a number of a tensor, for which a GPU would have to stop.

    A sampler's labels need none; and whether numbers stay finite is seen in the losses.
    """
    plain = meta_lstm.coordinates
    with ExitStack() as stack:
        for where, name, instead in (
            (Episode, "_check_labels", lambda *_: None),
            (MAML, "_check_labels", lambda *_: None),
            (protonet, "ways_of", lambda _: ways),
            (matching_net, "ways_of", lambda _: ways),
            (meta_lstm, "check_loss", lambda *_: None),
            (meta_lstm, "coordinates", lambda tensors, *_: plain(tensors)),
        ):
            stack.enter_context(mock.patch.object(where, name, instead))
        yield
