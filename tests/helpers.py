"""What several tests share: small banks, learners and archives, and checks of all their kind."""

import copy
import hashlib
import json
import math
import os
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from metautils.checkpoint import CHECKPOINT
from metautils.data import folder
from metautils.data.bank import ClassBank, Parts, split_classes
from metautils.episode import Episode
from metautils.evaluate import evaluate
from metautils.files import DataError, cache_folder, load_safely
from metautils.learners.base import Learner, Preset
from metautils.learners.protonet import ProtoNet
from metautils.nets import classifier
from metautils.sampling import EpisodeSampler
from metautils.train import History, meta_train

ROOT = Path(__file__).parents[1]

RAGGED = [0, 0, 0, 1, 2, 2]  # labels of a support set whose classes differ in size
LABELS = pytest.mark.parametrize(
    "labels",
    [
        pytest.param(list(range(5)), id="5-way 1-shot"),
        pytest.param(list(range(3)) * 4, id="3-way 4-shot"),
        pytest.param(list(range(20)) * 2, id="20-way 2-shot"),
        pytest.param(RAGGED, id="ragged"),
    ],
)


def real_data() -> Path:
    """The folder of real data sets, or skip the test."""
    beside = ROOT.parent / "shared" / "data"
    named = os.environ.get("METAUTILS_DATA") or (str(beside) if beside.is_dir() else "")
    if not named:
        pytest.skip("no real images: METAUTILS_DATA is not set and ../shared/data is not there")
    return Path(named)


def as_html(text: str) -> str:
    """Markdown as HTML, by the common rules alone."""
    from markdown_it import MarkdownIt  # only the book's tests have it

    return MarkdownIt("commonmark").enable("table").render(text)


def write_archives(
    source: Path, parts: Iterable[str], contents: Mapping[str, bytes], method: int = 0
) -> Path:
    """A folder with an archive of each part, the first level of the contents' names."""
    source.mkdir(parents=True, exist_ok=True)
    for part in parts:
        with zipfile.ZipFile(source / f"{part}.zip", "w", method) as file:
            for name, content in contents.items():
                if name.startswith(f"{part}/"):
                    file.writestr(name, content)
    return source


def write_files(source: Path, contents: Mapping[str, bytes]) -> Path:
    """A folder with these files below."""
    for name, content in contents.items():
        path = source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return source


def told_in_one_line(load: Callable[[], object], sentence: str) -> None:
    """Loading fails with a DataError of one line in which the sentence is found."""
    with pytest.raises(DataError, match=sentence) as caught:
        load()
    assert "\n" not in str(caught.value)


def told_of_folder(
    load: Callable[[], object], monkeypatch: pytest.MonkeyPatch, root: Path, sentence: str
) -> None:
    """Loading from this folder of data fails in one line, and no cache is left."""
    monkeypatch.setenv("METAUTILS_DATA", str(root))
    told_in_one_line(load, sentence)
    assert not list(cache_folder().glob("*.pt"))


def told_without_a_trace(
    load: Callable[[], object], capfd: pytest.CaptureFixture[str], sentence: str
) -> None:
    """Loading fails in one line, leaves no cache, and prints nothing beside."""
    told_in_one_line(load, sentence)
    assert not list(cache_folder().glob("*.pt"))
    assert capfd.readouterr().err == ""


def numbered(*counts: int) -> ClassBank:
    """A bank in which every image says who it is: (its row, its class)."""
    owner = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    images = torch.stack([torch.arange(len(owner)), owner], 1).float()
    names = tuple(f"class {k}" for k in range(len(counts)))
    return ClassBank(images, torch.tensor(counts), names)


def blobs(classes: int = 6, images: int = 8, size: int = 4, seed: int = 0) -> ClassBank:
    """Noisy copies of one random pattern a class: easy to tell apart."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.rand(classes, 1, 1, size, size, generator=generator)
    noise = torch.rand(classes, images, 1, size, size, generator=generator)
    x = (255 * (0.6 * centres + 0.4 * noise)).round().to(torch.uint8).flatten(0, 1)
    names = tuple(f"blob {k}" for k in range(classes))
    return ClassBank(x, torch.full((classes,), images), names)


def tiny(pixels: int = 16, width: int = 8, seed: int = 0, dropout: float = 0.0) -> ProtoNet:
    """A ProtoNet with two small layers."""
    torch.manual_seed(seed)
    layers = [nn.Linear(pixels, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(dropout)]
    return ProtoNet(nn.Sequential(nn.Flatten(), *layers, nn.Linear(16, width)))


def group_norm(channels: int) -> nn.Module:
    """Normalises each image by itself."""
    return nn.GroupNorm(2, channels)


def one_block(norm: Callable[[int], nn.Module]) -> nn.Module:
    """A classifier of three classes of `blobs`, with one convolution."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), norm(8), nn.ReLU(), nn.Flatten())
    return classifier(body, 128, 3)


def fingerprint(*tensors: Tensor) -> str:
    """sha256 over the bytes of tensors."""
    digest = hashlib.sha256()
    for x in tensors:
        digest.update(x.detach().contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """A copy of all its parameters and buffers."""
    return copy.deepcopy(module.state_dict())


def same_weights(a: dict, b: dict) -> bool:
    """Same names, and equal to the last bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def images_to_learn(
    ways: int = 3,
    shots: int = 2,
    queries: int = 2,
    tasks: int = 2,
    size: int = 16,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Episode:
    """Tasks of random images, of which nothing but the exact numbers matters."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for each in (shots, queries):
        x = torch.randn(tasks, ways * each, 1, size, size, generator=generator, dtype=dtype)
        parts += [x, torch.arange(ways).repeat(tasks, each)]
    return Episode(*parts, torch.arange(ways).repeat(tasks, 1))


def task(
    labels: Sequence[int],
    queries: int = 7,
    tasks: int = 2,
    shape: tuple[int, ...] = (5,),
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Random features of a support set with these labels, in another order in each task."""
    g = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(len(labels), generator=g) for _ in range(tasks)])
    support_x = torch.randn(tasks, len(labels), *shape, generator=g)
    query_x = torch.randn(tasks, queries, *shape, generator=g)
    return support_x, torch.tensor(labels)[order], query_x


def predict(learner: Learner, e: Episode) -> Tensor:
    """The queries' outputs, without gradient."""
    with torch.no_grad():
        return learner(e.support_x, e.support_y, e.query_x)


def one_by_one(learner: Learner, e: Episode) -> Tensor:
    """The same, with each query in a call of its own."""
    queries = e.query_x.split(1, 1)
    with torch.no_grad():
        return torch.cat([learner(e.support_x, e.support_y, q) for q in queries], 1)


def together_and_alone(learner: Learner) -> tuple[Tensor, Tensor]:
    """Outputs in evaluation mode, for all queries of a task in one call and one by one."""
    e = images_to_learn(ways=5, tasks=1, size=28, dtype=torch.float32)
    for _ in range(50):  # so that the running statistics are those of the data
        predict(learner, e)
    learner.eval()
    return predict(learner, e), one_by_one(learner, e)


def tensors_of(e: Episode) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs and targets of the support, and of the queries."""
    return e.support_x, e.support_y, e.query_x, e.query_y


def check_that_episodes_follow_the_seed(make: Callable[[int], Iterable[Episode]]) -> None:
    """The same seed draws the same episodes, no two of them alike, and another seed others."""
    first, again, other = (make(seed) for seed in (4, 4, 5))
    torch.manual_seed(9)  # the global generator has no part in it
    several = list(islice(first, 3))
    for a, b in zip(several, islice(again, 3), strict=True):
        assert all(map(torch.equal, tensors_of(a), tensors_of(b)))
    assert not torch.equal(several[0].support_x, several[1].support_x)
    assert not torch.equal(several[0].support_x, next(iter(other)).support_x)


def check_that_the_generator_is_all_it_remembers(sampler) -> None:
    """Set back to an earlier state, the sampler's generator draws the same episode again."""
    sampler.sample()
    state = sampler.generator.get_state()
    expected = sampler.sample()
    sampler.generator.set_state(state)
    assert all(map(torch.equal, tensors_of(sampler.sample()), tensors_of(expected)))


def blob_tasks(tasks: int = 8, seed: int = 0) -> EpisodeSampler:
    """Episodes of three `blobs` with one shot."""
    return EpisodeSampler(blobs(), 3, 1, 3, tasks, seed=seed)


def train_on_blobs(learner: Learner, out: Path, **changed) -> History:
    """A short training with validations and checkpoints."""
    judge = EpisodeSampler(blobs(seed=9), 3, 1, 2, seed=5)
    length = {"steps": 12, "every": 5, "validation_episodes": 6, "progress": False} | changed
    return meta_train(learner, blob_tasks(tasks=2), validation=judge, out=out, **length)


def stop_in(learner: Learner, call: int) -> None:
    """Let the learner be interrupted before this one of its `pieces`, counted from 1."""
    calls, whole = count(1), learner.pieces

    def stopped(episode: Episode) -> Iterator:
        for piece in whole(episode):
            if next(calls) == call:
                raise KeyboardInterrupt
            yield piece

    learner.pieces = stopped


STEPS, EVERY = 20, 5
LENGTH = {"steps": STEPS, "every": EVERY, "validation_episodes": 6, "progress": False}


def source(
    seed: int = 0,
    ways: int = 3,
    shots: int = 1,
    queries: int = 2,
    tasks: int = 2,
    rotate: bool = False,
    bank_seed: int = 0,
) -> EpisodeSampler:
    """What `run` trains on."""
    return EpisodeSampler(blobs(seed=bank_seed), ways, shots, queries, tasks, rotate, seed)


def judge() -> EpisodeSampler:
    """What `run` validates on."""
    return EpisodeSampler(blobs(seed=9), 3, 1, 2, seed=5)


def run(
    out: Path | None = None,
    learner: Learner | None = None,
    scramble: int | None = None,
    **changed,
) -> tuple[Learner, History]:
    """A short training with dropout, which draws from the global generator."""
    learner = learner or tiny(dropout=0.2)
    if scramble is not None:
        torch.manual_seed(scramble)
    history = meta_train(learner, source(), validation=judge(), out=out, **(LENGTH | changed))
    return learner, history


class Scripted(ProtoNet):
    """At the given step something happens to its loss."""

    def __init__(self, at: int, what: Callable[[Learner, Tensor], Tensor]) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Sequential(nn.Flatten(), nn.Linear(16, 8)))
        self.spare = nn.Parameter(torch.zeros(2))
        self.at, self.what, self.calls, self.at_once = at, what, 0, None

    def pieces(self, episode: Episode) -> Iterator:
        return in_parts(super().pieces, episode, self.at_once)

    def loss(self, predictions: Tensor, query_y: Tensor) -> Tensor:
        loss = super().loss(predictions, query_y)
        self.calls += 1
        return self.what(self, loss) if self.calls == self.at else loss


def in_parts(
    pieces: Callable[[Episode], Iterator], episode: Episode, tasks: int | None
) -> Iterator:
    """The pieces of an episode, of at most so many tasks each, that add up to its meta-loss."""
    for part in episode.parts(tasks):
        for loss, *rest in pieces(part):
            yield loss * (part.tasks / episode.tasks), *rest


def interrupt(learner: Learner, loss: Tensor) -> Tensor:
    """What happens to a `Scripted` learner: Ctrl-C."""
    raise KeyboardInterrupt


def nan(learner: Learner, loss: Tensor) -> Tensor:
    """What happens to a `Scripted` learner: its loss is no number."""
    return loss * math.nan


def meta_loss(learner: Learner, episode: Episode) -> Tensor:
    """What `meta_train` differentiates, all pieces together."""
    return sum(loss for loss, *_ in learner.pieces(episode))


def check_that_a_stopped_training_resumes(
    make: Callable[[], Learner], call: int, folder: Path
) -> None:
    """Interrupted in this call in step 6 to 10 and resumed, it ends bit for bit as without.

    Resumed by a learner made anew, and by the very one that was interrupted.
    """
    whole, cut, resumed = make(), make(), make()
    history = train_on_blobs(whole, folder / "whole")
    stop_in(cut, call)
    with pytest.raises(KeyboardInterrupt):
        train_on_blobs(cut, folder / "cut")
    assert load_safely(folder / "cut" / CHECKPOINT)["notes"]["step"] == 5
    shutil.copytree(folder / "cut", folder / "same")
    with torch.no_grad():
        for p in resumed.parameters():
            p.zero_()
    for learner, out in ((resumed, folder / "cut"), (cut, folder / "same")):
        again = train_on_blobs(learner, out)
        assert same_weights(learner.state_dict(), whole.state_dict())
        assert again.loss == history.loss
        assert again.accuracy == history.accuracy
        assert again.validation == history.validation


def check_that_evaluation_leaves_no_trace(learner: Learner) -> None:
    """In weights, mode or gradients; nor do queries help one another."""
    before = weights_of(learner)
    (score,) = evaluate(learner, blobs(), [(3, 1)], queries=3, episodes=20)
    assert same_weights(weights_of(learner), before)
    assert learner.training
    assert all(p.grad is None for p in learner.parameters())
    assert not score.transductive


def elsewhere(make: Callable[[], Any]) -> Any:
    """What is made where torch's default device is another one: `meta` holds no numbers at all."""
    with torch.device("meta"):
        return make()


def check_that_episodes_are_drawn_on_the_cpu(make: Callable[[], Iterable[Episode]]) -> None:
    """Whatever torch's default device is, and the same ones."""
    for a, b in zip(islice(make(), 2), elsewhere(lambda: [*islice(make(), 2)]), strict=True):
        assert all(map(torch.equal, tensors_of(a), tensors_of(b)))


def convolutions_round() -> bool:
    """Whether a GPU may compute convolutions of float32 in TF32."""
    cudnn = torch.backends.cudnn
    return cudnn.conv.fp32_precision == "tf32" if hasattr(cudnn, "conv") else cudnn.allow_tf32


class Largest(TorchFunctionMode):
    """Notes how many numbers the largest tensor has that is made under it."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.numbers = max(self.numbers, result.numel())
        return result


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """All numbers of some tensors in one row."""
    return torch.cat([x.detach().flatten() for x in tensors])


def relative(a: Tensor, b: Tensor) -> float:
    """Length of the difference, as a share of the length of `b`."""
    return float((a - b).norm() / b.norm())


def gradient(value: Tensor, leaves: Sequence[Tensor]) -> Tensor:
    """Gradient for all leaves in one row; 0 where a leaf has no part in the value."""
    return flat(torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True))


def slope_error(value: Callable[[], Tensor], leaves: Sequence[Tensor]) -> float:
    """Relative error of a float64 gradient against central differences of fourth order.

    Along two random directions, which see every entry. The best of three step lengths counts: a
    long one may cross a kink of ReLU or max-pooling, a short one loses digits, and a wrong
    gradient is wrong by all of them.
    """
    start, exact = flat(leaves), gradient(value(), leaves)
    generator = torch.Generator().manual_seed(1)
    directions = torch.randn(2, len(start), generator=generator, dtype=torch.float64)
    directions /= directions.norm(dim=1, keepdim=True)

    @torch.no_grad()
    def at(point: Tensor) -> float:
        for x, numbers in zip(leaves, point.split([x.numel() for x in leaves]), strict=True):
            x.copy_(numbers.view(x.shape))
        return float(value())

    best = float("inf")
    for h in (1e-5, 3e-6, 1e-6):
        slopes = []
        for d in directions:
            f = {k: at(start + k * h * d) for k in (-2, -1, 1, 2)}
            slopes.append((8 * (f[1] - f[-1]) - (f[2] - f[-2])) / (12 * h))
        best = min(best, relative(directions @ exact, torch.tensor(slopes, dtype=torch.float64)))
        if best < 1e-9:
            break
    at(start)
    return best


def quick_preset(monkeypatch: pytest.MonkeyPatch, *numbers: int) -> None:
    """The quick preset of every method: steps, ways, shots, queries and test episodes.

    Those that adapt take two tasks at a time.
    """
    from metautils import methods

    steps, ways, shots, queries, episodes = numbers
    for name, method in methods.known().items():
        tasks = 1 if method.any_ways else 2
        quick = Preset(steps, ways, shots, queries, tasks, episodes)
        on_body = replace(quick, lr=1e-3, clip=1.0)
        short = replace(method, presets={"quick": quick}, body_presets={"quick": on_body})
        monkeypatch.setitem(methods.known(), name, short)


def small_glyphs(seed: int = 0) -> Parts:
    """A set in place of the glyphs, ready at once."""
    return split_classes(blobs(classes=14, images=8, size=16, seed=seed), (6, 3, 5))


def train(out: Path, *more: object, method: str = "protonet") -> int:
    """`python -m metautils train` on the CPU; its exit status."""
    from metautils import cli  # here, as it takes seconds that other tests need not wait

    return cli.main(["train", method, "--out", str(out), "--device", "cpu", *map(str, more)])


def again(out: Path, *more: object) -> int:
    """`python -m metautils evaluate` on the CPU; its exit status."""
    from metautils import cli  # here, as it takes seconds that other tests need not wait

    return cli.main(["evaluate", str(out), "--device", "cpu", *map(str, more)])


def read_json(path: Path) -> Any:
    """What a record holds."""
    return json.loads(path.read_text(encoding="utf-8"))


OWN_METHOD = """
from torch import nn

from metautils.learners.base import Method, Preset
from metautils.learners.protonet import ProtoNet


class Mine(ProtoNet):
    def __init__(self, pixels):
        super().__init__(nn.Sequential(nn.Flatten(), nn.Linear(pixels, pixels)))
        nn.init.eye_(self.embed[1].weight)
        nn.init.zeros_(self.embed[1].bias)


METHODS = {
    "mine": Method(
        "Nearest mean",
        lambda problem: Mine(problem.image.numel()),
        {"quick": Preset(3, 4, 1, 2, episodes=3)},
        any_ways=True,
    )
}
"""


def own_method(where: Path) -> Path:
    """A file with a method of the reader's own."""
    path = where / "mine.py"
    path.write_text(OWN_METHOD)
    return path


COLOURS = {"blue": (40, 60, 210), "green": (50, 190, 60), "red": (220, 50, 40)}


def paint(root: Path, images: int = 10, names: Iterable[str] = COLOURS, seed: int = 0) -> Path:
    """A folder of noisy images, the classes of which differ in their colour."""
    random = np.random.default_rng(seed)
    for name, colour in zip(names, COLOURS.values(), strict=False):
        (root / name).mkdir(parents=True)
        for k in range(images):
            noise = random.integers(-40, 41, (20, 24, 3))
            Image.fromarray((noise + colour).clip(0, 255).astype(np.uint8)).save(
                root / name / f"{k}.png"
            )
    return root


def tiny_body(features: int = 8, seed: int = 0) -> nn.Module:
    """A body of one convolution with batch normalisation; the global generator stays as it is."""
    from metautils.pretrained import Body

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [nn.Conv2d(3, features, 1), nn.BatchNorm2d(features), nn.ReLU()]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return Body(net, features, size=16)


def blind(body: nn.Module) -> nn.Module:
    """A tiny body whose features are the same for all images, until it learns."""
    with torch.no_grad():
        body.net[0].weight.zero_()
        body.net[0].bias.abs_().add_(0.1)
    return body


def tiny_classifier(seed: int = 0, size: int = 16) -> nn.Module:
    """A `Classifier` of the colours on a tiny body."""
    from metautils.classifier import Classifier

    torch.manual_seed(0)
    return Classifier(tiny_body(seed=seed), tuple(COLOURS), size)


IMAGE_SIZE = 16
RED, WHITE, BLACK = (255, 0, 0), (255, 255, 255), (0, 0, 0)


def read_one(
    tmp_path: Path, image: Image.Image, name: str = "x.png", channels: int = 3, **options
) -> Tensor:
    """What a folder's reader makes of one image, `(channels, IMAGE_SIZE, IMAGE_SIZE)`."""
    path = tmp_path / "set" / "a" / name
    path.parent.mkdir(parents=True)
    image.save(path, **options)
    bank = folder.bank(tmp_path / "set", IMAGE_SIZE, channels)
    assert bank.images.dtype == torch.uint8
    assert bank.images.shape == (1, channels, IMAGE_SIZE, IMAGE_SIZE)
    return bank.images[0]


def only_colour(image: Tensor) -> tuple[int, ...]:
    """The colour of an image of one colour."""
    values = image.flatten(1)
    assert (values == values[:, :1]).all()
    return tuple(values[:, 0].tolist())


def fill(root: Path, **classes: int) -> Path:
    """Folders with as many images of various sizes and modes as asked for."""
    random = np.random.default_rng(0)
    for name, images in classes.items():
        (root / name).mkdir(parents=True)
        for k in range(images):
            height, width = random.integers(5, 50, 2)
            mode = ("RGB", "L", "RGBA", "P", "1")[k % 5]
            level = int(random.integers(256))
            image = Image.new("L", (width, height), level).convert(mode)
            image.save(root / name / f"{k}.png")
    return root
