"""What several tests share: small banks and learners, and the folder with real images."""

import hashlib
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from metautils.data.bank import ClassBank
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


def fingerprint(*tensors: torch.Tensor) -> str:
    """sha256 over the bytes of tensors."""
    digest = hashlib.sha256()
    for x in tensors:
        digest.update(x.detach().contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()


def same_weights(a: dict, b: dict) -> bool:
    """Same names, and equal to the last bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
