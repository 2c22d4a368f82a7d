"""A classifier says the same of a file and of an opened image, before and after it is saved."""

from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from helpers import COLOURS, same_weights, tiny_classifier, told_in_one_line, weights_of
from PIL import Image
from sklearn.datasets import load_sample_image
from timm.data import create_transform, resolve_data_config
from torch import nn
from torchvision.transforms import v2

from metautils import classifier, pretrained
from metautils.classifier import Classifier
from metautils.classifier import to_test as of_test
from metautils.classifier import to_train as of_train
from metautils.evaluate import wilson95
from metautils.pretrained import LITE0, Body

# Images as tensors


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("shape", [(40, 20), (20, 40), (16, 16), (5, 9)])
@pytest.mark.parametrize("level", [0, 255])
def test_images_get_their_size_and_lie_between_0_and_1(interpolation, shape, level):
    net = tiny_classifier()
    net.body.interpolation = interpolation
    picture = Image.new("RGB", shape, (level,) * 3)
    for x in (of_train(net, True)(picture), of_test(net)(picture)):
        assert (x.shape, x.dtype) == ((3, 16, 16), torch.float32)
        torch.testing.assert_close(x, torch.full_like(x, level / 255))


def same_pixels(one, other):
    """But for what columns and then rows are rounded to: hardly anywhere, and by one value each.

    Bilinear in place of bicubic is 23 values off at most and 1 in the mean.
    """
    off = 255 * (one - other).abs()
    return float(off.max()) < 2.01 and float(off.mean()) < 0.01


@pytest.mark.parametrize("kind", [LITE0, "timm:mobilenetv2_100"])
@pytest.mark.parametrize("picture", ["china.jpg", "flower.jpg"])
def test_images_are_those_that_timm_tests_a_body_with(kind, picture):
    """Before its normalising, which the body does; to within the rounding of a pixel."""
    net = Classifier(pretrained.body(None, kind), ("a", "b"))
    photo = Image.fromarray(load_sample_image(picture)).resize((400, 300))
    known = "tf_efficientnet_lite0" if kind == LITE0 else kind.removeprefix("timm:")
    told = timm.get_pretrained_cfg(known).to_dict()
    theirs = create_transform(**resolve_data_config(pretrained_cfg=told))
    expected = theirs(photo) * net.body.std + net.body.mean
    assert net.body.interpolation == "bicubic"
    assert same_pixels(of_test(net)(photo), expected)


def test_images_are_those_that_torchvision_tests_its_resnet_with():
    net = Classifier(pretrained.body(None), ("a", "b"))
    photo = Image.fromarray(load_sample_image("china.jpg"))
    theirs = pretrained.IMAGENET.transforms()(photo)  # (3, 224, 224), normalised
    expected = theirs * net.body.std + net.body.mean
    assert same_pixels(of_test(net)(photo), expected)


def halves(width=64, height=32):
    """Black on the left, white on the right."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, width // 2 :] = 255
    return Image.fromarray(pixels)


def test_test_images_are_the_middle():
    x = of_test(tiny_classifier())(halves(200, 20))
    assert torch.equal(x, of_test(tiny_classifier())(halves(200, 20)))
    assert (x[:, :, 0] < 0.2).all() and (x[:, :, -1] > 0.8).all()
    # A pixel of the short side of 20 becomes 17 / 20, of which the crop leaves 16 / 17.
    black = (x[0] < 0.5).float().mean()
    assert float(black) == pytest.approx(0.5, abs=0.07)


@pytest.mark.parametrize(("mirror", "sides"), [(True, {-1, 1}), (False, {1})])
def test_training_images_are_mirrored_only_if_asked(mirror, sides):
    crop = of_train(tiny_classifier(), mirror)
    torch.manual_seed(0)
    crops = [crop(halves()) for _ in range(30)]
    slopes = {int((x[..., 8:].mean() - x[..., :8].mean()).sign()) for x in crops}
    assert slopes - {0} == sides  # 0 where the crop holds but one half
    assert len({float(x.mean()) for x in crops}) > 10  # cropped at random


# Use, save, load


def test_classify_tells_probabilities_highest_first(photos):
    net, path = tiny_classifier().train(), photos / "red" / "3.png"
    before = weights_of(net)
    told = net.classify(path)
    assert list(told.values()) == sorted(told.values(), reverse=True)
    assert sum(told.values()) == pytest.approx(1)
    assert same_weights(net.state_dict(), before)
    x = of_test(net)(Image.open(path))[None]
    with torch.no_grad():
        chances = net.eval()(x).softmax(1)[0].tolist()
    assert told == pytest.approx(dict(zip(COLOURS, chances, strict=True)))


def odd(kind):
    """An image that must not be converted carelessly."""
    noise = np.random.default_rng(0).integers(0, 256, (20, 30, 4), dtype=np.uint8)
    if kind == "transparent":
        return Image.fromarray(noise)
    if kind == "16 bits":
        return Image.fromarray(noise[..., 0].astype(np.uint16) << 8)
    return Image.fromarray(noise[..., :3])


@pytest.mark.parametrize("kind", ["plain", "lying", "transparent", "16 bits"])
def test_classify_takes_a_name_or_an_opened_image(tmp_path, kind):
    """And sees the same in both."""
    torch.manual_seed(0)
    net, exif = Classifier(Body(nn.Flatten(), 768), ("a", "b"), 16), Image.Exif()
    if kind == "lying":
        exif[0x0112] = 6
    odd(kind).save(tmp_path / "x.png", exif=exif)
    by_name = net.classify(str(tmp_path / "x.png"))
    with Image.open(tmp_path / "x.png") as image:
        assert net.classify(image) == pytest.approx(by_name)


def test_classify_names_a_file_that_is_no_image(tmp_path):
    net = tiny_classifier()
    (tmp_path / "x.jpg").write_text("words")
    told_in_one_line(lambda: net.classify(tmp_path / "x.jpg"), r"x\.jpg is no readable image")
    told_in_one_line(lambda: net.classify(tmp_path / "y.jpg"), r"y\.jpg is no readable image")


@pytest.mark.parametrize("kind", ["resnet50", "efficientnet_lite0", "timm:convnext_atto"])
def test_saved_classifier_gives_the_same_answers(tmp_path, kind):
    torch.manual_seed(0)
    net = Classifier(pretrained.body(None, kind), ("a", "b", "c"), 32)
    x = torch.randn(4, 3, 32, 32)
    net.train()(x)  # moves the statistics
    net.save(tmp_path / "x.pt")
    torch.manual_seed(1)
    loaded = classifier.load(tmp_path / "x.pt")
    assert (loaded.classes, loaded.size, loaded.training) == (net.classes, 32, False)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), net.eval()(x))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ([1, 2], "holds no classifier: name the model.pt"),
        ({"weights": {}, "size": 32}, "holds no classifier"),
        ({"classes": 3, "size": 32, "body": "resnet50", "weights": {}}, "holds no classifier"),
        ({"classes": ["a"], "size": 32, "body": "resnet50", "weights": [1]}, "holds no class"),
        ({"classes": ["a"], "size": 32, "weights": {}}, "holds no classifier"),
        (tiny_classifier().told(), "holds another network"),
    ],
    ids=["list", "without names", "a number", "a list of weights", "no body", "another body"],
)
def test_file_that_holds_no_classifier(tmp_path, content, sentence):
    torch.save(content, tmp_path / "x.pt")
    told_in_one_line(lambda: classifier.load(tmp_path / "x.pt"), rf"x\.pt .*{sentence}")


def test_file_of_before_scales_images_as_it_did_then(tmp_path):
    """Whatever its body says of itself today; a file of today says it itself."""
    net = Classifier(pretrained.body(None, "timm:convnext_atto"), ("a", "b"), 32)
    net.save(tmp_path / "x.pt")
    assert classifier.scaling(classifier.load(tmp_path / "x.pt").body) == {
        "enlarged": pytest.approx(1 / 0.875),
        "interpolation": "bicubic",
    }
    old = {k: x for k, x in net.told().items() if k not in ("enlarged", "interpolation")}
    torch.save(old, tmp_path / "x.pt")
    found = classifier.load(tmp_path / "x.pt").body
    assert classifier.scaling(found) == {"enlarged": 232 / 224, "interpolation": "bilinear"}


def test_damaged_or_missing_classifier(tmp_path):
    (tmp_path / "x.pt").write_bytes(b"half")
    told_in_one_line(lambda: classifier.load(tmp_path / "x.pt"), r"x\.pt is damaged")
    told_in_one_line(lambda: classifier.load(tmp_path / "y.pt"), r"y\.pt does not exist")


# Batches and features


def test_features_are_those_of_the_body(split):
    net = tiny_classifier().train()
    head = net.head
    rows, labels = classifier.features(net, split.validation).tensors
    assert net.head is head
    assert net.training
    assert labels.tolist() == split.validation.targets
    with torch.no_grad():
        x = torch.stack([of_test(net)(split.validation[k][0]) for k in range(6)])
        torch.testing.assert_close(rows, net.length(net.body.eval()(x)), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16])
def test_features_get_one_length(kind):
    """In all digits, whatever the body computed in; of nothing, nothing."""
    x = torch.randn(3, 16).to(kind)
    x[2] = 0
    y = classifier.OneLength()(x)
    assert y.dtype == torch.promote_types(kind, torch.float32)
    torch.testing.assert_close(y.norm(dim=1), torch.tensor([4.0, 4.0, 0.0], dtype=y.dtype))
    assert nn.functional.cosine_similarity(x[:2].to(y), y[:2]).min() > 0.9999


def test_last_batch_is_not_a_single_image(split):
    """It has no variance; a validation batch needs none, so nothing is left out there."""
    look = of_test(tiny_classifier())
    for part, shuffle, sizes in ((split.train, True, [17]), (split.train, False, [17, 1])):
        loader = classifier.batches(part, 17, look, shuffle)
        assert [len(y) for _, y in loader] == sizes
    whole = classifier.batches(split.train, 18, look, True)
    assert [len(y) for _, y in whole] == [18]


# The test


def six_answers():
    """Six images of three classes, of which the second, third and last are wrong."""
    chances = [
        [0.7, 0.2, 0.1],
        [0.6, 0.3, 0.1],
        [0.8, 0.1, 0.1],
        [0.1, 0.8, 0.1],
        [0.2, 0.2, 0.6],
        [0.1, 0.7, 0.2],
    ]
    labels, files = torch.tensor([0, 1, 1, 1, 2, 2]), tuple(f"{k}.png" for k in range(6))
    return classifier.Tested(torch.tensor(chances), labels, files, ("a", "b", "c"))


def test_numbers_of_the_test_by_hand():
    t = six_answers()
    assert (t.right, t.accuracy) == (3, 50)
    assert t.interval == wilson95(3, 6)
    assert t.confusion.tolist() == [[1, 0, 0], [2, 1, 0], [0, 1, 1]]
    assert t.surest_errors() == [2, 5, 1]  # 0.8, 0.7 and 0.6 for the wrong class
    assert t.surest_errors(2) == [2, 5]
    assert str(t) == "50.0 % of 6 test images, 95 % interval 18.8 to 81.2"


def test_surest_errors_are_not_those_that_gave_the_truth_least():
    """With three classes: 0.1 for the truth and 0.5 for another is no sure answer."""
    chances = torch.tensor([[0.5, 0.4, 0.1], [0.7, 0.1, 0.2]])
    t = classifier.Tested(chances, torch.tensor([2, 2]), ("a.png", "b.png"), ("a", "b", "c"))
    assert t.surest_errors() == [1, 0]


def test_report_says_what_an_accuracy_hides():
    """Forty of one class and one of another, which is never found."""
    chances = torch.tensor([[0.9, 0.1, 0.0]]).expand(41, 3)
    labels = torch.tensor([0] * 40 + [1])
    t = classifier.Tested(chances, labels, ("x.png",) * 41, ("common", "rare", "none"))
    assert t.accuracy == pytest.approx(100 * 40 / 41) == t.majority
    assert t.balanced == 50
    assert t.recalls[:2].tolist() == [100, 0] and t.recalls[2].isnan()
    lines = t.report().splitlines()
    assert lines[0] == str(t)
    assert lines[1].startswith("50.0 % as a mean over classes; 97.6 % would be right")
    assert lines[1].endswith("if every answer were common")
    assert lines[2:4] == ["  rare    0 of 1 found", "  common  40 of 40 found"]
    short = ["  rare  0 of 1 found", "  and 2 more classes, found as often or oftener"]
    assert t.report(1).splitlines()[-2:] == short


@pytest.mark.parametrize("shape", [(2, 20_000), (20_000, 2), (1, 9000)])
def test_a_strip_is_not_enlarged_to_gigabytes(shape):
    """Its middle alone is seen, so its ends are cut off before."""
    height, width = shape
    ramp = np.linspace(0, 255, max(shape)).astype(np.uint8)  # along the strip
    pixels = np.broadcast_to(ramp if height < width else ramp[:, None], shape)
    picture = Image.fromarray(np.stack([pixels] * 3, -1))
    whole = of_test(tiny_classifier(size=224))
    enlarged = v2.Compose(whole.transforms[:3])(picture)
    assert min(enlarged.shape[1:]) == 232 and enlarged.numel() <= 3 * 8 * 232**2
    x = whole(picture)
    assert x.shape == (3, 224, 224)
    assert x[0].std() < 0.1  # the middle of a slow ramp


@pytest.mark.parametrize("size", [(800, 100), (90, 720), (64, 64)])
def test_ordinary_images_keep_their_ends(size):
    x = v2.functional.pil_to_tensor(Image.new("RGB", size))
    assert classifier._without_ends(x) is x


def test_class_that_is_never_answered_has_its_place_in_the_confusion():
    t = replace(six_answers(), chances=torch.eye(3)[[0] * 6], labels=torch.zeros(6).long())
    assert t.confusion.tolist() == [[6, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert t.surest_errors() == []


def test_test_is_what_the_classifier_says_of_each_file(split):
    net = tiny_classifier()
    t = classifier.test(net, split.test)
    assert t.classes == tuple(COLOURS)
    assert list(zip(t.files, t.labels.tolist(), strict=True)) == split.test.samples
    for file, chances in zip(t.files, t.chances.tolist(), strict=True):
        told = net.classify(file)
        assert chances == pytest.approx([told[name] for name in COLOURS], abs=0.02)
