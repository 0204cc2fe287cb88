"""Run chapters without making pages of them: other processors' instructions, other seeds, and every claim on record.

A chapter runs in a kernel of its own, in its own folder, as in the build. Here an assert that fails is noted and the
chapter goes on, so that one run finds all of them.
"""

import contextlib
import os
import platform
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
from chapter_records import ROOT, Record, listening, read
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from tqdm import tqdm

CELL_SECONDS = 900  # old instructions on a busy machine are slow


@dataclass(frozen=True)
class Setting:
    """One way to run the book.

    Args:
        name: for tables and for the command line.
        environment: variables that choose instruction sets and numbers of threads.
        shift: added to every seed.
    """

    name: str
    environment: dict[str, str] = field(default_factory=dict)
    shift: int = 0


def _instructions(aten: str, mkl: str, openblas: str, threads: int) -> dict[str, str]:
    """What PyTorch's kernels, MKL and OpenBLAS (NumPy, SciPy) may use."""
    chosen = {"ATEN_CPU_CAPABILITY": aten, "MKL_ENABLE_INSTRUCTIONS": mkl, "OPENBLAS_CORETYPE": openblas}
    return (chosen if platform.machine() in ("x86_64", "AMD64") else {}) | {"OMP_NUM_THREADS": str(threads)}


ORDINARY = Setting("ordinary")
PROCESSORS = (
    Setting("old-1-thread", _instructions("default", "SSE4_2", "Nehalem", 1)),
    Setting("avx2-2-threads", _instructions("avx2", "AVX2", "Haswell", 2)),
    Setting("mixed-2-threads", _instructions("default", "AVX2", "Zen", 2)),
    Setting("mixed-1-thread", _instructions("avx2", "SSE4_2", "Nehalem", 1)),
)
SEEDS = tuple(Setting(f"seeds+{shift}", shift=shift) for shift in (1000, 2000, 3000))
SETTINGS = {setting.name: setting for setting in (ORDINARY, *PROCESSORS, *SEEDS)}


def execute(chapter: Path, records: Path, setting: Setting) -> float:
    """Run one chapter and return its seconds; what it claims and what it dies of is written into `records`."""
    notebook = nbformat.read(chapter, as_version=4)
    extra = {"CLAIMS_SURVEY": "1", "CLAIMS_SHIFT": str(setting.shift), "TQDM_DISABLE": "1", **setting.environment}
    began = time.perf_counter()
    with listening(records, **extra) as environment:
        client = NotebookClient(
            notebook, timeout=CELL_SECONDS, kernel_name="python3", resources={"metadata": {"path": str(chapter.parent)}}
        )
        with contextlib.suppress(CellExecutionError):  # told in the records
            client.execute(env=environment, stdout=_NOWHERE, stderr=_NOWHERE)
    return time.perf_counter() - began


_NOWHERE = os.open(os.devnull, os.O_WRONLY)  # for what kernels say of their sockets


def execute_all(
    chapters: Sequence[Path], setting: Setting, jobs: int | None = None
) -> tuple[list[Record], dict[str, float]]:
    """Run chapters side by side under a setting.

    Returns:
        Every record, with its chapter, cell and the name of the setting; and the seconds of each chapter.
    """
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder, tqdm(total=len(chapters), desc=setting.name, unit="chapter") as bar:

        def one(chapter: Path) -> None:
            name = chapter.relative_to(ROOT).as_posix()
            seconds[name] = execute(chapter, Path(folder), setting)
            bar.set_postfix_str(chapter.stem)
            bar.update()

        with ThreadPoolExecutor(jobs or os.cpu_count()) as pool:
            list(pool.map(one, chapters))
        records = read(Path(folder))
    return [record | {"setting": setting.name} for record in records], seconds
