"""SNAIL (Mishra et al. 2018): temporal convolutions and causal attention over the support set."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metautils.learners.base import Method, Preset, Problem
from metautils.learners.reader import Reader
from metautils.nets import Conv4, classifier, features_of

# Every layer maps a pair: what stands at the places of the support set, (tasks, S, c), and what
# stands at the place behind them, (tasks, Q, c), where each query is alone. So the support set is
# read once, however many queries there are.
Pair = tuple[Tensor, Tensor]


class DenseBlock(nn.Module):
    """A causal convolution over two places, gated, beside its input (`DenseBlock` of the paper).

    Args:
        inputs: channels.
        dilation: how many places back the other one lies.
        filters: channels that are added.

    Example:
        >>> support, queries = DenseBlock(8, dilation=2, filters=4)(
        ...     torch.rand(2, 5, 8), torch.rand(2, 15, 8))
        >>> support.shape, queries.shape
        (torch.Size([2, 5, 12]), torch.Size([2, 15, 12]))
    """

    def __init__(self, inputs: int, dilation: int, filters: int) -> None:
        super().__init__()
        self.dilation = dilation
        self.now = nn.Linear(inputs, 2 * filters)
        self.before = nn.Linear(inputs, 2 * filters, bias=False)

    def forward(self, support: Tensor, queries: Tensor) -> Pair:
        """Both with `filters` more channels."""
        # What stood `dilation` places before each place, zeros where there was none; of the
        # support (tasks, S, c), and of the place behind it, (tasks, 1, c), the same for all.
        before = F.pad(self.before(support), (0, 0, self.dilation, 0))
        s = support.shape[1]
        past = before[:, :s], before[:, s : s + 1]
        pairs = zip((support, queries), past, strict=True)
        return tuple(torch.cat([x, _gated(self.now(x) + old)], -1) for x, old in pairs)


def _gated(x: Tensor) -> Tensor:
    f, g = x.chunk(2, -1)
    return f.tanh() * g.sigmoid()


class TCBlock(nn.Sequential):
    """Dense blocks of dilations 1, 2, 4, ... that together reach all places.

    Args:
        inputs: channels.
        length: of the sequence.
        filters: channels that each of the ceil(log2 length) blocks adds.

    Example:
        >>> block = TCBlock(8, length=6, filters=4)
        >>> [each.dilation for each in block], block.outputs
        ([1, 2, 4], 20)
    """

    def __init__(self, inputs: int, length: int, filters: int) -> None:
        layers = math.ceil(math.log2(length))
        super().__init__(*(DenseBlock(inputs + k * filters, 2**k, filters) for k in range(layers)))
        self.outputs = inputs + layers * filters

    def forward(self, support: Tensor, queries: Tensor) -> Pair:
        """Both with more channels."""
        for block in self:
            support, queries = block(support, queries)
        return support, queries


class AttentionBlock(nn.Module):
    """Each place reads from itself and those before it, beside its input (`AttentionBlock`).

    Args:
        inputs: channels.
        keys: channels of keys and of what is looked for.
        values: channels that are read and added.

    Example:
        >>> block = AttentionBlock(8, keys=4, values=6)
        >>> support, queries = block(torch.rand(2, 5, 8), torch.rand(2, 15, 8))
        >>> support.shape, queries.shape
        (torch.Size([2, 5, 14]), torch.Size([2, 15, 14]))
    """

    def __init__(self, inputs: int, keys: int, values: int) -> None:
        super().__init__()
        self.keys, self.looked_for = nn.Linear(inputs, keys), nn.Linear(inputs, keys)
        self.values = nn.Linear(inputs, values)
        self.outputs = inputs + values

    def weights(self, support: Tensor, queries: Tensor) -> Pair:
        """How much is read from where: `(tasks, S, S)`, and `(tasks, Q, S + 1)`, itself last."""
        keys, own = self.keys(support), self.keys(queries)
        scale = keys.shape[-1] ** -0.5
        among = scale * self.looked_for(support) @ keys.mT  # (tasks, S, S)
        later = torch.ones_like(among, dtype=torch.bool).triu(1)
        q = scale * self.looked_for(queries)
        # (tasks, Q, S) and (tasks, Q, 1), from the query itself
        scores = torch.cat([q @ keys.mT, (q * own).sum(-1, keepdim=True)], -1)
        return among.masked_fill(later, -torch.inf).softmax(-1), scores.softmax(-1)

    def forward(self, support: Tensor, queries: Tensor) -> Pair:
        """Both with `values` more channels."""
        among, weights = self.weights(support, queries)
        values, own = self.values(support), self.values(queries)
        read = weights[..., :-1] @ values + weights[..., -1:] * own  # (tasks, Q, values)
        return torch.cat([support, among @ values], -1), torch.cat([queries, read], -1)


class SNAIL(Reader):
    """Attention, temporal convolutions, both again, and attention once more.

    Args:
        embed: a network `(n, ...)` to `(n, dimensions)`.
        features: its dimensions.
        ways: classes in a task.
        length: the most images in a sequence, the query among them.
        width: values of the first attention; the paper's other sizes are multiples of its 32.

    Example:
        >>> learner = SNAIL(nn.Linear(4, 8), features=8, ways=5, length=6)
        >>> x, y = torch.rand(2, 5, 4), torch.arange(5).expand(2, 5)
        >>> learner(x, y, torch.rand(2, 10, 4)).shape
        torch.Size([2, 10, 5])
    """

    def __init__(
        self, embed: nn.Module, features: int, ways: int, length: int, width: int = 32
    ) -> None:
        super().__init__(embed, ways)
        self.length, self.width = length, width
        first = AttentionBlock(features + ways, 2 * width, width)
        second = TCBlock(first.outputs, length, 4 * width)
        third = AttentionBlock(second.outputs, 8 * width, 4 * width)
        fourth = TCBlock(third.outputs, length, 4 * width)
        fifth = AttentionBlock(fourth.outputs, 16 * width, 8 * width)
        self.blocks = nn.ModuleList([first, second, third, fourth, fifth])
        self.head = nn.Linear(fifth.outputs, ways)

    def forward(self, support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Tensor:
        """Logits `(tasks, Q, ways)`."""
        *_, (_, queries) = self.layers(*self.read(support_x, support_y, query_x)[:3])
        return self.head(queries)

    def layers(self, support: Tensor, labels: Tensor, queries: Tensor) -> list[Pair]:
        """What goes into the first block, and what comes out of each; all in reading order."""
        # A query's label is not known: zeros stand in its place.
        none = queries.new_zeros(*queries.shape[:2], self.ways)
        x = torch.cat([support, self.one_hot(labels, support)], -1)
        pairs = [(x, torch.cat([queries, none], -1))]
        for block in self.blocks:
            pairs.append(block(*pairs[-1]))
        return pairs

    def attention(self, support_x: Tensor, support_y: Tensor, query_x: Tensor) -> list[Tensor]:
        """How much each query reads from each support image, `(tasks, Q, S)`, by attention block.

        The images are in the order in which they were given; what is missing to 1 a query reads
        from itself.
        """
        *pair, order = self.read(support_x, support_y, query_x)
        back = order.argsort(1)[:, None]  # (tasks, 1, S)
        found = []
        for block, inputs in zip(self.blocks, self.layers(*pair), strict=False):
            if isinstance(block, AttentionBlock):
                weights = block.weights(*inputs)[1][..., :-1]  # (tasks, Q, S)
                found.append(weights.gather(-1, back.expand_as(weights)))
        return found

    def extra_repr(self) -> str:
        """The setting, so that a checkpoint knows its learner."""
        return f"ways={self.ways}, length={self.length}, width={self.width}"


def _made(problem: Problem) -> SNAIL:
    """On the paper's embedding: a Conv-4 and a dense layer of 64 units."""
    body = Conv4(problem.image[0])
    embed = classifier(body, features_of(body, problem.image), 64)
    return SNAIL(embed, 64, problem.ways, problem.ways * problem.shots + 1)


METHODS = {
    "snail": Method(
        "SNAIL",
        _made,
        {
            "quick": Preset(300, 5, 1, 5, tasks=8),
            "full": Preset(15000, 5, 1, 5, tasks=8, episodes=1000),
        },
        rotations="classes",
    )
}
