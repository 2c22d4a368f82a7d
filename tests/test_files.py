"""Files are whole or not there; nothing but plain values is ever loaded."""

import errno
import multiprocessing
import os
import pickle
import shutil
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import told_in_one_line

from metautils.files import (
    DataError,
    cache_folder,
    check_apart,
    check_file,
    check_folder,
    data_folder,
    listed,
    load_safely,
    read_json,
    save_atomically,
    save_bytes,
    save_text,
    write_json,
    written_at,
)


class Breaks:
    """Cannot be pickled."""

    def __reduce__(self):
        raise RuntimeError("halfway")


class Evil:
    """Runs a command where it is unpickled carelessly."""

    def __reduce__(self):
        return os.system, ("touch evil",)


@contextmanager
def full_after(size):
    """Files cannot grow beyond so many bytes: the writing fails, not the opening."""
    resource = pytest.importorskip("resource", reason="this system sets no limits to files")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


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
    with pytest.raises(RuntimeError, match="halfway") as caught:  # a fault, and none of the disk
        save_atomically([torch.zeros(1000), Breaks()], path)
    assert not isinstance(caught.value, DataError)
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


@pytest.mark.parametrize("size", [0, 100, 3000])
def test_disk_that_is_full_is_told_and_the_old_file_stays(tmp_path, size):
    path, value = tmp_path / "x.pt", torch.randn(5000)
    save_atomically("old", path)
    with full_after(size):
        told_in_one_line(
            lambda: save_atomically(value, path), r"x\.pt could not be written \(.*\): free some"
        )
    assert load_safely(path) == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_error_of_the_disk_is_in_the_sentence(tmp_path, monkeypatch):
    def fail(value, file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    told_in_one_line(
        lambda: save_atomically(1, tmp_path / "new" / "x.pt"),
        r"new/x\.pt could not be written \(.*No space left on device.*\): free some space, or",
    )
    assert list((tmp_path / "new").iterdir()) == []


def save_many(path, writer, saves):
    for k in range(saves):
        save_atomically({"writer": writer, "save": k, "x": torch.full((1000,), writer)}, path)


def test_two_processes_save_to_one_path(tmp_path):
    """Neither fails, no reader sees anything but a whole file, and nothing is left beside it."""
    path, context = tmp_path / "new" / "x.pt", multiprocessing.get_context("spawn")
    writers = [context.Process(target=save_many, args=(path, k, 30)) for k in range(2)]
    for writer in writers:
        writer.start()
    seen = 0
    while any(writer.is_alive() for writer in writers):
        if path.exists():
            value = load_safely(path)
            assert (value["x"] == value["writer"]).all()
            seen += 1
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert seen > 0
    assert load_safely(path)["save"] == 29
    assert list(path.parent.iterdir()) == [path]


UNFIT = pytest.mark.parametrize("folder", ["file", "file/below", "/proc/x"])


@UNFIT
def test_saving_where_nothing_can_be_is_told(tmp_path, folder):
    (tmp_path / "file").write_text("")
    path = tmp_path / folder / "x.pt"
    told_in_one_line(lambda: save_atomically(1, path), f"{path} could not be written")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_folder_is_made_and_left_empty(tmp_path):
    for _ in range(2):
        check_folder(tmp_path / "new" / "folder", 1000)
    assert list((tmp_path / "new" / "folder").iterdir()) == []


@UNFIT
def test_folder_that_cannot_be_is_told(tmp_path, folder):
    (tmp_path / "file").write_text("")
    sentence = f"{folder} cannot be written to \\(.+\\): choose another folder"
    told_in_one_line(lambda: check_folder(tmp_path / folder, 1000), sentence)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_folder_on_a_full_disk_is_told_and_left_empty(tmp_path):
    with full_after(0):
        told_in_one_line(lambda: check_folder(tmp_path, 0), "cannot be written to .*: choose")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("free", [9 << 20, (10 << 20) - 1, 10 << 20])
def test_folder_with_too_little_room_is_told(tmp_path, monkeypatch, free):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    if free == 10 << 20:
        check_folder(tmp_path, 10 << 20)
    else:
        sentence = "has room for 9 MB, but 10 MB are needed: free some space or choose another"
        told_in_one_line(lambda: check_folder(tmp_path, 10 << 20), sentence)
    assert list(tmp_path.iterdir()) == []


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


def test_whatever_torch_says_of_damage_is_told(tmp_path, monkeypatch):
    def pop(*arguments, **named):
        raise IndexError("pop from empty list")

    (tmp_path / "x.pt").touch()
    monkeypatch.setattr(torch, "load", pop)
    with pytest.raises(DataError, match=r"x\.pt is damaged"):
        load_safely(tmp_path / "x.pt")


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
    told_in_one_line(lambda: load_safely(tmp_path), "cannot be read .*: check its name")


def refused(*arguments, **named):
    raise PermissionError(errno.EACCES, "Permission denied")


@pytest.mark.parametrize("read", [load_safely, read_json])
def test_file_that_may_not_be_read_is_told(tmp_path, monkeypatch, read):
    """As such, not as damaged."""
    path = tmp_path / "x"
    path.touch()
    monkeypatch.setattr(Path, "open", refused)
    monkeypatch.setattr(Path, "read_bytes", refused)
    told_in_one_line(lambda: read(path), r"x cannot be read \(Permission denied\): check its name")


def test_json_comes_back(tmp_path):
    value = {"name": "日本", "numbers": [1, 2.5, None]}
    write_json(value, tmp_path / "x.json")
    assert read_json(tmp_path / "x.json") == value


@pytest.mark.parametrize("content", [b"", b"half", b"\xff"])
def test_damaged_json_is_told(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    told_in_one_line(lambda: read_json(tmp_path / "x.json"), r"x\.json is damaged, or not written")


def test_folder_that_cannot_be_listed_is_told(tmp_path, monkeypatch):
    told_in_one_line(lambda: listed(tmp_path / "gone"), "gone does not exist")
    monkeypatch.setattr(Path, "iterdir", refused)
    told_in_one_line(lambda: listed(tmp_path), r"cannot be read \(Permission denied\)")


def test_time_of_writing(tmp_path):
    path = tmp_path / "x"
    assert written_at(path) is None
    path.touch()
    os.utime(path, ns=(5 * 10**9, 7 * 10**9))
    assert written_at(path) == 7 * 10**9


def test_cache_folder_without_a_home(monkeypatch):
    """As for a user of a container whom the system does not know."""

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.delenv("METAUTILS_CACHE", raising=False)
    told_in_one_line(cache_folder, "home directory.: set METAUTILS_CACHE to a folder for data")


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


def linked(place, to):
    try:
        os.symlink(to, place, target_is_directory=True)
    except OSError:
        pytest.skip("this system makes no links")
    return place


@pytest.mark.parametrize(
    "out",
    [
        "photos",
        "photos/new",
        "photos/a/run/1",
        "photos/a/..",
        "elsewhere/../photos/new",
        "link",
        "link/new",
        "deep/new",
        "others/new",
    ],
)
@pytest.mark.parametrize("data", ["photos", "link", "elsewhere/../photos"])
def test_results_among_the_images_are_refused(tmp_path, monkeypatch, out, data):
    """By whatever name; `others` is a class that lies elsewhere."""
    for name in ("photos/a", "elsewhere", "others"):
        (tmp_path / name).mkdir(parents=True)
    linked(tmp_path / "link", tmp_path / "photos")
    linked(tmp_path / "deep", tmp_path / "photos" / "a")
    linked(tmp_path / "photos" / "b", tmp_path / "others")
    told_in_one_line(
        lambda: check_apart(tmp_path / out, tmp_path / data),
        f"{out} lies in .*{data} and would be taken for a class: choose another",
    )
    monkeypatch.chdir(tmp_path)
    told_in_one_line(lambda: check_apart(Path(out), Path(data)), "would be taken for a class")


@pytest.mark.parametrize("out", ["runs", "photos-out", "new/run", "."])
@pytest.mark.parametrize("data", ["photos", "gone", "glyphs.txt"])
def test_results_beside_the_images_are_not(tmp_path, out, data):
    (tmp_path / "photos" / "a").mkdir(parents=True)
    (tmp_path / "glyphs.txt").touch()
    check_apart(tmp_path / out, tmp_path / data)
    linked(tmp_path / "photos" / "a" / "up", tmp_path)  # is not followed when images are read
    linked(tmp_path / "photos" / "up", tmp_path)
    check_apart(tmp_path / out, tmp_path / data)


def test_text_and_bytes_are_written_whole(tmp_path):
    """What is no text in a name becomes a question mark; folders are made."""
    save_text("é \udcff 日本\n", tmp_path / "new" / "x.txt")
    assert (tmp_path / "new" / "x.txt").read_bytes() == "é ? 日本\n".encode()
    save_bytes(b"\x00\n\xff", tmp_path / "new" / "x.bin")
    assert (tmp_path / "new" / "x.bin").read_bytes() == b"\x00\n\xff"
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["x.bin", "x.txt"]


def test_file_that_cannot_be_written_is_told_before(tmp_path):
    check_file(tmp_path / "new" / "x.csv", 1)
    assert [path.name for path in tmp_path.rglob("*")] == ["new"]
    (tmp_path / "file").write_text("")
    for path, told in (
        (tmp_path / "new", r"new is a folder: name a file"),
        (tmp_path / "file" / "x.csv", r"file cannot be written to|x\.csv cannot be read"),
    ):
        told_in_one_line(lambda path=path: check_file(path, 1), told)
