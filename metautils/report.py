"""A page on a trained classifier: one HTML file that opens anywhere, without network or scripts.

Whatever names files and classes have, they are escaped; the page forbids itself to load anything.
"""

from __future__ import annotations

import base64
import io
import math
import platform
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import PIL
import torchvision

from metautils.classifier import Tested
from metautils.data.images import read_rgb
from metautils.evaluate import wilson95
from metautils.files import save_text

REPORT = "report.html"
ERRORS = 24  # wrong answers that are shown
THUMBNAIL = 160  # pixels of the longer side
LABELLED = 40  # classes of a confusion matrix that has names
BINS = 10  # of the reliability curve
WIDE, HIGH, LEFT, TOP = 360, 230, 44, 12  # of a chart, and where its field begins
FIELD = (300, 170)  # width and height of the field

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1b1f24; --soft: #59636e; --line: #d5dae0;
  --one: #0072b2; --two: #b35900; --warn: #fff4e0; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171b; --ink: #e8eaed; --soft: #a5adb8;
  --line: #363d46; --one: #56b4e9; --two: #e69f00; --warn: #33270f; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 62rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: .5rem 0; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1rem 0 0; } p { margin: .4rem 0; max-width: 44rem; }
.big { font-size: 2.6rem; font-weight: 650; line-height: 1.2; }
.soft, figcaption, dt { color: var(--soft); } .note { background: var(--warn); padding: .6rem .8rem;
  border-radius: .4rem; }
.wide { overflow-x: auto; } svg { display: block; width: 100%; height: auto; }
svg text { fill: currentColor; font: 11px system-ui, sans-serif; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(18rem, 100%), 1fr));
  gap: 1rem; max-width: 52rem; } .chart { max-width: 27rem; }
figure { margin: 0; } figcaption { font-size: .85rem; }
table { border-collapse: collapse; } th, td { text-align: left; padding: .25rem .8rem .25rem 0;
  border-bottom: 1px solid var(--line); overflow-wrap: normal; }
td.n { white-space: nowrap; font-variant-numeric: tabular-nums; }
.errors { display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: 1rem; }
.errors img { width: 100%; height: 9rem; object-fit: contain; background: var(--line);
  border-radius: .3rem; } code { font-size: .88em; } dd { margin: 0 0 .5rem; }
.one { stroke: var(--one); color: var(--one); } .two { stroke: var(--two); color: var(--two); }
"""


def write(tested: Tested, record: dict[str, Any], path: Path) -> None:
    """Write the page, whole or not at all.

    Args:
        tested: what the classifier made of the test images, which are read for thumbnails.
        record: of the training, as `metautils.finetune.run` writes it; what it lacks is left out.
        path: of the page.

    Raises:
        DataError: if there is no room or no permission, or a test image is gone.
    """
    save_text(page(tested, record), path)


def page(tested: Tested, record: dict[str, Any]) -> str:
    """The page as text.

    Example:
        >>> import torch
        >>> chances = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
        >>> tested = Tested(chances, torch.tensor([0, 1]), ("0.png", "1.png"), ("<ant>", "bee"))
        >>> html = page(tested, {"data": "insects"})
        >>> "&lt;ant&gt;" in html, "<ant>" in html, "<script" in html
        (True, False, False)
    """
    title = f"Classifier of {escape(Path(record.get('data', 'images')).name)}"
    parts = (_summary, _notes, _recalls, _confusion, _reliability, _errors, _curves, _made)
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<style>{STYLE}</style></head><body><main>
<h1>{title}</h1>
{"".join(part(tested, record) for part in parts)}</main></body></html>
"""


def _summary(tested: Tested, record: dict[str, Any]) -> str:
    """The accuracy beside what it must be compared with."""
    (low, high), share = tested.interval, tested.majority
    common = escape(tested.classes[int(tested.confusion.sum(1).argmax())])
    doubt = "" if low > share else (
        f"<p class=note>The interval reaches down to that share: this test does not show that the "
        f"classifier is better than always to answer {common}.</p>"
    )  # fmt: skip
    return f"""<p class=big>{tested.accuracy:.1f} %</p>
<p>of {len(tested.labels)} test images are classified rightly, 95 % interval {low:.1f} to
{high:.1f} %. {share:.1f} % would be right if every answer were {common}.
Balanced accuracy, the mean over classes: {tested.balanced:.1f} %.</p>
{_scale(tested)}{doubt}"""


def _scale(tested: Tested) -> str:
    """The accuracy, its interval and the majority's share between 0 and 100 %."""
    (low, high), share = tested.interval, tested.majority

    def x(percent: float) -> str:
        return f"{10 + 3.4 * percent:.1f}"

    alt = (
        f"Accuracy {tested.accuracy:.1f} %, interval {low:.1f} to {high:.1f}, majority {share:.1f}"
    )
    ends = "".join(f'<text x="{x(k)}" y="40" text-anchor="middle">{k}</text>' for k in (0, 50, 100))
    return f"""<figure style="max-width:34rem"><svg viewBox="0 0 360 46" role="img"
 aria-label="{alt}"><path d="M{x(0)} 20H{x(100)}" stroke="var(--line)" stroke-width="2"/>
<path d="M{x(share)} 8V32" class="two" stroke-width="2" stroke-dasharray="3 2"/>
<path d="M{x(low)} 20H{x(high)}" class="one" stroke-width="7"/>
<circle cx="{x(tested.accuracy)}" cy="20" r="5" fill="var(--ink)"/>{ends}</svg>
<figcaption>The accuracy with its interval; dashed, the share of the most frequent class.
</figcaption></figure>"""


def _notes(tested: Tested, record: dict[str, Any]) -> str:
    notes = record.get("split", {}).get("notes", [])
    more = f"<p>... and {len(notes) - 10} more.</p>" if len(notes) > 10 else ""
    told = "".join(f"<p class=note>{escape(note)}</p>" for note in notes[:10])
    return f"<h2>About the images</h2>{told}{more}" if notes else ""


def _recalls(tested: Tested, record: dict[str, Any]) -> str:
    """How many of each class were found, those found least first, and else taken for what."""
    rows, confusion = [], tested.confusion
    for k in tested.recalls.argsort(stable=True).tolist():  # NaN, without an image, comes last
        found, total = int(confusion[k, k]), int(confusion[k].sum())
        low, high = wilson95(found, total) if total else (0, 0)
        percent = f"{100 * found / total:.1f} %" if total else "-"
        interval = f"{low:.0f} to {high:.0f} %" if total else "-"
        others = confusion[k].clone()
        others[k] = 0
        taken = escape(tested.classes[int(others.argmax())]) if others.sum() else ""
        rows.append(
            f"<tr><th scope=row>{escape(tested.classes[k])}</th><td class=n>{found} of {total}</td>"
            f"<td class=n>{percent}</td><td class=n>{interval}</td><td>{taken}</td></tr>"
        )
    return f"""<h2>How many of each class were found</h2><div class=wide><table>
<tr><th>Class</th><th>Found</th><th>Recall</th><th>95 % interval</th><th>Else</th>
</tr>{"".join(rows)}</table></div>
<p class=soft>Else: what most of the others were taken for.</p>"""


def _confusion(tested: Tested, record: dict[str, Any]) -> str:
    """The confusion matrix as a picture; of many classes without names and numbers."""
    confusion, names = tested.confusion, tested.classes
    count = len(names)
    longest = max(map(len, names))
    side, margin = (30, 14 + 6 * min(14, longest)) if count <= LABELLED else (6, 4)
    share = confusion / confusion.sum(1, keepdim=True).clamp(min=1)
    cells = []
    for i, j in confusion.nonzero().tolist():
        told = f"{escape(names[i])} taken for {escape(names[j])}: {confusion[i, j]}"
        x, y, strength = margin + side * j, margin + side * i, 0.1 + 0.55 * float(share[i, j])
        cells.append(
            f'<rect x="{x}" y="{y}" width="{side}" height="{side}" fill="var(--'
            f'{"one" if i == j else "two"})" fill-opacity="{strength:.2f}"><title>{told}</title>'
            "</rect>"
        )
        if count <= LABELLED:
            middle = f'x="{x + side / 2}" y="{y + side / 2 + 4}"'
            cells.append(f'<text {middle} text-anchor="middle">{confusion[i, j]}</text>')
    for k, name in enumerate(names if count <= LABELLED else ()):
        short, at = escape(name if len(name) <= 14 else f"{name[:13]}…"), margin + side * k + 19
        cells.append(f'<text x="{margin - 6}" y="{at}" text-anchor="end">{short}</text>')
        cells.append(f'<text transform="translate({at} {margin - 6}) rotate(-60)">{short}</text>')
    across, wrong = margin + side * count, _confused(tested)
    wide = across + (50 if count <= LABELLED else 4)  # the last name leans to the right
    style = f"width:{1.25 * wide if count < 20 else wide}px;{'max-width:100%' * (count < 10)}"
    return f"""<h2>What was taken for what</h2><div class=wide><figure style="{style}">
<svg viewBox="0 0 {wide} {across + 4}" role="img" aria-label="Confusion matrix. {wrong}">
<rect x="{margin}" y="{margin}" width="{side * count}" height="{side * count}" fill="none"
 stroke="var(--line)"/>{"".join(cells)}</svg></figure></div>
<p class=soft>A row for each true class, a column for each answer. {wrong}</p>"""


def _confused(tested: Tested) -> str:
    """The commonest confusions in words."""
    confusion = tested.confusion.clone()
    confusion.fill_diagonal_(0)
    order = confusion.flatten().argsort(descending=True, stable=True)[:5].tolist()
    pairs = [(k // len(tested.classes), k % len(tested.classes)) for k in order]
    told = [
        f"{escape(tested.classes[i])} for {escape(tested.classes[j])} ({confusion[i, j]})"
        for i, j in pairs
        if confusion[i, j]
    ]
    return f"Most often taken: {', '.join(told)}." if told else "No image was taken for another."


def _reliability(tested: Tested, record: dict[str, Any]) -> str:
    """How often it is right when it says so surely: points with intervals, and their counts."""
    said, answers = tested.chances.max(1)  # (n,), (n,)
    hits = answers == tested.labels
    places = (said * BINS).long().clamp(max=BINS - 1)  # (n,)
    rows = []
    for k in sorted(set(places.tolist())):
        own = places == k
        right, total = int(hits[own].sum()), int(own.sum())
        rows.append((100 * float(said[own].mean()), right, total))
    most = max(total for *_, total in rows)
    marks = [_line([(0, 0), (100, 100)], 'stroke="var(--soft)" stroke-dasharray="4 3"')]
    for x, right, total in rows:
        low, high = wilson95(right, total)
        bar = _at(x, 0)[0] - 8, 20 * total / most
        marks += [
            _line([(x, low), (x, high)], 'class="one" stroke-width="1.5"'),
            '<circle cx="{:.1f}" cy="{:.1f}" r="4" fill="var(--one)"/>'.format(
                *_at(x, 100 * right / total)
            ),
            f'<rect x="{bar[0]:.1f}" y="{HIGH + 40 - bar[1]:.1f}" width="16" height="{bar[1]:.1f}"'
            ' fill="var(--soft)"/>',
            f'<text x="{bar[0] + 8:.1f}" y="{HIGH + 53}" text-anchor="middle">{total}</text>',
        ]
    alt = "; ".join(f"says {x:.0f} %: {right} of {total} right" for x, right, total in rows)
    mean = 100 * float(said.mean())
    chart = _chart("".join(marks), "it says, %", "is right, %", (0, 100), (0, 100), alt, 58)
    return f"""<h2>Whether it knows how sure it may be</h2>
<p>On average it gives its answers {mean:.1f} %, and {tested.accuracy:.1f} % of them are right.
Below the dashed line it is too sure, above not sure enough.</p>
<figure class=chart>{chart}<figcaption>Test images by the probability of the answer, with
95 % intervals; below, how many they are.</figcaption></figure>"""


def _errors(tested: Tested, record: dict[str, Any]) -> str:
    """The wrong answers that it was surest of."""
    rows = tested.surest_errors(ERRORS)
    if not rows:
        return "<h2>Errors</h2><p>None of the test images was classified wrongly.</p>"
    root, tiles = record.get("data", ""), []
    for k in rows:
        answer, truth = int(tested.chances[k].argmax()), int(tested.labels[k])
        file = Path(tested.files[k])
        name = escape((file.relative_to(root) if file.is_relative_to(root) else file).as_posix())
        tiles.append(
            f'<figure><img src="{_thumbnail(file)}" alt="{name}"><figcaption>'
            f"<strong>{escape(tested.classes[truth])}</strong>, it said "
            f"<strong>{escape(tested.classes[answer])}</strong>, "
            f"{100 * float(tested.chances[k, answer]):.1f}&nbsp;%<br><code>{name}</code>"
            "</figcaption></figure>"
        )
    return f"""<h2>The errors that it was surest of</h2>
<p>They tell the most: a wrong label, a class that nobody thought of, a crop that cuts off what
matters. {len(rows)} of {len(tested.labels) - tested.right} errors, by the probability of the wrong
answer.</p><div class=errors>{"".join(tiles)}</div>"""


def _thumbnail(file: Path) -> str:
    """A small JPEG as a data URI."""
    picture, small = read_rgb(file), io.BytesIO()
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    picture.save(small, "jpeg", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(small.getvalue()).decode()}"


def _curves(tested: Tested, record: dict[str, Any]) -> str:
    """Loss and accuracy by epoch, of the stage that has epochs."""
    rows = record.get("stage_two")
    if not rows:
        return ""
    charts = "".join(
        _curve(rows, what, label) for what, label in (("loss", "loss"), ("accuracy", "accuracy, %"))
    )
    return (
        "<h2>Learning curves</h2><h3>Stage two: all layers</h3>"
        f"<div class=charts>{charts}</div>"
        "<p class=soft>Dotted: training images. Solid: validation images.</p>"
    )


def _curve(rows: Sequence[dict[str, Any]], what: str, label: str) -> str:
    lines = {
        part: [(row["number"], row[f"{part}_{what}"]) for row in rows]
        for part in ("train", "validation")
    }
    values = [y for line in lines.values() for _, y in line]
    xs = (1, rows[-1]["number"]) if len(rows) > 1 else (0, 2)
    ys = (0, 100) if what == "accuracy" else (0, max(values) or 1)
    drawn = _line(lines["train"], 'class="two" stroke-width="3" stroke-dasharray="1 5"', xs, ys)
    drawn += _line(lines["validation"], 'class="one" stroke-width="2"', xs, ys)
    alt = ", ".join(f"{part} {line[0][1]:.3g} to {line[-1][1]:.3g}" for part, line in lines.items())
    chart = _chart(drawn, "epoch", label, xs, ys, f"{label} by epoch: {alt}")
    return f"<figure>{chart}</figure>"


Range = tuple[float, float]


def _at(x: float, y: float, xs: Range = (0, 100), ys: Range = (0, 100)) -> tuple[float, float]:
    """Where a point lies in a chart."""
    across, up = (x - xs[0]) / (xs[1] - xs[0]), (y - ys[0]) / (ys[1] - ys[0])
    return LEFT + FIELD[0] * across, TOP + FIELD[1] * (1 - up)


def _line(
    points: Sequence[tuple[float, float]], style: str, xs: Range = (0, 100), ys: Range = (0, 100)
) -> str:
    """A line through some points; of a single one, which has none, a dot."""
    if len(points) == 1:
        x, y = _at(*points[0], xs, ys)
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="currentColor" {style}/>'
    path = " ".join("{:.1f},{:.1f}".format(*_at(x, y, xs, ys)) for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke-linecap="round" {style}/>'


def _chart(
    drawn: str, x_label: str, y_label: str, xs: Range, ys: Range, alt: str, more: int = 0
) -> str:
    """A field with axes around what is drawn in it, and `more` room below."""
    right, bottom = LEFT + FIELD[0], TOP + FIELD[1]
    marks = [f'<path d="M{LEFT} {TOP}V{bottom}H{right}" fill="none" stroke="var(--soft)"/>']
    for k in _ticks(*xs, 1):  # no half epochs
        marks.append(
            f'<text x="{_at(k, 0, xs)[0]:.1f}" y="{bottom + 15}" text-anchor="middle">{k:g}</text>'
        )
    for k in _ticks(*ys):
        y = _at(0, k, ys=ys)[1]
        marks.append(f'<path d="M{LEFT} {y:.1f}H{right}" stroke="var(--line)" stroke-width=".7"/>')
        marks.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{k:g}</text>')
    middle = (LEFT + right) / 2, (TOP + bottom) / 2
    return (
        f'<svg viewBox="0 0 {WIDE} {HIGH + more}" role="img" aria-label="{escape(alt)}">'
        f'{"".join(marks)}{drawn}<text x="{middle[0]}" y="{bottom + 34}" text-anchor="middle">'
        f'{x_label}</text><text transform="translate(12 {middle[1]}) rotate(-90)" '
        f'text-anchor="middle">{y_label}</text></svg>'
    )


def _ticks(low: float, high: float, least: float = 0) -> list[float]:
    """About five round numbers from low to high, `least` or more apart."""
    rough = max((high - low) / 5, least)
    scale = 10 ** math.floor(math.log10(rough))
    step = next(k * scale for k in (1, 2, 5, 10) if k * scale >= 0.999 * rough)
    first, last = math.ceil(low / step), math.floor(high / step + 1e-9)
    return [round(k * step, 9) for k in range(first, last + 1)]


def _probe(found: dict[str, Any]) -> str:
    """What stage one found, where there was one."""
    if not found:
        return ""
    return f"{found['accuracy']:.1f} % right in cross-validation, C = {found['strength']:g}"


def _made(tested: Tested, record: dict[str, Any]) -> str:
    """How it was made, so that it can be made again."""
    split, images = record.get("split", {}), record.get("images", {})
    made = {
        "Command": record.get("command") or "called from Python",
        "Images": ", ".join(f"{count} {part}" for part, count in images.items()),
        "Split": f"seed {split.get('seed', 0)}, groups {split.get('groups') or 'none'}",
        "Weights": record.get("weights") or "random",
        "Probe": _probe(record.get("stage_one", {})),
        "Stage two": "left out, as " * ("left_out" in record) + record.get("left_out", ""),
        "Recipe": ", ".join(f"{name} {value}" for name, value in record.get("recipe", {}).items()),
        "Minutes": record.get("minutes", ""),
        "Machine": f"{record.get('device', 'unknown')}, {record.get('threads', '?')} thread(s)",
        "Versions": f"metautils {record.get('commit', '?')}, torch {record.get('torch', '?')}, "
        f"torchvision {torchvision.__version__}, Pillow {PIL.__version__}, "
        f"Python {platform.python_version()}, {platform.platform()}",
    }
    rows = "".join(
        f"<dt>{name}</dt><dd><code>{escape(str(value))}</code></dd>"
        for name, value in made.items()
        if value != ""
    )
    return f"<h2>How it was made</h2><dl>{rows}</dl>"
