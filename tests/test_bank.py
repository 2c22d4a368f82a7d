"""A bank keeps images, counts, names and attributes together through change and storage."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, elsewhere, numbered
from torch import nn

from metautils.data import bank as bank_module
from metautils.data.bank import ClassBank, as_float, cached, split_classes
from metautils.files import DataError
from metautils.precision import fast_autocast


def square(classes=3, images=2, size=4):
    """A bank of uint8 images, no two alike."""
    x = torch.arange(classes * images * size * size).remainder(251).to(torch.uint8)
    counts = torch.full((classes,), images)
    names = tuple("abcdefgh"[:classes])
    attributes = torch.arange(classes * 2).view(classes, 2).float()
    return ClassBank(x.view(-1, 1, size, size), counts, names, attributes)


def test_classes_by_index():
    bank = numbered(2, 3, 1)
    assert len(bank) == 3
    assert bank.starts.tolist() == [0, 2, 5]
    assert [bank[k][:, 0].tolist() for k in range(3)] == [[0, 1], [2, 3, 4], [5]]


def test_from_classes():
    bank = ClassBank.from_classes([torch.zeros(2, 3), torch.ones(4, 3)], ["x", "y"])
    assert bank.counts.tolist() == [2, 4]
    assert bank.names == ("x", "y")
    assert bank.images.sum(1).tolist() == [0, 0, 3, 3, 3, 3]


@pytest.mark.parametrize("classes", [[2, 0], [1], [0, 1, 2], torch.tensor([2, 1])])
def test_select_keeps_the_order_asked_for(classes):
    bank = numbered(2, 3, 1)
    chosen = bank.select(classes)
    asked = [int(k) for k in classes]
    assert chosen.names == tuple(bank.names[k] for k in asked)
    assert chosen.counts.tolist() == [int(bank.counts[k]) for k in asked]
    assert torch.equal(chosen.images, torch.cat([bank[k] for k in asked]))
    assert chosen.attributes is None


def test_select_takes_the_attributes_along():
    assert square().select([2, 0]).attributes.tolist() == [[4, 5], [0, 1]]


def test_select_nothing():
    none = square().select([])
    assert (len(none), none.names, none.images.shape) == (0, (), (0, 1, 4, 4))
    assert none.attributes.shape == (0, 2)


def test_split_is_disjoint_and_complete_and_hangs_on_the_seed():
    bank = numbered(*range(1, 21))
    parts = split_classes(bank, (12, 3, 5), seed=0)
    assert [len(part) for part in parts] == [12, 3, 5]
    names = [name for part in parts for name in part.names]
    assert len(names) == 20
    assert set(names) == set(bank.names)
    for part in parts:
        for k, name in enumerate(part.names):
            assert torch.equal(part[k], bank[bank.names.index(name)])
    again, other = (split_classes(bank, (12, 3, 5), seed=seed) for seed in (0, 1))
    assert [part.names for part in again] == [part.names for part in parts]
    assert set(other.test.names) != set(parts.test.names)


@pytest.mark.parametrize("sizes", [(2, 2, 2), (0, 0, 0), (6, -1, 0)])
def test_split_sizes_must_add_up(sizes):
    with pytest.raises(ValueError, match=r"Parts of .* classes do not add up to the 5 there are"):
        split_classes(numbered(1, 1, 1, 1, 1), sizes)


def test_four_classes_for_each_one():
    bank = square()
    turned = bank.with_rotations()
    assert turned.names[:4] == ("a/rot000", "b/rot000", "c/rot000", "a/rot090")
    assert len(set(turned.names)) == len(turned) == 12
    assert turned.counts.tolist() == [2] * 12
    for k in range(4):
        for c in range(3):
            expected = bank[c]
            for _ in range(k):  # 90 degrees against the clock: the last column becomes the top row
                expected = expected.transpose(-2, -1).flip(-2)
            assert torch.equal(turned[3 * k + c], expected)


@pytest.mark.parametrize("shape", [(1, 4, 5), (7,)])
def test_only_square_images_turn(shape):
    bank = ClassBank(torch.zeros(2, *shape), torch.tensor([2]), ("a",))
    with pytest.raises(ValueError, match=r"Rotations need images \(n, channels, size, size\)"):
        bank.with_rotations()


@pytest.mark.parametrize("batch", [1, 4, 500])
def test_map_equals_embedding_directly(batch):
    bank = square()
    embed = nn.Sequential(nn.Flatten(), nn.Linear(16, 5))
    mapped = bank.map(embed, batch)
    with fast_autocast(bank.images.device):
        direct = embed(bank.images.float() / 255).detach().float()
    torch.testing.assert_close(mapped.images, direct)
    assert not mapped.images.requires_grad
    assert (mapped.names, mapped.counts.tolist()) == (bank.names, bank.counts.tolist())


def test_map_embeds_fewer_large_images_at_a_time():
    bank, asked = ClassBank(torch.rand(9, 3, 1000, 500), torch.tensor([9]), ("a",)), []
    bank.map(lambda x: asked.append(len(x)) or x.mean((1, 2, 3)))
    assert asked == [2, 2, 2, 2, 1]


PEAK = """
from pathlib import Path
import torch
from metautils.data.bank import ClassBank
def peak():
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
bank = ClassBank(torch.ones(100, 1, 707, 707, dtype=torch.uint8), torch.tensor([100]), ("a",))
before = peak()
turned = bank.with_rotations()
print((peak() - before) / bank.images.numel())
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="this system tells no peak")
def test_rotations_take_little_more_memory_than_their_result():
    """Which is four times the images."""
    command = [sys.executable, "-c", PEAK]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert 3.9 < float(done.stdout) < 6


def test_as_float():
    levels = torch.tensor([0, 51, 255], dtype=torch.uint8)
    assert as_float(levels).tolist() == pytest.approx([0, 0.2, 1])
    assert levels.tolist() == [0, 51, 255]
    already = torch.tensor([300.0, -1.0])
    assert as_float(already) is already


@pytest.mark.parametrize(
    ("counts", "names", "sentence"),
    [
        ([2, 2], ("a", "b"), "5 images, counts that add up to 4 and 2 names for 2 classes"),
        ([2, 3], ("a",), "5 images, counts that add up to 5 and 1 names for 2 classes"),
        ([5, 0], ("full", "bare"), "Class 'bare' has no image: drop it or add some"),
    ],
)
def test_contradiction_is_named(counts, names, sentence):
    with pytest.raises(ValueError, match=sentence):
        ClassBank(torch.zeros(5, 2), torch.tensor(counts), names)


def test_to_moves_images_only():
    bank = square().to("meta")
    assert bank.images.device.type == "meta"
    assert bank.counts.device.type == "cpu"


# The cache


def same(first, second):
    """Bit for bit."""
    return first.names == second.names and all(
        map(torch.equal, (first.images, first.counts), (second.images, second.counts))
    )


def none():
    raise AssertionError("The cache was there, but the bank was made again.")


def test_cache_is_enough_the_second_time(empty_cache):
    bank = cached("squares", square)
    assert (empty_cache / "squares.pt").exists()
    assert same(bank, square())
    assert same(cached("squares", none), bank)


def test_every_name_has_a_cache_of_its_own(empty_cache):
    cached("squares", square)
    assert same(cached("numbers", lambda: numbered(2, 3)), numbered(2, 3))
    assert same(cached("squares", none), square())


def test_bank_that_cannot_be_made_leaves_no_cache(empty_cache):
    def fail():
        raise DataError("no images")

    with pytest.raises(DataError, match="no images"):
        cached("squares", fail)
    assert not (empty_cache / "squares.pt").exists()


def empty(path):
    path.write_bytes(b"")


def truncate(path):
    path.write_bytes(path.read_bytes()[:1000])


def foreign(path):
    torch.save({"images": torch.zeros(3, 2)}, path)


def contradictory(path):
    torch.save({"images": torch.zeros(3, 2), "counts": torch.tensor([1]), "names": ["a"]}, path)


def unrelated(path):
    torch.save([1, 2], path)


@pytest.mark.parametrize("damage", [empty, truncate, foreign, contradictory, unrelated])
def test_damaged_cache_is_made_again(empty_cache, damage):
    bank, path = cached("squares", square), empty_cache / "squares.pt"
    whole = path.stat().st_size
    damage(path)
    assert path.stat().st_size != whole
    assert same(cached("squares", square), bank)
    assert path.stat().st_size == whole
    assert same(cached("squares", none), bank)


def test_cache_of_another_version_is_made_again(empty_cache):
    old = cached("squares", square, "1")
    new = cached("squares", lambda: square(size=6), "2")
    assert new.images.shape[-1] == 6
    assert same(cached("squares", none, "2"), new)
    assert same(cached("squares", square, "1"), old)


def test_cache_that_cannot_be_written_is_told_and_the_bank_is_there(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")  # a folder below a file can be made by nobody
    monkeypatch.setenv("METAUTILS_CACHE", str(tmp_path / "file" / "cache"))
    for _ in range(2):
        with pytest.warns(UserWarning, match="will be made again next time: .* could not be"):
            bank = cached("squares", square)
        assert same(bank, square())
        assert torch.equal(bank.attributes, square().attributes)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_empty_bank_is_mapped_to_an_empty_one():
    empty = ClassBank(torch.empty(0, 1, 4, 4), torch.empty(0, dtype=torch.int64), ())
    assert empty.map(nn.Flatten()).images.shape == (0, 16)


def test_default_device_plays_no_part():
    """Banks are made, chosen from, turned and split on the CPU, and as ever."""
    images = [square(k).images for k in (1, 2, 3)]

    def make():
        bank = ClassBank.from_classes(images, "abc")
        parts = split_classes(bank.with_rotations(), (5, 4, 3), seed=3)
        return [bank.select([2, 0]), *parts, parts.train.map(lambda x: x.flatten(1))]

    for here, there in zip(make(), elsewhere(make), strict=True):
        assert here.digest == there.digest
        assert torch.equal(here.starts, there.starts)


def test_bank_is_there_without_a_home(monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("pathlib.Path.home", homeless)
    monkeypatch.delenv("METAUTILS_CACHE", raising=False)
    with pytest.warns(UserWarning, match="will be made again next time: .* METAUTILS_CACHE"):
        assert same(cached("squares", square), square())


@pytest.mark.parametrize("fault", [ValueError, TypeError, KeyError])
def test_fault_of_ours_is_not_taken_for_a_damaged_cache(empty_cache, monkeypatch, fault):
    def broken(path):
        raise fault("a fault")

    cached("squares", square)
    monkeypatch.setattr(bank_module, "load_safely", broken)
    with pytest.raises(fault, match="a fault"):
        cached("squares", square)


def test_images_are_of_the_default_dtype(float64):
    found = as_float(torch.tensor([0, 51, 255], dtype=torch.uint8))
    assert torch.equal(found, torch.tensor([0.0, 51 / 255, 1.0]))  # to all digits of float64
    kept = torch.rand(3, dtype=torch.float32)
    assert as_float(kept) is kept
