"""Glyphs: made-up alphabets that look handwritten, so that every experiment runs with no network.

Three levels of chance, after the "programs of strokes" of Lake et al. (2015):

1. an *alphabet* draws its style: where its anchor points lie, how curved its strokes are, how many
   a character has, whether they touch, and a stock of strokes that its characters share;
2. a *character* draws a program in that style: a path of the pen over the anchors;
3. a *writer* draws each character anew: other proportions, slant, curvature, pen.

The page is the square [-1, 1] x [-1, 1], x to the right and y down.
"""

from __future__ import annotations

import hashlib
import math
import pathlib
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from metautils.data.bank import ClassBank, Parts, cached
from metautils.precision import in_float32, on_cpu

DABS = 20  # of ink on one move of the pen
VERTICES = 16  # at most, in one character
CHUNK = 256  # drawings rendered together, which bounds the memory

ATTRIBUTES: tuple[str, ...] = (
    "many strokes",
    "many dots",
    "long path",
    "wide",
    "tall",
    "turns smoothly",
    "turns sharply",
    "encloses paper",
    "horizontal ink",
    "vertical ink",
    "rising ink",
    "falling ink",
    *(
        f"ink {row} {col}"
        for row in ("top", "middle", "bottom")
        for col in ("left", "centre", "right")
    ),
)


class Path(NamedTuple):
    """Moves of a pen from vertex to vertex: of a stroke, a character, or a batch of characters.

    Each part has one row per vertex; bow and down tell of the move that leaves it.

    Example:
        >>> down = torch.tensor([True, True, False])  # two moves, of which the second is an arc
        >>> corner = Path(torch.rand(3, 2), torch.zeros(3), torch.tensor([0.0, 1.0, 0.0]), down)
        >>> corner.vertices.shape
        torch.Size([3, 2])
    """

    vertices: Tensor  # (..., vertices, 2) places on the page
    roundness: Tensor  # (..., vertices) 0 a sharp corner, 1 a smooth turn
    bow: Tensor  # (..., vertices) 0 a straight move, 1 an arc to one side, -1 to the other
    down: Tensor  # (..., vertices) bool, whether the pen writes


class Style(NamedTuple):
    """What the characters of one alphabet have in common.

    Example:
        >>> style = _style(torch.Generator().manual_seed(0))
        >>> style.anchors.shape, len(style.stock)
        (torch.Size([15, 2]), 6)
    """

    anchors: Tensor  # (anchors, 2) where strokes begin, turn and end
    liking: Tensor  # (anchors,) how often each is visited
    reach: float  # typical length of a move
    square: float  # how much it likes moves along the page's sides
    round: float  # probability that a vertex is smooth
    bowed: float  # probability that a move is an arc
    strokes: float  # mean number of strokes
    vertices: float  # mean number of vertices of a stroke
    joined: float  # probability that a stroke starts on an earlier one
    closed: float  # probability that a stroke returns to its start
    dotted: float  # probability that a stroke is a dot
    reuse: float  # probability that a stroke comes from the stock
    stock: list[Path]  # strokes used again and again


def _uniform(low: float, high: float, generator: torch.Generator) -> float:
    return low + (high - low) * torch.rand((), generator=generator).item()


def _happens(probability: float, generator: torch.Generator) -> bool:
    return _uniform(0, 1, generator) < probability


def _count(mean: float, least: int, most: int, generator: torch.Generator) -> int:
    """A whole number near `mean`."""
    drawn = mean + 0.9 * torch.randn((), generator=generator).item()
    return max(least, min(most, round(drawn)))


def _style(generator: torch.Generator) -> Style:
    """Draw an alphabet's style."""
    g = generator
    columns, rows = (torch.linspace(-1, 1, _count(3.4, 3, 5, g)) for _ in range(2))
    anchors = torch.cartesian_prod(columns * _uniform(0.6, 1.3, g), rows)  # (anchors, 2)
    style = Style(
        anchors=anchors + 0.1 * torch.randn(anchors.shape, generator=g),
        liking=torch.rand(len(anchors), generator=g) + 0.2,
        reach=_uniform(0.6, 1.5, g),
        square=_uniform(0, 3, g),
        round=_uniform(0.1, 0.95, g),
        bowed=_uniform(0.0, 0.8, g),
        strokes=_uniform(1.0, 3.5, g),
        vertices=_uniform(2.0, 4.5, g),
        joined=_uniform(0.4, 0.9, g),
        closed=_uniform(0.0, 0.4, g),
        dotted=0.6 * _uniform(0.0, 1.0, g) ** 4,
        reuse=_uniform(0.2, 0.8, g),
        stock=[],
    )
    style.stock.extend(_stroke(style, [], g) for _ in range(6))
    return style


def _stroke(style: Style, earlier: list[Path], generator: torch.Generator) -> Path:
    """Draw a stroke: a dot, or a walk over the anchors that seldom comes back on itself."""
    g, anchors = generator, style.anchors
    # (vertices so far, 2)
    used = torch.cat([stroke.vertices for stroke in earlier]) if earlier else anchors[:0]
    start = anchors[int(style.liking.multinomial(1, generator=g))]
    if earlier and _happens(style.dotted, g):
        return _path([start, start + 0.05], torch.zeros(2), torch.zeros(2))
    if earlier and _happens(style.joined, g):
        start = used[int(torch.randint(len(used), (), generator=g))]
    walk = [start]
    fewest = 2 if earlier or _happens(0.3, g) else 3
    for _ in range(_count(style.vertices, fewest, 6, g) - 1):
        used = torch.cat([used, walk[-1][None]])  # (vertices so far, 2)
        walk.append(_next(style, walk, used, g))
    if len(walk) > 2 and _happens(style.closed, g):
        walk.append(start)
    roundness = (torch.rand(len(walk), generator=g) < style.round).float()
    bowed = (torch.rand(len(walk), generator=g) < style.bowed).float()
    return _path(walk, roundness, bowed * torch.randn(len(walk), generator=g))


def _next(style: Style, walk: list[Tensor], used: Tensor, generator: torch.Generator) -> Tensor:
    """Choose the anchor to move to: at the alphabet's reach, fresh, and rarely straight back."""
    move = style.anchors - walk[-1]  # (anchors, 2), and all below (anchors,)
    length = move.norm(dim=1)
    skew = (move[:, 0] * move[:, 1]).abs() / length.square().clamp(min=0.01)
    fit = torch.exp(-2 * (length - style.reach) ** 2 - style.square * skew)
    fresh = (torch.cdist(style.anchors, used).amin(1) > 0.3) + 0.05
    weight = style.liking * fresh * fit * (length > 0.3)
    if len(walk) > 1:
        ahead = torch.cosine_similarity(move, (walk[-1] - walk[-2])[None])
        weight = weight * torch.exp(2 * ahead.clamp(max=0))
    return style.anchors[int(weight.multinomial(1, generator=generator))]


def _path(walk: list[Tensor], roundness: Tensor, bow: Tensor) -> Path:
    """A stroke through the places of `walk`; after the last one the pen lifts."""
    # (vertices, 2), and three of (vertices,)
    return Path(torch.stack(walk), roundness, bow, torch.arange(len(walk)) < len(walk) - 1)


def _character(style: Style, generator: torch.Generator) -> Path:
    """Draw a character's strokes, some from the alphabet's stock, and chain them to one path."""
    strokes: list[Path] = []
    for _ in range(_count(style.strokes, 1, 5, generator)):
        stroke = _stroke(style, strokes, generator)
        if _happens(style.reuse, generator):
            common = style.stock[int(torch.randint(len(style.stock), (), generator=generator))]
            shape = (common.vertices - common.vertices[0]) * _uniform(0.5, 1, generator)
            stroke = common._replace(vertices=stroke.vertices[0] + shape)
        if sum(len(one.bow) for one in [*strokes, stroke]) <= VERTICES:
            strokes.append(stroke)
    # (vertices of all strokes, ...)
    return Path(*(torch.cat(part) for part in zip(*strokes, strict=True)))


def _batch(characters: list[Path], generator: torch.Generator) -> Path:
    """Stack characters, padded with moves of the lifted pen, each centred on the page."""
    # (characters, most vertices, ...)
    p = Path(*(pad_sequence(part, batch_first=True) for part in zip(*characters, strict=True)))
    low, high = _box(*_ink(p)[::2])
    size = 0.95 + 0.55 * torch.rand(len(low), 1, generator=generator)  # (characters, 1)
    scale = size / (high - low).amax(1, keepdim=True).clamp(min=0.5)
    return p._replace(vertices=(p.vertices - ((low + high) / 2)[:, None]) * scale[:, None])


def _box(places: Tensor, ink: Tensor) -> tuple[Tensor, Tensor]:
    """The least and greatest coordinates `(n, 2)` that ink reaches."""
    dry = (ink == 0)[..., None]  # (n, dabs, 1)
    return places.masked_fill(dry, 9).amin(1), places.masked_fill(dry, -9).amax(1)


def _write(p: Path, generator: torch.Generator) -> Path:
    """Let another writer draw each character of a batch."""
    n, length = p.bow.shape

    def noise(*shape: int) -> Tensor:
        return torch.randn(n, *shape, generator=generator)

    # A smooth random field moves neighbours together, so that a junction stays a junction.
    bumps = torch.cartesian_prod(*[torch.linspace(-0.7, 0.7, 3)] * 2)  # (9, 2)
    near = torch.exp(-torch.cdist(p.vertices, bumps).square() / (2 * 0.4**2))  # (n, length, 9)
    # Each stroke and each vertex is a little out of place as well.
    stroke = torch.nn.functional.pad(~p.down[:, :-1], (1, 0)).cumsum(1)  # (n, length), its number
    offset = noise(length, 2).gather(1, stroke[..., None].expand(-1, -1, 2))  # (n, length, 2)
    moved = p.vertices + 0.085 * near @ noise(9, 2) + 0.04 * offset + 0.035 * noise(length, 2)
    # (n, 2, 2)
    slant_and_scale = (torch.eye(2) + 0.12 * noise(2, 2)) * torch.exp(0.1 * noise(1, 1))
    return Path(
        moved @ slant_and_scale + 0.08 * noise(1, 2),
        (p.roundness + 0.2 * noise(length)).clamp(0, 1.3),
        p.bow * (1 + 0.3 * noise(length)) + 0.16 * noise(length),
        p.down,
    )


def _ink(p: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Dabs along a batch of paths: places, velocities `(n, dabs, 2)` and ink `(n, dabs)`."""
    step = p.vertices.diff(dim=1)  # (n, moves, 2), one move less than vertices
    # Each move is a cubic from vertex to vertex. At a corner it leaves along the move itself,
    # turned by the bow; at a smooth vertex it goes on the way it came, between both.
    turn = p.bow[:, :-1, None] * torch.stack([-step[..., 1], step[..., 0]], -1)  # (n, moves, 2)
    leave, arrive = step + turn, step - turn
    inside = (p.down[:, :-2] & p.down[:, 1:-1]) * p.roundness[:, 1:-1]  # (n, moves - 1)
    smooth = 0.7 * (leave[:, 1:] + arrive[:, :-1])  # (n, moves - 1, 2)
    # (n, moves, 2)
    leave = torch.cat([leave[:, :1], leave[:, 1:].lerp(smooth, inside[..., None])], 1)
    # (n, moves, 2)
    arrive = torch.cat([arrive[:, :-1].lerp(smooth, inside[..., None]), arrive[:, -1:]], 1)
    # (n, moves, 2, 4)
    knots = torch.stack([p.vertices[:, :-1], p.vertices[:, 1:], leave, arrive], -1)
    # Hermite's four polynomials and their slopes.
    t = (torch.arange(DABS) + 0.5) / DABS
    rise, hill = t * t * (3 - 2 * t), 6 * t * (1 - t)
    place = torch.stack([1 - rise, rise, t * (1 - t) ** 2, t * t * (t - 1)])  # (4, DABS)
    slope = torch.stack([-hill, hill, (1 - t) * (1 - 3 * t), t * (3 * t - 2)])  # (4, DABS)
    # (n, moves, 2, DABS) to (n, moves, DABS, 2) to (n, dabs, 2)
    places, speeds = ((knots @ basis).transpose(2, 3).flatten(1, 2) for basis in (place, slope))
    # Ink flows with the way gone, and a pen that stands still leaves a dot.
    ink = (speeds.norm(dim=-1) / DABS).clamp(min=0.15 / DABS)
    return places, speeds, ink * p.down[:, :-1].repeat_interleave(DABS, 1)


def _render(p: Path, pen: Tensor, size: int) -> Tensor:
    """Images `(n, 1, size, size)` uint8 of paths; `pen` `(n,)` is how far a line spreads."""
    places, _, ink = _ink(p)
    # Whoever would run off the page writes smaller, and moves over.
    low, high = _box(places, ink)
    middle, fit = (low + high) / 2, (1.8 / (high - low).amax(1, keepdim=True)).clamp(max=1)
    room = 0.9 - fit * (high - low) / 2  # (n, 2)
    # (n, dabs, 2)
    places = (places - middle[:, None]) * fit[:, None] + middle.clamp(-room, room)[:, None]
    # A dab is a Gaussian in x times one in y, so a drawing is one product of two matrices.
    pixels = (torch.arange(size) + 0.5) * (2 / size) - 1
    # (n, dabs, 2, size)
    dabs = (places[..., None] - pixels).div_(pen[:, None, None, None]).square_().mul_(-0.5).exp_()
    x, y = dabs.unbind(2)  # each (n, dabs, size)
    x.mul_((0.88 * ink / (pen[:, None] * math.sqrt(2 * math.pi)))[..., None])
    drawing = (y.transpose(1, 2) @ x).clamp(max=1)  # (n, size, dabs) @ (n, dabs, size)
    return (255 * drawing).round().to(torch.uint8)[:, None]


def _draw(programs: Path, drawings: int, size: int, writers: torch.Generator) -> Tensor:
    """Images `(n * drawings, 1, size, size)` of `n` characters, `drawings` of each in a row."""
    # Drawn together with others of their length, short programs need little padding.
    length = programs.down.long().cumsum(1).argmax(1) + 2  # argmax finds the last move
    # (n, drawings)
    order = length.argsort(stable=True)[:, None] * drawings + torch.arange(drawings)
    images = torch.empty(order.numel(), 1, size, size, dtype=torch.uint8)
    for places in order.flatten().split(CHUNK):
        rows = places // drawings  # (drawn together,), the character of each
        longest = int(length[rows].max())
        drawn = _write(Path(*(part[rows, :longest] for part in programs)), writers)
        pen = 0.041 * torch.exp(0.12 * torch.randn(len(rows), generator=writers))
        images[places] = _render(drawn, pen, size)
    return images


def _describe(p: Path) -> Tensor:
    """The attributes `(characters, attributes)` in [0, 1] of a batch of characters."""
    n = len(p.bow)
    places, speeds, ink = _ink(p)
    total = ink.sum(1)
    share = ink / total[:, None]  # (n, dabs)
    angle = torch.atan2(-speeds[..., 1], speeds[..., 0])  # (n, dabs)
    # (n, dabs) each
    ways = [(angle - way).cos() ** 4 for way in torch.tensor([0, 0.5, 0.25, -0.25]) * math.pi]
    # How far the pen turns between dabs: within a move smoothly, from move to move sharply.
    # (n, dabs - 1)
    bend = (1 - (angle.diff(dim=1)).cos()).clamp(min=0).sqrt() * (ink[:, 1:] * ink[:, :-1] > 0)
    bend = torch.nn.functional.pad(bend, (0, 1)).view(n, -1, DABS)  # (n, moves, DABS)
    dots = (p.down[:, :-1] & (p.vertices.diff(dim=1).norm(dim=-1) < 0.08)).sum(1)  # (n,)
    strokes = (p.down[:, 1:-1] & ~p.down[:, :-2]).sum(1) + 1
    low, high = _box(places, ink)
    cell = ((places + 0.6) / 0.4).floor().long().clamp(0, 2) @ torch.tensor([1, 3])  # (n, dabs)
    cells = torch.zeros(n, 9).scatter_add(1, cell, share)  # (n, 9)
    image = _render(p, torch.full((n,), 0.045), 28).float() / 255  # (n, 1, 28, 28)
    columns = [strokes / 5, dots / 2, total / 8, *((high - low) / 1.6).unbind(1)]
    columns += [bend[:, :, :-1].sum((1, 2)) / 8, bend[:, :, -1].sum(1) / 5]
    columns += [_enclosed(image), *((way * share).sum(1) for way in ways)]
    columns += [*cells.sqrt().unbind(1)]  # each (n,)
    return torch.stack(columns, 1).clamp(0, 1)


def _enclosed(image: Tensor) -> Tensor:
    """Paper that cannot be reached from the border without crossing a line, 1 from 50 pixels."""
    paper = (image < 0.2).float()
    reached = paper.clone()
    reached[..., 1:-1, 1:-1] = 0
    for _ in range(image.shape[-1]):
        reached = torch.nn.functional.max_pool2d(reached, 3, 1, 1) * paper
    return (paper - reached).sum((1, 2, 3)) / 50


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
    with on_cpu(), in_float32():
        generator = torch.Generator().manual_seed(seed)
        # Writers have chance of their own: more drawings leave the characters as they are.
        writers = torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=generator)))
        styles = (_style(generator) for _ in range(alphabets))
        drafts = [_character(style, generator) for style in styles for _ in range(characters)]
        programs = _batch(drafts, generator)
        images = _draw(programs, drawings, size, writers)
        names = (
            f"alphabet{a:02d}/character{c:02d}" for a in range(alphabets) for c in range(characters)
        )
        counts = torch.full((len(programs.bow),), drawings)
        return ClassBank(images, counts, tuple(names), _describe(programs))


def load(seed: int = 0, alphabets: int = 50, characters: int = 24, drawings: int = 20) -> Parts:
    """Glyphs cut into train, validation and test by whole alphabets: 7 to 1 to 2.

    Raises:
        ValueError: if a number is not positive, or there are fewer than 3 alphabets.
    """
    if alphabets < 3:
        raise ValueError(
            f"{alphabets} alphabets cannot be cut into three parts: ask for 3 or more."
        )
    # Kept, since a notebook would wait seconds for them; other code here draws other glyphs.
    code = hashlib.sha256(pathlib.Path(__file__).read_bytes()).hexdigest()
    name = f"glyphs-{alphabets}-{characters}-{drawings}-{seed}"
    bank = cached(name, lambda: generate(alphabets, characters, drawings, seed=seed), code)
    test, validation = max(1, alphabets // 5), max(1, alphabets // 10)
    sizes = [alphabets - test - validation, validation, test]
    parts = torch.arange(len(bank), device="cpu").split([k * characters for k in sizes])
    return Parts(*(bank.select(part) for part in parts))
