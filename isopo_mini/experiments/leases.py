"""Who is making which run: a small file a run, so that several programs, on several machines, can share a folder.

A lease is a file that only one can create (`O_EXCL`). Its holder touches it every few seconds. One whose process is
gone, or that nobody has touched for a minute, is void: the holder was killed, and the next who asks gets the run.

Only who holds the folder's lock takes a file away, and looks again before: else the second of two who saw the same
void lease would take away the first one's new one. The lock is the operating system's, so a process that dies leaves
none behind.
"""

import json
import os
import socket
import tempfile
import threading
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock

FOLDER = "running"
BEAT, VOID = 5.0, 60.0  # seconds


@contextmanager
def lease(folder: Path, name: str) -> Iterator[bool]:
    """Hold the lease `name` of an experiment's folder.

    Yields:
        Whether it is ours. False when somebody else is at it.
    """
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    path = folder / FOLDER / name
    holder = _holder()
    if not (_create(path, holder) or (_is_void(path) and _replace_void(path, holder))):
        yield False
        return
    ended = threading.Event()
    heart = threading.Thread(target=_beat, args=(path, holder, ended), daemon=True)
    heart.start()
    try:
        yield True
    finally:
        ended.set()
        heart.join()
        with _lock(path.parent):
            if _holder_of(path) == holder:  # not of somebody who took us for dead
                path.unlink()


def left(folder: Path) -> list[str]:
    """The names of the leases whose holders are gone."""
    # Not the lock, nor the files of a moment that `_now_of` makes: their names begin with a dot.
    return sorted(path.name for path in (folder / FOLDER).glob("[!.]*") if _is_void(path))


def sweep(folder: Path, names: Collection[str]) -> None:
    """Take away the void leases of these names: of runs whose process died after it had written their record."""
    for path in [folder / FOLDER / name for name in left(folder) if name in names]:
        with _lock(path.parent):
            if _is_void(path):  # still
                path.unlink()


def _holder() -> dict[str, str | int]:
    """What tells one holder from all others, of this process too."""
    return {"host": socket.gethostname(), "process": os.getpid(), "token": uuid.uuid4().hex}


def _create(path: Path, holder: dict[str, str | int]) -> bool:
    """Make the file; False when it is there."""
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        return False
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump(holder, file)
    return True


def _holder_of(path: Path) -> dict[str, str | int] | None:
    """What `_create` wrote; None of one that was given back in this moment, or is not written yet."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _beat(path: Path, holder: dict[str, str | int], ended: threading.Event) -> None:
    """Show that the holder is alive, until it has ended."""
    while not ended.wait(BEAT):
        if _holder_of(path) != holder:  # somebody took us for dead
            return
        with suppress(OSError):
            os.utime(path)


def _is_void(path: Path) -> bool:
    """Whether the holder is gone: known at once of this machine's processes, after a while of others."""
    try:
        age = _now_of(path.parent) - path.stat().st_mtime
    except OSError:  # given back in this moment
        return False
    holder = _holder_of(path) or {}
    if holder.get("host") == socket.gethostname() and os.name == "posix" and not _runs(int(holder["process"])):
        return True
    return age > VOID


def _now_of(folder: Path) -> float:
    """The time by the clock that the folder's files get theirs from, which may be another machine's."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".now.") as file:
        return os.fstat(file.fileno()).st_mtime


def _lock(folder: Path) -> FileLock:
    """The folder's lock, for a moment."""
    return FileLock(folder / ".lock")


def _replace_void(path: Path, holder: dict[str, str | int]) -> bool:
    """Take a void lease's place; of several who try, one succeeds."""
    with _lock(path.parent):
        if _is_void(path):  # still
            path.unlink()
        return _create(path, holder)


def _runs(process: int) -> bool:
    """Whether a process of this machine is there."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
