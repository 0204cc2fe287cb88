"""Who is making which run: a small file a run, so that several programs, on several machines, can share a folder.

A lease is a file that only one can create (`O_EXCL`). Its holder touches it every few seconds. One whose process is
gone, or that nobody has touched for a minute, is void: the holder was killed, and the next who asks gets the run.
"""

import json
import os
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
    if not (_create(path) or (_is_void(path) and _remove_void(path) and _create(path))):
        yield False
        return
    ended = threading.Event()
    heart = threading.Thread(target=_beat, args=(path, ended), daemon=True)
    heart.start()
    try:
        yield True
    finally:
        ended.set()
        heart.join()
        path.unlink(missing_ok=True)


def left(folder: Path) -> list[str]:
    """The names of the leases whose holders are gone."""
    # Not the files of a moment that `_now_of` and `_remove_void` make, whose names begin with a dot.
    return sorted(path.name for path in (folder / FOLDER).glob("[!.]*") if _is_void(path))


def _create(path: Path) -> bool:
    """Make the file; False when it is there."""
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        return False
    with os.fdopen(handle, "w") as file:
        json.dump({"host": socket.gethostname(), "process": os.getpid()}, file)
    return True


def _beat(path: Path, ended: threading.Event) -> None:
    """Show that the holder is alive, until it has ended."""
    while not ended.wait(BEAT):
        try:
            os.utime(path)
        except OSError:  # removed by somebody who took us for dead
            return


def _is_void(path: Path) -> bool:
    """Whether the holder is gone: known at once of this machine's processes, after a while of others."""
    try:
        age = _now_of(path.parent) - path.stat().st_mtime
        holder = json.loads(path.read_text() or "{}")
    except (OSError, ValueError):  # given back in this moment, or not written yet
        return False
    if holder.get("host") == socket.gethostname() and os.name == "posix" and not _runs(holder["process"]):
        return True
    return age > VOID


def _now_of(folder: Path) -> float:
    """The time by the clock that the folder's files get theirs from, which may be another machine's."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".now.") as file:
        return os.fstat(file.fileno()).st_mtime


def _remove_void(path: Path) -> bool:
    """Take a void lease away; of several who try, one succeeds."""
    away = path.with_name(f".void.{os.getpid()}.{threading.get_ident()}.{path.name}")
    try:
        os.rename(path, away)
    except FileNotFoundError:
        return False
    away.unlink()
    return True


def _runs(process: int) -> bool:
    """Whether a process of this machine is there."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
