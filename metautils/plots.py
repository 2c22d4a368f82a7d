"""The house style of figures, and the drawings that several chapters share."""

from __future__ import annotations

import html
import io
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from PIL import Image
from torch import Tensor

from metautils.episode import Episode
from metautils.shown import SHARPNESS, Shown

# Okabe and Ito's palette, which colour-blind readers tell apart, in the order that keeps
# neighbours distinct on white and on black.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8C8C8C")
NO_ALT = "Every figure needs alt text: say what it shows in a sentence."
INK = "#010203"  # stands for the page's own text colour, see `show`
CSS_PIXELS = 96  # an inch of a page

STYLE = {
    "figure.figsize": (6.4, 3.4),
    "figure.constrained_layout.use": True,
    "font.size": 11,
    "font.family": "sans-serif",
    "axes.prop_cycle": plt.cycler(color=COLOURS),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#8888884d",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 2,
    "savefig.transparent": True,
    "svg.fonttype": "none",  # text stays text: it takes the page's font, and can be searched
    "svg.hashsalt": "metautils",  # the same figure gives the same file
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK
    ),
}
plt.rcParams.update(STYLE)


def show(figure: Figure, alt: str) -> Shown:
    """The figure as a picture, and as a drawing for the book's site.

    Args:
        figure: closed afterwards.
        alt: what a reader who cannot see the figure needs to know.

    Raises:
        ValueError: if `alt` is empty.
    """
    return _shown([figure], alt)


def show_slider(figures: Sequence[Figure], labels: Sequence[str], alt: str) -> Shown:
    """Figures of equal size behind one slider, which needs the browser but no kernel.

    Outside the book's site, where scripts may not run, each is unfolded by its label.

    Args:
        figures: one for each place of the slider; closed afterwards.
        labels: of the places, read out as the slider moves.
        alt: what a reader who cannot see the figures needs to know.

    Raises:
        ValueError: if `alt` is empty, or labels and figures differ in number.
    """
    if len(labels) != len(figures):
        raise ValueError(f"{len(figures)} figures have {len(labels)} labels: give one for each.")
    return _shown(figures, alt, labels)


def _shown(figures: Sequence[Figure], alt: str, labels: Sequence[str] = ()) -> Shown:
    """The figures in all their forms, closed afterwards."""
    if not alt.strip():
        raise ValueError(NO_ALT)
    alts = [f"{alt} Here: {label}." for label in labels] or [alt]
    # Saving resets the layout of a figure that has none of its own to the house style's.
    with plt.rc_context({"figure.constrained_layout.use": False}):
        drawings = [
            # Names of its own in each frame: a browser may not look them up in a hidden one.
            _svg(figure, each, salt=f"metautils{k}" if labels else "metautils")
            for k, (figure, each) in enumerate(zip(figures, alts, strict=True))
        ]
        pictures = [_png(figure) for figure in figures]
    for figure in figures:
        plt.close(figure)
    return Shown(pictures, drawings, alts, labels)


def _svg(figure: Figure, alt: str, salt: str) -> str:
    """The figure as SVG text in the page's ink."""
    file = io.StringIO()
    with plt.rc_context({"svg.hashsalt": salt}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    label = html.escape(alt, quote=True)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)


def _png(figure: Figure) -> bytes:
    """The figure as a picture on white, legible on a dark page too; few colours, a small file."""
    file, small = io.BytesIO(), io.BytesIO()
    figure.savefig(
        file, format="png", dpi=SHARPNESS * CSS_PIXELS, transparent=False, facecolor="white"
    )
    picture = Image.open(file).convert("RGB").quantize(128, dither=Image.Dither.NONE)
    picture.save(small, format="png", optimize=True)
    return small.getvalue()


def _picture(image: Tensor) -> dict[str, Any]:
    """What `imshow` needs for one image `(channels, h, w)`: ink on white paper, or in colour."""
    if image.shape[0] == 3:
        return {"X": image.permute(1, 2, 0).cpu().numpy()}  # (h, w, 3)
    most = 1 if image.is_floating_point() else 255
    return {"X": image[0].cpu().numpy(), "cmap": "gray_r", "vmin": 0, "vmax": most}  # (h, w)


def draw_image(ax: Axes, image: Tensor, title: str = "", colour: str | None = None) -> None:
    """One image `(channels, h, w)` as ink on white paper, framed in `colour`."""
    ax.imshow(**_picture(image))
    ax.set(xticks=[], yticks=[])
    ax.grid(False)
    ax.set_title(title, fontsize=10)
    for spine in ax.spines.values():
        spine.set(visible=colour is not None, color=colour, linewidth=2.5)


def draw_grid(rows: Sequence[Tensor], titles: Sequence[str] = (), scale: float = 0.62) -> Figure:
    """Rows of images, each `(n, channels, h, w)`; a title stands before its row."""
    columns = max(len(row) for row in rows)
    figure, axes = plt.subplots(
        len(rows), columns, figsize=(scale * columns + 1.2, scale * len(rows)), squeeze=False
    )
    for k, (row, line) in enumerate(zip(rows, axes, strict=True)):
        for ax in line[len(row) :]:
            ax.axis("off")
        for ax, image in zip(line, row, strict=False):
            draw_image(ax, image)
        if titles:
            line[0].set_ylabel(titles[k], rotation=0, ha="right", va="center")
    return figure


def draw_episode(
    episode: Episode, task: int = 0, queries: int = 10, reveal: bool = False
) -> Figure:
    """One task: the support images of each class in its colour, above `queries` grey queries.

    The queries, chosen evenly and mixed, have letters. With `reveal` they have the colours of
    their classes.

    Raises:
        ValueError: if the task has fewer queries, or the alphabet fewer letters.
    """
    if not 1 <= queries <= min(26, episode.query_x.shape[1]):
        raise ValueError(f"queries is {queries}: at most 26, and no more than the task has.")
    shots, wide = episode.support_x.shape[1] // episode.ways, 0.78
    rows = -(-queries // 10)
    width, top = max(wide * episode.ways, 4.4), wide * shots + 0.75 * rows + 0.55
    figure, ax = sheet(width, top + 0.3)
    for way in range(episode.ways):
        x = wide * way + (width - wide * episode.ways) / 2
        ax.text(x + 0.36, top + 0.05, f"class {way}", ha="center", fontsize=10)
        members = episode.support_x[task][episode.support_y[task] == way]  # (shots, channels, h, w)
        for k, image in enumerate(members, 1):
            draw_tile(ax, image, (x + 0.03, top - wide * k), 0.68, COLOURS[way % len(COLOURS)])
    ax.text(0.04, 0.75 * rows + 0.08, "queries", fontsize=11)
    chosen = torch.linspace(0, episode.query_x.shape[1] - 1, queries, device="cpu").long().flip(0)
    generator = torch.Generator().manual_seed(0)
    chosen = chosen[torch.randperm(queries, generator=generator, device="cpu")]
    side = min(width / 10, 0.7)
    for k, query in enumerate(chosen):
        x, y = side * (k % 10), 0.75 * (rows - 1 - k // 10) + 0.25
        colour = COLOURS[int(episode.query_y[task][query]) % len(COLOURS)] if reveal else COLOURS[6]
        draw_tile(ax, episode.query_x[task][query], (x + 0.03, y), side - 0.06, colour)
        ax.text(x + side / 2, y - 0.05, chr(ord("a") + k), ha="center", va="top", fontsize=10)
    return figure


def sheet(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty sheet for a diagram, its axes in inches from the lower left corner."""
    figure = plt.figure(figsize=(width, height), layout="none")
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, width), ylim=(0, height), autoscale_on=False)
    ax.axis("off")
    return figure, ax


def draw_box(
    ax: Axes,
    corner: tuple[float, float],
    width: float,
    height: float,
    text: str = "",
    colour: str = INK,
) -> None:
    """A rounded frame on a `sheet`, from its lower left corner, with text in the middle."""
    shape = "round,pad=0,rounding_size=0.08"
    ax.add_patch(
        FancyBboxPatch(corner, width, height, shape, facecolor="none", edgecolor=colour, lw=1.6)
    )
    middle = corner[0] + width / 2, corner[1] + height / 2
    ax.text(*middle, text, ha="center", va="center", fontsize=11)


def draw_arrow(
    ax: Axes,
    start: tuple[float, float],
    end: tuple[float, float],
    text: str = "",
    colour: str = INK,
) -> None:
    """An arrow on a `sheet`, with text above the middle of a level one."""
    ax.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "lw": 1.6, "color": colour})
    middle = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + 0.06
    ax.text(*middle, text, ha="center", va="bottom", fontsize=10.5)


def draw_tile(
    ax: Axes,
    image: Tensor,
    corner: tuple[float, float],
    side: float = 0.42,
    colour: str | None = None,
) -> None:
    """A small image `(channels, h, w)` on a `sheet`, framed in `colour`."""
    x, y = corner
    ax.imshow(**_picture(image), aspect="auto", extent=(x, x + side, y, y + side))
    if colour:
        ax.add_patch(plt.Rectangle(corner, side, side, fill=False, edgecolor=colour, lw=2))
