"""Files that are written whole or not at all, and the folders where things lie."""

from __future__ import annotations

import os
import pickle
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch


class DataError(RuntimeError):
    """A data set or file is missing or damaged; the message says which and what to do."""


def save_atomically(value: Any, path: Path) -> None:
    """`torch.save` to a temporary name beside `path`, then rename: no reader sees a half file.

    Raises:
        DataError: if there is no room or no permission; what was there before stays.
    """
    # One name for all: what a killed run leaves behind, the next one overwrites.
    temporary = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            torch.save(value, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    # torch's own writer says RuntimeError where the disk is full.
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"{path} could not be written ({error}): free some space, or choose a folder that you "
            "may write to."
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


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
