"""Which part a picture goes to: by what is on it, so that others that come or go leave it there."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

SHARE = 0.2  # of all pictures, for validation and for test each


def assign(
    units: Sequence[str], labels: Sequence[int], parts: Sequence[str], seed: int
) -> list[str]:
    """The part of each image: "train", or one of at most two `parts` that get a fifth each.

    A unit is what stays together: copies of a picture, images of a group. Its name and the seed
    give it a place between 0 and 1 by a hash; the first fifth of these places is for the first of
    `parts`, the last for the second. So a part gets a fifth of a class more or less, as chance
    will, and a unit that is added or taken away moves no other. Only where a part would get less
    than a tenth of a class's units, less than one, or more than three tenths, those are moved that
    lie nearest to the border: of units of one class, for one that is added, at most one a part.

    Args:
        units: name of each image's unit.
        labels: class of each image.
        parts: names of what is to be taken out of the training images.
        seed: another one gives other parts.

    Example:
        >>> names = [f"{k}.png" for k in range(10)]
        >>> before = assign(names, [0] * 10, ("validation", "test"), seed=0)
        >>> [before.count(part) for part in ("train", "validation", "test")]
        [6, 1, 3]
        >>> assign([*names, "new.png"], [0] * 11, ("validation", "test"), seed=0)[:10] == before
        True
    """
    places = {unit: _place(unit, seed) for unit in units}
    given = dict.fromkeys(units, "train")
    for end, part in enumerate(parts):
        given |= {unit: part for unit, x in places.items() if abs(x - end) < SHARE}
    classes: dict[int, set[str]] = {}
    for unit, label in zip(units, labels, strict=True):
        classes.setdefault(label, set()).add(unit)
    for _, own in sorted(classes.items()):
        order = sorted(own, key=places.__getitem__)
        _keep_bounds(dict(zip(parts, (order, order[::-1]), strict=False)), given)
    return [given[unit] for unit in units]


def _keep_bounds(orders: dict[str, list[str]], given: dict[str, str]) -> None:
    """Move the units of a class that must be moved, in `given`; `orders` begin at a part's end."""
    for part, order in orders.items():  # too many go first: they may be what another part lacks
        inside = [unit for unit in order if given[unit] == part]
        given |= dict.fromkeys(inside[max(1, 3 * len(order) // 10) :], "train")
    for part, order in orders.items():
        lacking = max(1, len(order) // 10) - sum(given[unit] == part for unit in order)
        spare = [unit for unit in order if given[unit] == "train"]
        given |= dict.fromkeys(spare[: max(0, lacking)], part)


def joined(names: Sequence[tuple[str, ...]]) -> list[str]:
    """For each image the name of its unit: images that share a name, by links of links, are one.

    The name is the least of all that the unit has.

    Example:
        >>> joined([("a", "1"), ("b", "1"), ("c", "2")])
        ['1', '1', '2']
    """
    above: dict[str, str] = {}

    def top(name: str) -> str:
        while above.setdefault(name, name) != name:
            above[name] = above[above[name]]
            name = above[name]
        return name

    for own in names:
        first, *rest = sorted(map(top, own))
        for other in rest:
            above[other] = first
    return [top(own[0]) for own in names]


def _place(unit: str, seed: int) -> float:
    """A number in [0, 1) that is the same on every system."""
    return int(hashlib.sha256(f"{seed} {unit}".encode()).hexdigest()[:13], 16) / 16**13
