"""Writing so that nothing is ever half-written: aside first, then renamed into place."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from pathlib import Path

from .errors import OutputError


@contextlib.contextmanager
def _sentences(path: Path, what: str):
    """Turns the operating system's refusals into one sentence."""
    try:
        yield
    except (OSError, ValueError) as error:  # a ValueError of a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"{what} {str(path)!r} cannot be written: {reason}.") from None


def write_bytes(path: str | Path, data: bytes) -> None:
    """Writes a file whole or not at all; raises OutputError."""
    path = Path(path)
    with _sentences(path, "The file"):
        handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            readable(aside)
            os.replace(aside, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(aside)
            raise


def readable(path: str | Path) -> None:
    """Gives a file the rights of any new file; what is written aside has its owner's only."""
    os.chmod(path, 0o666 & ~_umask())


def write_json(path: str | Path, data) -> None:
    write_bytes(path, (json.dumps(data, ensure_ascii=False, indent=1) + "\n").encode("utf-8"))


def make_folder(path: str | Path) -> Path:
    """A folder to write into, made if need be and tried by writing; raises OutputError before any heavy work."""
    path = Path(path)
    with _sentences(path, "The folder"):
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    return path


@contextlib.contextmanager
def output_folder(path: str | Path):
    """A folder to write into, tried before any heavy work; what was made for it and is still empty after a failure is
    removed again. Raises OutputError."""
    path = Path(path)
    made = [folder for folder in (path, *path.parents) if not _exists(folder)]
    try:
        yield make_folder(path)
    except BaseException:
        for folder in made:
            with contextlib.suppress(OSError, ValueError):
                folder.rmdir()
        raise


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
def new_folder(path: str | Path):
    """A folder that appears under its name only when all in it is written; one that is there already is refused."""
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise OutputError(f"The folder {str(path)!r} is there already; name a new one.")
    with _sentences(path, "The folder"):
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        try:
            yield aside
            os.chmod(aside, 0o777 & ~_umask())
            if path.exists():
                path.rmdir()
            aside.rename(path)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
