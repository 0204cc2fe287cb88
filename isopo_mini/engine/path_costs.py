"""What each path to a weight's Gram matrix adds to a step, in multiplications, and which is the cheapest."""

from dataclasses import dataclass

from isopo_mini.geometry import gram as grams

# Measured on one core, from a width of 256 to one of 4,096: writing the entries of the G_s and reading them twice takes
# as long as so many multiplications each, once they no longer fit into a cache.
MOVED = 40
CACHE = 2**22  # bytes
# Reading an entry of a matrix for its product with a vector, when it is in a cache, takes as long as so many
# multiplications of a product of matrices.
READ = 13


@dataclass(frozen=True)
class Sizes:
    """Of a weight `(rows, columns)` and of what it is used on: S, T, and the bytes of a number."""

    sequences: int
    positions: int
    rows: int
    columns: int
    element_size: int

    @property
    def gradients(self) -> int:
        """Entries of all G_s."""
        return self.sequences * self.rows * self.columns


def exact_path(sizes: Sizes, most_bytes: int | None = None) -> str:
    """`"dense"` or `"ghost"`, whichever adds less; `"ghost"` where the G_s would take more than `most_bytes`."""
    if most_bytes is not None and sizes.gradients * sizes.element_size > most_bytes:
        return "ghost"
    return "dense" if dense_cost(sizes) <= ghost_cost(sizes) else "ghost"


def exact_cost(sizes: Sizes, most_bytes: int | None = None) -> int:
    """Of the path that `exact_path` names."""
    return dense_cost(sizes) if exact_path(sizes, most_bytes) == "dense" else ghost_cost(sizes)


def dense_cost(sizes: Sizes) -> int:
    """Of forming every G_s: what it multiplies, and what it moves if that is more than a cache holds."""
    moved = MOVED * sizes.gradients if sizes.gradients * sizes.element_size > CACHE else 0
    return grams.dense_cost(sizes.sequences, sizes.positions, sizes.rows, sizes.columns) + moved


def ghost_cost(sizes: Sizes) -> int:
    """Of inner products of positions."""
    return grams.ghost_cost(sizes.sequences, sizes.positions, sizes.rows, sizes.columns)


def sketched_cost(sizes: Sizes, size: int) -> int:
    """Of sums with random signs, k = `size`: every entry of a factor that is longer than k is read once."""
    tokens = sizes.sequences * sizes.positions
    read = sum(length for length in (sizes.rows, sizes.columns) if length > size) * tokens * MOVED // 3
    kept = min(sizes.rows, size) * min(sizes.columns, size)
    return read + tokens * kept + sizes.sequences**2 * kept


def products_pay(sequences: int, columns: int, iterations: int) -> bool:
    """Do so many products with the rows of all sequences, and with their transpose, take less than K and its factor?"""
    return 2 * READ * iterations * sequences * columns < sequences**2 * columns + sequences**3
