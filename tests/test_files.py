"""Files are whole or not there; nothing but plain values is ever loaded."""

import os
import pickle
from functools import partial
from pathlib import Path

import pytest
import torch

from metautils.files import DataError, cache_folder, data_folder, load_safely, save_atomically


class Breaks:
    """Cannot be pickled."""

    def __reduce__(self):
        raise RuntimeError("halfway")


class Evil:
    """Runs a command where it is unpickled carelessly."""

    def __reduce__(self):
        return os.system, ("touch evil",)


def test_round_trip_makes_the_folder(tmp_path):
    path = tmp_path / "new" / "folder" / "x.pt"
    value = {"a": torch.arange(3), "b": [1, "two", None], "c": {"d": 0.5}}
    save_atomically(value, path)
    loaded = load_safely(path)
    assert torch.equal(loaded.pop("a"), value.pop("a"))
    assert loaded == value
    assert list(path.parent.iterdir()) == [path]


def test_failing_save_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "x.pt"
    save_atomically(torch.ones(3), path)
    before = path.read_bytes()
    with pytest.raises(RuntimeError, match="halfway"):
        save_atomically([torch.zeros(1000), Breaks()], path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_file_under_its_name_is_never_half(tmp_path, monkeypatch):
    path = tmp_path / "x.pt"
    save_atomically("old", path)

    def slowly(value, file):
        file.write(b"half")
        file.flush()
        assert load_safely(path) == "old"
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", slowly)
    with pytest.raises(KeyboardInterrupt):
        save_atomically("new", path)
    assert load_safely(path) == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("write", [partial(pickle.dump, protocol=2), torch.save])
def test_code_in_a_file_is_refused_and_not_run(tmp_path, monkeypatch, write):
    monkeypatch.chdir(tmp_path)
    with Path("x.pt").open("wb") as file:
        write({"weights": Evil()}, file)
    with pytest.raises(DataError, match=r"x\.pt is damaged, or not written here: delete it"):
        load_safely(Path("x.pt"))
    assert not Path("evil").exists()


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"not a checkpoint at all", b"PK\3\4rest"])
def test_damage_is_told_in_one_sentence(tmp_path, content):
    path = tmp_path / "x.pt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"x\.pt is damaged") as caught:
        load_safely(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_truncation_is_told(tmp_path, share):
    path = tmp_path / "x.pt"
    save_atomically({"x": torch.randn(2000), "y": [1, 2]}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(DataError, match=r"x\.pt is damaged"):
        load_safely(path)


def test_missing_file_is_told(tmp_path):
    with pytest.raises(DataError, match=r"gone\.pt does not exist: check the name"):
        load_safely(tmp_path / "gone.pt")


def test_folder_in_place_of_a_file_is_told(tmp_path):
    with pytest.raises(DataError, match="damaged, or not written here"):
        load_safely(tmp_path)


def test_data_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("METAUTILS_DATA", raising=False)
    assert data_folder() is None
    monkeypatch.setenv("METAUTILS_DATA", "")
    assert data_folder() is None
    monkeypatch.setenv("METAUTILS_DATA", str(tmp_path))
    assert data_folder() == tmp_path


@pytest.mark.parametrize("kind", ["missing", "file"])
def test_wrong_data_folder_is_told(tmp_path, monkeypatch, kind):
    path = tmp_path / "wrong"
    if kind == "file":
        path.write_text("")
    monkeypatch.setenv("METAUTILS_DATA", str(path))
    sentence = "METAUTILS_DATA is '.*wrong', which is no folder: correct it or unset it to download"
    with pytest.raises(DataError, match=sentence):
        data_folder()


def test_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("METAUTILS_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("METAUTILS_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "metautils"
