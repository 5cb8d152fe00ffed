"""An audit hook that fails on whatever a file must not cause, and files that try to cause it.

``python -m tests.guard [MUTATIONS]`` damages saved folders, plans, scans, recipes, ONNX files, checkpoints and training
states at random and reads them under the hook; ``tests/test_guard.py`` does a few of them, and all the hand-made ones.
"""

from __future__ import annotations

import contextlib
import os
import site
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import convsurgery

__all__ = ["CANARY", "Guard", "Violation", "snapshot"]

#: a text that hostile files carry where they hope that it is executed
CANARY = "convsurgery_canary"

_NEVER = (
    "socket.",
    "subprocess.",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.startfile",
    "pty.",
    "urllib.",
    "http.",
    "ftplib.",
    "smtplib.",
    "webbrowser.",
    # The restricted reader of torch's checkpoints looks nothing up; who does, can run anything.
    "pickle.find_class",
    "ctypes.dlopen",
)
_CHANGES = (
    "os.mkdir",
    "os.remove",
    "os.rmdir",
    "os.rename",
    "os.link",
    "os.symlink",
    "os.chmod",
    "os.chown",
    "os.truncate",
    "os.utime",
    "os.mkfifo",
    "os.mknod",
)
_LOOKS = ("os.listdir", "os.scandir", "os.walk", "glob.glob", "os.chdir")
_WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Violation(BaseException):
    """Something that no file may cause. Not an Exception, so that nothing under test swallows it."""


def _roots() -> tuple[str, ...]:
    """Where Python's and the installed packages' own files lie."""
    places = {sys.prefix, sys.base_prefix, sys.exec_prefix, *sysconfig.get_paths().values(), *site.getsitepackages()}
    places |= {str(Path(convsurgery.__file__).parent), str(Path(sys.executable).parent)}
    places |= {str(Path(path)) for path in (Path(__file__).parent,)}
    system = ("/proc", "/sys", "/dev/null", "/dev/urandom", "/usr/lib", "/lib", "/usr/share/zoneinfo", "/etc/localtime")
    return tuple(sorted({os.path.realpath(place) for place in places} | set(system)))


class Guard:
    """The hook. It cannot be taken out of the process again, so there is one, which sleeps outside of ``with``.

    Within, reading is allowed below ``reads``, changing below ``writes``, and both of Python's own files as they are.
    """

    _installed: Guard | None = None

    def __init__(self) -> None:
        self.active = False
        self.reads: tuple[str, ...] = ()
        self.writes: tuple[str, ...] = ()
        self.found: list[str] = []
        self.own = _roots()

    @classmethod
    def installed(cls) -> Guard:
        if cls._installed is None:
            cls._installed = cls()
            sys.addaudithook(cls._installed._hook)
        return cls._installed

    @contextlib.contextmanager
    def watching(self, reads: tuple[Path, ...] = (), writes: tuple[Path, ...] = ()) -> Iterator[None]:
        """Fail at the end when anything was caused inside that may not be, whoever swallowed the error."""
        self.found = []
        self.writes = tuple(os.path.realpath(path) for path in writes)
        self.reads = (*(os.path.realpath(path) for path in reads), *self.writes, *self.own)
        self.active = True
        try:
            yield
        finally:
            self.active = False
        if self.found:
            raise Violation("; ".join(dict.fromkeys(self.found)))

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.active:
            return
        self.active = False  # what the hook itself does is not watched
        try:
            problem = self._problem(event, args)
        finally:
            self.active = True
        if problem is not None:
            self.found.append(problem)
            raise Violation(problem)

    def _problem(self, event: str, args: tuple[Any, ...]) -> str | None:
        if event.startswith(_NEVER):
            return f"{event}{args[:3]!r:.300}"
        if event in ("compile", "exec"):
            return self._code(event, args[0])
        if event == "open":
            path, mode, flags = args
            writing = bool(mode and set(mode) & set("wax+")) or bool((flags or 0) & _WRITE_FLAGS)
            return self._path("write" if writing else "open", path, self.writes if writing else self.reads)
        if event in _CHANGES:
            paths = [part for part in args[:2] if isinstance(part, str | bytes | os.PathLike)]
            return next((bad for path in paths if (bad := self._path(event, path, self.writes))), None)
        if event in _LOOKS and args and args[0] is not None:
            return self._path(event, args[0], self.reads)
        return None

    def _code(self, event: str, code: Any) -> str | None:
        text = code if isinstance(code, str) else code.decode("utf-8", "replace") if isinstance(code, bytes) else ""
        held = (*getattr(code, "co_names", ()), *map(str, getattr(code, "co_consts", ())))
        return f"{event} of text from a file: {text[:80]!r}" if CANARY in text or CANARY in " ".join(held) else None

    def _path(self, what: str, path: Any, allowed: tuple[str, ...]) -> str | None:
        if isinstance(path, int):
            return None
        if os.fspath(path) in ("/dev/null", b"/dev/null", os.devnull):
            return None
        real = os.path.realpath(os.fsdecode(path))
        inside = any(real == root or real.startswith(root + os.sep) for root in allowed)
        return None if inside else f"{what} {real}"


def snapshot(*folders: Path) -> dict[str, tuple[Any, ...]]:
    """Everything below some folders, with kind, size and time of change: two are equal where nothing was touched."""
    found: dict[str, tuple[Any, ...]] = {}
    for folder in folders:
        for root, names, files in os.walk(folder):
            for name in (*names, *files):
                path = os.path.join(root, name)
                state = os.lstat(path)
                found[path] = (state.st_mode, state.st_size, state.st_mtime_ns, state.st_ino)
    return found


def main() -> None:
    """The long run: so many random damages, what became of them, and exit code 1 when one went wrong."""
    import random
    import tempfile

    import damage
    from test_guard import make_good

    tries = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    with tempfile.TemporaryDirectory() as folder:
        good, place = Path(folder) / "good", Path(folder) / "place"
        place.mkdir()
        good.mkdir()
        make_good(good)
        counts = damage.run(good, place, random.Random(seed), tries, runtime=True)
    wrong = counts.pop("wrong")
    print(", ".join(f"{value} {name}" for name, value in counts.items()), f"and {len(wrong)} wrong, seed {seed}")
    print(*wrong, sep="\n")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    import guard  # the tests' own: a hook is installed once

    guard.main()
