// The numbers of the damping of one layer, and no drawing: what isopo_mini.explorables.damping computes in Python.
//
// K is the layer's Gram matrix, A the advantages. The layer's step is Σ_s c_s G_s, and lengths and angles of such steps
// need only K: ⟨Σ_s c_s G_s, Σ_s d_s G_s⟩ = cᵀKd. With eigenvalues κ_i, and a_i the part of A along eigenvector i, all
// of them are sums over i.
"use strict";

explorables.numbers.damping = (function () {
  const ZERO = 1e-12; // an eigenvalue below this share of the largest is zero, up to rounding

  /** Eigenvalues and eigenvectors (rows) of a symmetric matrix, by Jacobi's rotations. Largest first. */
  function eigen(matrix) {
    const a = matrix.map((row) => row.slice());
    const n = a.length;
    const v = a.map((_, i) => a.map((_, j) => (i === j ? 1 : 0)));
    for (let sweep = 0; sweep < 60; sweep++) {
      let off = 0;
      let on = 0;
      a.forEach((row, i) => row.forEach((x, j) => (i === j ? (on += x * x) : (off += x * x))));
      if (off <= 1e-32 * on) break;
      for (let p = 0; p < n; p++) for (let q = p + 1; q < n; q++) rotate(a, v, p, q);
    }
    const order = a.map((_, i) => i).sort((i, j) => a[j][j] - a[i][i]);
    return { values: order.map((i) => a[i][i]), vectors: order.map((i) => v[i]) };
  }

  /** One rotation in the plane of p and q that makes a_pq zero. */
  function rotate(a, v, p, q) {
    if (a[p][q] === 0) return;
    const theta = (a[q][q] - a[p][p]) / (2 * a[p][q]);
    const t = (theta >= 0 ? 1 : -1) / (Math.abs(theta) + Math.hypot(theta, 1));
    const c = 1 / Math.hypot(t, 1);
    const s = t * c;
    for (let k = 0; k < a.length; k++) [a[k][p], a[k][q]] = [c * a[k][p] - s * a[k][q], s * a[k][p] + c * a[k][q]];
    for (let k = 0; k < a.length; k++) [a[p][k], a[q][k]] = [c * a[p][k] - s * a[q][k], s * a[p][k] + c * a[q][k]];
    for (let k = 0; k < a.length; k++) [v[p][k], v[q][k]] = [c * v[p][k] - s * v[q][k], s * v[p][k] + c * v[q][k]];
  }

  /** What is found once for a layer: spectrum, the parts of A, and the mean eigenvalue tr K/S. */
  function layer(gram, advantages) {
    const { values, vectors } = eigen(gram);
    const kappa = values.map((value) => (value > ZERO * values[0] ? value : 0));
    const parts = vectors.map((vector) => vector.reduce((sum, x, s) => sum + x * advantages[s], 0));
    const mean = gram.reduce((sum, row, s) => sum + row[s], 0) / gram.length;
    return { kappa, vectors, parts, mean };
  }

  /** λ, factors λ/(κ + λ), coefficients c in the gradient scale, lengths and cosines at one ρ. */
  function at(found, rho) {
    const { kappa, vectors, parts, mean } = found;
    const damping = rho * mean;
    const factors = kappa.map((value) => damping / (value + damping));
    const coefficients = vectors[0].map((_, s) =>
      vectors.reduce((sum, vector, i) => sum + vector[s] * factors[i] * parts[i], 0),
    );
    // Along each direction of K: c = f a for the step, a for REINFORCE, a/κ for the natural gradient, nothing if κ = 0.
    const sum = (term) => kappa.reduce((total, value, i) => total + (value > 0 ? term(value, factors[i], parts[i]) : 0), 0);
    const step = Math.sqrt(sum((value, f, a) => value * (f * a) ** 2));
    const reinforce = Math.sqrt(sum((value, f, a) => value * a * a));
    const natural = Math.sqrt(sum((value, f, a) => (a * a) / value));
    return {
      damping,
      factors,
      coefficients,
      gradient_length: step / reinforce,
      natural_length: step / damping / natural,
      cosine_reinforce: sum((value, f, a) => value * f * a * a) / (step * reinforce),
      cosine_natural: sum((value, f, a) => f * a * a) / (step * natural),
    };
  }

  return { eigen, layer, at };
})();
