"""Episodes hold what they promise, for any sizes, and come out the same from the same seed."""

import subprocess
import sys

import pytest
import torch
from helpers import ROOT, check_that_episodes_are_drawn_on_the_cpu, fingerprint, numbered
from hypothesis import given, settings
from hypothesis import strategies as st

from metautils.data.bank import ClassBank
from metautils.sampling import EpisodeSampler


@st.composite
def samplers(draw):
    """A sampler over a ragged bank, with sizes that just fit or leave room."""
    counts = draw(st.lists(st.integers(2, 9), min_size=1, max_size=8))
    shots = draw(st.integers(1, min(counts) - 1))
    queries = draw(st.integers(1, min(counts) - shots))
    ways, tasks = draw(st.integers(1, len(counts))), draw(st.integers(1, 4))
    seed = draw(st.integers(0, 2**31))
    return EpisodeSampler(numbered(*counts), ways, shots, queries, tasks, seed=seed)


@settings(deadline=None, max_examples=150)
@given(samplers())
def test_no_class_and_no_image_twice_and_labels_tell_the_class(sampler):
    for _ in range(2):
        episode = sampler.sample()
        assert (episode.tasks, episode.ways) == (sampler.tasks, sampler.ways)
        rows = torch.cat([episode.support_x, episode.query_x], 1)[..., 0]
        for task in range(episode.tasks):
            assert len(set(episode.classes[task].tolist())) == sampler.ways
            assert len(set(rows[task].tolist())) == sampler.ways * (sampler.shots + sampler.queries)
        for part, each in (("support", sampler.shots), ("query", sampler.queries)):
            x, y = getattr(episode, f"{part}_x"), getattr(episode, f"{part}_y")
            assert torch.equal(episode.classes.gather(1, y), x[..., 1].long())
            counts = torch.nn.functional.one_hot(y, sampler.ways).sum(1)
            assert (counts == each).all()


def test_every_class_and_image_is_as_likely():
    """Within 5 standard deviations, at every label and in both sets."""
    counts, tasks = (3, 5, 8, 4), 6000
    episode = EpisodeSampler(numbered(*counts), 2, 1, 2, tasks, seed=1).sample()

    def check(drawn, probability, trials):
        deviation = (trials * probability * (1 - probability)) ** 0.5
        assert (drawn - trials * probability).abs().max() < 5 * deviation

    for label in range(2):
        check(episode.classes[:, label].bincount(minlength=4), 1 / 4, tasks)
    start = 0
    for k, n in enumerate(counts):
        times = int((episode.classes == k).sum())
        for x, each in ((episode.support_x, 1), (episode.query_x, 2)):
            rows = x[..., 0][x[..., 1] == k].long() - start
            check(rows.bincount(minlength=n), each / n, times)
        start += n


def patterns(classes=4, images=4):
    """Random 6x6 images: no two are alike, turned or not."""
    x = torch.rand(classes * images, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    counts = torch.full((classes,), images)
    return ClassBank(x, counts, tuple(map(str, range(classes))))


def test_rotation_turns_a_class_as_one_and_classes_each_on_their_own():
    bank, tasks = patterns(), 1600
    sampler = EpisodeSampler(bank, 2, 1, 2, tasks, rotate=True, seed=4)
    episode = sampler.sample()
    turned = torch.stack([bank.images.rot90(k, (-2, -1)) for k in range(4)]).flatten(2)

    def turns(x):
        """(tasks, images): which multiple of 90 degrees; every image must be one exactly."""
        found = (x.flatten(2)[:, :, None, None] == turned).all(-1)
        assert (found.flatten(2).sum(-1) == 1).all()
        return found.any(3).long().argmax(-1)

    support, query = turns(episode.support_x), turns(episode.query_x)
    assert torch.equal(support.gather(1, episode.query_y), query)
    pairs = (4 * support[:, 0] + support[:, 1]).bincount(minlength=16)
    assert (pairs - tasks / 16).abs().max() < 5 * (tasks / 16 * 15 / 16) ** 0.5


def test_without_rotation_images_are_upright():
    bank = patterns()
    episode = EpisodeSampler(bank, 4, 2, 2, seed=0).sample()
    x = torch.cat([episode.support_x, episode.query_x], 1)[0].flatten(1)
    assert torch.equal(x.sort(0).values, bank.images.flatten(1).sort(0).values)


FINGERPRINT = """
import sys
sys.path.insert(0, "tests")
from helpers import fingerprint, numbered
from metautils.sampling import EpisodeSampler
sampler = EpisodeSampler(numbered(4, 6, 5, 9, 7), 3, 2, 2, tasks=2, seed={seed})
episodes = [sampler.sample() for _ in range(5)]
print(fingerprint(*(x for e in episodes for x in vars(e).values())))
"""


def drawn(seed):
    sampler = EpisodeSampler(numbered(4, 6, 5, 9, 7), 3, 2, 2, tasks=2, seed=seed)
    return fingerprint(*(x for _ in range(5) for x in vars(sampler.sample()).values()))


def test_same_seed_same_episodes_and_other_seed_others():
    assert drawn(7) == drawn(7)
    assert len({drawn(seed) for seed in range(20)}) == 20


def test_same_seed_same_episodes_in_a_fresh_process():
    command = [sys.executable, "-c", FINGERPRINT.format(seed=7)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == drawn(7)


def test_global_generator_neither_steers_nor_is_moved():
    torch.manual_seed(1)
    before, first = torch.get_rng_state(), drawn(3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert drawn(3) == first


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
@pytest.mark.parametrize("rotate", [False, True])
def test_same_episodes_on_a_gpu(rotate):
    bank = patterns()
    here = EpisodeSampler(bank, 3, 1, 2, tasks=5, rotate=rotate, seed=2).sample()
    there = EpisodeSampler(bank.to("cuda"), 3, 1, 2, tasks=5, rotate=rotate, seed=2).sample()
    assert there.support_x.device.type == there.query_y.device.type == "cuda"
    for name, x in vars(here).items():
        assert torch.equal(x, getattr(there, name).cpu()), name


def test_episodes_follow_one_another():
    sampler = iter(EpisodeSampler(numbered(*[9] * 9), 4, 2, 2))
    assert fingerprint(next(sampler).support_x) != fingerprint(next(sampler).support_x)


def test_uint8_becomes_float_from_0_to_1():
    images = torch.tensor([0, 255, 51, 102], dtype=torch.uint8).view(4, 1, 1, 1)
    bank = ClassBank(images, torch.tensor([4]), ("a",))
    episode = EpisodeSampler(bank, 1, 2, 2).sample()
    x = torch.cat([episode.support_x, episode.query_x], 1)
    assert x.dtype == torch.float32
    assert x.flatten().sort().values.tolist() == pytest.approx([0, 0.2, 0.4, 1])


@pytest.mark.parametrize("name", ["ways", "shots", "queries", "tasks"])
@pytest.mark.parametrize("value", [0, -2])
def test_numbers_must_be_positive(name, value):
    sizes = {"ways": 2, "shots": 1, "queries": 1, "tasks": 1, name: value}
    with pytest.raises(ValueError, match=f"{name} is {value}; it must be at least 1"):
        EpisodeSampler(numbered(4, 4), **sizes)


def test_more_ways_than_classes():
    sentence = "3 ways need 3 classes but there are 2: ask for fewer ways"
    with pytest.raises(ValueError, match=sentence):
        EpisodeSampler(numbered(4, 4), 3, 1, 1)


def test_class_too_small_is_named():
    sentence = "'class 1' has 3 images but 2 shots and 2 queries need 4: ask for fewer or drop"
    with pytest.raises(ValueError, match=sentence):
        EpisodeSampler(numbered(4, 3, 4), 2, 2, 2)


@pytest.mark.parametrize("shape", [(1, 4, 6), (2,)])
def test_rotation_needs_square_images(shape):
    bank = ClassBank(torch.zeros(4, *shape), torch.tensor([2, 2]), ("a", "b"))
    with pytest.raises(ValueError, match=r"Rotations need square images, not \("):
        EpisodeSampler(bank, 2, 1, 1, rotate=True)


@pytest.mark.parametrize("rotate", [False, True])
def test_default_device_plays_no_part(rotate):
    bank = patterns()
    check_that_episodes_are_drawn_on_the_cpu(
        lambda: EpisodeSampler(bank, 3, 1, 2, tasks=5, rotate=rotate, seed=2)
    )
