"""What all learners share: which classes there are, and losses of targets."""

import pytest
import torch
from helpers import RAGGED, predict, task
from torch import nn

from metautils.data.regression import SINUSOIDS, RegressionSampler
from metautils.episode import Episode
from metautils.errors import BadArgument
from metautils.evaluate import squared_errors
from metautils.learners.anil import ANIL
from metautils.learners.base import Learner, task_loss, ways_of
from metautils.learners.baseline import Baseline, cosine_head, linear_head, nearest_centroid
from metautils.learners.imaml import IMAML
from metautils.learners.learned_optimizer import FromScratch, LSTMOptimizer
from metautils.learners.maml import FOMAML, MAML
from metautils.learners.matching_net import MatchingNet
from metautils.learners.meta_lstm import MetaLSTM
from metautils.learners.meta_sgd import MetaSGD
from metautils.learners.protonet import ProtoNet
from metautils.learners.relation_net import RelationModule, RelationNet
from metautils.learners.reptile import Reptile
from metautils.nets import mlp
from metautils.train import meta_train

# Classes of a task


def relation():
    """Of feature maps of one channel."""
    return RelationNet(nn.Flatten(), RelationModule(channels=1, size=4))


COMPARING = pytest.mark.parametrize(
    "make",
    [
        lambda: ProtoNet(nn.Flatten()),
        lambda: MatchingNet(nn.Flatten()),
        relation,
        *(
            lambda fit=fit: Baseline(nn.Flatten(), nn.Identity(), fit)
            for fit in (nearest_centroid, linear_head, cosine_head)
        ),
    ],
    ids=["protonet", "matching", "relation", "centroid", "linear", "cosine"],
)


@COMPARING
@pytest.mark.parametrize(
    ("labels", "told"),
    [
        ([[0, 0, 2, 2]], "Class 1 has no support image in task 0, .* makes 3 ways: .* 0 to 2 one"),
        ([[1, 1, 2, 2]], "Class 0 has no support image in task 0, .* makes 3 ways"),
        ([[0, 1, 2, 4], [0, 1, 2, 3]], "Class 3 has no support image in task 0, .* makes 5 ways"),
        ([[0, 1, 2, 2], [0, 1, 1, 0]], "Class 2 has no support image in task 1, .* makes 3 ways"),
        ([[0, 1, 2, 10**12]], "Class 3 has no support image in task 0, though labels run to 1000"),
        ([[0, 1, -1, 2]], "support_y holds the label -1; count from 0"),
        ([[0.0, 1.0, 2.0]], r"support_y is torch\.float32 of shape \(1, 3\); give int64 labels"),
        ([[]], r"support_y is torch\.float32 of shape \(1, 0\); give .* one image or more"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("grad", [True, False])
def test_class_without_a_support_image_is_named(make, labels, told, grad):
    """Its mean would be 0/0, and what is no number wins every comparison."""
    labels = torch.tensor(labels)
    x, q = torch.rand(*labels.shape, 1, 4, 4), torch.rand(len(labels), 3, 1, 4, 4)
    with pytest.raises(BadArgument, match=f"^{told}") as caught, torch.set_grad_enabled(grad):
        make()(x, labels, q)
    assert "\n" not in str(caught.value)


@COMPARING
def test_classes_of_other_sizes_and_any_order_are_welcome(make):
    x, y, q = task(RAGGED, shape=(1, 4, 4), tasks=3)
    outputs = make()(x, y, q)
    assert outputs.shape == (3, 7, 3)
    assert outputs.isfinite().all()


@pytest.mark.parametrize(
    ("labels", "ways"), [([[0]], 1), ([[0, 0, 0]], 1), ([[2, 1, 0]], 3), ([RAGGED, RAGGED], 3)]
)
def test_ways(labels, ways):
    assert ways_of(torch.tensor(labels)) == ways


# Targets of regression


ADAPTING = pytest.mark.parametrize(
    "make",
    [
        *(lambda kind=kind: kind(mlp()) for kind in (MAML, FOMAML, ANIL, MetaSGD, Reptile, IMAML)),
        lambda: MAML(mlp(), vectorise=False),
        lambda: MetaLSTM(mlp()),
        lambda: FromScratch(mlp, LSTMOptimizer(), steps=2),
    ],
    ids=[
        "maml",
        "fomaml",
        "anil",
        "meta_sgd",
        "reptile",
        "imaml",
        "loop",
        "meta_lstm",
        "from scratch",
    ],
)


@ADAPTING
def test_targets_of_one_dimension_are_refused(make):
    """The difference of (4, 1) and (4,) is (4, 4), of all pairs."""
    x, y, q = torch.rand(2, 4, 1), torch.rand(2, 4), torch.rand(2, 3, 1)
    told = (
        r"^Predictions have the shape \(4, 1\) but targets \(4,\): .*give targets\.unsqueeze\(-1\)"
    )
    with pytest.raises(BadArgument, match=told):
        make()(x, y, q)
    assert make()(x, y.unsqueeze(-1), q).shape == (2, 3, 1)


@pytest.mark.parametrize(
    ("predictions", "targets", "told"),
    [
        ((8, 1), (8,), r"\(8, 1\) but targets \(8,\): .*so give targets\.unsqueeze\(-1\)"),
        ((8, 2), (8, 1), r"\(8, 2\) but targets \(8, 1\): both .* a number for every output"),
        ((8, 1), (8, 2), r"\(8, 1\) but targets \(8, 2\): both must be alike"),
        ((8,), (8, 1), r"\(8,\) but targets \(8, 1\): both must be alike"),
        ((8, 1), (1,), r"\(8, 1\) but targets \(1,\): both must be alike"),
        ((8, 1), (), r"\(8, 1\) but targets \(\): both must be alike"),
    ],
)
def test_targets_of_another_shape_are_refused(predictions, targets, told):
    with pytest.raises(BadArgument, match=f"^Predictions have the shape {told}"):
        task_loss(torch.rand(predictions), torch.rand(targets))


def test_queries_of_one_dimension_are_refused():
    with pytest.raises(BadArgument, match=r"\(6, 1\) but targets \(6,\): .*unsqueeze\(-1\)"):
        MAML(mlp()).loss(torch.rand(2, 3, 1), torch.rand(2, 3))


class Flat(Learner):
    """Predicts one number for a query, without a dimension of outputs."""

    def forward(self, support_x, support_y, query_x):
        return query_x[..., 0]


def test_errors_of_predictions_of_another_shape_are_refused():
    told = r"^Predictions have the shape \(2, 10\) but targets \(2, 10, 1\): both must be alike"
    with pytest.raises(BadArgument, match=told):
        squared_errors(Flat(), RegressionSampler(SINUSOIDS, 5, tasks=2), 2)


def test_episode_of_targets_with_a_dimension_of_outputs_is_learned():
    x, y = torch.rand(2, 4, 1), torch.rand(2, 4, 1)
    assert predict(MAML(mlp()), Episode(x, y, x, y)).shape == (2, 4, 1)


@ADAPTING
def test_regression_in_float64_where_it_is_the_default(make, float64):
    learner, tasks = make(), RegressionSampler(SINUSOIDS, 5, tasks=2)
    meta_train(learner, tasks, 1, progress=False)
    assert predict(learner, tasks.sample()).dtype == torch.float64
    assert squared_errors(learner, tasks, 2).dtype == torch.float64
