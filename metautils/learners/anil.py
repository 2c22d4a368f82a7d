"""ANIL, almost no inner loop (Raghu et al. 2020): MAML that adapts the last layer only."""

from __future__ import annotations

from torch import nn

from metautils.learners.base import Method
from metautils.learners.maml import MAML, PRESETS, on_strided_conv4


class ANIL(MAML):
    """The body stays as meta-trained; the inner steps move the head (section 5 of the paper).

    Args:
        net: with a submodule named `head`, as `metautils.nets.classifier` makes it.
        lr, steps, options: as in `MAML`.

    Example:
        >>> import torch
        >>> from metautils.nets import mlp
        >>> learner = ANIL(mlp(inputs=4, outputs=5), steps=3)
        >>> x, y = torch.rand(2, 5, 4), torch.arange(5).expand(2, 5)
        >>> learner(x, y, torch.rand(2, 10, 4)).shape
        torch.Size([2, 10, 5])
    """

    def __init__(self, net: nn.Module, lr: float = 0.4, steps: int = 1, **options: object) -> None:
        super().__init__(net, lr, steps, only=("head",), **options)


METHODS = {"anil": Method("ANIL", on_strided_conv4(ANIL, test_steps=3), PRESETS)}
