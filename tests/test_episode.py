"""An episode that exists has shapes that agree."""

import pytest
import torch

from metautils.episode import Episode


def parts(**changed):
    """Arguments of a sound episode: 2 tasks, 3 ways, 1 shot, 2 queries a class."""
    labels = torch.arange(3).repeat(2, 1)
    sound = {
        "support_x": torch.zeros(2, 3, 1, 5, 5),
        "support_y": labels,
        "query_x": torch.zeros(2, 6, 1, 5, 5),
        "query_y": labels.repeat(1, 2),
        "classes": torch.arange(6).view(2, 3),
    }
    return sound | changed


def test_sound_episode_tells_its_sizes():
    episode = Episode(**parts())
    assert (episode.tasks, episode.ways) == (2, 3)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        (
            {"support_y": torch.zeros(2, 4, dtype=torch.int64)},
            r"support_y has shape \(2, 4\) but support_x starts with \(2, 3\): give one label per",
        ),
        (
            {"query_y": torch.zeros(6, dtype=torch.int64)},
            r"query_y has shape \(6,\) but query_x starts with \(2, 6\): give one label per input",
        ),
        (
            {"support_y": torch.zeros(2, 3), "query_y": torch.zeros(2, 6), "classes": None},
            r"^support_y has shape \(2, 3\) and holds float targets, .*give support_y\.unsqueeze",
        ),
        (
            {"support_y": torch.zeros(2, 3, 1), "query_y": torch.zeros(2, 6), "classes": None},
            r"^query_y has shape \(2, 6\) and holds float targets, .*give query_y\.unsqueeze\(-1\)",
        ),
        (
            {"support_y": torch.zeros(2, 3, 1), "query_y": torch.zeros(2, 6, 2), "classes": None},
            r"^support_y has shape \(2, 3, 1\) but query_y \(2, 6, 2\): both must hold .* outputs",
        ),
        ({"support_y": torch.zeros(2, 3)}, r"support_y is torch.float32; labels must be torch.int"),
        (
            {"query_y": torch.zeros(2, 6, dtype=torch.int32)},
            r"query_y is torch.int32; labels must be torch.int64",
        ),
        (
            {"query_x": torch.zeros(2, 6, 3, 5, 5)},
            r"support images have shape \(1, 5, 5\) but query images \(3, 5, 5\): both must be ali",
        ),
        (
            {"query_x": torch.zeros(4, 6, 1, 5, 5), "query_y": torch.zeros(4, 6).long()},
            r"support, query and classes hold 2, 4, 2 tasks",
        ),
        (
            {"classes": torch.zeros(1, 3).long()},
            r"support, query and classes hold 2, 2, 1 tasks: the first dimension must be the",
        ),
    ],
)
def test_contradiction_is_named(changed, sentence):
    with pytest.raises(ValueError, match=sentence):
        Episode(**parts(**changed))


@pytest.mark.parametrize("part", ["support_y", "query_y"])
@pytest.mark.parametrize("label", [-1, 3])
def test_label_out_of_range_is_named(part, label):
    labels = parts()[part].clone()
    labels[1, 0] = label
    sentence = f"{part} holds the label {label}; in a task of 3 classes labels run from 0 to 2"
    with pytest.raises(ValueError, match=sentence):
        Episode(**parts(**{part: labels}))


@pytest.mark.parametrize(("at_once", "sizes"), [(None, [2]), (1, [1, 1]), (2, [2]), (5, [2])])
def test_parts_are_the_same_tasks_in_order(at_once, sizes):
    g = torch.Generator().manual_seed(0)
    random = {
        f"{part}_x": torch.rand(2, n, 1, 5, 5, generator=g)
        for part, n in (("support", 3), ("query", 6))
    }
    whole = Episode(**parts(**random))
    pieces = list(whole.parts(at_once))
    assert [piece.tasks for piece in pieces] == sizes
    for name, tensor in vars(whole).items():
        assert torch.equal(torch.cat([getattr(piece, name) for piece in pieces]), tensor)


def test_cannot_be_changed_afterwards():
    with pytest.raises(AttributeError):
        Episode(**parts()).query_x = torch.zeros(1)
