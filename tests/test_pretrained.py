"""ResNet-50 bodies get the weights that were asked for, or a sentence says why not."""

import hashlib
import os
import shutil
from urllib.error import URLError

import pytest
import torch
from helpers import same_weights, told_in_one_line
from torch import nn
from torch.nn import functional as F
from torchvision.models import ResNet50_Weights, Weights, WeightsEnum, resnet50
from torchvision.transforms.functional import normalize

from metautils import pretrained
from metautils.learners.baseline import Baseline
from metautils.pretrained import FEATURES, Prepared, body, imagenet

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
    x = torch.rand(2, 3, 64, 48)
    with torch.no_grad():
        features = body(file).eval()(x)
        assert features.shape == (2, FEATURES)
        torch.testing.assert_close(network.fc(features), network(x), atol=1e-4, rtol=1e-4)


def test_random_body():
    torch.manual_seed(0)
    first, second = body(None), body(None)
    assert not any(name.startswith("fc.") for name in first.state_dict())
    assert not torch.equal(first.conv1.weight, second.conv1.weight)
    assert first.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert all(float(block.bn3.weight.detach().abs().sum()) == 0 for block in first.layer3)


# Weights of ImageNet


def test_imagenet_is_downloaded_once_with_its_hash(network, cache, downloads):
    net = body("imagenet")
    assert downloads == [(ResNet50_Weights.IMAGENET1K_V2.url, "11ad3fa6")]
    expected = network.state_dict()
    del expected["fc.weight"], expected["fc.bias"]
    assert same_weights(net.state_dict(), expected)
    assert [path.name for path in cache.iterdir()] == ["resnet50-11ad3fa6.pth"]
    # What was delivered has another hash, which torch would have noticed in a real download.
    told_in_one_line(imagenet, r"resnet50-11ad3fa6\.pth is damaged: its SHA-256 begins with")
    assert len(downloads) == 1


def test_file_in_the_cache_needs_no_network(cache, downloads, file, network, monkeypatch):
    monkeypatch.setattr(pretrained, "IMAGENET", published(file))
    cache.mkdir(parents=True)
    (cache / file.name).symlink_to(file)
    assert torch.equal(body().conv1.weight, network.conv1.weight)
    assert downloads == []


@pytest.mark.parametrize("content", [b"", b"half"])
def test_damaged_file_in_the_cache_is_named(cache, downloads, content):
    cache.mkdir(parents=True)
    path = cache / "resnet50-11ad3fa6.pth"
    path.write_bytes(content)
    found = hashlib.sha256(content).hexdigest()[:8]
    told_in_one_line(imagenet, f"{path} is damaged: .* begins with {found}, not 11ad3fa6. Delete")
    assert downloads == []


@pytest.mark.parametrize(
    "error", [URLError("no route to host"), TimeoutError("timed out"), RuntimeError("invalid hash")]
)
def test_failing_download_is_told(cache, monkeypatch, error):
    def fail(*arguments, **named):
        raise error

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    told_in_one_line(
        lambda: body("imagenet"),
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
    told_in_one_line(lambda: body("imagenet"), named.name)
    assert not (tmp_path / "evil").exists()


# Weights of a file


def test_body_of_a_checkpoint_of_meta_training(tmp_path, file):
    own = body(file)
    learner = Baseline(Prepared(own), nn.Linear(FEATURES, 64))
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
    assert float(body(tmp_path / "x.pt").conv1.weight.detach().abs().sum()) == 0


def test_missing_or_damaged_file_is_named(tmp_path):
    told_in_one_line(lambda: body(tmp_path / "gone.pt"), r"gone\.pt does not exist: check the name")
    (tmp_path / "x.pt").write_bytes(b"half")
    told_in_one_line(lambda: body(tmp_path / "x.pt"), r"x\.pt is damaged")


# Prepared


def test_prepared_normalises_colour_and_grey():
    torch.manual_seed(0)
    net, x = Prepared(nn.Identity()), torch.rand(2, 3, 5, 7)
    torch.testing.assert_close(net(x), normalize(x, MEAN, STD))
    torch.testing.assert_close(net(x[:, :1]), normalize(x[:, :1].expand_as(x), MEAN, STD))
    assert net.state_dict() == {}  # nothing that a checkpoint of the network lacks


@pytest.mark.parametrize("shape", [(28, 28), (9, 30), (30, 9), (5, 8), (8, 5), (8, 8)])
def test_prepared_scales_to_its_size(shape):
    torch.manual_seed(0)
    x = torch.rand(2, 1, *shape)
    colours = normalize(F.interpolate(x, (8, 8), mode="bilinear").expand(-1, 3, -1, -1), MEAN, STD)
    torch.testing.assert_close(Prepared(nn.Identity(), 8)(x), colours)
    assert Prepared(nn.Identity())(x).shape == (2, 3, *shape)
