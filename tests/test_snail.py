"""SNAIL against torch's own convolution and attention, and who sees whom."""

import pytest
import torch
from helpers import images_to_learn, meta_loss, slope_error, together_and_alone
from torch import nn
from torch.nn import functional as F

from metautils.learners.base import Problem
from metautils.learners.snail import METHODS, SNAIL, AttentionBlock, DenseBlock, TCBlock
from metautils.nets import Conv4


def pair(support=5, queries=3, channels=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(2, n, channels, generator=g) for n in (support, queries))


def one_sequence(block, support, queries):
    """What the block makes of each query, with the support before it in an ordinary sequence."""
    found = []
    for k in range(queries.shape[1]):
        row = torch.cat([support, queries[:, k : k + 1]], 1)
        found.append(block(row, queries[:, :0])[0])
    return found


BLOCKS = pytest.mark.parametrize(
    "block",
    [
        *(pytest.param(DenseBlock(8, d, 4), id=f"dilation {d}") for d in (1, 2, 4, 8)),
        pytest.param(TCBlock(8, 6, 4), id="temporal convolutions"),
        pytest.param(AttentionBlock(8, 4, 6), id="attention"),
    ],
)


@pytest.mark.parametrize("dilation", [1, 2, 4, 8])
def test_dense_block_is_a_causal_convolution(dilation):
    """Of torch's Conv1d, of two places, padded in front."""
    torch.manual_seed(dilation)
    block, (x, none) = DenseBlock(8, dilation, 4), pair(queries=0)
    weight = torch.stack([block.before.weight, block.now.weight], -1)  # (2 * filters, 8, 2)
    padded = F.pad(x.mT, (dilation, 0))
    f, g = F.conv1d(padded, weight, block.now.bias, dilation=dilation).mT.chunk(2, -1)
    expected = torch.cat([x, f.tanh() * g.sigmoid()], -1)
    torch.testing.assert_close(block(x, none)[0], expected, atol=1e-6, rtol=1e-5)


def test_attention_block_is_causal_attention():
    torch.manual_seed(0)
    block, (x, none) = AttentionBlock(8, 4, 6), pair(queries=0)
    q, k, v = block.looked_for(x), block.keys(x), block.values(x)
    read = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    expected = torch.cat([x, read], -1)
    torch.testing.assert_close(block(x, none)[0], expected, atol=1e-6, rtol=1e-5)


@BLOCKS
def test_each_query_is_the_last_place_of_a_sequence_of_its_own(block):
    support, queries = pair()
    among, each = block(support, queries)
    for k, row in enumerate(one_sequence(block, support, queries)):
        torch.testing.assert_close(row[:, :-1], among, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(row[:, -1], each[:, k], atol=1e-6, rtol=1e-5)


@BLOCKS
@pytest.mark.parametrize("place", range(5))
def test_no_place_sees_a_later_one(block, place):
    support, queries = pair()
    changed = support.clone()
    changed[:, place] += 1
    before, after = block(support, queries)[0], block(changed, queries)[0]
    assert torch.equal(before[:, :place], after[:, :place])
    assert not torch.equal(before[:, place], after[:, place])


def test_temporal_convolutions_reach_all_places_and_no_more_are_there():
    """ceil(log2 T) blocks."""
    for length, layers in ((2, 1), (5, 3), (6, 3), (8, 3), (9, 4), (21, 5), (26, 5)):
        block = TCBlock(8, length, 4)
        assert [b.dilation for b in block] == [2**k for k in range(layers)]
        assert block.outputs == 8 + 4 * layers
        support, queries = pair(support=length - 1)
        changed = support.clone()
        changed[:, 0] += 1
        assert not torch.equal(block(support, queries)[1], block(changed, queries)[1])


def small(ways=5, length=6):
    torch.manual_seed(0)
    return SNAIL(nn.Linear(4, 8), 8, ways, length)


def few(ways=5, queries=7):
    g = torch.Generator().manual_seed(1)
    x, q = (torch.randn(2, n, 4, generator=g) for n in (ways, queries))
    return x, torch.arange(ways).expand(2, -1), q


def test_attention_is_told_in_the_order_of_the_support_set():
    net, (x, y, q) = small().eval(), few()
    found = net.attention(x, y, q)
    assert [w.shape for w in found] == [(2, 7, 5)] * 3
    assert all(bool((w > 0).all() and (w.sum(-1) < 1).all()) for w in found)
    order = net.order(2, 5)
    direct = net.blocks[0].weights(*net.layers(*net.read(x, y, q)[:3])[0])[1]  # in reading order
    for k in range(5):
        assert torch.equal(found[0][:, :, order[0, k]], direct[:, :, k])


def test_label_of_a_query_is_left_empty():
    net, (x, y, q) = small(), few()
    support, queries = net.layers(*net.read(x, y, q)[:3])[0]
    assert support[..., 8:].sum(-1).eq(1).all()
    assert not queries[..., 8:].any()


def test_queries_one_at_a_time_change_nothing():
    torch.manual_seed(0)
    together, alone = together_and_alone(SNAIL(Conv4(width=8), 8, 5, 11))
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    assert together.std() > 0.01


def test_gradient_equals_finite_differences(float64):
    torch.manual_seed(0)
    net, e = SNAIL(Conv4(width=4), 4, 3, 7).eval(), images_to_learn()
    assert slope_error(lambda: meta_loss(net, e), list(net.head.parameters())) < 1e-7


@pytest.mark.parametrize(("ways", "shots"), [(5, 1), (5, 5), (20, 1)])
def test_length_is_that_of_the_problem(ways, shots):
    problem = Problem(torch.Size([1, 28, 28]), ways, 100, shots=shots)
    assert METHODS["snail"].make(problem).length == ways * shots + 1
