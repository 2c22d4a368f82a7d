"""One image is read right whatever its kind, or a sentence names the file that is none."""

import numpy as np
import pytest
import torch
from helpers import BLACK, IMAGE_SIZE, RED, WHITE, fill, only_colour, read_one, told_in_one_line
from PIL import Image

from metautils.data import folder
from metautils.data.images import read_image, read_rgb, visible
from metautils.files import DataError


def transparent_palette():
    image = Image.new("P", (30, 20), 1)
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.info["transparency"] = 1
    return image


def sixteen_bits(level):
    return Image.fromarray(np.full((20, 30), level, dtype=np.uint16))


@pytest.mark.parametrize(
    ("image", "colour"),
    [
        pytest.param(Image.new("RGB", (30, 20), RED), RED, id="RGB"),
        pytest.param(Image.new("L", (20, 40), 90), (90, 90, 90), id="L"),
        pytest.param(Image.new("LA", (30, 20), (90, 255)), (90, 90, 90), id="LA opaque"),
        pytest.param(Image.new("LA", (30, 20), (90, 0)), WHITE, id="LA transparent"),
        pytest.param(Image.new("RGBA", (30, 20), (*RED, 255)), RED, id="RGBA opaque"),
        pytest.param(Image.new("RGBA", (30, 20), (*RED, 0)), WHITE, id="RGBA transparent"),
        pytest.param(Image.new("RGBA", (9, 9), (0, 0, 0, 51)), (204,) * 3, id="RGBA half"),
        pytest.param(Image.new("RGB", (8, 8), RED).convert("P"), RED, id="P"),
        pytest.param(transparent_palette(), WHITE, id="P transparent"),
        pytest.param(Image.new("1", (30, 20), 1), WHITE, id="1 bit white"),
        pytest.param(Image.new("1", (30, 20), 0), BLACK, id="1 bit black"),
        pytest.param(sixteen_bits(65535), WHITE, id="16 bit white"),
        pytest.param(sixteen_bits(25700), (100, 100, 100), id="16 bit grey"),
        pytest.param(sixteen_bits(0), BLACK, id="16 bit black"),
    ],
)
def test_modes(tmp_path, image, colour):
    assert only_colour(read_one(tmp_path, image)) == colour


@pytest.mark.parametrize(
    ("mode", "ink", "colour"),
    [("RGB", RED, RED), ("CMYK", (0, 255, 255, 0), RED), ("L", 120, (120, 120, 120))],
)
def test_jpeg(tmp_path, mode, ink, colour):
    image = read_one(tmp_path, Image.new(mode, (30, 20), ink), "x.JPG", format="JPEG")
    expected = torch.tensor(colour)[:, None, None]
    assert (image.int() - expected).abs().max() <= 3


@pytest.mark.parametrize("name", ["x.bmp", "x.webp", "x.tif", "x.tiff", "x.ppm", "x.jpeg", "x.PNG"])
def test_formats(tmp_path, name):
    image = read_one(tmp_path, Image.new("RGB", (20, 20), WHITE), name)
    assert image.min() >= 252


@pytest.mark.parametrize(("orientation", "turns"), [(1, 0), (3, 2), (6, 3), (8, 1)])
def test_photo_is_turned_as_its_exif_says(tmp_path, orientation, turns):
    pixels = np.zeros((IMAGE_SIZE, IMAGE_SIZE), dtype=np.uint8)
    pixels[:, : IMAGE_SIZE // 2] = 200
    pixels[: IMAGE_SIZE // 2, : IMAGE_SIZE // 2] = 100
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = read_one(tmp_path, Image.fromarray(pixels), "x.jpg", 1, exif=exif, quality=100)
    expected = torch.from_numpy(np.rot90(pixels, turns).copy()).int()
    assert (image[0].int() - expected).abs().max() <= 3


def test_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (20, 20), colour) for colour in (RED, WHITE, BLACK)]
    image = read_one(tmp_path, frames[0], "x.gif", save_all=True, append_images=frames[1:])
    assert only_colour(image) == RED


def refuses(path, sentence):
    with pytest.raises(DataError, match=sentence) as caught:
        folder.bank(path, IMAGE_SIZE)
    assert "\n" not in str(caught.value)


def noise_image(path, **options):
    pixels = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)


@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.gif", "x.webp", "x.bmp", "x.tif", "x.ppm"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.6])
def test_truncated_image_is_named(tmp_path, name, share):
    fill(tmp_path, a=2)
    path = tmp_path / "a" / name
    noise_image(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    refuses(tmp_path, rf"a/{name} is no readable image: mend or remove it")


def test_text_that_ends_like_an_image_is_named(tmp_path):
    fill(tmp_path, a=2)
    (tmp_path / "a" / "page.jpg").write_text("<html>404</html>")
    refuses(tmp_path, r"a/page\.jpg is no readable image: mend or remove it")


def test_image_too_large_to_be_true_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    fill(tmp_path, a=0)
    noise_image(tmp_path / "a" / "huge.png")
    refuses(tmp_path, r"a/huge\.png is no readable image")


@pytest.mark.parametrize("kind", ["name", "path", "opened"])
def test_file_and_opened_image_are_read_alike(tmp_path, kind):
    """As 8 bits: grey stays grey unless colour is asked for; what was opened stays as it is."""
    path = tmp_path / "x.png"
    sixteen_bits(25700).save(path)
    with Image.open(path) as opened:
        before = opened.mode  # I;16, or I in an older Pillow
        file = {"name": str(path), "path": path, "opened": opened}[kind]
        grey, colour = read_image(file), read_rgb(file)
        assert opened.mode == before
    assert (grey.mode, grey.getcolors()) == ("L", [(600, 100)])
    assert (colour.mode, colour.getcolors()) == ("RGB", [(600, (100, 100, 100))])


def test_missing_image_is_named(tmp_path):
    told_in_one_line(lambda: read_rgb(tmp_path / "x.png"), r"x\.png is no readable image: mend")


@pytest.mark.parametrize("name", [".DS_Store", "._0.png", ".ipynb_checkpoints", "__MACOSX"])
def test_what_systems_leave_behind_is_not_visible(name):
    assert not visible(name)
    assert visible(name.strip("._"))


def test_sixteen_bits_are_turned_upright(tmp_path):
    """As the file says, which the conversion to 8 bits does not keep."""
    image, exif = sixteen_bits(65535), Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    image.save(tmp_path / "x.png", exif=exif)
    assert read_image(tmp_path / "x.png").size == (20, 30)


def test_fault_of_ours_is_not_taken_for_a_bad_image(tmp_path, monkeypatch):
    def broken(image):
        raise ValueError("a fault")

    Image.new("L", (4, 4)).save(tmp_path / "x.png")
    monkeypatch.setattr("metautils.data.images._eight_bits", broken)
    with pytest.raises(ValueError, match="^a fault$"):
        read_image(tmp_path / "x.png")
