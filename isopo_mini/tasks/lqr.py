"""Linear systems with quadratic cost: the cost of a gain, its gradient and the optimum by matrix equations.

States x_{t+1} = A x_t + B u_t from x_0 with E x_0 x_0ᵀ = Σ, measurements y_t = C x_t, controls u_t = −K y_t, and

    J(K) = E Σ_t (x_tᵀ Q x_t + u_tᵀ R u_t),

to be *minimised*. With C = I the control sees everything and the Riccati equation gives the optimum; with a C of
fewer rows than states it is static output feedback. All of it in float64.

The letters are those of control. A is a matrix here, not an advantage, and Q and R are weights of the cost.
"""

import warnings

import numpy as np
import scipy.linalg
import torch
from jaxtyping import Float
from torch import Tensor

from isopo_mini import checks


class LinearQuadratic:
    """A linear system, its quadratic cost, and what the cost of a gain K is, by Lyapunov equations.

    Args:
        A: how the state moves by itself, `(n, n)`.
        B: how a control moves it, `(n, m)`.
        Q: weight of the state in the cost, `(n, n)`, symmetric and positive semidefinite.
        R: weight of the control, `(m, m)`, symmetric and positive definite.
        Sigma: E x_0 x_0ᵀ, `(n, n)`, symmetric and positive definite: every state is started from.
        C: what is measured, `(p, n)`, with independent rows; the whole state when None.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: shapes disagree, a number is not finite, a weight is not symmetric or not definite, or rows of C
            are dependent.

    Example:
        >>> import torch
        >>> one = torch.ones(1, 1)
        >>> system = LinearQuadratic(A=one, B=one, Q=one, R=one, Sigma=one)
        >>> system.optimal_gain()  # 1 over the golden ratio
        tensor([[0.6180]], dtype=torch.float64)
        >>> system.cost(0.5 * one)  # (Q + R K²) Σ / (1 − (A − BK)²)
        tensor(1.6667, dtype=torch.float64)

    Reference:
        Duan et al., Optimization Landscape of Policy Gradient Methods for Discrete-time Static Output Feedback,
        arXiv 2310.19022. Fazel et al., Global Convergence of Policy Gradient Methods for the Linear Quadratic
        Regulator, arXiv 1801.05039, for C = I.
    """

    def __init__(
        self,
        A: Float[Tensor, "n n"],
        B: Float[Tensor, "n m"],
        Q: Float[Tensor, "n n"],
        R: Float[Tensor, "m m"],
        Sigma: Float[Tensor, "n n"],
        C: Float[Tensor, "p n"] | None = None,
    ) -> None:
        sizes = checks.require_shape("A", A, "n n")
        checks.require_not_empty("A", A)
        if C is None:
            C = torch.eye(sizes["n"], dtype=torch.float64, device=A.device)
        for name, tensor, shape in (
            ("A", A, "n n"),
            ("B", B, "n m"),
            ("Q", Q, "n n"),
            ("R", R, "m m"),
            ("Sigma", Sigma, "n n"),
            ("C", C, "p n"),
        ):
            sizes = checks.require_shape(name, tensor, shape, sizes)
            checks.require_floating(name, tensor)
            checks.require_not_empty(name, tensor)
            checks.require_finite(name, tensor)
            checks.require_same_device(name, tensor, "A", A)
        self.A, self.B, self.Q, self.R, self.Sigma, self.C = (M.detach().double() for M in (A, B, Q, R, Sigma, C))
        _require_symmetric("Q", self.Q, definite=False)
        _require_symmetric("R", self.R, definite=True)
        _require_symmetric("Sigma", self.Sigma, definite=True)
        rank = torch.linalg.matrix_rank(self.C).item()
        if rank < sizes["p"]:
            raise ValueError(f"C: expected {sizes['p']} independent rows, got rank {rank}")
        self.num_states, self.num_controls, self.num_outputs = sizes["n"], sizes["m"], sizes["p"]

    # -- stability -----------------------------------------------------------------------------------------------

    def closed_loop(self, gain: Float[Tensor, "m p"]) -> Float[Tensor, "n n"]:
        """A − BKC, the map from one state to the next, `(n, n)`."""
        checks.require_shape("gain", gain, "m p", {"m": self.num_controls, "p": self.num_outputs})
        checks.require_floating("gain", gain)
        checks.require_finite("gain", gain)
        return self.A - self.B @ gain.detach().double() @ self.C

    def spectral_radius(self, gain: Float[Tensor, "m p"]) -> float:
        """Largest modulus of an eigenvalue of A − BKC. The gain is stable, and J finite, exactly when it is below 1.

        Test it before trusting a step: beyond the boundary the Lyapunov equations still have solutions, which mean
        nothing.
        """
        return torch.linalg.eigvals(self.closed_loop(gain)).abs().max().item()

    def _stable_loop(self, gain: Tensor) -> Tensor:
        """A − BKC, or an error when its spectral radius is not below 1."""
        radius = self.spectral_radius(gain)
        if not radius < 1:
            raise ValueError(f"gain: expected a stable closed loop A − BKC, got spectral radius {radius:.6g}")
        return self.closed_loop(gain)

    # -- cost and gradient ---------------------------------------------------------------------------------------

    def value_matrix(self, gain: Float[Tensor, "m p"]) -> Float[Tensor, "n n"]:
        """P with xᵀPx the cost from x on: P = Q + CᵀKᵀRKC + (A−BKC)ᵀ P (A−BKC), `(n, n)`."""
        loop = self._stable_loop(gain)
        seen = gain.detach().double() @ self.C
        return _lyapunov(loop.T, self.Q + seen.T @ self.R @ seen)

    def state_covariance(self, gain: Float[Tensor, "m p"]) -> Float[Tensor, "n n"]:
        """Σ_K = E Σ_t x_t x_tᵀ, the visits of states: Σ_K = Σ + (A−BKC) Σ_K (A−BKC)ᵀ, `(n, n)`."""
        return _lyapunov(self._stable_loop(gain), self.Sigma)

    def cost(self, gain: Float[Tensor, "m p"]) -> Float[Tensor, ""]:
        """J(K) = tr(P Σ). To be minimised, and not differentiable by autograd: see `gradient`."""
        return (self.value_matrix(gain) * self.Sigma).sum()

    def output_covariance(self, gain: Float[Tensor, "m p"]) -> Float[Tensor, "p p"]:
        """L = C Σ_K Cᵀ = E Σ_t y_t y_tᵀ, `(p, p)`. The Fisher matrix of K under Gaussian noise on u is L, row by row
        of K, up to the noise's precision."""
        return self.C @ self.state_covariance(gain) @ self.C.T

    def control_curvature(self, gain: Float[Tensor, "m p"]) -> Float[Tensor, "m m"]:
        """R + BᵀPB, what a control costs now and later, `(m, m)`."""
        return self.R + self.B.T @ self.value_matrix(gain) @ self.B

    def gradient(self, gain: Float[Tensor, "m p"]) -> Float[Tensor, "m p"]:
        """∇J(K) = 2 [(R + BᵀPB) K C − BᵀPA] Σ_K Cᵀ, `(m, p)`."""
        values, covariance = self.value_matrix(gain), self.state_covariance(gain)
        seen = gain.detach().double() @ self.C
        advantage = (self.R + self.B.T @ values @ self.B) @ seen - self.B.T @ values @ self.A  # (m, n)
        return 2 * advantage @ covariance @ self.C.T

    def natural_gradient(self, gain: Float[Tensor, "m p"]) -> Float[Tensor, "m p"]:
        """∇J(K) L⁻¹, `(m, p)`: the gradient with the visits divided out."""
        return torch.linalg.solve(self.output_covariance(gain), self.gradient(gain), left=False)

    def gauss_newton(self, gain: Float[Tensor, "m p"]) -> Float[Tensor, "m p"]:
        """(R + BᵀPB)⁻¹ ∇J(K) L⁻¹, `(m, p)`. With C = I, K minus half of it is one step of policy iteration."""
        return torch.linalg.solve(self.control_curvature(gain), self.natural_gradient(gain))

    # -- optimum -------------------------------------------------------------------------------------------------

    def optimal_gain(self) -> Float[Tensor, "m n"]:
        """The best gain on the whole state, (R + BᵀPB)⁻¹BᵀPA with P from the Riccati equation, `(m, n)`.

        It is the best K when C = I. Otherwise it is what no control that sees only Cx can beat: the bound
        `optimal_cost`.

        Raises:
            ValueError: no gain stabilises the system, or Q does not see a part of it that lies on the boundary.
        """
        values = self._riccati()
        return torch.linalg.solve(self.R + self.B.T @ values @ self.B, self.B.T @ values @ self.A)

    def optimal_cost(self) -> Float[Tensor, ""]:
        """tr(PΣ) with P from the Riccati equation: the least J when C = I, and a lower bound for every C."""
        return (self._riccati() * self.Sigma).sum()

    def _riccati(self) -> Tensor:
        """P = Q + AᵀPA − AᵀPB (R + BᵀPB)⁻¹ BᵀPA, the stabilising solution."""
        try:
            values = scipy.linalg.solve_discrete_are(*(M.cpu().numpy() for M in (self.A, self.B, self.Q, self.R)))
        except np.linalg.LinAlgError as error:
            raise ValueError(
                f"A, B, Q: expected a system that some gain on the whole state stabilises and Q sees, got {error}"
            ) from error
        return torch.from_numpy(values).to(self.A.device)


def _lyapunov(loop: Tensor, constant: Tensor) -> Tensor:
    """X = constant + loop X loopᵀ, symmetric; an error where rounding cannot tell the loop from an unstable one."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", scipy.linalg.LinAlgWarning)
            solution = scipy.linalg.solve_discrete_lyapunov(loop.cpu().numpy(), constant.cpu().numpy())
    except (np.linalg.LinAlgError, scipy.linalg.LinAlgWarning) as error:
        radius = torch.linalg.eigvals(loop).abs().max().item()
        message = f"gain: expected a stable closed loop A − BKC, got spectral radius {radius:.17g}, 1 up to rounding"
        raise ValueError(message) from error
    symmetric = (solution + solution.T) / 2
    return torch.from_numpy(symmetric).to(loop.device)


def _require_symmetric(name: str, matrix: Tensor, *, definite: bool) -> None:
    """Check that a weight is symmetric and positive (semi)definite, up to the rounding of float32."""
    scale = matrix.abs().max().item()
    asymmetry = (matrix - matrix.T).abs().max().item()
    if asymmetry > 1e-6 * scale:
        raise ValueError(f"{name}: expected a symmetric matrix, got mirrored entries that differ by {asymmetry:g}")
    smallest = torch.linalg.eigvalsh(matrix)[0].item()
    if smallest <= 0 if definite else smallest < -1e-6 * scale:
        kind = "definite" if definite else "semidefinite"
        raise ValueError(f"{name}: expected a positive {kind} matrix, got smallest eigenvalue {smallest:g}")
