"""Units go to parts by their names alone, and as few as can be are moved where a part needs one."""

import pytest

from metautils.data.assign import assign, joined

PARTS = ("validation", "test")


def names(count, prefix="x"):
    return [f"{prefix}{k}" for k in range(count)]


def moved(before, after):
    return [(a, b) for a, b in zip(before, after, strict=False) if a != b]


@pytest.mark.parametrize("parts", [PARTS, PARTS[:1], ()])
@pytest.mark.parametrize("count", [3, 4, 5, 9, 10, 30, 100])
def test_parts_hold_a_tenth_to_three_tenths(count, parts):
    for seed in range(50):
        given = assign(names(count), [0] * count, parts, seed)
        for part in parts:
            assert max(1, count // 10) <= given.count(part) <= max(1, 3 * count // 10)
        assert given.count("train") >= 1
        assert set(given) == {"train", *parts}


def test_a_fifth_on_the_mean():
    given = assign(names(4000), [0] * 4000, PARTS, 0)
    for part in PARTS:
        assert given.count(part) == pytest.approx(800, abs=100)


@pytest.mark.parametrize(("count", "rare"), [(3, 1), (5, 1), (10, 0.4), (40, 0.2), (150, 0.1)])
def test_what_is_added_moves_at_most_one_a_part(count, rare):
    """From or to the training images; and of larger classes almost never one."""
    total = 0
    for seed in range(100):
        before = assign(names(count), [0] * count, PARTS, seed)
        after = assign(names(count + 1), [0] * (count + 1), PARTS, seed)
        changes = moved(before, after)
        assert len(changes) <= 2
        assert all("train" in each for each in changes)
        assert len({next(x for x in each if x != "train") for each in changes}) == len(changes)
        total += len(changes)
    assert total <= rare * 100


def test_order_labels_and_other_classes_play_no_part():
    units = names(60)
    labels = [k % 3 for k in range(60)]
    given = dict(zip(units, assign(units, labels, PARTS, 4), strict=True))
    turned = assign(units[::-1], [9 - k for k in labels[::-1]], PARTS, 4)
    assert dict(zip(units[::-1], turned, strict=True)) == given
    alone = assign(units[::3], labels[::3], PARTS, 4)
    assert dict(zip(units[::3], alone, strict=True)) == {u: given[u] for u in units[::3]}


def test_another_seed_gives_other_parts():
    drawn = [assign(names(10), [0] * 10, PARTS, seed) for seed in range(40)]
    assert drawn[0] == assign(names(10), [0] * 10, PARTS, 0) != drawn[1]
    for column in zip(*drawn, strict=True):
        assert set(column) == {"train", *PARTS}


def test_unit_of_several_classes_is_in_one_part():
    units = [f"patient {k // 2}" for k in range(40)]
    given = assign(units, [0, 1] * 20, PARTS, 0)
    assert given[::2] == given[1::2]


def test_joined_by_links_of_links():
    links = [("a", "p"), ("b", "p"), ("b", "q"), ("c", "q"), ("d",), ("e", "r"), ("r",)]
    assert joined(links) == ["a", "a", "a", "a", "d", "e", "e"]
    assert joined(links[::-1]) == ["e", "e", "d", "a", "a", "a", "a"]
