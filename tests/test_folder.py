"""A reader's own images, whatever their kind, become a bank, or a sentence names the bad one."""

import numpy as np
import pytest
import torch
from PIL import Image

from metautils.data import folder
from metautils.files import DataError
from metautils.sampling import EpisodeSampler

SIZE = 16
RED, WHITE, BLACK = (255, 0, 0), (255, 255, 255), (0, 0, 0)


def one(tmp_path, image, name="x.png", channels=3, **options):
    """What the reader makes of one image, `(channels, SIZE, SIZE)`."""
    path = tmp_path / "set" / "a" / name
    path.parent.mkdir(parents=True)
    image.save(path, **options)
    bank = folder.bank(tmp_path / "set", SIZE, channels)
    assert bank.images.dtype == torch.uint8
    assert bank.images.shape == (1, channels, SIZE, SIZE)
    return bank.images[0]


def flat(image):
    """The colour of an image of one colour."""
    values = image.flatten(1)
    assert (values == values[:, :1]).all()
    return tuple(values[:, 0].tolist())


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
    assert flat(one(tmp_path, image)) == colour


@pytest.mark.parametrize(
    ("mode", "ink", "colour"),
    [("RGB", RED, RED), ("CMYK", (0, 255, 255, 0), RED), ("L", 120, (120, 120, 120))],
)
def test_jpeg(tmp_path, mode, ink, colour):
    image = one(tmp_path, Image.new(mode, (30, 20), ink), "x.JPG", format="JPEG")
    expected = torch.tensor(colour)[:, None, None]
    assert (image.int() - expected).abs().max() <= 3


@pytest.mark.parametrize("name", ["x.bmp", "x.webp", "x.tif", "x.tiff", "x.ppm", "x.jpeg", "x.PNG"])
def test_formats(tmp_path, name):
    image = one(tmp_path, Image.new("RGB", (20, 20), WHITE), name)
    assert image.min() >= 252


def test_grey(tmp_path):
    image = one(tmp_path, Image.new("RGB", (30, 20), RED), channels=1)
    assert flat(image) == (76,)  # the luma of red, 0.299 x 255


def test_middle_square_of_a_wide_and_of_a_tall_image(tmp_path):
    pixels = np.zeros((10, 40, 3), dtype=np.uint8)
    pixels[:, 15:25] = RED
    # Resampling mixes the cut's very edge with its neighbours.
    assert flat(one(tmp_path / "wide", Image.fromarray(pixels))[..., 3:-3]) == RED
    tall = np.ascontiguousarray(pixels.transpose(1, 0, 2))
    assert flat(one(tmp_path / "tall", Image.fromarray(tall))[:, 3:-3]) == RED


def test_same_size_changes_no_pixel_and_colours_keep_their_order(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    image = one(tmp_path, Image.fromarray(pixels))
    assert torch.equal(image, torch.from_numpy(pixels).permute(2, 0, 1))


@pytest.mark.parametrize(("orientation", "turns"), [(1, 0), (3, 2), (6, 3), (8, 1)])
def test_photo_is_turned_as_its_exif_says(tmp_path, orientation, turns):
    pixels = np.zeros((SIZE, SIZE), dtype=np.uint8)
    pixels[:, : SIZE // 2] = 200
    pixels[: SIZE // 2, : SIZE // 2] = 100
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = one(tmp_path, Image.fromarray(pixels), "x.jpg", 1, exif=exif, quality=100)
    expected = torch.from_numpy(np.rot90(pixels, turns).copy()).int()
    assert (image[0].int() - expected).abs().max() <= 3


def test_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (20, 20), colour) for colour in (RED, WHITE, BLACK)]
    image = one(tmp_path, frames[0], "x.gif", save_all=True, append_images=frames[1:])
    assert flat(image) == RED


def fill(root, **classes):
    """Folders with as many images of various sizes and modes as asked for."""
    random = np.random.default_rng(0)
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for k in range(count):
            height, width = random.integers(5, 50, 2)
            mode = ("RGB", "L", "RGBA", "P", "1")[k % 5]
            level = int(random.integers(256))
            image = Image.new("L", (width, height), level).convert(mode)
            image.save(root / name / f"{k}.png")
    return root


def test_classes_are_the_folders_in_order(tmp_path):
    root = fill(tmp_path, zebra=2, ant=5, Cat=1)
    bank = folder.bank(root, SIZE)
    assert bank.names == ("Cat", "ant", "zebra")
    assert bank.counts.tolist() == [1, 5, 2]
    assert torch.equal(folder.bank(root, SIZE).images, bank.images)


def test_images_come_in_order_of_name(tmp_path):
    (tmp_path / "a").mkdir()
    for name, level in (("10.png", 10), ("b.png", 30), ("2.png", 20)):
        Image.new("L", (4, 4), level).save(tmp_path / "a" / name)
    bank = folder.bank(tmp_path, 4, channels=1)
    assert bank.images.flatten(1)[:, 0].tolist() == [10, 20, 30]


def test_other_files_are_passed_over(tmp_path):
    root = fill(tmp_path, a=2, b=3, **{".hidden": 1})
    (root / "README.txt").write_text("words")
    (root / "a" / "Thumbs.db").write_bytes(b"x")
    (root / "a" / "notes.txt").write_text("words")
    (root / "a" / "._0.png").write_bytes(b"what a Mac leaves beside an image")
    (root / "b" / "folder.png").mkdir()
    bank = folder.bank(root, SIZE)
    assert (bank.names, bank.counts.tolist()) == (("a", "b"), [2, 3])


def test_ragged_classes_can_be_sampled(tmp_path):
    bank = folder.bank(fill(tmp_path, a=3, b=7, c=4, d=9), SIZE)
    episode = EpisodeSampler(bank, 4, 1, 2, tasks=3).sample()
    assert episode.query_x.shape == (3, 8, 3, SIZE, SIZE)


def test_load_splits_by_class(tmp_path):
    root = fill(tmp_path, **{f"class{k:02d}": 1 for k in range(25)})
    parts = folder.load(root, SIZE)
    assert [len(part) for part in parts] == [16, 4, 5]
    assert len({name for part in parts for name in part.names}) == 25
    assert folder.load(root, SIZE, seed=1).test.names != parts.test.names


def refuses(path, sentence):
    with pytest.raises(DataError, match=sentence) as caught:
        folder.bank(path, SIZE)
    assert "\n" not in str(caught.value)


def test_no_folder(tmp_path):
    refuses(tmp_path / "gone", "gone is no folder: name one that holds a subfolder for each class")
    (tmp_path / "file").write_text("")
    refuses(tmp_path / "file", "file is no folder")


def test_folder_without_classes(tmp_path):
    Image.new("L", (4, 4)).save(tmp_path / "loose.png")
    refuses(tmp_path, "has no subfolder: put the images of each class into one")


def test_empty_class_is_named(tmp_path):
    fill(tmp_path, full=2, bare=0)
    (tmp_path / "bare" / "notes.txt").write_text("")
    refuses(tmp_path, "bare holds no image: add some or remove the folder")


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


@pytest.mark.parametrize("channels", [0, 2, 4])
def test_channels_are_1_or_3(tmp_path, channels):
    with pytest.raises(ValueError, match=f"channels is {channels}; it must be 1"):
        folder.bank(tmp_path, channels=channels)
