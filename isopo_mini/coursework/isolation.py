"""A process for code that nobody has read: limits of time, memory, disk and processes, and no network where possible.

Three things hold a submission. The worker limits itself before it runs any of it (`resource.setrlimit`: memory,
processor time, file size, processes). A guard looks at it from outside, twenty times a second, and ends it when there
are too many processes, too much memory in all of them together, or too much in its folder. And where the system lets
an ordinary user have namespaces (`unshare`, Linux), it gets a network, a process table and a view of the file system
of its own: no address can be reached, folders named by the caller are empty, and its end is the end of all that it has
started.

This guards against accidents and idle cleverness. It is no sandbox against malice: for that, use a container.
"""

import contextlib
import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

GIBIBYTE, MEBIBYTE = 2**30, 2**20
NAMESPACES = ("--user", "--map-root-user", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc")
# Forks are faster than any guard, so the kernel has to count. It does for ordinary users (RLIMIT_NPROC), since 5.14 in
# each namespace. Root it stops only by the process table, which a namespace has of its own since 6.14 and no smaller.
SMALLEST_TABLE = 301
BETWEEN_LOOKS, LOOKS = 0.05, 20  # seconds between two looks of the guard, and looks in a second
AROUND = 2  # processes that are not the submission's: `unshare`, and the worker itself
# With the size of that table or nothing, the folders to hide up to "--", then the command, which cannot mount itself.
INSIDE = """
if [ -n "$1" ]; then echo "$1" > /proc/sys/kernel/pid_max || exit 125; fi; shift
while [ "$1" != -- ]; do mount -t tmpfs -o ro,size=4k none "$1" || exit 125; shift; done; shift
exec setpriv --no-new-privs --bounding-set=-all --inh-caps=-all "$@"
"""


@dataclass(frozen=True)
class Limits:
    """What a submission may use.

    Args:
        call_seconds: one cell, or one call of a function; of the processor, see `stopwatch`.
        seconds: everything together; of the processor too.
        memory: bytes of address space of a process, and of memory of all its processes together.
        disk: bytes of all files in its folder together; half for a single one, which fails before the guard looks.
        processes: how many at one time, threads not counted.
        answer: bytes of what a function returns.
    """

    call_seconds: float = 60.0
    seconds: float = 600.0
    memory: int = 4 * GIBIBYTE
    disk: int = 64 * MEBIBYTE
    processes: int = 32
    answer: int = 64 * MEBIBYTE


ORDINARY = Limits()


@functools.cache
def has_namespaces() -> bool:
    """Whether a process can be given a network and a process table of its own here."""
    if not (shutil.which("unshare") and shutil.which("setpriv")):
        return False
    command = ["unshare", *NAMESPACES, "sh", "-c", INSIDE, "sh", _table(), "--", "true"]
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False).returncode == 0


def counts_forks() -> bool:
    """Whether the kernel stops who forks without end. Otherwise there is the guard alone, which may come too late."""
    return os.geteuid() != 0 or (has_namespaces() and bool(_table()))


def _table() -> str:
    """The size of a process table of one's own, where the kernel has such; elsewhere this would be everybody's."""
    return str(SMALLEST_TABLE) if _kernel() >= (6, 14) else ""


def _kernel() -> tuple[int, int]:
    """Version of a Linux kernel; zeros elsewhere."""
    numbers = re.match(r"(\d+)\.(\d+)", os.uname().release) if sys.platform == "linux" else None
    return (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)


def most_processes(limits: Limits) -> int:
    """What RLIMIT_NPROC should be: threads count too, and where the kernel counts all of a user, those there are."""
    allowed = limits.processes + 32
    if has_namespaces() and _kernel() >= (5, 14):
        return allowed
    me = psutil.Process().username()
    mine = [entry.info for entry in psutil.process_iter(["username", "num_threads"])]
    return allowed + sum(entry["num_threads"] or 1 for entry in mine if entry["username"] == me)


class Guarded:
    """A running Python module under guard.

    Args:
        module: to be run, as `python -m` does it.
        arguments: of the module.
        folder: its working directory, for temporary files too.
        limits: what ends it.
        hidden: folders that it shall not see, where the system has namespaces.
        descriptors: file descriptors that it inherits.
    """

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        folder: Path,
        limits: Limits,
        hidden: Sequence[Path] = (),
        descriptors: Sequence[int] = (),
    ) -> None:
        self.folder, self.limits = folder, limits
        self.reason = ""
        command = [sys.executable, "-P", "-m", module, *arguments]
        if has_namespaces():
            places = [str(place.resolve()) for place in hidden if place.is_dir()]
            command = ["unshare", *NAMESPACES, "sh", "-c", INSIDE, "sh", _table(), *places, "--", *command]
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            env=_environment(folder),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # a million lines go nowhere
            stderr=subprocess.DEVNULL,
            pass_fds=descriptors,
            start_new_session=True,
        )
        self._running = AROUND  # processes when it was looked at the last time
        self._ended = threading.Event()
        self._guard = threading.Thread(target=self._watch, daemon=True)
        self._guard.start()

    def end(self, reason: str = "") -> None:
        """End the process and all that it has started; the first reason is kept."""
        self.reason = self.reason or reason
        self._ended.set()
        _kill(self.process)
        if threading.current_thread() is not self._guard:
            self._guard.join()

    def processor_seconds(self) -> float:
        """What it and its descendants have used of the processor since it began."""
        return sum(map(_processor_seconds, _family(self.process.pid)))

    def settled(self) -> str:
        """Wait for a second until nothing runs that did not run the last time; what is used too much of meanwhile."""
        family: list[psutil.Process] = []
        for _ in range(LOOKS):
            family = _family(self.process.pid)
            if self.reason:
                return self.reason
            if len(family) <= self._running:
                break
            if excess := self._excess():
                return excess
            time.sleep(BETWEEN_LOOKS)
        self._running = len(family)
        return ""

    def _watch(self) -> None:
        """End it when it uses too much."""
        while not self._ended.wait(BETWEEN_LOOKS):
            if excess := self._excess():
                self.reason = self.reason or excess
                _kill(self.process)
                return

    def _excess(self) -> str:
        """What it uses too much of, in words; empty when nothing."""
        family = _family(self.process.pid)
        if len(family) > self.limits.processes + AROUND:
            return f"it started more than {self.limits.processes} processes"
        # What is read from files, or shared after a fork, is not counted twice; to find that out takes longer.
        used = sum(map(_own_memory, family))
        if used > self.limits.memory and sum(map(_share_of_memory, family)) > self.limits.memory:
            return f"its processes used more than {self.limits.memory / GIBIBYTE:.3g} GiB of memory"
        if _size(self.folder) > self.limits.disk:
            return f"it wrote more than {self.limits.disk / MEBIBYTE:.3g} MiB of files"
        return ""


def _environment(folder: Path) -> dict[str, str]:
    """What the process is told: enough to find Python and its packages, and where temporary files go."""
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "LANG", "LD_LIBRARY_PATH") if name in os.environ}
    places = dict.fromkeys(("HOME", "TMPDIR", "IPYTHONDIR", "MPLCONFIGDIR"), str(folder))
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return kept | places | one_thread | {"MPLBACKEND": "Agg", "TQDM_DISABLE": "1"}


def _kill(process: subprocess.Popen) -> None:
    """Kill a process, its group, and its descendants; in a namespace they all end with the first."""
    family = _family(process.pid)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # of its own session, so of nobody else's group
    for member in family:
        with contextlib.suppress(psutil.Error):
            member.kill()
    process.wait()


def _family(pid: int) -> list[psutil.Process]:
    """A process and its descendants, as far as they are still there."""
    try:
        first = psutil.Process(pid)
        return [first, *first.children(recursive=True)]
    except psutil.Error:
        return []


def _processor_seconds(process: psutil.Process) -> float:
    """Of one process, and of those that it has waited for."""
    try:
        used = process.cpu_times()
    except psutil.Error:
        return 0.0
    return used.user + used.system + used.children_user + used.children_system


def _own_memory(process: psutil.Process) -> int:
    """Bytes of memory that are not those of files; what a fork shares with its parent is counted in both."""
    try:
        used = process.memory_info()
    except psutil.Error:
        return 0
    return used.rss - getattr(used, "shared", 0)


def _share_of_memory(process: psutil.Process) -> int:
    """Bytes of memory, those shared with n − 1 others divided by n."""
    try:
        used = process.memory_full_info()
    except psutil.Error:
        return 0
    return getattr(used, "pss", used.uss)


def _size(folder: Path) -> int:
    """Bytes of all files of a folder."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(place, name)).st_blocks * 512
    return total
