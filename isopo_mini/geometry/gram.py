"""The Gram matrix of one layer's per-sequence gradients, three ways.

The gradient of a weight matrix W (o × i) is a sum of outer products, one a position. For sequence s,

    G_s = Σ_t left_st right_stᵀ                                                    (o, i)

- `Linear`: left = gradient at the layer's output, right = the layer's input.
- `Embedding`: left = one-hot vector of the token, right = gradient at the layer's output. The one-hot vectors
  are never formed: pass the token indices (int64) as `left`.

The Gram matrix K_ss' = ⟨G_s, G_s'⟩ is the layer's empirical neural tangent kernel. `dense` forms every G_s,
`ghost` only inner products of positions, `sketched` random projections of G_s.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from isopo_mini import checks
from isopo_mini.geometry.sketches import Sketch as Sketch
from isopo_mini.geometry.sketches import TakeMemory, columns_of, project
from isopo_mini.geometry.sketches import draw_projection as draw_projection
from isopo_mini.geometry.sketches import draw_sketch as draw_sketch

# Entries of the two (positions × positions) blocks that `ghost` holds at once: 2²⁰ floats are 4 MB each.
GHOST_BLOCK = 2**20
# Eight or eleven bits of mantissa are too few for sums as long as an inner product of gradients.
HALF_PRECISION = (torch.float16, torch.bfloat16)
# Entries of a gradient whose products single precision may add up: the sum of 28 million is off by 8e-3 for S = 4,
# sums of 4,096 added up in double precision by 1e-8, in no more time.
SUMMED_AT_ONCE = 2**12
# With at least so many rows, and rows at least so long, half of the inner products are made and mirrored. Of fewer or
# shorter rows it is faster to make them all in one call.
MANY_ROWS, LONG_ROWS = 256, 512


def per_sequence_gradients(
    left: Float[Tensor, "S T o"] | Int[Tensor, "S T"],
    right: Float[Tensor, "S T i"],
    rows: int | None = None,
    out: Float[Tensor, "S o i"] | None = None,
) -> Float[Tensor, "S o i"]:
    """G_s = Σ_t left_st right_stᵀ, for every sequence.

    Args:
        rows: o, needed when `left` holds indices.
        out: memory to write the result to.
    """
    _check_pair(left, right)
    if left.is_floating_point():
        return torch.bmm(left.transpose(1, 2), right, out=out)
    if rows is None:
        raise ValueError("rows: expected the number of rows of the weight, since left holds indices, got None")
    sequences, width = left.shape[0], right.shape[2]
    gradients = right.new_zeros(sequences * rows, width)
    offset = rows * torch.arange(sequences, device=left.device)[:, None]  # every sequence has rows of its own
    gradients.index_add_(0, (left + offset).flatten(), right.flatten(0, 1))
    gradients = gradients.view(sequences, rows, width)
    return gradients if out is None else out.copy_(gradients)


def inner_products(gradients: Float[Tensor, "S ..."]) -> Float[Tensor, "S S"]:
    """K = G Gᵀ with every sequence's gradient flattened to one row. At least single precision."""
    flat = gradients if gradients.ndim == 2 else gradients.flatten(1)
    if flat.dtype in HALF_PRECISION:
        flat = flat.float()
    size = flat.shape[1]
    whole = size // SUMMED_AT_ONCE
    if whole < 2 or flat.dtype == torch.float64:
        is_large = len(flat) >= MANY_ROWS and size >= LONG_ROWS
        return _product_by_strips(flat) if is_large else flat @ flat.T
    end = whole * SUMMED_AT_ONCE
    blocks = flat[:, :end].unflatten(1, (whole, SUMMED_AT_ONCE)).transpose(0, 1)  # (blocks, S, entries), no copy
    total = torch.bmm(blocks, blocks.mT).sum(dim=0, dtype=torch.float64)
    if end < size:
        total += flat[:, end:] @ flat[:, end:].T
    return total.to(flat.dtype)


def block_products(gradients: Float[Tensor, "S ..."], count: int) -> Float[Tensor, "B b b"]:
    """`inner_products` of every one of `count` blocks of S/count sequences."""
    flat = gradients.flatten(1)
    if flat.shape[1] >= 2 * SUMMED_AT_ONCE and flat.dtype != torch.float64:
        return torch.stack([inner_products(block) for block in flat.chunk(count)])
    blocks = (flat.float() if flat.dtype in HALF_PRECISION else flat).unflatten(0, (count, -1))
    return torch.bmm(blocks, blocks.mT)


def _product_by_strips(rows: Float[Tensor, "S n"]) -> Float[Tensor, "S S"]:
    """The rows' inner products: the lower triangle in four strips, mirrored; five eighths of the multiplications."""
    product = rows.new_empty(len(rows), len(rows))
    height = -(-len(rows) // 4)
    for start in range(0, len(rows), height):
        end = start + height  # the last strip may be lower than the others
        product[start:, start:end] = rows[start:] @ rows[start:end].T
        product[start:end, end:] = product[end:, start:end].T
    return product


def dense(
    left: Float[Tensor, "S T o"] | Int[Tensor, "S T"], right: Float[Tensor, "S T i"], rows: int | None = None
) -> Float[Tensor, "S S"]:
    """K_ss' = ⟨G_s, G_s'⟩ from the gradients themselves. Memory S·o·i, multiplications S·T·o·i + S²·o·i."""
    return inner_products(per_sequence_gradients(left, right, rows))


def ghost(
    left: Float[Tensor, "S T o"] | Int[Tensor, "S T"], right: Float[Tensor, "S T i"], bias: bool = False
) -> Float[Tensor, "S S"]:
    """K_ss' = Σ_tt' (left_st·left_s't')(right_st·right_s't'): no gradient is formed. Multiplications S²T²(o+i).

    Args:
        bias: count the gradient of the layer's bias too, Σ_t left_st. It is that of a weight whose input is 1
            everywhere, so every product of right vectors grows by 1.

    Source: Goodfellow, *Efficient per-example gradient computations*, arXiv 1510.01799 (norms, that is, the
    diagonal for T = 1); the double sum over positions is the ghost norm of Li et al., arXiv 2110.05679.
    """
    _check_pair(left, right)
    return ghost_between(left, right, left, right, bias)


def ghost_between(
    left: Float[Tensor, "S T o"] | Int[Tensor, "S T"],
    right: Float[Tensor, "S T i"],
    other_left: Float[Tensor, "R U o"] | Int[Tensor, "R U"],
    other_right: Float[Tensor, "R U i"],
    bias: bool = False,
) -> Float[Tensor, "S R"]:
    """⟨G_s, H_r⟩ for two sets of gradients G and H of one weight, block by block so that memory stays small."""
    positions = right.shape[1]
    others, other_positions = other_right.shape[:2]
    precise = torch.promote_types(right.dtype, torch.float32)
    flat_left, flat_right = left.flatten(0, 1), right.flatten(0, 1).to(precise)
    same = other_right is right and other_left is left
    columns_left = flat_left if same else other_left.flatten(0, 1)
    columns_right = (flat_right if same else other_right.flatten(0, 1).to(precise)).T
    size = max(1, GHOST_BLOCK // (positions * others * other_positions)) * positions
    blocks = []
    for rows_left, rows_right in zip(flat_left.split(size), flat_right.split(size), strict=True):
        products = rows_right @ columns_right
        if bias:
            products += 1.0
        products *= _inner_of_left(rows_left, columns_left, precise)
        if positions * other_positions > 1:
            products = products.view(-1, positions, others, other_positions).sum(dim=(1, 3))
        blocks.append(products)
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


def own_products(
    left: Float[Tensor, "S T o"] | Int[Tensor, "S T"],
    right: Float[Tensor, "S T i"],
    other_left: Float[Tensor, "S U o"] | Int[Tensor, "S U"],
    other_right: Float[Tensor, "S U i"],
) -> Float[Tensor, "S"]:
    """⟨G_s, H_s⟩ for two sets of gradients of one weight, each sequence with itself: the diagonal of a Gram matrix.

    Multiplications S·T·U(o+i), in blocks of sequences so that memory stays small.
    """
    precise = torch.promote_types(right.dtype, torch.float32)
    size = max(1, GHOST_BLOCK // (right.shape[1] * other_right.shape[1]))
    factors = (left, right, other_left, other_right)
    products = []
    for a, x, b, y in zip(*(factor.split(size) for factor in factors), strict=True):
        of_right = x.to(precise) @ y.to(precise).mT
        if a.is_floating_point() and b.is_floating_point():
            of_left = a.to(precise) @ b.to(precise).mT
        elif a.is_floating_point():  # the entry of a that b's one-hot vector picks
            of_left = a.to(precise).gather(2, b[:, None, :].expand(-1, a.shape[1], -1))
        elif b.is_floating_point():
            of_left = b.to(precise).gather(2, a[:, None, :].expand(-1, b.shape[1], -1)).mT
        else:
            of_left = a[:, :, None] == b[:, None, :]
        products.append((of_right * of_left).sum(dim=(1, 2)))
    return torch.cat(products)


def sketched_gradients(
    left: Float[Tensor, "S T o"] | Int[Tensor, "S T"],
    right: Float[Tensor, "S T i"],
    sketch: Sketch,
    memory: TakeMemory | None = None,
    bias_column: Float[Tensor, "l"] | None = None,
) -> Float[Tensor, "S k l"]:
    """Ĝ_s = Σ_t (P left_st)(Q right_st)ᵀ. Linear in G_s, so sketches of parts add up when they share P and Q.

    Args:
        memory: see `sketches.project`.
        bias_column: one more column of Q, for an input 1 at every position: Ĝ_s is then that of weight and bias
            together. It needs a Q.
    """
    _check_pair(left, right)
    if sketch.right is not None:
        right = project(right, sketch.right, memory)
        if bias_column is not None:
            right += bias_column
    if left.is_floating_point():
        if sketch.left is not None:
            left = project(left, sketch.left, memory)
    elif sketch.left is not None:
        left = columns_of(sketch.left, left, right.dtype)
    else:
        raise ValueError("sketch.left: expected a projection, since left holds indices, got None")
    return torch.bmm(left.transpose(1, 2), right)


def sketched(
    left: Float[Tensor, "S T o"] | Int[Tensor, "S T"], right: Float[Tensor, "S T i"], sketch: Sketch
) -> Float[Tensor, "S S"]:
    """K̂_ss' = ⟨Ĝ_s, Ĝ_s'⟩ with Ĝ_s = P G_s Qᵀ, an unbiased estimate of K_ss'. A position costs k(o+i+k)."""
    return inner_products(sketched_gradients(left, right, sketch))


def dense_cost(sequences: int, positions: int, rows: int, columns: int) -> int:
    """Multiplications that `dense` adds to a step: the inner products and the weighted sum of the G_s.

    Forming the G_s adds none: it takes the place of the ordinary weight gradient, which costs the same S·T·o·i.
    """
    return (sequences**2 + sequences) * rows * columns


def ghost_cost(sequences: int, positions: int, rows: int, columns: int) -> int:
    """Multiplications that `ghost` adds to a step; the weight gradient is then the ordinary one."""
    return sequences**2 * positions**2 * (rows + columns)


def cheaper(sequences: int, positions: int, rows: int, columns: int) -> str:
    """`"dense"` or `"ghost"`, whichever adds fewer multiplications. Short sequences in wide layers favour ghost."""
    costs = {path: cost(sequences, positions, rows, columns) for path, cost in _COSTS.items()}
    return min(costs, key=lambda path: costs[path])


_COSTS = {"dense": dense_cost, "ghost": ghost_cost}


def _inner_of_left(left: Tensor, other: Tensor, dtype: torch.dtype) -> Tensor:
    """Inner products of all pairs of left vectors, `(n, m)`; a one-hot vector is given by its index."""
    if left.is_floating_point() and other.is_floating_point():
        return left.to(dtype) @ other.to(dtype).T
    if left.is_floating_point():
        return left[:, other].to(dtype)
    if other.is_floating_point():
        return other[:, left].T.to(dtype, copy=True)
    return (left[:, None] == other[None, :]).to(dtype)


def _check_pair(left: Tensor, right: Tensor) -> None:
    """Both sides must have the same S and T."""
    sizes = checks.require_shape("right", right, "S T i")
    checks.require_floating("right", right)
    checks.require_not_empty("right", right)
    if isinstance(left, Tensor) and left.dtype == torch.int64:
        checks.require_shape("left", left, "S T", sizes)
    else:
        checks.require_shape("left", left, "S T o", sizes)
        checks.require_floating("left", left)
    checks.require_same_device("left", left, "right", right)
