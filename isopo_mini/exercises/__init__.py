"""`check`: run a reader's function on a few cases, say what differs, and which known mistake that looks like.

What is right, the cases and the mistakes of the book's own exercises stand in this package, a module a part, so that
they do not stand beside the exercise: `check(function, "fisher_product")` finds them by name.
"""

from isopo_mini.exercises.checker import check

__all__ = ["check"]
