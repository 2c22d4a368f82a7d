"""Networks that several chapters share."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class BatchNorm(nn.Module):
    """Batch normalisation of images by the batch at hand, with no running statistics.

    For learners that adapt: every task has its own statistics. `batch_norm_mode` sets how.

    Args:
        channels: of the feature maps.

    Attributes:
        fused: use torch's own kernel, up to twice as fast on a CPU. Not under `torch.vmap`, where
            the kernel's second derivative is wrong, and silently so.
        reference: how many images at the front of the batch give mean and variance (None: all).

    Shapes:
        `(n, channels, h, w)` to the same.

    Example:
        >>> x = BatchNorm(4)(torch.rand(8, 4, 5, 5))
        >>> x.shape, bool(x.mean((0, 2, 3)).abs().max() < 1e-5)
        (torch.Size([8, 4, 5, 5]), True)
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.fused, self.reference, self.eps = False, None, 1e-5

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each channel, then scale and shift it."""
        several = x.numel() > x.shape[1]  # of a single value torch's kernel has no variance
        if self.fused and self.reference is None and several:
            return F.batch_norm(x, None, None, self.weight, self.bias, training=True, eps=self.eps)
        var, mean = torch.var_mean(x[: self.reference], dim=(0, 2, 3), correction=0)  # (channels,)
        return self._scaled(x, mean, var)

    def _scaled(self, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        scale = self.weight * (var + self.eps).rsqrt()
        shift = self.bias - mean * scale
        return x * scale[:, None, None] + shift[:, None, None]  # (channels, 1, 1)


class StepBatchNorm(BatchNorm):
    """Batch normalisation that has running statistics for each inner step (MAML++).

    It normalises by the batch at hand and, in training mode, remembers the batch's mean and
    variance under the number of inner steps made (Antoniou et al. 2019, section 4). With
    `remembered` it normalises by what it remembers of that number instead, so that images do not
    see one another.

    Args:
        channels: of the feature maps.
        steps: inner steps in training; later ones count as the last.

    Attributes:
        step: the inner steps that the parameters have behind them, see `set_step`.
        remembered: see above.
        momentum: share of a batch, of one task, in the running statistics.

    Shapes:
        `(n, channels, h, w)` to the same.

    Example:
        >>> norm = StepBatchNorm(4, steps=2)
        >>> x = norm(2 + torch.rand(8, 4, 5, 5))
        >>> norm.mean[0] > 0.02, norm.mean[1]  # 2.5, a hundredth of it
        (tensor([True, True, True, True]), tensor([0., 0., 0., 0.]))
    """

    momentum = 0.01

    def __init__(self, channels: int, steps: int) -> None:
        super().__init__(channels)
        self.register_buffer("mean", torch.zeros(steps + 1, channels))
        self.register_buffer("var", torch.ones(steps + 1, channels))
        self.step, self.remembered = 0, False

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each channel, then scale and shift it."""
        k = min(self.step, len(self.mean) - 1)
        if self.remembered:
            return self._scaled(x, self.mean[k], self.var[k])
        if self.training:
            self._remember(x, k)
        return super().forward(x)

    @torch.no_grad()
    def _remember(self, x: Tensor, k: int) -> None:
        x = x.to(self.mean.dtype)  # half precision has too few digits for averages
        var, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)  # (channels,)
        now = (torch.arange(len(self.mean), device=x.device) == k)[:, None]  # (steps + 1, 1)
        # Not in place: under vmap every task has its own.
        self.mean = torch.where(now, self.mean.lerp(mean, self.momentum), self.mean)
        self.var = torch.where(now, self.var.lerp(var, self.momentum), self.var)


def set_step(net: nn.Module, step: int, remembered: bool = False) -> None:
    """Set the attributes of every `StepBatchNorm` in a network."""
    for layer in net.modules():
        if isinstance(layer, StepBatchNorm):
            layer.step, layer.remembered = step, remembered


def batch_norm_mode(net: nn.Module, fused: bool, reference: int | None = None) -> None:
    """Set the attributes of every `BatchNorm` in a network."""
    for layer in net.modules():
        if isinstance(layer, BatchNorm):
            layer.fused, layer.reference = fused, reference


class LearnedScale(nn.Module):
    """A factor that is learned: what cosines are multiplied with before a softmax.

    Args:
        start: its value before training, above 0.

    Example:
        >>> scale = LearnedScale(10.0)
        >>> scale(torch.ones(2)).tolist(), len(list(scale.parameters()))
        ([10.0, 10.0], 1)
    """

    # Adam moves every parameter by about its rate a step. At the small rates that suit weights
    # which have learned elsewhere, the factor would stand still: here it may move so much faster.
    pace = 100.0

    def __init__(self, start: float) -> None:
        super().__init__()
        self.start, self.moved = start, nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """`x` times the factor."""
        return self.start * (self.pace * self.moved).exp() * x

    def extra_repr(self) -> str:
        """The setting, so that a checkpoint knows its learner."""
        return f"start={self.start:g}"


class Conv4(nn.Module):
    """The four-block convolutional network of few-shot learning (Vinyals et al. 2016).

    Each block is a 3x3 convolution, normalisation, ReLU and 2x2 max-pooling, so an image of
    28x28 becomes `width` numbers and one of 84x84 becomes `25 * width`. The strided variant (Finn
    et al. 2017, Omniglot) halves the image in the convolution instead, a quarter of the work, and
    ends with the mean over positions, so every image becomes `width` numbers.

    Args:
        channels: of the images, 1 or 3.
        width: filters in each convolution.
        strided: halve by stride, not by pooling.
        pools: how many blocks, from the first, have a pooling; the embedding of Sung et al. 2018
            has two, so an image of 28x28 becomes `width` maps of 7x7, flattened. None if strided.
        norm: makes the normalisation for a number of channels: `nn.BatchNorm2d` keeps running
            statistics; learners that adapt want `BatchNorm`.

    Shapes:
        `(n, channels, h, w)` float to `(n, width * (h // 2**pools) * (w // 2**pools))`, or
        `(n, width)` if strided.

    Raises:
        ValueError: if pools is not 0 to 4.

    Example:
        >>> Conv4()(torch.rand(2, 1, 28, 28)).shape
        torch.Size([2, 64])
        >>> Conv4(channels=3, strided=True)(torch.rand(2, 3, 84, 84)).shape
        torch.Size([2, 64])
    """

    def __init__(
        self,
        channels: int = 1,
        width: int = 64,
        strided: bool = False,
        pools: int = 4,
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        if not 0 <= pools <= 4:
            raise ValueError(f"pools is {pools}; of four blocks 0 to 4 can have one.")
        sizes = [channels, width, width, width, width]
        halve = ["stride"] * 4 if strided else ["pool"] * pools + [""] * (4 - pools)
        blocks = [_block(*s, norm, how) for s, how in zip(pairwise(sizes), halve, strict=True)]
        self.blocks, self.strided = nn.Sequential(*blocks), strided
        # Channels next to each other in memory suit the convolution kernels of CPUs and GPUs.
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        """Embed the images."""
        x = self.blocks(x)
        return x.mean((2, 3)) if self.strided else x.flatten(1)  # from (n, width, h, w)


def _block(
    channels: int, width: int, norm: Callable[[int], nn.Module], halve: str
) -> nn.Sequential:
    stride = 2 if halve == "stride" else 1
    layers = [nn.Conv2d(channels, width, 3, stride, padding=1), norm(width)]
    # ReLU keeps order, so it may follow the pooling: the same numbers from a quarter of the
    # work, which makes a training step a fifth faster on a CPU.
    pool = [nn.MaxPool2d(2)] if halve == "pool" else []
    return nn.Sequential(*layers, *pool, nn.ReLU())


@torch.no_grad()
def features_of(embed: nn.Module, image: Sequence[int]) -> int:
    """How many numbers a body gives for an image of this shape, `(channels, height, width)`.

    Tried out in evaluation mode, so that neither running statistics nor random numbers move.

    Example:
        >>> features_of(Conv4(width=32), (1, 84, 84))
        800
    """
    was_training = embed.training
    features = embed.eval()(torch.zeros(1, *image)).shape[1]
    embed.train(was_training)
    return features


def classifier(embed: nn.Module, features: int, ways: int) -> nn.Sequential:
    """`embed` with a linear `head` on top: images to logits of `ways` classes."""
    return nn.Sequential(OrderedDict(embed=embed, head=nn.Linear(features, ways)))


def mlp(inputs: int = 1, outputs: int = 1, width: int = 40) -> nn.Sequential:
    """Two hidden layers of ReLU: the network of Finn et al. 2017 for regression."""
    body = nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
    return classifier(body, width, outputs)
