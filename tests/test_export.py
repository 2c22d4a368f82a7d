"""The exported file answers as the classifier does, for any number of images, without our code."""

import importlib.util
import inspect
import json

import numpy as np
import pytest
import torch
from helpers import COLOURS, tiny_body
from PIL import Image
from torchvision.transforms import v2

from metautils import classifier, cli, export, pretrained
from metautils.errors import BadArgument
from metautils.files import DataError
from metautils.recognise import Recogniser

NEEDS_ONNX = pytest.mark.skipif(
    "dynamo" not in inspect.signature(torch.onnx.export).parameters
    or any(importlib.util.find_spec(x) is None for x in (*export.NEEDED, "onnxruntime")),
    reason="onnx, onnxscript or onnxruntime is not installed, or this torch is too old for them",
)


@pytest.fixture(scope="module")
def net():
    """A classifier whose answers differ from image to image."""
    torch.manual_seed(0)
    made = classifier.Classifier(tiny_body(), tuple(COLOURS), 16)
    made.train()(3 * torch.randn(64, 3, 16, 16))  # moves the statistics
    with torch.no_grad():
        made.head.weight *= 8
    return made.eval()


@pytest.fixture(scope="module")
def pictures():
    noise = np.random.default_rng(0).integers(0, 256, (7, 20, 30, 3), dtype=np.uint8)
    return [Image.fromarray(each // (1 + k % 3)) for k, each in enumerate(noise)]


def cut_out(net, pictures):
    """Images as the file wants them: what is left of the test's steps but normalising."""
    steps = [s for s in classifier.to_test(net).transforms if not isinstance(s, v2.Normalize)]
    return torch.stack([v2.Compose(steps)(each) for each in pictures])


def ours(net, pictures):
    found = torch.stack([x for _, x in classifier.classify_each(net, pictures)])
    assert found.std(0).max() > 0.02
    return found.numpy()


def by_onnxruntime(path, images, output="probabilities"):
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (answers,) = session.run([output], {"images": images.numpy()})
    return answers, session.get_modelmeta().custom_metadata_map


def close(one, other):
    np.testing.assert_allclose(one, other, atol=1e-4, rtol=0)


@NEEDS_ONNX
def test_onnx_answers_as_the_classifier(tmp_path, net, pictures, capfd):
    export.export(net, tmp_path / "new" / "model.onnx")
    expected, images = ours(net, pictures), cut_out(net, pictures)
    for count in (7, 2, 1):
        answers, told = by_onnxruntime(tmp_path / "new" / "model.onnx", images[:count])
        close(answers, expected[:count])
    assert json.loads(told["classes"]) == list(COLOURS)
    assert told["size"] == "16"
    assert "scale the short side to 17 pixels" in told["images"]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model.onnx"]
    assert capfd.readouterr().out == ""


@NEEDS_ONNX
@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_resnet_50_answers_as_the_classifier(tmp_path, suffix):
    """A body with all the layers of a real one."""
    torch.manual_seed(0)
    net = classifier.Classifier(pretrained.body(None), ("a", "b", "c"), 32)
    for _ in range(3):
        net.train()(torch.randn(8, 3, 32, 32))
    pictures = [Image.effect_noise((40, 50), 20 * k).convert("RGB") for k in range(1, 4)]
    expected, images = ours_of(net, pictures), cut_out(net, pictures)
    path = tmp_path / f"model{suffix}"
    export.export(net, path)
    if suffix == ".onnx":
        close(by_onnxruntime(path, images)[0], expected)
    else:
        close(torch.export.load(path).module()(images).detach().numpy(), expected)


def ours_of(net, pictures):
    return torch.stack([x for _, x in classifier.classify_each(net, pictures)]).numpy()


def test_program_answers_as_the_classifier(tmp_path, net, pictures):
    export.export(net, tmp_path / "model.pt2")
    expected, images = ours(net, pictures), cut_out(net, pictures)
    held = {"classifier.json": ""}
    program = torch.export.load(tmp_path / "model.pt2", extra_files=held)
    for count in (7, 2, 1):
        close(program.module()(images[:count]).detach().numpy(), expected[:count])
    told = json.loads(held["classifier.json"])
    assert json.loads(told["classes"]) == list(COLOURS)


def test_told_is_how_this_body_wants_its_images():
    net = classifier.Classifier(pretrained.body(None, "efficientnet_lite0"), ("a", "b"))
    assert export.told(net)["images"].endswith(
        "scale the short side to 256 pixels (bicubic, antialiased), cut out the middle"
    )


def test_command_line_exports_and_says_how_to_use_it(tmp_path, net, capsys, monkeypatch):
    monkeypatch.setattr(classifier, "load", lambda path: net)
    out = tmp_path / "model.pt2"
    assert cli.main(["export", str(tmp_path), "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert f"{out} gives the probabilities of {', '.join(COLOURS)}." in told
    assert (
        "Its images: RGB in [0, 1], (n, 3, 16, 16): scale the short side to 17 pixels "
        "(bilinear, antialiased), cut out the middle.\n"
    ) in told
    assert out.exists()


@pytest.mark.parametrize(
    ("name", "error", "told"),
    [
        ("model.pt", BadArgument, r"model\.pt ends in neither \.onnx nor \.pt2"),
        ("folder.pt2", DataError, r"folder\.pt2 is a folder: name a file"),
        ("file/model.pt2", DataError, "file cannot be written to"),
    ],
)
def test_bad_names_are_told_before_any_work(tmp_path, net, monkeypatch, name, error, told):
    monkeypatch.setattr(torch.export, "export", None)
    (tmp_path / "folder.pt2").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(error, match=told) as caught:
        export.export(net, tmp_path / name)
    assert "\n" not in str(caught.value)


def test_onnx_without_its_packages_is_a_sentence(tmp_path, net, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnxscript" else found(name)
    )
    with pytest.raises(BadArgument, match=r"needs onnxscript: `pip install onnxscript`, or give"):
        export.export(net, tmp_path / "model.onnx")
    monkeypatch.setattr(export, "NEEDED", ())
    monkeypatch.setattr(torch.onnx, "export", lambda model, args: None)
    with pytest.raises(BadArgument, match=r"needs torch 2\.5 or newer, and this is .*\.pt2"):
        export.export(net, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


# A recogniser


@pytest.fixture
def things(pictures):
    """Three classes of two pictures each, and one of one."""
    torch.manual_seed(0)
    made = Recogniser(tiny_body(), size=16)
    made.remember(pictures, ["a", "a", "b", "b", "c", "c", "d"])
    return made


@pytest.mark.parametrize("head", ["centroid", "ridge"])
@pytest.mark.parametrize("suffix", [pytest.param(".onnx", marks=NEEDS_ONNX), ".pt2"])
def test_recogniser_gives_its_scores(tmp_path, things, pictures, head, suffix):
    things.head = head
    expected = things.scores(things.features(pictures)).numpy()
    assert expected.std(0).max() > 0.02
    images = cut_out(things.seen_by(), pictures)
    path = tmp_path / f"things{suffix}"
    export.export(things, path)
    for count in (7, 1):
        if suffix == ".onnx":
            answers, told = by_onnxruntime(path, images[:count], "scores")
        else:
            held = {"classifier.json": ""}
            answers = torch.export.load(path, extra_files=held).module()(images[:count]).detach()
            told = json.loads(held["classifier.json"])
        close(answers, expected[:count])
    assert json.loads(told["classes"]) == things.classes
    assert float(told["threshold"]) == things.threshold


def test_command_exports_remembered_things(tmp_path, things, capsys, monkeypatch):
    things.save(tmp_path / "things.pt")
    monkeypatch.setattr(pretrained, "body", lambda *a: things.body)
    out = tmp_path / "things.pt2"
    assert cli.main(["export", str(tmp_path / "things.pt"), "--out", str(out)]) == 0
    assert f"{out} gives the scores of a, b, c, d." in capsys.readouterr().out
    assert out.exists()


def test_command_exports_nothing_of_another_body(tmp_path, things, capsys, monkeypatch):
    things.save(tmp_path / "things.pt")
    monkeypatch.setattr(pretrained, "body", lambda *a: tiny_body(seed=5))
    out = tmp_path / "things.pt2"
    assert cli.main(["export", str(tmp_path / "things.pt"), "--out", str(out)]) == 2
    assert "was made with other weights" in capsys.readouterr().err
    classifier.Classifier(tiny_body(seed=3), ["a"], 16).save(tmp_path / "run" / "model.pt")
    assert cli.main(["export", str(tmp_path / "run/model.pt"), "--out", str(out)]) == 2
    assert "model.pt holds no remembered things" in capsys.readouterr().err
    assert not out.exists()


def test_recogniser_of_one_class_is_told(tmp_path, pictures):
    made = Recogniser(tiny_body(), size=16)
    made.remember(pictures[:2], ["a", "a"])
    with pytest.raises(BadArgument, match="give two or more, or one and --strangers"):
        export.export(made, tmp_path / "things.pt2")
    assert not (tmp_path / "things.pt2").exists()
