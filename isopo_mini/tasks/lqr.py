"""Linear systems with quadratic cost: the cost of a gain, its gradient and the optimum by matrix equations.

States x_{t+1} = A x_t + B u_t from x_0 with E x_0 x_0ᵀ = Σ, measurements y_t = C x_t, controls u_t = −K y_t, and

    J(K) = E Σ_t (x_tᵀ Q x_t + u_tᵀ R u_t),

to be *minimised*. With C = I the control sees everything and the Riccati equation gives the optimum; with a C of
fewer rows than states it is static output feedback. All of it in float64.

The letters are those of control. A is a matrix here, not an advantage, and Q and R are weights of the cost.
"""

import numpy as np
import scipy  # its parts load themselves when they are used: they take half a second
import torch
from jaxtyping import Float
from torch import Tensor

from isopo_mini import checks
from isopo_mini.tasks import lyapunov


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
        lengths = self.C.norm(dim=1, keepdim=True)
        rank = torch.linalg.matrix_rank(self.C / torch.where(lengths > 0, lengths, 1)).item()  # whatever the units
        if rank < sizes["p"]:
            raise ValueError(f"C: expected {sizes['p']} independent rows, got rank {rank}")
        self.num_states, self.num_controls, self.num_outputs = sizes["n"], sizes["m"], sizes["p"]

    # -- stability -----------------------------------------------------------------------------------------------

    def closed_loop(self, gain: Float[Tensor, "m p"]) -> Float[Tensor, "n n"]:
        """A − BKC, the map from one state to the next, `(n, n)`."""
        return self.A - self.B @ self._on_states(gain)

    def _on_states(self, gain: Tensor) -> Tensor:
        """KC, what is done with each state, `(m, n)`."""
        checks.require_shape("gain", gain, "m p", {"m": self.num_controls, "p": self.num_outputs})
        checks.require_floating("gain", gain)
        checks.require_finite("gain", gain)
        return gain.detach().double() @ self.C

    def spectral_radius(self, gain: Float[Tensor, "m p"]) -> float:
        """Largest modulus of an eigenvalue of A − BKC. The gain is stable, and J finite, exactly when it is below 1.

        Test it before trusting a step: beyond the boundary the Lyapunov equations still have solutions, which mean
        nothing. Everything below that needs a stable gain raises a ValueError for another one, and, in other words,
        for a stable one of whose cost rounding leaves no digits.
        """
        return torch.linalg.eigvals(self.closed_loop(gain)).abs().max().item()

    def _solve(self, gain: Tensor, constant: Tensor, *, transposed: bool = False) -> Tensor:
        """X = constant + A_K X A_Kᵀ, or with A_K transposed, for a stable A_K = A − BKC; an error otherwise."""
        loop, radius = self.closed_loop(gain), self.spectral_radius(gain)
        lyapunov.require_stable(loop, radius)
        return lyapunov.solve(loop.T if transposed else loop, constant, radius)

    # -- cost and gradient ---------------------------------------------------------------------------------------

    def value_matrix(self, gain: Float[Tensor, "m p"]) -> Float[Tensor, "n n"]:
        """P with xᵀPx the cost from x on: P = Q + CᵀKᵀRKC + (A−BKC)ᵀ P (A−BKC), `(n, n)`."""
        seen = self._on_states(gain)
        return self._solve(gain, self.Q + seen.T @ self.R @ seen, transposed=True)

    def state_covariance(self, gain: Float[Tensor, "m p"]) -> Float[Tensor, "n n"]:
        """Σ_K = E Σ_t x_t x_tᵀ, the visits of states: Σ_K = Σ + (A−BKC) Σ_K (A−BKC)ᵀ, `(n, n)`."""
        return self._solve(gain, self.Sigma)

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
        return 2 * self._advantage(gain, self.value_matrix(gain)) @ self.state_covariance(gain) @ self.C.T

    def _advantage(self, gain: Tensor, values: Tensor) -> Tensor:
        """(R + BᵀPB) K C − BᵀPA = RKC − BᵀP(A − BKC), `(m, n)`: what moving a control now is worth."""
        return (self.R + self.B.T @ values @ self.B) @ self._on_states(gain) - self.B.T @ values @ self.A

    def hessian(self, gain: Float[Tensor, "m p"]) -> Float[Tensor, "mp mp"]:
        """∇²J(K), `(m·p, m·p)`, entries of K row by row: one pair of Lyapunov equations a column.

        With E = (R + BᵀPB) K C − BᵀPA, so that ∇J = 2 E Σ_K Cᵀ, a change D of the gain changes it by

            2 (E' Σ_K + E Σ_K') Cᵀ,  E' = (R + BᵀPB) D C − BᵀP'(A − BKC),

        where P' and Σ_K' solve the equations of P and Σ_K with other constants: CᵀDᵀE and −BDCΣ_K(A − BKC)ᵀ, plus
        their transposes.
        """
        loop, values, covariance = self.closed_loop(gain), self.value_matrix(gain), self.state_covariance(gain)
        advantage, curvature = self._advantage(gain, values), self.R + self.B.T @ values @ self.B
        columns = []
        for shift in torch.eye(gain.numel(), dtype=torch.float64, device=loop.device):
            change = shift.reshape(gain.shape) @ self.C  # DC
            to_values, to_covariance = change.T @ advantage, -self.B @ change @ covariance @ loop.T
            values_change = self._solve(gain, to_values + to_values.T, transposed=True)
            covariance_change = self._solve(gain, to_covariance + to_covariance.T)
            advantage_change = curvature @ change - self.B.T @ values_change @ loop
            columns.append(2 * (advantage_change @ covariance + advantage @ covariance_change) @ self.C.T)
        matrix = torch.stack([column.flatten() for column in columns])
        return (matrix + matrix.T) / 2

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
        return self._riccati()[1]

    def optimal_cost(self) -> Float[Tensor, ""]:
        """tr(PΣ) with P from the Riccati equation: the least J when C = I, and a lower bound for every C."""
        return (self._riccati()[0] * self.Sigma).sum()

    def _riccati(self) -> tuple[Tensor, Tensor]:
        """P = Q + AᵀPA − AᵀPB (R + BᵀPB)⁻¹ BᵀPA, the stabilising solution, and its gain (R + BᵀPB)⁻¹ BᵀPA."""
        expected = "A, B, Q: expected a system that some gain on the whole state stabilises and Q sees"
        try:
            solution = scipy.linalg.solve_discrete_are(*(M.cpu().numpy() for M in (self.A, self.B, self.Q, self.R)))
        except np.linalg.LinAlgError as error:
            raise ValueError(f"{expected}, got {error}") from error
        values = torch.from_numpy(solution).to(self.A.device)
        gain = torch.linalg.solve(self.R + self.B.T @ values @ self.B, self.B.T @ values @ self.A)
        radius = torch.linalg.eigvals(self.A - self.B @ gain).abs().max().item()
        if not radius < 1 - 1e-12:  # what is on the boundary, the solver sees or not, as rounding has it
            raise ValueError(f"{expected}, got spectral radius {radius:.6g} with the best gain")
        return values, gain


def _require_symmetric(name: str, matrix: Tensor, *, definite: bool) -> None:
    """Check that a weight is symmetric and positive (semi)definite, up to the rounding of float32.

    Its diagonal is scaled to 1 first: units of the states that are far apart make no weight indefinite.
    """
    sizes = matrix.diagonal().clamp(min=0).sqrt()
    sizes = torch.where(sizes > 0, sizes, 1.0)
    scaled = matrix / sizes / sizes[:, None]
    asymmetry, scale = (matrix - matrix.T).abs(), scaled.abs().max().item()
    if (asymmetry / sizes / sizes[:, None]).max() > 1e-6 * scale:
        raise ValueError(
            f"{name}: expected a symmetric matrix, got mirrored entries that differ by {asymmetry.max():g}"
        )
    smallest = torch.linalg.eigvalsh(scaled)[0].item()
    if smallest <= 0 if definite else smallest < -1e-6 * scale:
        kind = "definite" if definite else "semidefinite"
        raise ValueError(
            f"{name}: expected a positive {kind} matrix, got smallest eigenvalue {smallest:g} where the diagonal is 1"
        )
