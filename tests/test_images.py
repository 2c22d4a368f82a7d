"""One image is read right whatever its kind, or a sentence names the file that is none."""

import io
import os
import re
import signal
import struct
import threading
import time
import zlib

import numpy as np
import pytest
import torch
from helpers import BLACK, IMAGE_SIZE, RED, WHITE, fill, only_colour, read_one, told_in_one_line
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, PngImagePlugin

from metautils.data import folder, labelled
from metautils.data.images import read_each, read_image, read_rgb, visible
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


# Depths: by what the file declares


def level(path):
    """The one grey of an image, as it is read."""
    ((_, grey),) = read_image(path).getcolors()
    return grey


def tiff_of_12_bits(path, numbers):
    """Two numbers in three bytes, which Pillow reads but does not write."""
    a, b = numbers
    data = bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255])
    tags = {256: 2, 257: 1, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 1, 279: 3}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, x) for tag, x in tags.items())
    ifd = struct.pack("<H", len(tags)) + entries + bytes(4)
    path.write_bytes(b"II*\0" + struct.pack("<I", 12) + data + b"\0" + ifd)


@pytest.mark.parametrize("name", ["x.png", "x.tif", "x.jp2"])
@pytest.mark.parametrize("number", [0, 100, 200, 255, 256, 257, 25700, 65535])
def test_sixteen_bits_are_scaled_by_the_depth_of_the_file(tmp_path, name, number):
    """Never by the image's own pixels: a dark one is dark."""
    sixteen_bits(number).save(tmp_path / name)
    assert level(tmp_path / name) == round(number / 257)


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_adobe_deflate"])
@pytest.mark.parametrize(("white", "grey"), [(1, 100), (0, 155)])
def test_tiff_may_say_that_white_is_zero(tmp_path, compression, white, grey):
    sixteen_bits(25700).save(tmp_path / "x.tif", compression=compression, tiffinfo={262: white})
    assert level(tmp_path / "x.tif") == grey


@pytest.mark.parametrize("order", ["<", ">"])
def test_order_of_the_bytes_is_minded(tmp_path, order):
    image = Image.frombytes(
        "I;16B" if order == ">" else "I;16", (30, 20), np.full(600, 25700, f"{order}u2").tobytes()
    )
    image.save(tmp_path / "x.tif")
    assert level(tmp_path / "x.tif") == 100


def test_twelve_bits(tmp_path):
    tiff_of_12_bits(tmp_path / "x.tif", (4095, 1606))
    assert list(read_image(tmp_path / "x.tif").tobytes()) == [255, 100]


def test_portable_grey_map_of_its_own_depth(tmp_path):
    """Pillow scales it to 16 bits."""
    for top, number, grey in ((1000, 1000, 255), (1000, 500, 128), (65535, 200, 1)):
        (tmp_path / "x.pgm").write_bytes(b"P5 1 1 %d\n" % top + number.to_bytes(2, "big"))
        assert level(tmp_path / "x.pgm") == grey


def test_sixteen_bits_that_an_older_pillow_opens_as_integers(tmp_path, monkeypatch):
    monkeypatch.setitem(PngImagePlugin._MODES, (16, 0), ("I", "I;16B"))
    sixteen_bits(200).save(tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as opened:
        assert opened.mode == "I"
    assert level(tmp_path / "x.png") == 1


@pytest.mark.parametrize(("number", "grey"), [(0, 0), (100 / 255, 100), (0.004, 1), (1, 255)])
def test_floats_up_to_one_are_scaled_alike(tmp_path, number, grey):
    Image.fromarray(np.full((20, 30), number, np.float32)).save(tmp_path / "x.tif")
    assert level(tmp_path / "x.tif") == grey


def test_float_mask_of_zero_and_one(tmp_path):
    Image.fromarray(np.eye(4, dtype=np.float32)).save(tmp_path / "x.tiff")
    assert np.array_equal(read_image(tmp_path / "x.tiff"), 255 * np.eye(4, dtype=np.uint8))


@pytest.mark.parametrize(
    ("pixels", "sentence"),
    [
        (np.float32([[0, 255]]), "has numbers outside [0, 1], and so no range that is known: save"),
        (np.float32([[0, 1.5]]), "has numbers outside [0, 1]"),
        (np.float32([[-0.5, 1]]), "has numbers outside [0, 1]"),
        (np.float32([[np.nan, 1]]), "has numbers outside [0, 1]"),
        (np.float32([[np.inf, 1]]), "has numbers outside [0, 1]"),
        (np.int32([[0, 200]]), "has integers of mode I of which no range is known: save it with 8"),
        (np.int32([[0, 65535]]), "has integers of mode I of which no range is known"),
    ],
)
def test_range_that_cannot_be_known_is_refused(tmp_path, pixels, sentence):
    Image.fromarray(pixels).save(tmp_path / "x.tif")
    told_in_one_line(lambda: read_rgb(tmp_path / "x.tif"), rf"x\.tif {re.escape(sentence)}")


# Metadata, and damage


def with_exif(path, spoil, orientation=6):
    """A JPEG of 20 x 30 that is to be turned, its EXIF block changed by `spoil`."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x011A] = orientation, "maker", 72.0
    Image.new("RGB", (30, 20), RED).save(path, exif=exif)
    whole = path.read_bytes()
    start = whole.index(b"Exif\0\0") + 6
    block = bytearray(whole[start : start + len(exif.tobytes()) - 6])
    spoil(block)
    path.write_bytes(whole[:start] + bytes(block) + whole[start + len(block) :])


def field(block, tag):
    """Where an entry of the block begins."""
    order = "<" if block[:2] == b"II" else ">"
    found = block.index(struct.pack(f"{order}H", tag), 8)
    return found, order


def put(tag, offset, form, number):
    """Spoil the kind (2), the count (4) or the value (8) of a field."""

    def spoil(block):
        start, order = field(block, tag)
        struct.pack_into(order + form, block, start + offset, number)

    return spoil


METADATA = pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # Pillow's own, of each field


@METADATA
@pytest.mark.parametrize("tag", [0x010F, 0x011A])
@pytest.mark.parametrize(
    ("offset", "form", "number"),
    [(2, "H", kind) for kind in (0, 1, 3, 4, 6, 7, 9, 11, 12, 13, 99)]
    + [(4, "I", 0), (4, "I", 7), (4, "I", 2**31), (8, "I", 2**31), (8, "I", 0)],
)
def test_photo_with_a_broken_field_is_read_upright(tmp_path, tag, offset, form, number):
    with_exif(tmp_path / "x.jpg", put(tag, offset, form, number))
    assert read_rgb(tmp_path / "x.jpg").size == (20, 30)


@METADATA
@pytest.mark.parametrize(
    "spoil",
    [
        put(0x0112, 2, "H", 2),
        put(0x0112, 2, "H", 12),
        put(0x0112, 8, "H", 9),
        lambda block: block.__setitem__(slice(0, 8), b"rubbish!"),
        lambda block: block.__setitem__(slice(4, 8), b"\xff\xff\xff\x7f"),
    ],
)
def test_photo_that_does_not_say_how_it_was_held_is_read_as_it_lies(tmp_path, spoil):
    with_exif(tmp_path / "x.jpg", spoil)
    assert read_rgb(tmp_path / "x.jpg").size == (30, 20)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_ways_to_hold_a_camera(tmp_path, orientation):
    pixels, exif = np.arange(6, dtype=np.uint8).reshape(2, 3), Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "x.png", exif=exif)
    with Image.open(tmp_path / "x.png") as opened:
        expected = np.array(ImageOps.exif_transpose(opened))
    once = read_image(tmp_path / "x.png")
    assert np.array_equal(once, expected)
    assert np.array_equal(read_image(once), expected)  # and is not turned again


@pytest.mark.parametrize(
    "error",
    [
        struct.error("unpack requires 4 bytes"),
        TypeError("two\nlines"),
        KeyError(259),
        IndexError(),
        EOFError(),
        OverflowError("x" * 1000),
        zlib.error("Error -3"),
        MemoryError(),
        AttributeError("no tag"),
        RuntimeError("decoder"),
    ],
)
def test_whatever_a_damaged_file_raises_is_told_with_its_name(tmp_path, monkeypatch, error):
    def fails(self):
        raise error

    sixteen_bits(9).save(tmp_path / "x.png")
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", fails)
    told_in_one_line(lambda: read_image(tmp_path / "x.png"), r"x\.png is no readable image: .*\(\S")


def in_memory(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def whole_files():
    """Small files of many kinds, all of them whole."""
    random, exif = np.random.default_rng(0), Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x011A] = 6, "maker", 72.0
    colour = Image.fromarray(random.integers(0, 256, (9, 12, 3), dtype=np.uint8))
    palette, deep = colour.convert("P"), random.integers(0, 65536, (9, 12), dtype=np.uint16)
    for kind in ("JPEG", "PNG", "WEBP", "TIFF"):
        yield in_memory(colour, kind, exif=exif)
    for kind in ("PNG", "GIF"):
        yield in_memory(palette, kind, transparency=3)
    for image in (Image.fromarray(deep), Image.fromarray(random.random((9, 12), np.float32))):
        yield in_memory(image, "TIFF")
    yield in_memory(Image.fromarray(deep), "PNG")
    yield in_memory(palette, "GIF", save_all=True, append_images=[palette.rotate(90)])
    yield in_memory(colour, "BMP")
    yield in_memory(colour.convert("CMYK"), "JPEG")


WHOLE = list(whole_files())
DAMAGE = st.tuples(
    st.sampled_from(["set", "cut", "insert", "end"]),
    st.one_of(st.integers(0, 200), st.integers(0, 2000)),
    st.binary(min_size=1, max_size=8),
)


def damaged(whole, changes):
    content = bytearray(whole)
    for kind, place, some in changes:
        place %= len(content) + 1
        end = {"insert": place, "end": len(content)}.get(kind, place + len(some))
        content[place:end] = some if kind in ("set", "insert") else b""
    return bytes(content)


@METADATA
@settings(max_examples=400, deadline=None)
@given(whole=st.sampled_from(WHOLE), changes=st.lists(DAMAGE, min_size=1, max_size=3))
def test_damaged_file_is_read_or_named(tmp_path_factory, whole, changes):
    """By both readers, and by nothing else than a sentence."""
    path = tmp_path_factory.getbasetemp() / "damaged.png"
    path.write_bytes(damaged(whole, changes))
    for read in (labelled._read, lambda path: folder._read(path, 8, 3)):
        try:
            read(path)
        except DataError as error:
            assert str(path) in str(error)
            assert "\n" not in str(error)


@pytest.mark.parametrize(
    "name",
    [
        ".DS_Store",
        "._0.png",
        ".ipynb_checkpoints",
        "__MACOSX",
        "Thumbs.db",
        "desktop.ini",
        "@eaDir",
    ],
)
def test_what_systems_leave_behind_is_not_visible(name):
    assert not visible(name)
    assert not visible(name.upper())
    assert visible(name.strip("._@").replace("db", "png").replace("ini", "jpg"))


def test_sixteen_bits_are_turned_upright(tmp_path):
    """As the file says, which the conversion to 8 bits does not keep."""
    image, exif = sixteen_bits(65535), Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    image.save(tmp_path / "x.png", exif=exif)
    assert read_image(tmp_path / "x.png").size == (20, 30)


def test_fault_of_ours_is_not_taken_for_a_bad_image(tmp_path, monkeypatch):
    def broken(loaded):
        raise ValueError("a fault")

    Image.new("L", (4, 4)).save(tmp_path / "x.png")
    monkeypatch.setattr("metautils.data.images._eight_bits", broken)
    with pytest.raises(ValueError, match="^a fault$"):
        read_image(tmp_path / "x.png")


def test_several_files_are_read_at_the_same_time(monkeypatch):
    """In their order, whichever is done first; neither waits for the other to be done."""
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    met = threading.Barrier(2, timeout=20)

    def read(file):
        met.wait()
        time.sleep(0.02 * (file % 3))
        return 2 * file

    assert read_each(read, range(12)) == [2 * file for file in range(12)]


def test_fault_of_ours_while_many_files_are_read_is_raised(monkeypatch):
    def read(file):
        if file == 5:
            raise KeyError("a fault")
        raise DataError(f"{file} is bad.")

    with pytest.raises(KeyError, match="a fault"):
        read_each(read, range(100))


@pytest.mark.skipif(os.name != "posix", reason="only there is SIGINT sent to a process")
def test_reading_many_files_is_interrupted_at_once():
    """By Ctrl-C, which comes to the main thread alone; what waits to be read stays unread."""
    seen = []

    def read(file):
        seen.append(file)
        time.sleep(0.01)
        if file == 3:
            os.kill(os.getpid(), signal.SIGINT)

    # What runs in the background of a shell was started with this signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            read_each(read, range(1000))
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(seen) < 100
