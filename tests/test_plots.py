"""Figures are drawings inside the page: described, in its colour and font, needing nothing else."""

import base64
import html
import io
import json
import re
import warnings
from xml.etree import ElementTree

import matplotlib.pyplot as plt
import pytest
import torch
from helpers import ROOT, blobs
from matplotlib.colors import to_hex
from PIL import Image

from metautils import plots
from metautils.sampling import EpisodeSampler
from metautils.shown import form_for_site

SVG = "{http://www.w3.org/2000/svg}"
LABELS = ["0 steps", "1 <b>", "2"]


def line():
    figure, ax = plt.subplots()
    ax.plot([0, 1, 4], label="a line")
    ax.set(xlabel="steps", ylabel="loss", title="How it falls")
    ax.legend()
    return figure


def episode(ways=3, shots=1, queries=4):
    return EpisodeSampler(blobs(), ways, shots, queries).sample()


def forms(shown):
    """What a cell's output holds, by type."""
    return shown._repr_mimebundle_()[0]


def site_form(shown):
    """The HTML that the site shows."""
    return form_for_site(forms(shown))


def picture(content):
    """A PNG as it comes in an output."""
    return Image.open(io.BytesIO(base64.b64decode(content)))


def drawn(figure, alt="What is seen."):
    """The page's text, and the drawing parsed."""
    text = site_form(plots.show(figure, alt))
    start, end = text.index("<svg"), text.index("</svg>") + len("</svg>")
    return text, ElementTree.fromstring(text[start:end])


@pytest.mark.parametrize("alt", ["Loss falls.", 'He said "a < b & c > d"', "it's 5 ± 1 %"])
def test_drawing_is_an_image_with_its_description(alt):
    text, svg = drawn(line(), alt)
    assert svg.tag == f"{SVG}svg"
    assert svg.get("role") == "img"
    assert svg.get("aria-label") == alt
    assert f'aria-label="{html.escape(alt, quote=True)}"' in text
    assert text.count("<svg ") == 1
    assert "<?xml" not in text
    assert "<!DOCTYPE" not in text


@pytest.mark.parametrize("alt", ["", "   ", "\n"])
def test_description_is_needed(alt):
    figure = line()
    with pytest.raises(ValueError, match="Every figure needs alt text: say what it shows"):
        plots.show(figure, alt)
    plt.close(figure)


FIGURES = {
    "line": line,
    "sheet": lambda: plots.sheet(2, 1)[1].figure,
    "episode": lambda: plots.draw_episode(episode()),
    "grid": lambda: plots.draw_grid([blobs()[k] for k in range(3)]),
}


@pytest.mark.parametrize("name", FIGURES)
def test_needs_nothing_from_outside(name):
    text, svg = drawn(FIGURES[name]())
    assert not re.search(r"@font-face|@import|<script|<style[^>]*src", text)
    for element in svg.iter():
        for key, value in element.attrib.items():
            if key.endswith(("href", "src")):
                assert value.startswith(("#", "data:image/png;base64,")), (key, value)
            assert not re.search(r"url\((?!#)", value), value


def test_text_stays_text_in_no_font_of_its_own():
    text, svg = drawn(line())
    words = {"".join(element.itertext()).strip() for element in svg.iter(f"{SVG}text")}
    assert {"steps", "loss", "How it falls", "a line"} <= words
    fonts = set(re.findall(r"font(?:-family)?: ([^;\"]*)", text))
    assert fonts
    assert all("sans-serif" in font for font in fonts)


def test_ink_takes_the_colour_of_the_page():
    text, svg = drawn(line())
    assert plots.INK not in text
    for element in svg.iter(f"{SVG}text"):
        assert "currentColor" in element.get("style", "") + element.get("fill", "")


def test_same_figure_same_string():
    assert drawn(line())[0] == drawn(line())[0]
    other = line()
    other.axes[0].plot([3, 2])
    assert drawn(other)[0] != drawn(line())[0]


def test_no_date_and_no_path():
    text, _ = drawn(line())
    assert not re.search(r"\b20\d\d-\d\d|dc:date|dc:creator", text)
    assert str(ROOT) not in text


def test_figure_is_closed():
    before = plt.get_fignums()
    drawn(line())
    assert plt.get_fignums() == before


def test_ink_is_dark_on_white_paper():
    figure, ax = plt.subplots()
    plots.draw_image(ax, torch.tensor([[[0, 255]]], dtype=torch.uint8), "a", colour="red")
    (image,) = ax.get_images()
    paper, ink = image.cmap(image.norm(image.get_array()))[0]
    assert (paper[:3].tolist(), ink[:3].tolist()) == ([1, 1, 1], [0, 0, 0])
    assert ax.get_title() == "a"
    assert all(spine.get_visible() for spine in ax.spines.values())
    plt.close(figure)


def test_float_images_end_at_1():
    figure, ax = plt.subplots()
    plots.draw_image(ax, torch.tensor([[[0.0, 0.5]]]))
    (image,) = ax.get_images()
    assert image.get_clim() == (0, 1)
    assert not any(spine.get_visible() for spine in ax.spines.values())
    plt.close(figure)


def test_colour_image():
    figure, ax = plt.subplots()
    plots.draw_image(ax, torch.rand(3, 4, 5))
    assert ax.get_images()[0].get_array().shape == (4, 5, 3)
    plt.close(figure)


def images(figure):
    return [ax for ax in figure.axes if ax.get_images()]


def test_grid_shows_every_image_and_every_title():
    bank = blobs()
    figure = plots.draw_grid([bank[0], bank[1][:3]], ["first", "second"])
    assert len(images(figure)) == 8 + 3
    assert [ax.get_ylabel() for ax in figure.axes if ax.get_ylabel()] == ["first", "second"]
    plt.close(figure)


@pytest.mark.parametrize(("ways", "shots"), [(1, 1), (2, 3), (5, 1)])
@pytest.mark.parametrize("queries", [5, 10])
def test_episode_shows_support_and_distinct_queries(ways, shots, queries):
    e = episode(ways, shots, 5)
    queries = min(queries, 5 * ways)
    figure = plots.draw_episode(e, queries=queries)
    (ax,) = figure.axes
    shown = [tuple(torch.as_tensor(i.get_array().data).flatten().tolist()) for i in ax.images]
    assert len(shown) == len(set(shown)) == ways * shots + queries
    told = [text.get_text() for text in ax.texts]
    letters = [chr(ord("a") + k) for k in range(queries)]
    assert told == [*(f"class {k}" for k in range(ways)), "queries", *letters]
    plt.close(figure)


def test_episode_reveals_the_class_of_each_query():
    e = episode(3, 1, 4)
    frames = {}
    for reveal in (False, True):
        figure = plots.draw_episode(e, reveal=reveal)
        (ax,) = figure.axes
        frames[reveal] = [to_hex(patch.get_edgecolor()).upper() for patch in ax.patches]
        asked = [torch.as_tensor(image.get_array().data) for image in ax.images][3:]
        plt.close(figure)
    answers = [int(e.query_y[0][(e.query_x[0, :, 0] == x).all(-1).all(-1)]) for x in asked]
    assert frames[False] == [*plots.COLOURS[:3], *[plots.COLOURS[6]] * 10]
    assert frames[True] == [*plots.COLOURS[:3], *(plots.COLOURS[k] for k in answers)]


def test_tiles_of_a_wide_episode_do_not_overlap():
    e = EpisodeSampler(blobs(classes=20), 20, 2, 2).sample()
    figure = plots.draw_episode(e, queries=25)
    (ax,) = figure.axes
    boxes = [patch.get_bbox() for patch in ax.patches]
    assert len(boxes) == 20 * 2 + 25
    for k, a in enumerate(boxes):
        assert not any(a.overlaps(b) for b in boxes[k + 1 :])
        assert 0 <= a.x0 and a.x1 <= ax.get_xlim()[1] and 0 <= a.y0 and a.y1 <= ax.get_ylim()[1]
    plt.close(figure)


@pytest.mark.parametrize("queries", [0, 5, 27])
def test_episode_has_the_queries_that_are_asked_for(queries):
    e = episode(2, 1, 2) if queries < 27 else episode(6, 1, 7)
    with pytest.raises(ValueError, match=f"queries is {queries}: at most 26, and no more than"):
        plots.draw_episode(e, queries=queries)


def test_slider_shows_its_first_frame_and_hides_the_others():
    text = site_form(plots.show_slider([line(), line(), line()], LABELS, "A fall."))
    body = ElementTree.fromstring(text)
    frames = body.find("div[@class='frames']")
    assert ["hidden" in frame.attrib for frame in frames] == [False, True, True]
    told = [frame.find(f"{SVG}svg").get("aria-label") for frame in frames]
    assert told == ["A fall. Here: 0 steps.", "A fall. Here: 1 <b>.", "A fall. Here: 2."]
    knob = body.find("label/input")
    assert (knob.get("min"), knob.get("max"), knob.get("value")) == ("0", "2", "0")
    assert json.loads(knob.get("data-labels")) == LABELS
    assert body.find("label/output").text == "0 steps"


def test_frames_of_a_slider_share_no_names():
    text = site_form(plots.show_slider([line(), line()], ["a", "b"], "A fall."))
    paths = re.findall(r'<clipPath id="([^"]+)"', text)
    assert len(paths) == len(set(paths)) == 2


def test_slider_needs_a_label_for_each_figure_and_a_description():
    with pytest.raises(ValueError, match="2 figures have 1 labels"):
        plots.show_slider([line(), line()], ["a"], "A fall.")
    with pytest.raises(ValueError, match="needs alt text"):
        plots.show_slider([line()], ["a"], " ")


@pytest.mark.parametrize("name", FIGURES)
def test_a_picture_shows_where_neither_svg_nor_style_nor_script_may(name):
    alt = 'A "line" < a curve.'
    with warnings.catch_warnings(action="error"):
        data, about = plots.show(FIGURES[name](), alt)._repr_mimebundle_()
    assert data["text/plain"] == alt == about["image/png"]["alt"]
    assert not re.search(r"<(svg|style|script)", data["text/html"])
    image = ElementTree.fromstring(data["text/html"]).find("img")
    assert image.get("alt") == alt
    start, content = image.get("src").split(",")
    assert start == "data:image/png;base64"
    assert content == data["image/png"]
    shown = picture(content).convert("RGB")
    assert shown.getpixel((1, 1)) == (255, 255, 255), "on white, so that it is seen in the dark"
    assert name == "sheet" or shown.getextrema() != ((255, 255),) * 3, "something is drawn"
    assert int(image.get("width")) == about["image/png"]["width"] == round(shown.width / 1.5)


def test_a_slider_shows_all_its_frames_where_no_script_may_run():
    data = forms(plots.show_slider([line(), line(), line()], LABELS, "A fall."))
    folds = ElementTree.fromstring(f"<div>{data['text/html']}</div>").findall("details")
    assert [fold.find("summary").text for fold in folds] == LABELS
    assert ["open" in fold.attrib for fold in folds] == [True, False, False]
    frames = [fold.find("img") for fold in folds]
    assert [f.get("alt") for f in frames] == [f"A fall. Here: {label}." for label in LABELS]
    one, sheet = picture(frames[0].get("src").split(",")[1]), picture(data["image/png"])
    assert sheet.size == (2 * (one.width // 2), 2 * (one.height // 2))


def test_the_same_figure_gives_the_same_forms():
    assert forms(plots.show(line(), "A line.")) == forms(plots.show(line(), "A line."))


def test_figures_are_closed():
    plt.close("all")
    plots.show(line(), "A line.")
    plots.show_slider([line(), line()], ["a", "b"], "Two.")
    assert plt.get_fignums() == []


def test_a_diagram_holds_what_is_drawn_on_its_sheet():
    figure, ax = plots.sheet(4, 2)
    plots.draw_box(ax, (0.1, 0.1), 1, 0.5, "a box", plots.COLOURS[0])
    plots.draw_arrow(ax, (1.1, 0.3), (2, 0.3), "leads to")
    plots.draw_tile(ax, torch.rand(1, 28, 28), (2.1, 0.1), colour=plots.COLOURS[1])
    assert (ax.get_xlim(), ax.get_ylim()) == ((0, 4), (0, 2)), "inches, whatever is drawn"
    text, svg = drawn(figure)
    assert svg.get("viewBox").split()[2:] == ["288", "144"]  # points, 72 to the inch
    assert {"a box", "leads to"} <= {t.text for t in svg.iter(f"{SVG}text")}
    assert len(list(svg.iter(f"{SVG}image"))) == 1
    assert plots.COLOURS[0].lower() in text.lower() and plots.COLOURS[1].lower() in text.lower()
    assert plots.INK not in text


def test_a_tile_shows_bytes_and_floats_alike():
    image = torch.randint(0, 256, (1, 5, 5), dtype=torch.uint8)
    drawn_alike = []
    for each in (image, image.float() / 255):
        figure, ax = plots.sheet(1, 1)
        plots.draw_tile(ax, each, (0, 0), side=1)
        picture = ax.images[0]
        drawn_alike.append(picture.norm(picture.get_array()).round(4).tolist())
        plt.close(figure)
    assert drawn_alike[0] == drawn_alike[1]
