"""What several tests share: small banks and learners, and the folder with real images."""

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from metautils.data.bank import ClassBank
from metautils.episode import Episode
from metautils.learners.protonet import ProtoNet

# On tensors as small as these, threads wait for one another longer than they work.
torch.set_num_threads(1)

ROOT = Path(__file__).parents[1]


def real_data() -> Path:
    """The folder of real data sets, or skip the test."""
    beside = ROOT.parent / "shared" / "data"
    named = os.environ.get("METAUTILS_DATA") or (str(beside) if beside.is_dir() else "")
    if not named:
        pytest.skip("no real images: METAUTILS_DATA is not set and ../shared/data is not there")
    return Path(named)


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


def fingerprint(*tensors: Tensor) -> str:
    """sha256 over the bytes of tensors."""
    digest = hashlib.sha256()
    for x in tensors:
        digest.update(x.detach().contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()


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
