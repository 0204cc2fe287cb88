"""Files are written whole or not at all: whoever is killed in between leaves the old ones."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write to a temporary file in the same folder, then rename: a killed process leaves the old file or the new."""
    write_together({path: content})


def write_together(contents: Mapping[Path, str | bytes]) -> None:
    """Write files that belong together: the first gets its name when all of them are complete.

    The name of a temporary file begins with a dot and the name of the real one; see `is_unfinished`.
    """
    complete: dict[str, Path] = {}
    try:
        for path, content in contents.items():
            handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
            complete[temporary] = path
            with os.fdopen(handle, "wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
        for temporary, path in complete.items():
            os.replace(temporary, path)
    except BaseException:
        for temporary in complete:
            Path(temporary).unlink(missing_ok=True)
        raise


def is_unfinished(found: Path, path: Path) -> bool:
    """Whether `found` is what a process left that was killed while it wrote `path`."""
    return found.parent == path.parent and found.name.startswith(f".{path.name}.")
