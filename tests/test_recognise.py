"""Things are recognised from a photo or a few, nothing is trained, and strangers are told."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import COLOURS, ROOT, paint, tiny_body, tiny_classifier
from PIL import Image

from metautils import cli, pretrained, recognise
from metautils.errors import BadArgument
from metautils.files import DataError
from metautils.learners.baseline import SCALE, ridge_head
from metautils.recognise import Recogniser, load


def colour(name, seed=0):
    """A noisy photo of a colour, which may be one that no class has."""
    rgb = {**COLOURS, "yellow": (230, 220, 40), "black": (5, 5, 5)}[name]
    noise = np.random.default_rng(seed).integers(-40, 41, (20, 24, 3))
    return Image.fromarray((noise + rgb).clip(0, 255).astype(np.uint8))


def made(shots=2, head="centroid", names=COLOURS):
    """A recogniser of colours on a tiny body."""
    things = Recogniser(tiny_body(), head)
    for seed in range(shots):
        things.remember([colour(name, seed) for name in names], list(names))
    return things


@pytest.mark.parametrize("head", recognise.HEADS)
@pytest.mark.parametrize("shots", [1, 3])
def test_things_are_recognised(head, shots):
    things = made(shots, head)
    for name in COLOURS:
        answer = things.recognise(colour(name, 9))
        assert answer.name == name
        assert answer.score > answer.threshold
        assert list(answer.scores.values()) == sorted(answer.scores.values(), reverse=True)
        assert set(answer.scores) == set(COLOURS)


def test_stranger_is_none_of_these():
    answer = made(names=["red", "green"]).recognise(colour("blue", 9))
    assert answer.name is None
    assert answer.score <= answer.threshold
    assert str(answer).startswith("none of these (")


def test_scores_are_cosines_with_class_means():
    things, photo = made(shots=3), colour("red", 9)
    x = things.features([photo])
    assert x.norm(dim=1).item() == pytest.approx(1, abs=1e-5)
    for k, name in enumerate(things.classes):
        own = [j for j, other in enumerate(things.names) if other == name]
        mean = things.photos[own].mean(0)
        expected = float(x[0] @ mean / mean.norm())
        assert things.scores(x)[0, k].item() == pytest.approx(expected, abs=1e-5)


def test_ridge_is_the_least_squares_fit_held_towards_nothing():
    """Against the other form of the same equation, with a weight for each feature."""
    torch.manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(2, 6, 4, dtype=torch.float64), dim=-1)
    q = torch.nn.functional.normalize(torch.randn(2, 3, 4, dtype=torch.float64), dim=-1)
    labels = torch.tensor([[0, 1, 2, 0, 1, 2], [2, 1, 0, 0, 0, 1]])
    y = torch.eye(3, dtype=torch.float64)[labels]
    from metautils.learners.baseline import RIDGE

    held = x.mT @ x + RIDGE * torch.eye(4, dtype=torch.float64)
    weights = torch.linalg.solve(held, x.mT @ y)
    assert torch.allclose(ridge_head(x, labels, q), SCALE * q @ weights)


def test_classes_come_and_go():
    things = made(names=["red", "green"])
    assert things.recognise(colour("blue", 9)).name is None
    things.remember([colour("blue")], ["blue"])
    assert things.recognise(colour("blue", 9)).name == "blue"
    things.forget("red")
    assert things.classes == ["green", "blue"]
    assert things.recognise(colour("red", 9)).name != "red"
    assert len(things.photos) == len(things.names) == 3


def test_order_of_remembering_changes_no_score():
    one, other = made(names=["red", "green", "blue"]), made(names=["blue", "red", "green"])
    photo = colour("green", 9)
    a, b = one.recognise(photo), other.recognise(photo)
    assert a.threshold == pytest.approx(b.threshold, abs=1e-6)
    assert a.scores == pytest.approx(b.scores, abs=1e-6)


def test_same_photo_again_is_passed_over():
    things = made()
    things.remember([colour("red", 0), colour("red", 7), colour("red", 7)], ["red"] * 3)
    assert things.names.count("red") == 3


def test_leaving_out_shows_no_photo_to_itself():
    """Known scores are those of a recogniser that has not seen the photo."""
    things = made(shots=2)
    things.remember([colour("yellow")], ["yellow"])
    known = things.known()
    assert len(known) == 6
    for k in range(6):
        less = Recogniser(things.body)
        keep = [j for j in range(7) if j != k]
        less.photos, less.names = things.photos[keep], [things.names[j] for j in keep]
        assert known[k].item() == pytest.approx(less.scores(things.photos[[k]]).max().item())


def test_strangers_of_its_own_are_classes_left_out():
    things = made(shots=2)
    unknown = things.unknown()
    assert len(unknown) == 6
    less = made(shots=2)
    less.forget("blue")
    own = [k for k, name in enumerate(things.names) if name == "blue"]
    expected = less.scores(things.photos[own]).amax(1)
    # In the order of the classes.
    start = 2 * things.classes.index("blue")
    assert unknown[start : start + 2].tolist() == pytest.approx(expected.tolist())


def test_strangers_that_are_met_set_the_threshold():
    things = made()
    before = things.threshold
    things.meet([colour("black", k) for k in range(3)])
    assert len(things.unknown()) == 3
    assert things.threshold != before
    assert things.recognise(colour("black", 9)).name is None
    assert things.recognise(colour("red", 9)).name == "red"


@pytest.mark.parametrize(
    ("known", "unknown", "threshold"),
    [
        ([0.9, 0.8], [0.2, 0.4], 0.6),  # the middle of the gap
        ([0.9, 0.3, 0.8, 0.7], [0.2, 0.4, 0.1, 0.5], 0.6),  # one of four is refused, none let in
        ([0.5], [0.5], 0.5),
        ([], [0.1, 0.2, 0.3, 0.4, 0.5], 0.4),  # lets in a quarter of the strangers
        ([], [0.3, 0.3], 0.3),  # of two photos the one is the other's stranger
    ],
)
def test_threshold_between_scores(known, unknown, threshold):
    assert recognise._between(*map(torch.tensor, (known, unknown))) == pytest.approx(threshold)


def test_one_class_and_strangers_will_do():
    things = made(names=["red"])
    with pytest.raises(BadArgument, match=r"^1 class\(es\) of photos .* --strangers"):
        things.recognise(colour("red", 9))
    things.meet([colour("blue"), colour("green")])
    assert things.recognise(colour("red", 9)).name == "red"
    assert things.recognise(colour("blue", 9)).name is None


def test_nothing_is_trained():
    things = made()
    before = [x.clone() for x in things.body.state_dict().values()]
    things.body.train()  # whatever the body was used for before
    things = Recogniser(things.body)
    things.remember([colour("red"), colour("blue")], ["red", "blue"])
    things.recognise(colour("red", 5))
    assert all(map(torch.equal, before, things.body.state_dict().values()))


def test_saved_and_loaded(tmp_path):
    things = made(head="ridge")
    things.meet([colour("black")])
    things.save(tmp_path / "things.pt")
    other = load(tmp_path / "things.pt", things.body)
    photo = colour("red", 9)
    assert other.recognise(photo) == things.recognise(photo)
    other.remember([colour("red", 0)], ["red"])  # known already
    assert other.names == things.names


def test_file_holds_no_photo(tmp_path):
    things = made()
    things.save(tmp_path / "things.pt")
    saved = torch.load(tmp_path / "things.pt", weights_only=True)
    numbers = {x.shape for x in saved.values() if isinstance(x, torch.Tensor)}
    assert numbers == {(6, 8), (0, 8)}


def test_file_of_another_body_is_told(tmp_path):
    made().save(tmp_path / "things.pt")
    with pytest.raises(DataError, match="with other weights .* give --run or --body"):
        load(tmp_path / "things.pt", tiny_body(seed=1))


@pytest.mark.parametrize("content", [b"half", None])
def test_file_that_is_none(tmp_path, content):
    path = tmp_path / "things.pt"
    path.write_bytes(content) if content else torch.save({"names": []}, path)
    with pytest.raises(DataError, match=r"things\.pt (is damaged|holds no remembered things)"):
        load(path)


@pytest.mark.parametrize(
    ("wrong", "error", "told"),
    [
        (lambda x: x.remember([colour("red", 0)], ["blue"]), DataError, "same picture as one of"),
        (lambda x: x.remember([colour("red")], ["a", "b"]), BadArgument, "1 photos and 2 names"),
        (lambda x: x.meet([colour("red", 0)]), DataError, "is no stranger but a photo of 'red'"),
        (lambda x: x.forget("pink"), BadArgument, "no class 'pink' .* there are: blue, green, red"),
        (lambda x: x.remember(["gone.png"], ["red"]), DataError, "gone.png is no readable image"),
    ],
)
def test_what_is_wrong_is_told_and_changes_nothing(wrong, error, told):
    things = made()
    names, photos, threshold = list(things.names), things.photos.clone(), things.threshold
    with pytest.raises(error, match=told):
        wrong(things)
    assert things.names == names
    assert torch.equal(things.photos, photos)
    assert not len(things.strangers)
    assert things.threshold == threshold


def test_head_that_is_none():
    with pytest.raises(BadArgument, match="'tree' is no head: name one of centroid, ridge"):
        Recogniser(tiny_body(), "tree")


def test_first_answer_waits_for_no_other_library():
    """Each takes a second or more to import, and no answer needs it."""
    told = "import sys; from metautils import cli, recognise; cli._parser(['recognise']); "
    told += "print([x for x in ('sklearn', 'matplotlib') "
    told += "if x in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", told], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout == "[]\n"


# On the command line


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Photos of three colours to remember, others to recognise, and a tiny body for all names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretrained, "body", lambda weights=None: tiny_body())
    paint(tmp_path / "things", 2)
    shutil.rmtree(tmp_path / "things" / "blue")
    for name in COLOURS:
        colour(name, 9).save(tmp_path / f"{name}.png")
    return tmp_path


def say(capsys, *arguments):
    """The lines of `python -m metautils recognise`."""
    assert cli.main(["recognise", *arguments]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out.splitlines()


def test_command_recognises(capsys, place):
    lines = say(capsys, "--support", "things", "red.png", "green.png", "blue.png")
    told = ["red.png: red", "green.png: green", "blue.png: none of these"]
    assert [line.split(" (")[0] for line in lines] == told


def test_command_goes_on_from_what_it_saved(capsys, place):
    first = say(capsys, "--support", "things", "--head", "ridge", "--save", "x.pt", "red.png")
    shutil.rmtree("things")
    assert say(capsys, "--support", "x.pt", "red.png") == first
    assert say(capsys, "--support", "x.pt", "--head", "centroid", "red.png") != first


def test_command_takes_strangers_and_folders(capsys, place):
    (place / "others").mkdir()
    for k in range(3):
        colour("black", k).save(place / "others" / f"{k}.png")
    alone = say(capsys, "--support", "things", "things/red")
    more = say(capsys, "--support", "things", "--strangers", "others", "things/red")
    assert len(alone) == len(more) == 2
    assert alone != more


def test_command_takes_the_body_of_a_fine_tuning(capsys, place, monkeypatch):
    tiny_classifier(seed=3).save("run/model.pt")
    monkeypatch.setattr(pretrained, "body", lambda *a: tiny_body(seed=5))
    lines = say(capsys, "--support", "things", "--run", "run", "--save", "x.pt", "red.png")
    assert lines[0].startswith("red.png: red (")
    assert say(capsys, "--support", "x.pt", "--run", "run", "red.png") == lines
    assert say(capsys, "--support", "x.pt", "--run", "run/model.pt", "red.png") == lines
    assert cli.main(["recognise", "--support", "x.pt", "red.png"]) == 2
    assert "x.pt was made with other weights" in capsys.readouterr().err


def spoil(place, name):
    """What is wrong with the photos, by a word."""
    if name == "one":
        shutil.rmtree("things/red")
    elif name == "empty":
        shutil.rmtree("things/red"), (place / "things" / "red").mkdir()
    elif name == "twice":
        Image.open("things/red/0.png").save("things/green/again.bmp")
    elif name == "none":
        (place / "things" / "red" / "0.png").write_bytes(b"no image")


@pytest.mark.parametrize(
    ("wrong", "more", "sentence"),
    [
        ("one", [], "things has 1 subfolder(s) of photos: give two or more, one for"),
        ("empty", [], "red holds no image: add some or remove the folder"),
        ("twice", [], "is the same picture as one of 'green'"),
        ("none", [], "0.png is no readable image: mend or remove it"),
        ("", ["--run", "gone"], "record.json does not exist: train with --out gone first"),
        ("", ["--strangers", "gone"], "gone is no readable image: mend or remove it"),
        ("", ["--save", "things"], "things is a folder: name a file"),
    ],
)
def test_command_tells_what_is_wrong(capsys, place, wrong, more, sentence):
    spoil(place, wrong)
    assert cli.main(["recognise", "--support", "things", "red.png", *more]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("metautils: ") and err.count("\n") == 1
    assert sentence in err


def test_photo_to_recognise_that_is_none_does_not_stop_the_others(capsys, place):
    (place / "bad.png").write_bytes(b"no image")
    files = ["red.png", "bad.png", "gone.png", "blue.png"]
    assert cli.main(["recognise", "--support", "things", *files]) == 2
    out, err = capsys.readouterr()
    assert [line.split(":")[0] for line in out.splitlines()] == ["red.png", "blue.png"]
    assert [line.split(" ")[1] for line in err.splitlines()] == ["bad.png", "gone.png"]
