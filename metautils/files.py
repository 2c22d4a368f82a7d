"""Files that are written whole or not at all, and the folders where things lie."""

from __future__ import annotations

import glob
import json
import os
import pickle
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch

from metautils.errors import ReaderError


class DataError(ReaderError, RuntimeError):
    """A data set or file is missing or damaged; the message says which and what to do."""


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Say what the system says of a file or folder of the reader's.

    Raises:
        DataError: if it is missing, is no file, or may not be read.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist: check the name, or run again.") from error
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror or error}): check its name, and that you may "
            "read it."
        ) from error


def listed(folder: Path) -> list[Path]:
    """What lies in a folder, by name: in the same order on every system.

    Paths themselves are sorted on Windows as if in lower case.

    Raises:
        DataError: if it cannot be read.
    """
    with reading(folder):
        return sorted(folder.iterdir(), key=lambda path: path.name)


def read_json(path: Path) -> Any:
    """What `write_json` wrote.

    Raises:
        DataError: if the file is missing, damaged or something else.
    """
    with reading(path):
        content = path.read_bytes()
    try:
        return json.loads(content.decode())
    except ValueError as error:
        raise DataError(f"{path} is damaged, or not written here: delete it, run again.") from error


def save_atomically(value: Any, path: Path) -> None:
    """`torch.save`, whole or not at all: no reader sees a half file, nor do two writers meet.

    Raises:
        DataError: if there is no room or no permission; what was there before stays.
    """
    _written(path, lambda file: torch.save(value, file))


def write_json(value: Any, path: Path) -> None:
    """JSON, in the same way as `save_atomically`."""
    save_text(json.dumps(value, indent=1) + "\n", path)


def save_text(text: str, path: Path) -> None:
    """Text in UTF-8, in the same way as `save_atomically`; names of files as the system has them.

    What is no text in such a name stands there as a question mark.
    """
    _written(path, lambda file: file.write(text.encode(errors="replace")))


def save_bytes(content: bytes, path: Path) -> None:
    """Bytes, in the same way as `save_atomically`."""
    _written(path, lambda file: file.write(content))


def _written(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write to a name of this writer's own beside `path`, then rename."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _tidy(path)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
        try:
            with temporary.open("xb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:
        # torch's own writer says RuntimeError where the disk is full, on top of the system's error.
        if not isinstance(error, OSError) and not isinstance(error.__context__, OSError):
            raise
        raise DataError(
            f"{path} could not be written ({error}): free some space, or choose a folder that you "
            "may write to."
        ) from error


def _tidy(path: Path) -> None:
    """Remove what writers left behind that were killed; a day is more than any still needs."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > 86400:
                left.unlink()


def check_folder(folder: Path, room: int) -> None:
    """Make a folder and see, before hours of work, that files of `room` bytes can be put there.

    Raises:
        DataError: if it cannot be made or written to, or has too little room.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe.{uuid.uuid4().hex}.partial"  # another process may look too
        try:
            probe.write_bytes(b"x")
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(
            f"{folder} cannot be written to ({error.strerror}): choose another folder."
        ) from error
    free = shutil.disk_usage(folder).free
    if free < room:
        raise DataError(
            f"{folder} has room for {free >> 20} MB, but {room >> 20} MB are needed: free some "
            "space or choose another folder."
        )


def check_file(path: Path, room: int) -> None:
    """See, before any work, that a file of `room` bytes can be written to this name.

    Raises:
        DataError: if it is a folder, or its folder cannot be made or written to.
    """
    with reading(path):
        folder = path.is_dir()
    if folder:
        raise DataError(f"{path} is a folder: name a file.")
    check_folder(path.parent, room)


def check_apart(out: Path, data: Path) -> None:
    """See that what is written to `out` will not lie among the images of a folder.

    Raises:
        DataError: if `out` is that folder or lies in it, by whatever name: links are followed.
    """
    with reading(data):
        inside = data.iterdir() if data.is_dir() else ()
        links = [p for p in inside if p.is_symlink() and p.exists()]
        held = [data, *(p for p in links if p.resolve() not in data.resolve().parents)]
        above = [p for p in (out.resolve(), *out.resolve().parents) if p.exists()]
        if data.is_dir() and any(p.samefile(each) for p in above for each in held):
            raise DataError(f"{out} lies in {data} and would be taken for a class: choose another.")


def written_at(path: Path) -> int | None:
    """When a file was last written, in nanoseconds; None if it is not there."""
    return path.stat().st_mtime_ns if path.exists() else None


# What torch raises for a damaged file.
DAMAGE = (
    RuntimeError, EOFError, pickle.UnpicklingError, OSError, KeyError, ValueError, IndexError,
)  # fmt: skip


def load_safely(path: Path) -> Any:
    """`torch.load` of tensors and plain values only.

    Raises:
        DataError: if the file is damaged or holds anything else.
    """
    with reading(path):
        path.open("rb").close()
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except DAMAGE as error:
        raise DataError(f"{path} is damaged, or not written here: delete it, run again.") from error


def data_folder() -> Path | None:
    """The folder that `METAUTILS_DATA` names, or None where it is not set.

    Raises:
        DataError: if it is set and is no folder.
    """
    name = os.environ.get("METAUTILS_DATA")
    if not name:
        return None
    if not Path(name).is_dir():
        raise DataError(
            f"METAUTILS_DATA is {name!r}, which is no folder: correct it or unset it to download."
        )
    return Path(name)


def cache_folder() -> Path:
    """Where decoded and downloaded sets are kept: `METAUTILS_CACHE` or `~/.cache/metautils`.

    Raises:
        DataError: if there is neither that nor a home.
    """
    named = os.environ.get("METAUTILS_CACHE")
    try:
        return Path(named) if named else Path.home() / ".cache" / "metautils"
    except RuntimeError as error:
        raise DataError(f"{error}: set METAUTILS_CACHE to a folder for data.") from error
