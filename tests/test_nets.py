"""Conv4 has the shapes and the sizes of the paper's network."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from metautils.nets import Conv4


@pytest.mark.parametrize(
    ("channels", "width", "size", "features"),
    [(1, 64, 28, 64), (3, 64, 84, 1600), (3, 8, 32, 32), (1, 4, 16, 4)],
)
def test_features(channels, width, size, features):
    assert Conv4(channels, width)(torch.rand(2, channels, size, size)).shape == (2, features)


def test_number_of_weights():
    """Four 3x3 convolutions with bias, each with the two vectors of a batch normalisation."""
    expected = (9 * 64 + 64) + 3 * (9 * 64 * 64 + 64) + 4 * 2 * 64
    assert sum(p.numel() for p in Conv4().parameters()) == expected == 111_936


def test_equals_its_blocks_written_out():
    torch.manual_seed(0)
    net, x = Conv4(width=8), torch.rand(6, 1, 28, 28)
    h = x
    for convolution, norm, _, _ in net.blocks:
        h = F.conv2d(h, convolution.weight, convolution.bias, padding=1)
        mean, var = h.mean((0, 2, 3), keepdim=True), h.var((0, 2, 3), correction=0, keepdim=True)
        h = (h - mean) / (var + norm.eps).sqrt()
        h = F.max_pool2d(h.clamp(min=0), 2)
    torch.testing.assert_close(net(x), h.flatten(1), atol=1e-4, rtol=1e-4)


def test_memory_format_changes_no_value():
    net = Conv4(width=8).eval()
    x = torch.rand(3, 1, 28, 28)
    plain = Conv4(width=8).eval().to(memory_format=torch.contiguous_format)
    plain.load_state_dict(net.state_dict())
    torch.testing.assert_close(net(x), plain.blocks(x).flatten(1), atol=1e-6, rtol=1e-5)


def test_each_block_learns():
    net = Conv4(width=4)
    net(torch.rand(4, 1, 28, 28)).square().sum().backward()
    weights = [m.weight for m in net.modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d)]
    assert len(weights) == 8
    assert all(w.grad.abs().sum() > 0 for w in weights)
