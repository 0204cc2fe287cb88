"""The damping of one layer: from REINFORCE to the natural gradient, in two scales."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
import torch
from jaxtyping import Float
from torch import Tensor

from isopo_mini.explorables.page import Explorable
from isopo_mini.geometry.isopo import mean_eigenvalue, ntk_coefficients


def damping_numbers(gram: Float[Tensor, "S S"], advantages: Float[Tensor, "S"], rho: float) -> dict[str, float]:
    """What the damping λ = ρ tr K/S does to a layer's step Σ_s c_s G_s, as far as K and A tell.

    Lengths and angles need no gradient: with coefficients c and d, ⟨Σ_s c_s G_s, Σ_s d_s G_s⟩ = cᵀKd.

    Args:
        gram: K of the layer, not zero.
        advantages: A, not in the null space of K.
        rho: ρ > 0.

    Returns:
        - `damping`: λ;
        - `gradient_length`: length of the step in the gradient scale, over REINFORCE's;
        - `natural_length`: length in the natural scale, over that of the undamped natural gradient;
        - `cosine_reinforce`, `cosine_natural`: of the step with these two.
    """
    gram, advantages = gram.double(), advantages.double()
    damping = rho * mean_eigenvalue(gram)
    step = ntk_coefficients(gram, advantages, damping, "natural")
    undamped = (
        torch.linalg.pinv(gram, rtol=1e-12, hermitian=True) @ advantages
    )  # K⁺A: repeated sequences make K singular

    def inner(one: Tensor, other: Tensor) -> float:
        return (one @ gram @ other).item()

    lengths = {name: inner(c, c) ** 0.5 for name, c in (("step", step), ("A", advantages), ("natural", undamped))}
    return {
        "damping": damping.item(),
        "gradient_length": damping.item() * lengths["step"] / lengths["A"],
        "natural_length": lengths["step"] / lengths["natural"],
        "cosine_reinforce": inner(step, advantages) / (lengths["step"] * lengths["A"]),
        "cosine_natural": inner(step, undamped) / (lengths["step"] * lengths["natural"]),
    }


def damping(grams: Mapping[str, Float[Tensor, "S S"]], advantages: Float[Tensor, "S"], rho: float = 1.0) -> Explorable:
    """Draw the spectrum of the first layer and both ends of the damping, and return the same with a slider.

    Args:
        grams: K of each layer, by its name.
        advantages: A, one a sequence.
        rho: ρ at the start, from 10⁻³ to 10³.
    """
    name, gram = next(iter(grams.items()))
    shares = torch.linalg.eigvalsh(gram.double()).flip(0).clamp_min(0) / mean_eigenvalue(gram.double())
    shares = shares.numpy()
    index, rhos = range(1, len(shares) + 1), torch.logspace(3, -3, 61).tolist()
    figure, (left, right) = plt.subplots(1, 2, figsize=(6.8, 4.4))
    left.bar(index, rho / (shares + rho), color="#AACCBB", label="factor λ/(κ + λ)")
    left.set(xlabel="eigen-direction", title=f"K of {name}, ρ = {rho:g}", ylim=(0, 1.05))
    left.plot(index, shares / shares.max(), "o", color="#111111", markersize=4, label="κ, over the largest")
    rows = [damping_numbers(gram, advantages, value) for value in rhos]
    lines = {
        "gradient_length": ("length, gradient scale", "#009E73", "-"),
        "natural_length": ("length, natural scale", "#AA3377", "-"),
        "cosine_reinforce": ("cosine with REINFORCE", "#111111", "--"),
        "cosine_natural": ("cosine with natural gradient", "#0072B2", "--"),
    }
    for key, (label, color, line) in lines.items():
        right.semilogx(rhos, [row[key] for row in rows], line, color=color, label=label)
    right.axvline(rho, color="#777777", linewidth=1)
    right.set(xlabel="damping ρ", title="the layer's step", ylim=(0, 1.05), xticks=[1e3, 1, 1e-3])
    right.invert_xaxis()
    figure.legend(loc="outside lower center", ncols=2)
    plt.show()
    layers = {layer: matrix.tolist() for layer, matrix in grams.items()}
    data = {"grams": layers, "advantages": advantages.tolist(), "rho": rho}
    return Explorable("damping", "a slider lowers the damping, from REINFORCE to the natural gradient.", data)
