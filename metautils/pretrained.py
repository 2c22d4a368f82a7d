"""ResNet-50 (He et al. 2016) as a body, with the weights of ImageNet, of a file, or none."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import ResNet50_Weights, resnet50

from metautils.checkpoint import CheckpointMismatch, check_same_network
from metautils.files import DataError, load_safely, reading

FEATURES = 2048  # that a ResNet-50 gives for an image
IMAGENET = ResNet50_Weights.IMAGENET1K_V2


def body(weights: str | Path | None = "imagenet") -> nn.Module:
    """torchvision's ResNet-50 without its last layer: `(n, 3, h, w)` to `(n, 2048)`.

    Args:
        weights: "imagenet" for `ResNet50_Weights.IMAGENET1K_V2`, downloaded once and checked by
            its hash; a file with weights of a ResNet-50, such as the checkpoint of
            `python -m metautils train resnet50`; or None for random ones.

    Raises:
        DataError: if the weights cannot be had, are damaged, or are of another network.
    """
    # Residual branches that start at nothing: a shallow network at first, which learns sooner.
    net = resnet50(zero_init_residual=True)
    net.fc = nn.Identity()
    if weights is not None:
        loaded = imagenet() if weights == "imagenet" else _stored(Path(weights), net)
        try:
            check_same_network(loaded, net, weights)
        except CheckpointMismatch as error:
            raise DataError(str(error)) from error
        net.load_state_dict(loaded)
    # Channels next to each other in memory suit the convolution kernels of CPUs and GPUs.
    return net.to(memory_format=torch.channels_last)


def imagenet() -> dict[str, Tensor]:
    """The state of IMAGENET1K_V2 but for its last layer.

    Raises:
        DataError: if it cannot be downloaded, or what lies in torch's cache is damaged.
    """
    name = IMAGENET.url.rsplit("/", 1)[1]
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    with reading(path):
        there = path.exists()
    if there:
        _check_hash(path)  # torch checks a file only while it downloads it
    try:
        state = IMAGENET.get_state_dict(progress=True, check_hash=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise DataError(f"{path} holds more than tensors: delete it, run again.") from error
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"{name} is not in {path.parent} and could not be downloaded ({error}): connect to "
            "the network, copy the file there, or name a file of weights."
        ) from error
    return _without_head(state)


def _check_hash(path: Path) -> None:
    expected = path.stem.rsplit("-", 1)[1]
    with reading(path), path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if not found.startswith(expected):
        raise DataError(
            f"{path} is damaged: its SHA-256 begins with {found[:8]}, not {expected}. Delete it "
            "and run again."
        )


def _stored(path: Path, net: nn.Module) -> dict[str, Tensor]:
    """Weights of a file: a network's state, or the best of a checkpoint, as a whole or inside."""
    saved = load_safely(path)
    if isinstance(saved, dict) and isinstance(saved.get("best"), dict):
        saved = saved["best"]
    if not isinstance(saved, dict) or not all(map(_is_weight, saved.items())):
        raise DataError(f"{path} holds no weights of a network: name another file.")
    # A learner may hold the network under a name of its own, such as "embed.net.".
    first = next(iter(net.state_dict()))
    holders = [name.removesuffix(first) for name in saved if name.endswith(first)]
    start = min(holders, key=len, default="")
    inside = {name.removeprefix(start): x for name, x in saved.items() if name.startswith(start)}
    return _without_head(inside)


def _is_weight(item: tuple[Any, Any]) -> bool:
    return isinstance(item[0], str) and isinstance(item[1], Tensor)


def _without_head(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x for name, x in state.items() if not name.startswith("fc.")}


class Prepared(nn.Module):
    """A network behind the resizing and normalising that it needs: images in [0, 1] go in.

    Args:
        net: takes images normalised by the mean and deviation of ImageNet.
        size: height and width that images are scaled to, pixels; None for as they are.

    Example:
        >>> net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> Prepared(net, size=64)(torch.rand(4, 1, 28, 28)).shape  # grey becomes three channels
        torch.Size([4, 3])
    """

    def __init__(self, net: nn.Module, size: int | None = None) -> None:
        super().__init__()
        self.net, self.size = net, size
        mean, std = (
            torch.tensor(IMAGENET.transforms().mean),
            torch.tensor(IMAGENET.transforms().std),
        )
        self.register_buffer("mean", mean[:, None, None], persistent=False)  # (3, 1, 1)
        self.register_buffer("std", std[:, None, None], persistent=False)  # (3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """`(n, 1 or 3, h, w)` in [0, 1] to what the network gives."""
        if self.size is not None and x.shape[-2:] != (self.size, self.size):
            x = nn.functional.interpolate(x, (self.size, self.size), mode="bilinear")
        return self.net(((x - self.mean) / self.std).contiguous(memory_format=torch.channels_last))
