"""Runs through any `concurrent.futures.Executor`: processes of this machine, or a Dask cluster's.

Every run is made once, whoever shares the folder, and leaves its record or the reason why there is none: a traceback
in `failed`. A process that dies costs the run that it was making, and no other.
"""

import multiprocessing
import os
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from isopo_mini import checks
from isopo_mini.experiments import record_files
from isopo_mini.experiments.leases import lease, left
from isopo_mini.experiments.runs import Run, run
from isopo_mini.writing import write_atomically

FAILED = "failed"
_POLL = 1.0  # seconds


def run_all(runs: Sequence[Run], folder: Path, processes: int = 1, executor: Executor | None = None) -> None:
    """Run what has no record yet in `folder`, and write the records there.

    Args:
        runs: see `experiments.grid`.
        folder: results; records go into a folder of their own inside it, and into one file at the end. Runs that
            another program is making in the same folder are waited for.
        processes: how many runs at a time, each in a process with one thread; 1 is this process. With more, a script
            must call this under `if __name__ == "__main__":`, because each process imports it anew.
        executor: where to run instead, such as a Dask cluster's. It must see the folder under the same path, and run
            one at a time in a process.

    Raises:
        RuntimeError: runs failed with an error of their own, or their process died. All others have their records
            then, and `failed` the tracebacks.
    """
    checks.require_at_least("processes", processes, 1)
    folder = folder.resolve()
    (folder / record_files.FOLDER).mkdir(parents=True, exist_ok=True)
    names = record_files.recorded(folder)
    missing = [one for one in runs if not _is_recorded(one, names)]
    with tqdm(total=len(runs), initial=len(runs) - len(missing), desc="runs", delay=2) as bar:
        work = _Work(folder, bar)
        try:
            while missing:
                missing = work.round(missing, processes, executor)
                if missing and not work.progressed:  # all of them are being made elsewhere
                    time.sleep(_POLL)
        finally:
            record_files.pack(folder)
    if work.failed:
        name, error = next(iter(work.failed.items()))
        raise RuntimeError(
            f"{len(work.failed)} of {len(runs)} runs failed, first {name}: {str(error).rstrip('.')}; "
            f"see {folder.name}/{FAILED}"
        ) from error


def run_and_record(one: Run, folder: Path) -> bool:
    """Run, and write the record.

    Returns:
        Whether there is a record now; False when somebody else is at it.
    """
    with lease(folder, one.file_name) as ours:
        if not ours:
            return False
        if record_files.is_recorded(folder, one.file_name):  # since the grid was looked through
            return True
        note = folder / FAILED / f"{one.file_name}.txt"
        try:
            record_files.write_record(folder / record_files.FOLDER / one.file_name, run(one))
        except Exception:
            _write_note(note, traceback.format_exc())
            raise
        note.unlink(missing_ok=True)
        return True


@dataclass
class _Work:
    """What became of the runs of a grid so far.

    Args:
        folder: where their records go.
        bar: counts those that are done, one way or the other.
    """

    folder: Path
    bar: Any
    failed: dict[str, BaseException] = field(default_factory=dict)
    progressed: bool = False
    started: bool = False

    def round(self, runs: Sequence[Run], processes: int, executor: Executor | None) -> list[Run]:
        """Try all of them once; return those that are still to be made, here or by somebody else."""
        self.progressed = False
        if executor is not None:
            again, lost = self._submit(runs, executor)
        elif processes == 1:
            return [one for one in runs if self._submit([one], _Here())[0]]
        else:
            with _processes(processes) as pool:
                again, lost = self._submit(runs, pool)
        # Whoever was being made when a process died is tried alone: then it is known which of them kills processes.
        suspected = set(left(self.folder)) & {one.file_name for one in lost}
        for one in [one for one in lost if one.file_name in suspected]:
            with _processes(1) as alone:
                elsewhere, lost_again = self._submit([one], alone)
            again += elsewhere
            for dead in lost_again:
                error = RuntimeError("its process died, killed or out of memory")
                _write_note(self.folder / FAILED / f"{dead.file_name}.txt", f"{error}\n")
                self._done(dead, error)
        if lost and not self.progressed:
            raise RuntimeError(_CUT_OFF if self.started else _GUARD)
        return again + [one for one in lost if one.file_name not in suspected]

    def _submit(self, runs: Sequence[Run], executor: Executor) -> tuple[list[Run], list[Run]]:
        """Run them; return those that somebody else is at, and those that were lost with a process of the executor."""
        elsewhere, lost = [], []
        waiting: dict[Future[bool], Run] = {executor.submit(run_and_record, one, self.folder): one for one in runs}
        for future in as_completed(waiting):
            one, error = waiting[future], future.exception()
            if isinstance(error, BrokenExecutor):
                lost.append(one)
            elif error is None and not future.result():
                elsewhere.append(one)
            else:
                self._done(one, error)
        return elsewhere, lost

    def _done(self, one: Run, error: BaseException | None) -> None:
        """It has its record, or an error, which is kept for the end: one bad run does not stop a night's others."""
        self.progressed = self.started = True
        self.bar.update()
        if error is not None:
            self.failed[one.file_name] = error


class _Here(Executor):
    """Runs what it is given at once, in this process."""

    def submit(self, function: Any, /, *arguments: Any, **options: Any) -> Future:
        """A future that has its result, or its error, already."""
        future: Future = Future()
        try:
            future.set_result(function(*arguments, **options))
        except Exception as error:
            future.set_exception(error)
        return future


@contextmanager
def _processes(count: int) -> Iterator[Executor]:
    """A pool of processes. Left by an error or by Ctrl-C, it starts no further run."""
    # Not forked: a process that has used threads or a GPU cannot be copied safely.
    pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), _start_worker)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


# Why no process of several ever took a run.
_GUARD = (
    "no process got as far as to start. Each of them imports the program anew, so a script must call this under "
    '`if __name__ == "__main__":`, and a program from standard input cannot have processes. Mend that, or give '
    "processes=1"
)


# Why processes that have taken runs before no longer do.
_CUT_OFF = "the processes die before they take a run; start the same command again when that is mended"


def _start_worker() -> None:
    """One thread for the work, and one that ends this process when its parent has died, even by SIGKILL."""
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _write_note(path: Path, text: str) -> None:
    """Why a run has no record."""
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, text)


def _is_recorded(one: Run, names: dict[str, dict[str, Any]]) -> bool:
    """Whether the folder has this run's record. Another run's under its name is an error."""
    found = names.get(one.file_name)
    if found is not None and found != asdict(one):
        raise ValueError(f"{one.file_name}: expected the record of {asdict(one)}, got that of {found}")
    return found is not None
