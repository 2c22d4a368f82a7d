"""Meta-SGD (Li et al. 2017): learn the start and, for every parameter, its inner rate."""

from __future__ import annotations

import torch
from torch import nn

from metautils.adapt import SGD
from metautils.learners.base import Method
from metautils.learners.maml import MAML, PRESETS, on_strided_conv4


class MetaSGD(MAML):
    """`phi = theta - alpha * grad L_support(theta)`, alpha learned, of theta's shape (equation 2).

    Args:
        net, steps, options: as in `MAML`.
        lr: where every rate starts; training may move it anywhere, below 0 too.

    Example:
        >>> from metautils.nets import mlp
        >>> learner = MetaSGD(mlp(inputs=4, outputs=5))
        >>> learner.rates[0].shape  # one rate for each of the first layer's weights
        torch.Size([40, 4])
        >>> x, y = torch.rand(2, 5, 4), torch.arange(5).expand(2, 5)
        >>> learner(x, y, torch.rand(2, 10, 4)).shape
        torch.Size([2, 10, 5])
    """

    def __init__(self, net: nn.Module, lr: float = 0.4, steps: int = 1, **options: object) -> None:
        super().__init__(net, lr, steps, learned_rates=False, **options)
        self.rates = nn.ParameterList(torch.full_like(p, lr) for p in net.parameters())

    def optimizer(self) -> SGD:
        """SGD with the learned rates."""
        names = [name for name, _ in self.net.named_parameters()]
        return SGD(dict(zip(names, self.rates, strict=True)))


METHODS = {"meta_sgd": Method("Meta-SGD", on_strided_conv4(MetaSGD), PRESETS)}
