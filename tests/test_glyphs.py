"""The glyphs look like handwriting in numbers: same seed, same bank; one character, many hands."""

import hashlib
import pathlib
import subprocess
import sys

import pytest
import torch
from helpers import elsewhere

from metautils.data import glyphs
from metautils.data.bank import ClassBank

SMALL = {"alphabets": 4, "characters": 6, "drawings": 5}
SIDES = ("left", "right")


@pytest.fixture(scope="module")
def bank() -> ClassBank:
    return glyphs.generate(alphabets=10, characters=12, drawings=10)


def fingerprint(bank: ClassBank) -> str:
    return hashlib.sha256(bank.images.numpy().tobytes()).hexdigest()


def test_same_in_another_process():
    code = (
        "import hashlib; from metautils.data import glyphs;"
        f"bank = glyphs.generate(**{SMALL}, seed=3);"
        "print(hashlib.sha256(bank.images.numpy().tobytes()).hexdigest())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == fingerprint(glyphs.generate(**SMALL, seed=3))


def test_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    glyphs.generate(**SMALL)
    assert torch.equal(before, torch.get_rng_state())


def test_seeds_differ():
    assert fingerprint(glyphs.generate(**SMALL)) != fingerprint(glyphs.generate(**SMALL, seed=1))


def test_shapes_and_names(bank):
    assert bank.images.shape == (1200, 1, 28, 28)
    assert bank.images.dtype == torch.uint8
    assert bank.counts.tolist() == [10] * 120
    assert len(set(bank.names)) == 120
    assert bank.names[13] == "alphabet01/character01"


def test_other_sizes_keep_the_share_of_ink(bank):
    big = glyphs.generate(alphabets=10, characters=12, drawings=10, size=56)
    assert big.images.shape[-2:] == (56, 56)
    assert big.images.float().mean() == pytest.approx(bank.images.float().mean().item(), rel=0.05)


def test_every_drawing_has_ink_and_paper(bank):
    ink = bank.images.float().div(255).flatten(1).mean(1)
    assert ink.min() > 0.003
    assert ink.max() < 0.5
    assert bank.images.flatten(1).amax(1).min() > 100


def test_few_drawings_touch_the_border(bank):
    inner = bank.images[..., 1:-1, 1:-1].flatten(1).long().sum(1)
    border = bank.images.flatten(1).long().sum(1) - inner
    assert (border > 2 * 255).float().mean() < 0.03


def test_drawings_differ_but_less_than_characters(bank):
    x = bank.images.float().div(255)
    blurred = torch.nn.functional.avg_pool2d(x, 4).flatten(1).view(120, 10, -1)
    same = (blurred[:, :1] - blurred[:, 1:]).norm(dim=-1)
    other = (blurred[:, :1] - blurred.roll(1, 0)[:, 1:]).norm(dim=-1)
    assert same.min() > 0
    assert same.mean() < 0.85 * other.mean()


def test_more_drawings_keep_the_characters():
    few, many = (glyphs.generate(alphabets=3, characters=4, drawings=d) for d in (1, 9))
    assert torch.equal(few.attributes, many.attributes)


def test_attributes_describe_each_class(bank):
    a = bank.attributes
    assert a.shape == (120, len(glyphs.ATTRIBUTES))
    assert len(set(glyphs.ATTRIBUTES)) == len(glyphs.ATTRIBUTES)
    assert a.min() >= 0
    assert a.max() <= 1
    assert (a.std(0) > 0.02).all()
    assert len(a.unique(dim=0)) > 115


def test_attributes_agree_with_the_drawings(bank):
    """What the attributes say of ink and place is seen in the mean drawing of each class."""
    mean = bank.images.float().div(255).view(120, 10, 28, 28).mean(1)
    columns = {name: bank.attributes[:, k] for k, name in enumerate(glyphs.ATTRIBUTES)}
    left, right = mean[..., :11].sum((1, 2)), mean[..., 17:].sum((1, 2))
    told = [sum(columns[f"ink {r} {c}"] for r in ("top", "middle", "bottom")) for c in SIDES]
    seen = (left - right) / mean.sum((1, 2))
    assert torch.corrcoef(torch.stack([told[0] - told[1], seen]))[0, 1] > 0.8
    told, ink = columns["long path"], mean.sum((1, 2))
    assert torch.corrcoef(torch.stack([told, ink]))[0, 1] > 0.9


def test_load_cuts_by_alphabets(empty_cache):
    parts = glyphs.load(alphabets=10, characters=3, drawings=2)
    alphabets = [{name.split("/")[0] for name in part.names} for part in parts]
    assert [len(part) for part in parts] == [21, 3, 6]
    assert [len(names) for names in alphabets] == [7, 1, 2]
    assert len(set.union(*alphabets)) == 10
    assert all(part.attributes is not None for part in parts)


@pytest.mark.parametrize("name", ["alphabets", "characters", "drawings"])
@pytest.mark.parametrize("value", [0, -1])
def test_numbers_must_be_positive(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}; it must be at least 1"):
        glyphs.generate(**{**SMALL, name: value})


def test_size_must_hold_a_drawing():
    with pytest.raises(ValueError, match="size is 7; a drawing needs at least 8 pixels"):
        glyphs.generate(**SMALL, size=7)


def test_three_parts_need_three_alphabets():
    with pytest.raises(ValueError, match="2 alphabets cannot be cut into three parts"):
        glyphs.load(alphabets=2)


def refuse(*numbers, **named):
    raise AssertionError("The cache was there, but the glyphs were drawn again.")


def test_bank_comes_from_the_cache_the_second_time(empty_cache, monkeypatch):
    """Part by part the same to the last bit, attributes and all."""
    numbers = {"seed": 3, "alphabets": 4, "characters": 3, "drawings": 2}
    drawn = glyphs.load(**numbers)
    assert [path.name for path in empty_cache.iterdir()] == ["glyphs-4-3-2-3.pt"]
    with monkeypatch.context() as patch:
        patch.setattr(glyphs, "generate", refuse)
        kept = glyphs.load(**numbers)
    for one, two in zip(drawn, kept, strict=True):
        assert one.names == two.names
        for name in ("images", "counts", "attributes"):
            a, b = getattr(one, name), getattr(two, name)
            assert torch.equal(a, b)
            assert a.dtype == b.dtype
    other = glyphs.load(**(numbers | {"seed": 4}))
    assert not torch.equal(other.train.images, drawn.train.images)


def test_glyphs_of_other_code_are_drawn_anew(empty_cache, tmp_path, monkeypatch):
    numbers, calls = {"alphabets": 3, "characters": 2, "drawings": 2}, []
    glyphs.load(**numbers)
    draw = glyphs.generate
    monkeypatch.setattr(glyphs, "generate", lambda *a, **k: calls.append(a) or draw(*a, **k))
    glyphs.load(**numbers)
    assert calls == []
    other = tmp_path / "glyphs.py"
    other.write_bytes(pathlib.Path(glyphs.__file__).read_bytes() + b"# other\n")
    monkeypatch.setattr(glyphs, "__file__", str(other))
    for _ in range(2):  # drawn once, and kept in its turn
        glyphs.load(**numbers)
        assert calls == [(3, 2, 2)]


def test_default_device_plays_no_part(empty_cache):
    """Drawn, kept and read again."""

    def make():
        return [
            glyphs.generate(1, 3, 2, size=16),
            *glyphs.load(0, 3, 2, 2),
            *glyphs.load(0, 3, 2, 2),
        ]

    for here, there in zip(make(), elsewhere(make), strict=True):
        assert here.digest == there.digest
        assert torch.equal(here.attributes, there.attributes)


def test_same_glyphs_whatever_the_default_dtype_is(float64):
    found = glyphs.generate(alphabets=1, characters=4, drawings=3)
    torch.set_default_dtype(torch.float32)
    expected = glyphs.generate(alphabets=1, characters=4, drawings=3)
    assert found.digest == expected.digest
    assert torch.equal(found.attributes, expected.attributes)
