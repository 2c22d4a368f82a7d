"""EfficientNet-Lite0 (Tan and Le 2019, without what small processors lack) and its blocks."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn
from torch.nn import functional as F

FEATURES = 1280
# Of each stage: blocks, kernel, stride of the first block, how much wider it is inside, channels.
STAGES = (
    (1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192), (1, 3, 1, 6, 320),
)  # fmt: skip


class Same(nn.Conv2d):
    """A convolution whose images are padded so that n pixels become n / stride, rounded up.

    The odd pixel of the padding lies at the right and the lower edge, unlike torch's own.

    Shapes:
        `(n, channels, h, w)` to `(n, out, ceil(h / stride), ceil(w / stride))`.

    Example:
        >>> import torch
        >>> Same(3, 8, kernel_size=3, stride=2, bias=False)(torch.rand(1, 3, 8, 7)).shape
        torch.Size([1, 8, 4, 4])
    """

    def forward(self, x: Tensor) -> Tensor:
        """Pad and convolve."""
        (k, _), (s, _) = self.kernel_size, self.stride
        down, across = (max(0, (-(-n // s) - 1) * s + k - n) for n in x.shape[-2:])
        if down or across:
            x = F.pad(x, (across // 2, across - across // 2, down // 2, down - down // 2))
        return super().forward(x)


class Block(nn.Module):
    """Channels are widened, each is convolved alone, and they are narrowed again.

    Args:
        channels: that come in.
        out: that go out.
        kernel, stride: of the convolution of each channel.
        wider: how many times as many channels there are inside; of 1, none are widened.

    Example:
        >>> import torch
        >>> Block(8, 8, kernel=3, stride=1, wider=6)(torch.rand(1, 8, 5, 5)).shape
        torch.Size([1, 8, 5, 5])
    """

    def __init__(self, channels: int, out: int, kernel: int, stride: int, wider: int) -> None:
        super().__init__()
        inside = channels * wider
        widen = [("conv_pw", nn.Conv2d(channels, inside, 1, bias=False))] if wider > 1 else []
        alone = (
            nn.Conv2d(inside, inside, kernel, padding=kernel // 2, groups=inside, bias=False)
            if stride == 1
            else Same(inside, inside, kernel, stride, groups=inside, bias=False)
        )
        last = "conv_pwl" if wider > 1 else "conv_pw"
        layers = [*widen, ("conv_dw", alone), (last, nn.Conv2d(inside, out, 1, bias=False))]
        for k, (name, layer) in enumerate(layers, 1):
            setattr(self, name, layer)
            setattr(self, f"bn{k}", nn.BatchNorm2d(layer.out_channels, eps=1e-3))
        self._order = [name for name, _ in layers]
        self._around = stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        """`(n, channels, h, w)` to `(n, out, ceil(h / stride), ceil(w / stride))`."""
        y = x
        for k, name in enumerate(self._order, 1):
            y = getattr(self, f"bn{k}")(getattr(self, name)(y))
            y = F.relu6(y) if k < len(self._order) else y
        return x + y if self._around else y


def lite0() -> nn.Sequential:
    """The network without its last layer: `(n, 3, h, w)`, normalised, to `(n, 1280)`.

    With random weights; parameters have the names and the order that timm gives them.
    """
    stages, channels = [], 32
    for blocks, kernel, stride, wider, out in STAGES:
        stage = []
        for k in range(blocks):
            stage.append(Block(channels, out, kernel, stride if k == 0 else 1, wider))
            channels = out
        stages.append(nn.Sequential(*stage))
    return nn.Sequential(OrderedDict(
        conv_stem=Same(3, 32, 3, 2, bias=False), bn1=nn.BatchNorm2d(32, eps=1e-3), act1=nn.ReLU6(),
        blocks=nn.Sequential(*stages),
        conv_head=nn.Conv2d(320, FEATURES, 1, bias=False),
        bn2=nn.BatchNorm2d(FEATURES, eps=1e-3), act2=nn.ReLU6(),
        pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(),
    ))  # fmt: skip
