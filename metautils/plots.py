"""The house style of figures, and the drawings that several chapters share."""

from __future__ import annotations

import html
import io
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from torch import Tensor

from metautils.episode import Episode

if TYPE_CHECKING:
    from IPython.display import HTML

# Okabe and Ito's palette, which colour-blind readers tell apart, in the order that keeps
# neighbours distinct on white and on black.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8C8C8C")
NO_ALT = "Every figure needs alt text: say what it shows in a sentence."
INK = "#010203"  # stands for the page's own text colour, see `show`

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


def show(figure: Figure, alt: str) -> HTML:
    """The figure as a drawing inside the page, in the page's text colour, light or dark.

    Args:
        figure: closed afterwards.
        alt: what a reader who cannot see the figure needs to know.

    Raises:
        ValueError: if `alt` is empty.
    """
    from IPython.display import HTML

    return HTML(f'<div class="figure" style="overflow-x: auto">{_svg(figure, alt)}</div>')


def show_slider(figures: Sequence[Figure], labels: Sequence[str], alt: str) -> HTML:
    """Figures of equal size behind one slider, which needs the browser but no kernel.

    Args:
        figures: one for each place of the slider; closed afterwards.
        labels: of the places, read out as the slider moves.
        alt: what a reader who cannot see the figures needs to know.

    Raises:
        ValueError: if `alt` is empty, or labels and figures differ in number.
    """
    from IPython.display import HTML

    if not alt.strip():
        raise ValueError(NO_ALT)
    if len(labels) != len(figures):
        raise ValueError(f"{len(figures)} figures have {len(labels)} labels: give one for each.")
    frames = [
        # Names of its own in each frame: a browser may not look them up in a hidden one.
        _svg(figure, f"{alt} Here: {label}.", salt=f"metautils{k}")
        for k, (figure, label) in enumerate(zip(figures, labels, strict=True))
    ]
    hidden = ["", *[' hidden=""'] * (len(frames) - 1)]
    shown = "".join(f"<div{h}>{svg}</div>" for h, svg in zip(hidden, frames, strict=True))
    names = html.escape(json.dumps(list(labels)), quote=True)
    # One line of script in the page moves it: it works in a saved page, on Colab and in Jupyter.
    move = (
        "const f=this.closest('.figure'),v=+this.value;"
        "[...f.querySelector('.frames').children].forEach((d,k)=>{d.hidden=k!==v});"
        "const t=JSON.parse(this.dataset.labels)[v];"
        "f.querySelector('output').textContent=t;this.setAttribute('aria-valuetext',t)"
    )
    first = html.escape(labels[0])
    return HTML(
        f'<div class="figure" style="overflow-x: auto"><div class="frames">{shown}</div>'
        f'<label style="display: block">Move the slider: <input type="range" min="0" '
        f'max="{len(frames) - 1}" value="0" step="1" style="vertical-align: middle; width: 50%" '
        f'data-labels="{names}" aria-valuetext="{first}" oninput="{move}"/> '
        f"<output>{first}</output></label></div>"
    )


def _svg(figure: Figure, alt: str, salt: str = STYLE["svg.hashsalt"]) -> str:
    """The figure as SVG text in the page's ink, closed afterwards."""
    if not alt.strip():
        raise ValueError(NO_ALT)
    file = io.StringIO()
    with plt.rc_context({"svg.hashsalt": salt}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    label = html.escape(alt, quote=True)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)


def draw_image(ax: Axes, image: Tensor, title: str = "", colour: str | None = None) -> None:
    """One image `(channels, h, w)` as ink on white paper, framed in `colour`."""
    if image.shape[0] == 3:
        ax.imshow(image.permute(1, 2, 0).cpu().numpy())
    else:
        most = 1 if image.is_floating_point() else 255
        ax.imshow(image[0].cpu().numpy(), cmap="gray_r", vmin=0, vmax=most)
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
    """One task: each class's support images in its colour, beside `queries` queries in grey.

    With `reveal`, the same queries in the colours of their classes.
    """
    shots = episode.support_x.shape[1] // episode.ways
    columns = -(-queries // episode.ways)
    across = shots + 1 + columns
    figure, axes = plt.subplots(
        episode.ways, across, figsize=(0.8 * across, 0.8 * episode.ways), squeeze=False
    )
    chosen = torch.linspace(0, episode.query_x.shape[1] - 1, queries).long().flip(0)
    chosen = chosen[torch.randperm(queries, generator=torch.Generator().manual_seed(0))]
    for way, line in enumerate(axes):
        members = episode.support_x[task][episode.support_y[task] == way]
        for ax, image in zip(line, members, strict=False):
            draw_image(ax, image, colour=COLOURS[way % len(COLOURS)])
        line[0].set_ylabel(f"class {way}", rotation=0, ha="right", va="center", fontsize=10)
        for ax in line[shots:]:
            ax.axis("off")
        for ax, k in zip(line[shots + 1 :], chosen[way * columns :], strict=False):
            ax.axis("on")
            answer = COLOURS[int(episode.query_y[task][k]) % len(COLOURS)]
            draw_image(ax, episode.query_x[task][k], colour=answer if reveal else "#8C8C8C")
    axes[0, 0].set_title("support", fontsize=11)
    axes[0, shots + 1].set_title("queries", fontsize=11, loc="left")
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
    ax.text(*middle, text, ha="center", va="center", fontsize=10)


def draw_arrow(
    ax: Axes,
    start: tuple[float, float],
    end: tuple[float, float],
    text: str = "",
    colour: str = INK,
) -> None:
    """An arrow on a `sheet`, with text above its middle."""
    ax.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "lw": 1.6, "color": colour})
    middle = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + 0.06
    ax.text(*middle, text, ha="center", va="bottom", fontsize=9.5)


def draw_tile(
    ax: Axes,
    image: Tensor,
    corner: tuple[float, float],
    side: float = 0.42,
    colour: str | None = None,
) -> None:
    """A small drawing `(1, h, w)` on a `sheet`, framed in `colour`."""
    (x, y), most = corner, 1 if image.is_floating_point() else 255
    extent = (x, x + side, y, y + side)
    ax.imshow(image[0].cpu().numpy(), "gray_r", aspect="auto", vmin=0, vmax=most, extent=extent)
    if colour:
        ax.add_patch(plt.Rectangle(corner, side, side, fill=False, edgecolor=colour, lw=2))
