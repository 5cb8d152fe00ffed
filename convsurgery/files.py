"""Files: reading what a stranger may have written, and writing so that the old or the new is there at any moment."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from convsurgery.errors import ConvSurgeryError, StorageError
from convsurgery.plain import control_characters, parse_json

__all__ = [
    "RUNNING",
    "alone",
    "input_path",
    "is_folder_with",
    "locked",
    "member",
    "output_file",
    "output_folder",
    "read_json",
    "read_text",
    "refuse_existing",
    "replace_folder",
    "staging",
    "with_usual_mode",
    "write_text",
    "writing",
]

#: bytes of a JSON file; a plan of 3,000 convolutions has 4 million
MAX_JSON = 64 << 20
#: file in the folder of a run while it lasts; a killed process leaves it behind
RUNNING = ".running"
#: seconds after which a folder that nobody has locked is taken for a killed process's
_YOUNG = 10.0
_STAGED = ".saving-"


def is_folder_with(path: str | os.PathLike[str], name: str) -> bool:
    """Whether ``path`` is a folder that holds a file ``name``; False for what cannot be a path at all."""
    try:
        return (Path(path) / name).is_file()
    except (OSError, ValueError):
        return False


def member(folder: Path, name: str) -> Path:
    """The path of a regular file of ``folder``; a link that leads out of it, a device or a pipe is refused.

    Raises:
        StorageError: for those, and where there is no such file.
    """
    path = folder / name
    try:
        # A pipe would be waited for, and a link may lead to a file that its sender does not own.
        if not stat.S_ISREG(path.stat().st_mode):
            raise StorageError(f"{path} is not a regular file")
        inside = Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))
    except (OSError, ValueError) as error:
        raise StorageError(f"{path} cannot be read: {_text(error)}") from error
    if not inside:
        raise StorageError(f"{path} is a link that leads out of its folder; put the file itself there")
    return path


def read_text(path: Path, limit: int = MAX_JSON) -> str:
    """The text of a regular file in UTF-8.

    Raises:
        StorageError: for anything else, and for more than ``limit`` bytes.
    """
    try:
        with open(path, "rb", opener=_no_wait) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise StorageError(f"{path} is not a regular file")
            data = file.read(limit + 1)
    except (OSError, ValueError) as error:
        raise StorageError(f"{path} cannot be read: {_text(error)}") from error
    if len(data) > limit:
        raise StorageError(f"{path} is larger than {limit:,} bytes: nothing that convsurgery writes")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise StorageError(f"{path} cannot be read: {error}") from error


def _no_wait(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def read_json(path: Path, limit: int = MAX_JSON) -> Any:
    """Plain data from a JSON file, read as :func:`convsurgery.plain.parse_json` reads; errors as there."""
    return parse_json(read_text(path, limit), str(path))


def input_path(path: str | os.PathLike[str], kind: type[ConvSurgeryError] = StorageError) -> Path:
    """A path the user named to be read, ``~`` written out; ``kind`` is raised for what no path here can be."""
    try:
        if not os.fspath(path):
            raise kind("no path given")
        made = Path(path).expanduser()
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            made.stat()
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise kind(f"{_shown(path)} is no path that can be read: {_text(error)}") from error
    return made


def output_file(path: str | os.PathLike[str]) -> Path:
    """Where a file that the user named is to be written: links are followed, what is replaced is a regular file.

    Raises:
        StorageError: for a folder, a device, a pipe, a socket, and a path that leads nowhere.
    """
    try:
        real = Path(os.path.realpath(Path(path).expanduser()))
        mode = real.stat().st_mode if real.exists() else None
        folder = real.parent.is_dir()
    except (OSError, ValueError, RuntimeError) as error:
        raise StorageError(f"cannot write {_shown(path)}: {_text(error)}") from error
    if mode is not None and not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "no regular file, but a device, pipe or socket"
        raise StorageError(f"cannot write {path}: it is {kind}")
    if os.path.islink(real):
        raise StorageError(f"cannot write {path}: it is a link that leads to itself")
    if not folder:
        raise StorageError(f"cannot write {path}: no such writable folder, {real.parent}")
    return real


def output_folder(path: str | os.PathLike[str]) -> Path:
    """Where a folder that the user named is to be written, made when absent; a link to a folder is followed.

    Raises:
        StorageError: for what is there and no folder, and where none can be made.
    """
    try:
        folder = Path(path).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise StorageError(f"cannot write to {_shown(path)}: {_text(error)}") from error
    return folder


#: files by which a folder is known to hold a model or a run
_WORTH = ("convsurgery.json", "model.safetensors", "best", "last", "metrics.csv")


def refuse_existing(path: str | os.PathLike[str], *, folder: bool) -> None:
    """Refuse to write where something of worth is: a file, or a folder that holds a saved model or a run.

    What can be no output at all is left to who writes, and refused in his own words.

    Args:
        path: of the output.
        folder: whether that is a folder.

    Raises:
        StorageError: naming the way to replace it.
    """
    try:
        real = Path(path).expanduser()
        held = [name for name in _WORTH if folder and real.is_dir() and os.path.lexists(real / name)]
        there = bool(held) if folder else real.is_file()
    except (OSError, ValueError, RuntimeError):
        return
    if there:
        what = f"already holds {', '.join(held)}" if held else "is there already"
        raise StorageError(f"{_shown(path)} {what}: overwrite=True (--overwrite) replaces it, or name another output")


def _replaceable(path: Path) -> None:
    """A member of a folder is replaced only when it is a regular file: a link there belongs to somebody."""
    if os.path.lexists(path) and not stat.S_ISREG(path.lstat().st_mode):
        raise StorageError(f"{path} is a link, a folder or a device: not replaced")


@contextlib.contextmanager
def writing(path: str | os.PathLike[str], *, named: bool = True) -> Iterator[Path]:
    """A path beside ``path`` to write to; it takes the name of ``path`` when the block ends without an error.

    Args:
        path: the file to write or replace.
        named: whether the user named the file; a link is then followed. Otherwise it is a member of a folder, and a
            link in its place is refused.

    Raises:
        StorageError: where nothing can be written; errors of the block pass through.
    """
    target = output_file(path) if named else Path(path)
    if not named:
        _replaceable(target)
    with staging(target.parent, target.name) as folder:
        staged = folder / target.name
        yield staged
        try:
            with_usual_mode(staged)
            os.replace(staged, target)
        except OSError as error:
            raise StorageError(f"cannot write {path}: {_text(error)}") from error


def write_text(path: str | os.PathLike[str], text: str, *, named: bool = True) -> None:
    """Write a text whole or not at all; arguments and errors as of :func:`writing`."""
    with writing(path, named=named) as staged:
        try:
            staged.write_text(text, encoding="utf-8")
        except OSError as error:
            raise StorageError(f"cannot write {path}: {_text(error)}") from error


def with_usual_mode(path: Path) -> None:
    """The rights that a new file has here; libraries that write one may give less."""
    probe = path.with_name(path.name + ".mode")
    handle = os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    mode = stat.S_IMODE(os.fstat(handle).st_mode)
    os.close(handle)
    probe.unlink()
    path.chmod(mode)


@contextlib.contextmanager
def staging(parent: Path, name: str) -> Iterator[Path]:
    """An empty folder in ``parent`` that is gone afterwards; what killed processes left behind is removed.

    Raises:
        StorageError: where it cannot be made.
    """
    prefix = f".{name}{_STAGED}"
    _sweep(parent, prefix, _YOUNG)
    try:
        folder = Path(tempfile.mkdtemp(dir=parent, prefix=prefix))
    except OSError as error:
        raise StorageError(f"cannot write to {parent}: {_text(error)}") from error
    # Whoever holds the lock is alive: the system takes it from a process that was killed.
    handle = _lock(folder, wait=False)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _unlock(handle)


def _sweep(parent: Path, prefix: str, young: float) -> None:
    try:
        found = [entry for entry in parent.iterdir() if entry.name.startswith(prefix) and _STAGED in entry.name]
    except OSError:
        return
    for folder in found:
        # One that was made just now may not be locked yet.
        if folder.is_symlink() or not folder.is_dir() or time.time() - folder.stat().st_mtime < young:
            continue
        handle = _lock(folder, wait=False)
        if handle is not None:
            shutil.rmtree(folder, ignore_errors=True)
            _unlock(handle)


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """The only run that writes into ``folder``, which is made when absent; what a killed one staged there is removed.

    Raises:
        StorageError: where another process, or another thread of this one, writes a run there; where nothing can be
            written.
    """
    made = not folder.exists()
    output_folder(folder)
    path = folder / RUNNING
    handle = _claim(path)
    try:
        # Nobody else stages here, so that the age does not matter.
        _sweep(folder, ".", 0.0)
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
            if made and not any(folder.iterdir()):
                folder.rmdir()
        _unlock(handle)


def _claim(path: Path) -> int | None:
    """The lock that a run holds while it lasts; None where the system has no such locks."""
    try:
        import fcntl
    except ImportError:
        return None
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        except OSError as error:
            raise StorageError(f"cannot write to {path.parent}: {_text(error)}") from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(handle)
            raise StorageError(
                f"another run is being written into {path.parent}: wait until it has ended, or name another folder"
            ) from error
        except OSError:  # a disk without locks
            os.close(handle)
            return None
        # Whoever held it before may have removed the file between the two calls.
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(handle), path.lstat()):
                return handle
        os.close(handle)


@contextlib.contextmanager
def locked(folder: Path, *, shared: bool = False) -> Iterator[None]:
    """Alone among those who write into ``folder``, or with others who only read it; waits for its turn."""
    handle = _lock(folder, wait=True, shared=shared)
    try:
        yield
    finally:
        _unlock(handle)


def _lock(folder: Path, *, wait: bool, shared: bool = False) -> int | None:
    """A lock on a folder; None where another holds it or the system has no such locks."""
    try:
        import fcntl
    except ImportError:
        return None
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(handle)
        return None
    return handle


def _unlock(handle: int | None) -> None:
    if handle is not None:
        os.close(handle)


def replace_folder(staged: Path, target: Path) -> None:
    """Give the folder ``staged`` the name ``target``; the old folder of that name, if any, is then removed.

    On Linux the two change places in one step. Elsewhere the old one has another name (``.NAME.old``) for a moment.
    """
    if not target.exists():
        os.rename(staged, target)
        return
    if target.is_symlink() or not target.is_dir():
        raise StorageError(f"{target} is a link or no folder: not replaced")
    if _exchange(staged, target):
        shutil.rmtree(staged, ignore_errors=True)
        return
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    os.rename(target, old)
    os.rename(staged, target)
    shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, two: Path) -> bool:
    """Let two names change places at once; False where the system or its disk cannot."""
    if not sys.platform.startswith("linux"):
        return False
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    if call(here, os.fsencode(one), here, os.fsencode(two), swap) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.EPERM):
        return False
    raise OSError(number, os.strerror(number), str(two))


def _shown(path: str | os.PathLike[str]) -> str:
    try:
        text = os.fspath(path)
    except TypeError:
        return f"a value of type {type(path).__name__}"
    return repr(text[:80] + "...") if len(text) > 120 or control_characters(text) else text


def _text(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
