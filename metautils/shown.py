"""What a cell shows of its figures: forms for every viewer, and one for the book's own site."""

from __future__ import annotations

import base64
import gzip
import html
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

SITE = "application/vnd.metautils.site"  # the type of the site's form
SHARPNESS = 1.5  # pixels of a picture to one of the page


@dataclass(frozen=True)
class Shown:
    """Figures as a cell shows them: pictures that every viewer shows, and drawings for the site.

    Viewers differ in what they let through. A picture in HTML keeps its alt text in JupyterLab and
    nbconvert, where a bare PNG loses it; the bare PNG is for those that show no HTML. Neither
    needs a style, a script or inline SVG. The book's own site takes drawings in place of the
    pictures: they have the page's font and colour, light or dark.

    Args:
        pictures: PNG files, one for each frame.
        drawings: the same as SVG, for the site.
        alts: what a reader who cannot see the frames needs to know.
        labels: of the places of a slider, if there is one.

    Example:
        >>> file = io.BytesIO()
        >>> Image.new("RGB", (6, 4)).save(file, format="png")
        >>> data, _ = Shown([file.getvalue()], ["<svg/>"], ["A black field."])._repr_mimebundle_()
        >>> sorted(data)
        ['application/vnd.metautils.site', 'image/png', 'text/html', 'text/plain']
    """

    pictures: Sequence[bytes]
    drawings: Sequence[str]
    alts: Sequence[str]
    labels: Sequence[str] = ()

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> tuple[dict, dict]:
        """What IPython sends to a viewer: forms by their type, and what is to be said of them."""
        images = [
            f'<img alt="{html.escape(alt, quote=True)}" width="{_width(picture)}" '
            f'src="data:image/png;base64,{_base64(picture)}"/>'
            for picture, alt in zip(self.pictures, self.alts, strict=True)
        ]
        whole = self.pictures[0] if len(self.pictures) == 1 else _sheet_of(self.pictures)
        data = {
            "text/plain": " ".join(self.alts),
            "text/html": _folds(images, self.labels),
            "image/png": _base64(whole),
            SITE: _base64(gzip.compress(_slider(self.drawings, self.labels).encode(), mtime=0)),
        }
        return data, {"image/png": {"alt": data["text/plain"], "width": _width(whole)}}


def form_for_site(data: dict[str, str]) -> str | None:
    """The HTML that the site takes from a stored output, by its types; None if it is no figure."""
    packed = data.get(SITE)
    return packed and gzip.decompress(base64.b64decode(packed)).decode()


def _folds(frames: Sequence[str], labels: Sequence[str]) -> str:
    """One frame as it is, or several to be unfolded, which needs no script."""
    if not labels:
        return f"<div>{frames[0]}</div>"
    marks = [' open=""', *[""] * (len(frames) - 1)]
    return "".join(
        f"<details{mark}><summary>{html.escape(label)}</summary>{frame}</details>"
        for mark, label, frame in zip(marks, labels, frames, strict=True)
    )


def _slider(frames: Sequence[str], labels: Sequence[str]) -> str:
    """One frame as it is, or several behind a slider."""
    if not labels:
        return f'<div class="figure" style="overflow-x: auto">{frames[0]}</div>'
    hidden = ["", *[' hidden=""'] * (len(frames) - 1)]
    shown = "".join(f"<div{h}>{frame}</div>" for h, frame in zip(hidden, frames, strict=True))
    names = html.escape(json.dumps(list(labels)), quote=True)
    # One line of script in the page moves it: it works in a saved page too.
    move = (
        "const f=this.closest('.figure'),v=+this.value;"
        "[...f.querySelector('.frames').children].forEach((d,k)=>{d.hidden=k!==v});"
        "const t=JSON.parse(this.dataset.labels)[v];"
        "f.querySelector('output').textContent=t;this.setAttribute('aria-valuetext',t)"
    )
    first = html.escape(labels[0])
    return (
        f'<div class="figure" style="overflow-x: auto"><div class="frames">{shown}</div>'
        f'<label style="display: block">Move the slider: <input type="range" min="0" '
        f'max="{len(frames) - 1}" value="0" step="1" style="vertical-align: middle; width: 50%" '
        f'data-labels="{names}" aria-valuetext="{first}" oninput="{move}"/> '
        f"<output>{first}</output></label></div>"
    )


def _sheet_of(pictures: Sequence[bytes]) -> bytes:
    """All frames of a slider in one picture, at half their size, in two columns."""
    frames = [Image.open(io.BytesIO(picture)).convert("RGB") for picture in pictures]
    wide, high = (side // 2 for side in frames[0].size)
    sheet = Image.new("RGB", (2 * wide, -(-len(frames) // 2) * high), "white")
    for k, frame in enumerate(frames):
        sheet.paste(frame.resize((wide, high)), (k % 2 * wide, k // 2 * high))
    file = io.BytesIO()
    sheet.quantize(128, dither=Image.Dither.NONE).save(file, format="png", optimize=True)
    return file.getvalue()


def _width(picture: bytes) -> int:
    """How wide a picture is on the page, in its pixels: fewer than the file's, so it is sharp."""
    return round(Image.open(io.BytesIO(picture)).width / SHARPNESS)


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")
