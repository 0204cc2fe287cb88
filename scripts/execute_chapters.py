"""Run chapters without making pages of them: other processors' instructions, other seeds, and every claim on record.

A chapter runs in a kernel of its own, in its own folder, as in the build. Here an assert that fails is noted and the
chapter goes on, so that one run finds all of them.
"""

import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from chapter_records import NO_GRAMMAR, ROOT, Record, listening, read
from tqdm import tqdm

# `jupyter execute`, wherever its script may lie.
EXECUTE = f"{NO_GRAMMAR}; from nbclient.cli import main; main()"
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


def execute(chapter: Path, setting: Setting, root: Path = ROOT) -> list[Record]:
    """Run one chapter; what it claims and what it dies of."""
    extra = {"CLAIMS_SURVEY": "1", "CLAIMS_SHIFT": str(setting.shift), "TQDM_DISABLE": "1", **setting.environment}
    command = [sys.executable, "-c", EXECUTE, "--kernel_name=python3", f"--timeout={CELL_SECONDS}", str(chapter)]
    with tempfile.TemporaryDirectory() as folder, listening(Path(folder), **extra) as environment:
        finished = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", check=False)
        records = read(Path(folder), root)
    if finished.returncode and not any("error" in record for record in records):
        # The kernel itself has died, or a cell took too long.
        where = {"chapter": chapter.relative_to(root).as_posix(), "cell": 0, "source": "", "failing": ""}
        records.append(where | {"error": "no answer", "message": finished.stderr[-500:].strip()})
    return records


def execute_all(
    chapters: Sequence[Path], setting: Setting, jobs: int | None = None, root: Path = ROOT
) -> tuple[list[Record], dict[str, float]]:
    """Run chapters side by side under a setting.

    Returns:
        Every record, with its chapter, cell and the name of the setting; and the seconds of each chapter.
    """
    seconds: dict[str, float] = {}
    with tqdm(total=len(chapters), desc=setting.name, unit="chapter") as bar:

        def one(chapter: Path) -> list[Record]:
            began = time.perf_counter()
            records = execute(chapter, setting, root)
            seconds[chapter.relative_to(root).as_posix()] = time.perf_counter() - began
            bar.set_postfix_str(chapter.stem)
            bar.update()
            return records

        with ThreadPoolExecutor(jobs or os.cpu_count()) as pool:
            found = [record for records in pool.map(one, chapters) for record in records]
    return [record | {"setting": setting.name} for record in found], seconds
