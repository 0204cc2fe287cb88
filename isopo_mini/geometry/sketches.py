"""Sketches: random projections of a layer's gradients that keep their inner products in the mean.

Ĝ_s = P G_s Qᵀ with random P (k × o) and Q (k × i), independent of each other, E[PᵀP] = I and E[QᵀQ] = I. Then
E⟨Ĝ_s, Ĝ_s'⟩ = ⟨G_s, G_s'⟩. There are two kinds of P:

- *Gaussian*: entries N(0, 1/k). A vector of n numbers costs n·k multiplications.
- *Signs*: the vector is cut into blocks of k, which are added up with a random sign for every entry: n additions.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from isopo_mini import checks

KINDS = ("gaussian", "signs")


@dataclass(frozen=True)
class SignProjection:
    """(P v)_j = Σ_b signs_bj v_(bk+j): the m blocks of v, of k entries each, summed with random signs.

    P has one entry ±1 a column, so PᵀP has ones on its diagonal whatever the signs, and ±1 for two entries that have
    the same place in their blocks. Hence, the signs being independent,

        Var (Pu)·(Pv) = Σ (u_i² v_j² + u_i v_i u_j v_j)   over i ≠ j with the same place in their blocks,

    where a Gaussian projection has ((u·u)(v·v) + (u·v)²)/k. The two are alike where a vector is spread evenly over the
    places, and signs are better for u = v. They are worse where nearly all of a vector has one place: for u = v with
    equal entries at that place alone the relative variance is 2(1 − 1/m) instead of 2/k.

    Args:
        signs: +1 or −1, one row a block.
    """

    signs: Float[Tensor, "m k"]

    def dense(self) -> Float[Tensor, "k n"]:
        """P written out."""
        blocks, size = self.signs.shape
        identity = torch.eye(size, dtype=self.signs.dtype, device=self.signs.device)
        return identity.repeat(1, blocks) * self.signs.flatten()


Projection = Float[Tensor, "_ _"] | SignProjection
TakeMemory = Callable[[tuple[int, ...], Tensor], Tensor]


def project(
    vectors: Float[Tensor, "... n"], projection: Projection, memory: TakeMemory | None = None
) -> Float[Tensor, "... k"]:
    """P v for every vector, in the dtype of the vectors.

    Args:
        memory: where the entries with their signs are written, which are as many as the vectors have: on a CPU, memory
            that was used before takes half of the time. A function of a shape and of a tensor whose dtype and device it
            has. Fresh memory if None.
    """
    if not isinstance(projection, SignProjection):
        return vectors @ projection.to(vectors.dtype).T
    signs = projection.signs.to(vectors.dtype)
    blocks = vectors.unflatten(-1, signs.shape)
    signed = blocks * signs if memory is None else torch.mul(blocks, signs, out=memory(blocks.shape, blocks))
    return signed.sum(dim=-2)


def columns_of(projection: Projection, indices: Int[Tensor, "..."], dtype: torch.dtype) -> Float[Tensor, "... k"]:
    """P's products with one-hot vectors that are given by their indices."""
    written_out = projection.dense() if isinstance(projection, SignProjection) else projection
    return written_out.to(dtype).T[indices]


@dataclass(frozen=True)
class Sketch:
    """The projections of Ĝ_s = P G_s Qᵀ. A side that is no longer than k is kept as it is (None).

    Args:
        left: P, of vectors with o entries, or None.
        right: Q, of vectors with i entries, or None.
    """

    left: Projection | None
    right: Projection | None


def draw_projection(
    size: int,
    length: int,
    like: Float[Tensor, "..."],
    generator: torch.Generator | None = None,
    kind: str = "gaussian",
) -> Projection:
    """A random P of vectors of `length` numbers, with E[PᵀP] = I.

    Args:
        size: k.
        kind: `"gaussian"`, or `"signs"`, which is Gaussian all the same where k does not divide the length.

    Raises:
        ValueError: `size` is less than 1, or the kind is unknown.
    """
    checks.require_at_least("size", size, 1)
    checks.require_choice("kind", kind, KINDS)
    if kind == "signs" and length % size == 0:
        return SignProjection(random_signs((length // size, size), like, generator))
    return torch.randn(size, length, dtype=like.dtype, device=like.device, generator=generator) / math.sqrt(size)


def draw_sketch(
    size: int,
    rows: int,
    columns: int,
    like: Float[Tensor, "..."],
    generator: torch.Generator | None = None,
    kind: str = "gaussian",
) -> Sketch:
    """Draw the two projections for a weight of shape `(rows, columns)`, with the dtype and device of `like`.

    Args:
        size: k, the length that each side of G_s is projected to. A side that is no longer than k is kept.
        kind: see `draw_projection`.

    Raises:
        ValueError: `size` is less than 1, or the kind is unknown.
    """
    sides = [
        draw_projection(size, length, like, generator, kind) if length > size else None for length in (rows, columns)
    ]
    return Sketch(*sides)


def random_signs(
    shape: tuple[int, ...], like: Float[Tensor, "..."], generator: torch.Generator | None = None
) -> Float[Tensor, "..."]:
    """+1 or −1 with equal chances, independent, with the dtype and device of `like`."""
    bits = torch.randint(0, 2, shape, device=like.device, generator=generator)
    return (2 * bits - 1).to(like.dtype)
