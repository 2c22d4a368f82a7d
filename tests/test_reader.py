"""What all learners share that read: the order, and support sets that cannot be read."""

import pytest
import torch
from torch import nn

from metautils.learners.mann import MANN, LSTMReader
from metautils.learners.snail import SNAIL

KINDS = {
    "snail": lambda: SNAIL(nn.Linear(4, 8), 8, 5, 6),
    "mann": lambda: MANN(nn.Linear(4, 8), 8, 5),
    "lstm": lambda: LSTMReader(nn.Linear(4, 8), 8, 5),
}


@pytest.fixture(params=KINDS)
def net(request):
    torch.manual_seed(0)
    return KINDS[request.param]()


X, Y, Q = torch.rand(2, 5, 4), torch.arange(5).expand(2, 5), torch.rand(2, 3, 4)


def test_order_is_another_each_time_in_training_and_the_same_in_evaluation(net):
    net.train()
    torch.manual_seed(0)
    orders = torch.cat([net.order(50, 5) for _ in range(4)])
    assert len(orders.unique(dim=0)) > 60  # of 120
    assert not torch.equal(net(X, Y, Q), net(X, Y, Q))
    net.eval()
    torch.manual_seed(1)
    assert len(net.order(50, 5).unique(dim=0)) == 1
    assert torch.equal(net(X, Y, Q), net(X, Y, Q))


def test_order_moves_images_with_their_labels(net):
    marks = torch.arange(5.0)[None, :, None].expand(2, 5, 4)
    net.embed = nn.Identity()
    support, labels, queries, order = net.read(marks, Y, marks[:, :3])
    assert torch.equal(support[..., 0].long(), labels)
    assert torch.equal(order, labels)
    assert torch.equal(queries, marks[:, :3])


def test_a_class_without_images_may_be_missing(net):
    assert net.eval()(X[:, :2], torch.tensor([[3, 4], [0, 0]]), Q).shape == (2, 3, 5)


@pytest.mark.parametrize("label", [-1, 5, 19])
def test_label_without_an_input_is_told(net, label):
    y = torch.tensor([[0, 1, 2, 3, label]]).expand(2, 5)
    sentence = f"holds the label {label}, but the learner has inputs for the labels 0 to 4: give"
    with pytest.raises(ValueError, match=sentence):
        net(X, y, Q)


def test_empty_support_set_is_told(net):
    with pytest.raises(ValueError, match="support set is empty: give one image or more"):
        net(X[:, :0], Y[:, :0], Q)


def test_sequence_that_is_too_long_is_told():
    x, y = torch.rand(2, 10, 4), torch.arange(5).repeat(2).expand(2, 10)
    sentence = "10 support images and a query make a sequence of 11, .* made for 6 at most"
    with pytest.raises(ValueError, match=sentence):
        KINDS["snail"]()(x, y, Q)
    assert KINDS["mann"]()(x, y, Q).shape == (2, 3, 5)


@pytest.mark.parametrize("ways", [0, 1])
def test_ways_must_be_two_or_more(ways):
    with pytest.raises(ValueError, match=f"ways is {ways}; to tell classes apart"):
        LSTMReader(nn.Identity(), 4, ways)
