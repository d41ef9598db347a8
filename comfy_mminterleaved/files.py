"""Atomic writes: to a temporary name first, then renamed into place."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import secrets
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from .errors import OutputError

T = TypeVar("T")


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


_PART = re.compile(r"\..+\.[0-9a-f]{8}-(?P<host>[0-9a-f]{8})-(?P<process>\d+)\.part")
_HOST = f"{zlib.crc32(platform.node().encode()):08x}"
_open_parts: set[Path] = set()  # temporary paths that this process is writing
_RENAME_TRIES = 20  # a virus scanner on Windows holds a new file open for a moment


def _part_path(path: Path) -> Path:
    """A hidden temporary name beside `path` that identifies the computer and the process that writes it."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}-{_HOST}-{os.getpid()}.part")


@contextlib.contextmanager
def _renamed_into_place(path: Path):
    """A temporary path for `path`: renamed to it at the end, removed after an error."""
    temp_path = _part_path(path)
    _open_parts.add(temp_path)
    try:
        yield temp_path
        replace_path(temp_path, path)
    except BaseException:
        _remove(temp_path)
        raise
    finally:
        _open_parts.discard(temp_path)


def replace_path(source: Path, target: Path) -> None:
    """`os.replace` that waits for a virus scanner."""
    for number in range(_RENAME_TRIES):
        try:
            os.replace(source, target)
            return
        except PermissionError:
            if number == _RENAME_TRIES - 1:
                raise
            time.sleep(0.1)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def remove_leftovers(folder: str | Path) -> None:
    """Removes incomplete files and folders that killed processes left in a folder.

    Removes those of dead processes on this computer, and all that are older than a day.
    """
    with contextlib.suppress(OSError):
        for path in Path(folder).iterdir():
            match = _PART.fullmatch(path.name)
            if match is None or path in _open_parts:
                continue
            process, is_ours = int(match["process"]), match["host"] == _HOST
            is_dead = is_ours and (process == os.getpid() or not _is_running(process))
            with contextlib.suppress(OSError):
                if is_dead or time.time() - path.stat().st_mtime > 24 * 3600:
                    _remove(path)


def _is_running(process: int) -> bool:
    if os.name == "nt":  # on Windows os.kill would end the process
        import ctypes

        handle = ctypes.windll.kernel32.OpenProcess(0x1000, False, process)  # PROCESS_QUERY_LIMITED_INFORMATION
        if not handle:
            return False
        code = ctypes.c_ulong()
        ctypes.windll.kernel32.GetExitCodeProcess(handle, ctypes.byref(code))
        ctypes.windll.kernel32.CloseHandle(handle)
        return code.value == 259  # STILL_ACTIVE
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


def atomic_write(path: str | Path, data: bytes) -> None:
    """Writes a file whole or not at all; raises OutputError."""
    path = Path(path)
    with friendly_errors(path, "The file"), _renamed_into_place(path) as temp_path:
        handle = os.open(temp_path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())


@contextlib.contextmanager
def atomic_path(path: str | Path):
    """A path beside `path` to write a file to, renamed to it at the end and removed after an error."""
    with _renamed_into_place(Path(path)) as temp_path:
        yield temp_path
        if temp_path.is_file():
            flush_to_disk(temp_path)


def flush_to_disk(path: str | Path) -> None:
    """Waits until a file that a library wrote is on the disk."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def apply_umask(path: str | Path) -> None:
    """Gives a file that a library wrote for its owner alone the permissions of any new file."""
    probe = _part_path(Path(path))
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
    """Yields a writable folder, checked before any heavy work; raises OutputError.

    After an error, folders that were created here are removed if they are still empty.
    """
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
    """A folder that appears under its name only when complete; raises OutputError if it exists and is not empty."""
    path = Path(path)
    with friendly_errors(path, "The folder"):
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise OutputError(f"Folder {str(path)!r} already exists; choose a new name.")
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent)
        with _renamed_into_place(path) as temp_path:
            temp_path.mkdir()
            yield temp_path
            if path.exists():
                path.rmdir()


def write_numbered_dir(parent: Path, name: str, number: int, write: Callable[[Path], T]) -> tuple[Path, T]:
    """Writes a folder NAME_00001, or with the next number that is free; it appears when it is complete.

    The number is taken last, so that two processes that write into `parent` do not take the same one.

    Args:
        write: Fills the folder that it is called with.

    Returns:
        The folder, and what `write` returned.
    """
    with friendly_errors(parent / name, "The folder"):
        parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(parent)
        temp_path = _part_path(parent / name)
        _open_parts.add(temp_path)
        try:
            temp_path.mkdir()
            result = write(temp_path)
            while True:
                folder = parent / f"{name}_{number:05d}"
                number += 1
                if folder.exists():
                    continue
                try:
                    replace_path(temp_path, folder)
                    return folder, result
                except OSError:
                    if not folder.exists():
                        raise
        except BaseException:
            _remove(temp_path)
            raise
        finally:
            _open_parts.discard(temp_path)


PROGRESS_SUFFIX = ".progress"  # of a file beside one that is being written, with how far it is


@contextlib.contextmanager
def locked(path: str | Path, sentence: str):
    """Holds a lock file while it works; raises OutputError(sentence) if another process does.

    The system lets go of the lock when the process dies.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise OutputError(sentence) from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows removes no open file
            Path(path).unlink()
        lock.release()


@contextlib.contextmanager
def resumable_dir(path: str | Path, fingerprint: str, size: int):
    """Like `atomic_dir`, for hours of work: what a killed process wrote is there again for the next of the same work.

    Args:
        fingerprint: Says what is written from what; of another one, nothing is kept.
        size: Bytes that will be written; raises OutputError if the disk has no room for them.
    """
    path = Path(path).absolute()
    work = path.with_name(f".{path.name}.unfinished")
    mark = work / ".fingerprint"
    with friendly_errors(path, "The folder"):
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise OutputError(f"Folder {str(path)!r} already exists; choose a new name.")
        path.parent.mkdir(parents=True, exist_ok=True)
    with locked(f"{work}.lock", f"The folder {str(path)!r} is being written by another process; wait for it."):
        with friendly_errors(path, "The folder"):
            if _read_text(mark) != fingerprint:
                _remove(work)
                work.mkdir()
                mark.write_text(fingerprint, encoding="utf-8")
            remove_leftovers(work)
            _check_free_space(path.parent, size, work)
        try:
            yield work
            if path.exists():
                path.rmdir()
            replace_path(work, path)
        except OSError as error:
            reason = (error.strerror or str(error)).rstrip(".")
            raise OutputError(
                f"The folder {str(path)!r} cannot be written: {reason}. What is done is kept in {work.name!r} beside "
                "it; run the same command again to go on."
            ) from None
        except (KeyboardInterrupt, MemoryError, RuntimeError):  # RuntimeError: PyTorch has no memory
            raise
        except BaseException:
            _remove(work)
            raise
        for left in (path / mark.name, *path.rglob(f"*{PROGRESS_SUFFIX}")):
            left.unlink(missing_ok=True)


def _check_free_space(folder: Path, size: int, work: Path) -> None:
    """Raises OutputError if a disk has less room than `size`, apart from what `work` has taken already."""
    allocated = sum(file.stat().st_size for file in work.rglob("*") if file.is_file())
    free = shutil.disk_usage(folder).free
    if size - allocated > free:
        if not allocated or not any(work.rglob(f"*{PROGRESS_SUFFIX}")):
            _remove(work)
        raise OutputError(
            f"The model takes {format_bytes(size - allocated)}, but {str(folder)!r} has {format_bytes(free)} free; "
            f"free {format_bytes(size - allocated - free)} there, or choose another disk."
        )


def format_bytes(count: float) -> str:
    """Like 13.9 GB, in powers of 1000."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.1f} GB" if count >= 10 else f"{count:.2f} GB"


def format_memory(count: float) -> str:
    """Like 12.9 GiB."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}" if count < 1000 else f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
