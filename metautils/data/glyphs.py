"""Glyphs: made-up alphabets that look handwritten, so that every experiment runs with no network.

Three levels of chance, after the "programs of strokes" of Lake et al. (2015):

1. an *alphabet* draws its style: where its anchor points lie, how curved its strokes are, how many
   a character has, whether they touch, and a stock of strokes that its characters share;
2. a *character* draws a program in that style: a path of the pen over anchor points;
3. a *writer* draws each character anew: other proportions, slant, curvature, pen.

A program is a path of vertices. On each move from a vertex to the next the pen is down or lifted;
at each vertex the path turns sharply (roundness 0) or smoothly (roundness 1).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from metautils.data.bank import ClassBank, Parts

MOVES = 12  # of the pen in one program, lifted ones included
DABS = 16  # of ink on one move
CHUNK = 512  # drawings rendered together, which bounds the memory

ATTRIBUTES: tuple[str, ...] = (
    "many strokes",
    "dots",
    "long path",
    "wide",
    "tall",
    "curved",
    "sharp corners",
    "closed loops",
    "horizontal ink",
    "vertical ink",
    "rising ink",
    "falling ink",
    *(f"ink {row} {col}" for row in ("top", "middle", "bottom") for col in ("left", "centre", "right")),
)


class Style(NamedTuple):
    """What the characters of one alphabet have in common."""

    anchors: Tensor  # (anchors, 2) points on the page, x to the right, y down
    liking: Tensor  # (anchors,) how often each is visited
    reach: float  # typical length of a move
    curved: float  # probability that a vertex is round
    bowed: float  # probability that a move is an arc
    strokes: float  # mean number of strokes
    vertices: float  # mean number of vertices of a stroke
    joined: float  # probability that a stroke starts on an earlier one
    closed: float  # probability that a stroke returns to its start
    dots: float  # probability that a stroke is a dot
    stock: list[Stroke]  # strokes used again and again
    reuse: float  # probability that a stroke comes from the stock


class Stroke(NamedTuple):
    """One stroke: vertices `(vertices, 2)`, their roundness `(vertices,)`, the bow of each move."""

    path: Tensor
    roundness: Tensor
    bow: Tensor


class Programs(NamedTuple):
    """Programs of many characters, padded to `MOVES` moves."""

    path: Tensor  # (characters, MOVES + 1, 2) vertices on the page [-1, 1] x [-1, 1]
    roundness: Tensor  # (characters, MOVES + 1) in [0, 1]
    bow: Tensor  # (characters, MOVES) how far each move bends to one side
    down: Tensor  # (characters, MOVES) whether the pen is down


def _uniform(low: float, high: float, generator: torch.Generator) -> float:
    return low + (high - low) * torch.rand((), generator=generator).item()


def _style(generator: torch.Generator) -> Style:
    """Draw an alphabet's style."""
    g = generator
    rows = torch.linspace(-1, 1, 4 if _uniform(0, 1, g) < 0.5 else 3)
    anchors = torch.cartesian_prod(torch.linspace(-1, 1, 3), rows)
    anchors = anchors + 0.15 * torch.randn(anchors.shape, generator=g)
    anchors = anchors * torch.tensor([_uniform(0.6, 1.0, g), 1.0])
    liking = torch.rand(len(anchors), generator=g) + 0.2
    style = Style(
        anchors,
        liking,
        reach=_uniform(0.7, 1.5, g),
        curved=_uniform(0.1, 0.95, g),
        bowed=_uniform(0.0, 0.8, g),
        strokes=_uniform(1.0, 3.2, g),
        vertices=_uniform(2.0, 3.8, g),
        joined=_uniform(0.4, 0.9, g),
        closed=_uniform(0.0, 0.4, g),
        dots=_uniform(0.0, 1.0, g) ** 3 * 0.3,
        stock=[],
        reuse=_uniform(0.1, 0.6, g),
    )
    style.stock.extend(_stroke(style, [], g) for _ in range(8))
    return style


def _count(mean: float, least: int, most: int, generator: torch.Generator) -> int:
    """A whole number around `mean`."""
    drawn = mean + 0.9 * torch.randn((), generator=generator).item()
    return max(least, min(most, round(drawn)))


def _stroke(style: Style, earlier: list[Stroke], generator: torch.Generator) -> Stroke:
    """Draw a stroke: a walk over the anchors, or a dot."""
    g, anchors = generator, style.anchors
    here = int(style.liking.multinomial(1, generator=g))
    start = anchors[here]
    if earlier and _uniform(0, 1, g) < style.joined:
        path = torch.cat([stroke.path for stroke in earlier])
        start = path[int(torch.randint(len(path), (), generator=g))]
    if earlier and _uniform(0, 1, g) < style.dots:
        return Stroke(anchors[here] + torch.tensor([[0.0, 0.0], [0.05, 0.05]]), torch.zeros(2), torch.zeros(1))
    path = [start]
    used = torch.cat([stroke.path for stroke in earlier] + [start[None]])
    fewest = 2 if earlier or _uniform(0, 1, g) < 0.3 else 3
    for _ in range(_count(style.vertices, fewest, 6, g) - 1):
        move = anchors - path[-1]
        distance = move.norm(dim=1)
        fresh = (torch.cdist(anchors, used).amin(1) > 0.3) + 0.15
        weight = style.liking * fresh * torch.exp(-((distance - style.reach) ** 2)) * (distance > 0.3)
        if len(path) > 1:  # rarely straight back
            ahead = torch.nn.functional.cosine_similarity(move, (path[-1] - path[-2])[None])
            weight = weight * torch.exp(2 * ahead.clamp(max=0))
        path.append(anchors[int(weight.multinomial(1, generator=g))])
        used = torch.cat([used, path[-1][None]])
    if len(path) > 2 and _uniform(0, 1, g) < style.closed:
        path.append(start)
    roundness = (torch.rand(len(path), generator=g) < style.curved).float()
    moves = len(path) - 1
    bow = torch.randn(moves, generator=g) * (torch.rand(moves, generator=g) < style.bowed)
    return Stroke(torch.stack(path), roundness, bow)


def _character(style: Style, generator: torch.Generator) -> list[Stroke]:
    """Draw a character's strokes, some from the alphabet's stock."""
    strokes: list[Stroke] = []
    room = MOVES + 1
    for _ in range(_count(style.strokes, 1, 5, generator)):
        if _uniform(0, 1, generator) < style.reuse:
            pick = int(torch.randint(len(style.stock), (), generator=generator))
            stroke = style.stock[pick]
        else:
            stroke = _stroke(style, strokes, generator)
        room -= len(stroke.path)
        if room < 0:
            break
        strokes.append(stroke)
    return strokes


def _pack(characters: list[list[Stroke]], generator: torch.Generator) -> Programs:
    """Pad the programs to one length and fit each on the page."""
    n = len(characters)
    path, roundness = torch.zeros(n, MOVES + 1, 2), torch.zeros(n, MOVES + 1)
    down, bow = torch.zeros(n, MOVES, dtype=torch.bool), torch.zeros(n, MOVES)
    for k, strokes in enumerate(characters):
        points = torch.cat([stroke.path for stroke in strokes])
        low, high = points.amin(0), points.amax(0)
        size = _uniform(0.45, 0.7, generator)
        points = (points - (low + high) / 2) * (2 * size / (high - low).amax().clamp(min=0.5))
        path[k, : len(points)] = points
        path[k, len(points) :] = points[-1]
        roundness[k, : len(points)] = torch.cat([stroke.roundness for stroke in strokes])
        end = 0
        for stroke in strokes:
            down[k, end : end + len(stroke.path) - 1] = True
            bow[k, end : end + len(stroke.path) - 1] = stroke.bow
            end += len(stroke.path)
    return Programs(path, roundness, bow, down)


def _write(p: Programs, generator: torch.Generator) -> Programs:
    """Let a writer vary each program: proportions, curvature and the place of every stroke."""
    n = len(p.path)

    def noise(*shape: int) -> Tensor:
        return torch.randn(n, *shape, generator=generator)

    # A smooth random field moves neighbours together, so that a junction stays a junction.
    bumps = torch.cartesian_prod(*[torch.linspace(-0.7, 0.7, 3)] * 2)
    near = torch.exp(-torch.cdist(p.path, bumps).square() / (2 * 0.4**2))
    path = p.path + 0.07 * near @ noise(9, 2)
    # Each stroke, and each vertex, is a little out of place.
    stroke = torch.cat([torch.zeros(n, 1, dtype=torch.long), (~p.down).long().cumsum(1)], 1)
    offset = noise(MOVES + 1, 2).gather(1, stroke[..., None].expand(-1, -1, 2))
    path = path + 0.03 * offset + 0.03 * noise(MOVES + 1, 2)
    matrix = torch.eye(2) + 0.1 * noise(2, 2)
    path = path @ matrix * torch.exp(0.1 * noise(1, 1)) + 0.08 * noise(1, 2)
    roundness = (p.roundness + 0.2 * noise(MOVES + 1)).clamp(0, 1.3)
    bow = p.bow * (1 + 0.25 * noise(MOVES)) + 0.12 * noise(MOVES)
    return Programs(path, roundness, bow, p.down)


def _ink(p: Programs) -> tuple[Tensor, Tensor, Tensor]:
    """Dabs of ink along the path: places and velocities `(n, dabs, 2)`, and weights `(n, dabs)`."""
    t = (torch.arange(DABS) + 0.5) / DABS
    step = p.path.diff(dim=1)
    # Each move is a cubic from vertex to vertex. At a corner it leaves along the move itself,
    # turned by the bow; at a smooth vertex it leaves the way it came, along both neighbours.
    bow = p.bow[..., None] * torch.stack([-step[..., 1], step[..., 0]], -1)
    leave, arrive = step + bow, step - bow
    inside = (p.down[:, :-1] & p.down[:, 1:])[..., None] * p.roundness[:, 1:-1, None]
    smooth = 0.7 * (leave[:, 1:] + arrive[:, :-1])
    leave = torch.cat([leave[:, :1], leave[:, 1:].lerp(smooth, inside)], 1)
    arrive = torch.cat([arrive[:, :-1].lerp(smooth, inside), arrive[:, -1:]], 1)
    knots = torch.stack([p.path[:, :-1], p.path[:, 1:], leave, arrive], -1)
    rise = t * t * (3 - 2 * t)
    place = torch.stack([1 - rise, rise, t * (1 - t) ** 2, t * t * (t - 1)])
    slope = 6 * t * (1 - t)
    speed = torch.stack([-slope, slope, (1 - t) * (1 - 3 * t), t * (3 * t - 2)])
    places = (knots @ place).transpose(2, 3).flatten(1, 2)
    speeds = (knots @ speed).transpose(2, 3).flatten(1, 2)
    length = (speeds.norm(dim=-1) / DABS).clamp(min=0.012)
    return places, speeds, length * p.down.repeat_interleave(DABS, 1)


def _render(p: Programs, pen: Tensor, size: int) -> Tensor:
    """Images `(n, 1, size, size)` uint8 of programs drawn with pens of width `pen` `(n,)`."""
    places, _, weights = _ink(p)
    pixels = (torch.arange(size) + 0.5) * (2 / size) - 1
    # A dab is a Gaussian in x times one in y, so a drawing is one product of two matrices.
    width = (pen * 2 / 28)[:, None, None, None]
    dabs = torch.exp(-0.5 * ((places[..., None] - pixels) / width).square())
    x, y = dabs.unbind(2)
    x = x * 0.95 * (weights / (width[..., 0, 0] * math.sqrt(2 * math.pi)))[..., None]
    ink = (y.transpose(1, 2) @ x).clamp(max=1)
    return (255 * ink).round().to(torch.uint8)[:, None]


def _describe(p: Programs) -> Tensor:
    """The attributes `(characters, attributes)` in [0, 1] of noise-free programs."""
    places, speeds, weights = _ink(p)
    share = weights / weights.sum(1, keepdim=True)
    angle = torch.atan2(-speeds[..., 1], speeds[..., 0])
    ways = torch.stack([(angle - a).cos() ** 4 for a in (0.0, math.pi / 2, math.pi / 4, -math.pi / 4)])
    strokes = p.down[:, :1].long().sum(1) + (~p.down[:, :-1] & p.down[:, 1:]).sum(1)
    step = p.path.diff(dim=1).norm(dim=-1)
    dots = (p.down & (step < 0.08)).sum(1)
    extent = (p.path.amax(1) - p.path.amin(1)) / 1.4
    inside = p.down[:, :-1] & p.down[:, 1:]
    corners = (inside * (1 - p.roundness[:, 1:-1])).sum(1)
    rounds = (inside * p.roundness[:, 1:-1]).sum(1) / inside.sum(1).clamp(min=1)
    thirds = torch.tensor([-0.2, 0.2])
    cell = torch.bucketize(places[..., 1].contiguous(), thirds) * 3
    cell = cell + torch.bucketize(places[..., 0].contiguous(), thirds)
    cells = torch.zeros(len(cell), 9).scatter_add(1, cell, share)
    loops = torch.zeros(len(cell))
    columns = [strokes / 5, dots / 2, weights.sum(1) / 8, *extent.unbind(1), rounds, corners / 6]
    columns += [loops, *(ways * share).sum(-1).unbind(0), *cells.sqrt().unbind(1)]
    return torch.stack(columns, 1).clamp(0, 1)


def generate(
    alphabets: int = 50,
    characters: int = 24,
    drawings: int = 20,
    size: int = 28,
    seed: int = 0,
) -> ClassBank:
    """Draw a bank of made-up characters; each character is a class.

    Args:
        alphabets: how many alphabets, each with a style of its own.
        characters: classes in each alphabet.
        drawings: images of each character, each by another writer.
        size: height and width of an image in pixels, at least 8.
        seed: the same seed gives the same bank.

    Returns:
        A bank of `alphabets * characters` classes named like "alphabet03/character17", in that
        order, with images `(classes * drawings, 1, size, size)` uint8 (ink 255, paper 0) and
        attributes `(classes, len(ATTRIBUTES))` in [0, 1] that describe each class's program.

    Raises:
        ValueError: if a number is not positive or `size` is below 8.
    """
    numbers = {"alphabets": alphabets, "characters": characters, "drawings": drawings}
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1.")
    if size < 8:
        raise ValueError(f"size is {size}; a drawing needs at least 8 pixels: ask for 28.")
    generator = torch.Generator().manual_seed(seed)
    # Writers have chance of their own: more drawings leave the characters as they are.
    writers = torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=generator)))
    strokes = []
    for _ in range(alphabets):
        style = _style(generator)
        strokes += [_character(style, generator) for _ in range(characters)]
    programs = _pack(strokes, generator)
    images = []
    for rows in torch.arange(len(strokes)).repeat_interleave(drawings).split(CHUNK):
        drawn = _write(Programs(*(part[rows] for part in programs)), writers)
        pen = 0.57 * torch.exp(0.12 * torch.randn(len(rows), generator=writers))
        images.append(_render(drawn, pen, size))
    names = [f"alphabet{a:02d}/character{c:02d}" for a in range(alphabets) for c in range(characters)]
    counts = torch.full((len(names),), drawings)
    return ClassBank(torch.cat(images), counts, tuple(names), _describe(programs))


def load(
    seed: int = 0, alphabets: int = 50, characters: int = 24, drawings: int = 20
) -> Parts:
    """Glyphs cut into train, validation and test by whole alphabets: 7 to 1 to 2.

    Raises:
        ValueError: if a number is not positive, or there are fewer than 3 alphabets.
    """
    if alphabets < 3:
        raise ValueError(f"{alphabets} alphabets cannot be cut into three parts: ask for 3 or more.")
    bank = generate(alphabets, characters, drawings, seed=seed)
    test, validation = max(1, alphabets // 5), max(1, alphabets // 10)
    sizes = [alphabets - test - validation, validation, test]
    parts = torch.arange(len(bank)).split([k * characters for k in sizes])
    return Parts(*(bank.select(part) for part in parts))
