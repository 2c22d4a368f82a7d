"""Networks that several chapters share."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Conv4(nn.Module):
    """The four-block convolutional network of few-shot learning (Vinyals et al. 2016).

    Each block is a 3x3 convolution, batch normalisation, ReLU and 2x2 max-pooling, so an image of
    28x28 becomes `width` numbers and one of 84x84 becomes `25 * width`.

    Args:
        channels: of the images, 1 or 3.
        width: filters in each convolution.

    Shapes:
        `(n, channels, h, w)` float to `(n, width * (h // 16) * (w // 16))`.
    """

    def __init__(self, channels: int = 1, width: int = 64) -> None:
        super().__init__()
        sizes = [channels, width, width, width, width]
        self.blocks = nn.Sequential(*map(self._block, sizes[:-1], sizes[1:]))
        # Channels next to each other in memory suit the convolution kernels of CPUs and GPUs.
        self.to(memory_format=torch.channels_last)

    @staticmethod
    def _block(channels: int, width: int) -> nn.Sequential:
        convolution = nn.Conv2d(channels, width, 3, padding=1)
        # ReLU keeps order, so it may follow the pooling: the same numbers from a quarter of the
        # work, which makes a training step a fifth faster on a CPU.
        return nn.Sequential(convolution, nn.BatchNorm2d(width), nn.MaxPool2d(2), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        """Embed the images."""
        return self.blocks(x.contiguous(memory_format=torch.channels_last)).flatten(1)
