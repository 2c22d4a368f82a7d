"""Files that are written whole or not at all, and the folders where things lie."""

from __future__ import annotations

import glob
import json
import os
import pickle
import shutil
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch


class DataError(RuntimeError):
    """A data set or file is missing or damaged; the message says which and what to do."""


def save_atomically(value: Any, path: Path) -> None:
    """`torch.save`, whole or not at all: no reader sees a half file, nor do two writers meet.

    Raises:
        DataError: if there is no room or no permission; what was there before stays.
    """
    _written(path, lambda file: torch.save(value, file))


def write_json(value: Any, path: Path) -> None:
    """JSON, in the same way as `save_atomically`."""
    text = json.dumps(value, indent=1) + "\n"
    _written(path, lambda file: file.write(text.encode()))


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
    # torch's own writer says RuntimeError where the disk is full.
    except (OSError, RuntimeError) as error:
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
        probe = folder / ".probe.partial"
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


def load_safely(path: Path) -> Any:
    """`torch.load` of tensors and plain values only.

    Raises:
        DataError: if the file is damaged or holds anything else.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist: check the name, or run again.") from error
    except (RuntimeError, EOFError, pickle.UnpicklingError, OSError, KeyError, ValueError) as error:
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
    """Where decoded and downloaded sets are kept: `METAUTILS_CACHE` or `~/.cache/metautils`."""
    return Path(os.environ.get("METAUTILS_CACHE") or Path.home() / ".cache" / "metautils")
