"""Atomic writes: to a temporary name first, then renamed into place."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import tempfile
from pathlib import Path

from .errors import OutputError


@contextlib.contextmanager
def friendly_errors(path: Path, label: str):
    """Turns the operating system's errors into one sentence, an OutputError."""
    try:
        yield
    except (OSError, ValueError) as error:  # a ValueError of a NUL in the name
        reason = getattr(error, "strerror", None) or error
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"{label} {str(path)!r} cannot be written: {reason}.") from None


def atomic_write(path: str | Path, data: bytes) -> None:
    """Writes a file whole or not at all; raises OutputError."""
    path = Path(path)
    with friendly_errors(path, "The file"):
        temp_path = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
        handle = os.open(temp_path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temp_path, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temp_path)
            raise


@contextlib.contextmanager
def atomic_path(path: str | Path):
    """A path beside `path` to write a file to, renamed to it at the end and removed after an error."""
    path = Path(path)
    temp_path = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        yield temp_path
        os.replace(temp_path, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temp_path)
        raise


def apply_umask(path: str | Path) -> None:
    """Gives a file that a library wrote for its owner alone the permissions of any new file."""
    probe = Path(path).with_name(f".{Path(path).name}.{secrets.token_hex(4)}.part")
    handle = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    mode = os.fstat(handle).st_mode & 0o777
    os.close(handle)
    os.unlink(probe)
    os.chmod(path, mode)


def write_json(path: str | Path, data) -> None:
    atomic_write(path, (json.dumps(data, ensure_ascii=False, indent=1) + "\n").encode("utf-8"))


def ensure_writable_dir(path: str | Path) -> Path:
    """Creates a folder if needed and tries to write into it; raises OutputError before any heavy work."""
    path = Path(path)
    with friendly_errors(path, "The folder"):
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    return path


@contextlib.contextmanager
def output_folder(path: str | Path):
    """A folder to write into, tried before any heavy work; after a failure it is removed again if it was made here and
    is still empty. Raises OutputError."""
    path = Path(path)
    created = [folder for folder in (path, *path.parents) if not _exists(folder)]
    try:
        yield ensure_writable_dir(path)
    except BaseException:
        for folder in created:
            with contextlib.suppress(OSError, ValueError):
                folder.rmdir()
        raise


def path_below(folder: str | Path, name: str) -> Path | None:
    """`folder / name`, resolved; None if that is not below `folder`, or is a name that no file system holds.

    Back slashes count as slashes: names written on Windows have them.
    """
    try:
        folder = Path(folder).resolve()
        path = (folder / name.replace("\\", "/")).resolve()
        path.exists()
    except (OSError, ValueError):  # too long; a NUL or half a character
        return None
    return path if path != folder and path.is_relative_to(folder) else None


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # no rights to look, or a NUL in the name
        return False


def free_name(path: Path) -> Path:
    """The first of path-2, path-3, ... that is not there."""
    number = 2
    while (other := path.with_name(f"{path.name}-{number}")).exists():
        number += 1
    return other


@contextlib.contextmanager
def atomic_dir(path: str | Path):
    """A folder that appears under its name only when it is complete; one that already exists is refused."""
    path = Path(path)
    with friendly_errors(path, "The folder"):
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise OutputError(f"Folder {str(path)!r} already exists; choose a new name.")
        path.parent.mkdir(parents=True, exist_ok=True)
        temp_path = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
        temp_path.mkdir()
        try:
            yield temp_path
            if path.exists():
                path.rmdir()
            temp_path.rename(path)
        except BaseException:
            shutil.rmtree(temp_path, ignore_errors=True)
            raise
