"""Coursework: what assignments and their grading need beside otter-grader.

    python -m isopo_mini.coursework student DIR      # the repository that students get
    python -m isopo_mini.coursework grade DIR OUT    # grade a folder of submissions

The masters are notebooks of otter's form, in the repository's folder `coursework`. `agreement` and `contest` are what
their tests call; `handing_out` and `grading` are the two commands, and need the extra `coursework`. A submission runs
in a process of its own: `submission`, `worker`, `messages` and `isolation`.
"""

from isopo_mini.coursework import agreement

__all__ = ["agreement"]
