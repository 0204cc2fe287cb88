// The numbers of the triangle of policies, and no drawing: what isopo_mini.explorables.simplex computes in Python.
//
// A policy pi is three probabilities. A step d changes the logits: pi_a becomes pi_a e^{d_a}, divided by the sum.
"use strict";

explorables.numbers.simplex = (function () {
  const CLIP = 0.2; // PPO's ε, on both sides
  const CLIPPED_STEPS = 10; // how often PPO uses one batch
  const STEP_SIZE = 0.2; // of the paths
  const PATH_STEPS = 75;

  const dot = (u, v) => u.reduce((sum, x, a) => sum + x * v[a], 0);
  const times = (number, v) => v.map((x) => number * x);

  function moved(pi, d) {
    const highest = Math.max(...d); // so that no exponential overflows
    const weights = pi.map((p, a) => p * Math.exp(d[a] - highest));
    return times(1 / weights.reduce((sum, weight) => sum + weight), weights);
  }

  /** F d for a table: (diag π − π πᵀ) d. It is also how fast the probabilities move. */
  const fisherTimes = (pi, d) => pi.map((p, a) => p * (d[a] - dot(pi, d)));

  /** dᵀ F d, as the variance of d_a: differences first, so that nothing cancels. */
  function squaredLength(pi, d) {
    const mean = dot(pi, d);
    return pi.reduce((sum, p, a) => sum + p * (d[a] - mean) ** 2, 0);
  }

  const kl = (pi, other) => pi.reduce((sum, p, a) => sum + p * Math.log(p / other[a]), 0);

  function advantages(pi, rewards) {
    // Measured from the likeliest arm, so that a nearly certain policy keeps its digits.
    const likeliest = rewards[pi.indexOf(Math.max(...pi))];
    const relative = rewards.map((r) => r - likeliest);
    return relative.map((r) => r - dot(pi, relative));
  }

  /** What each rule adds to the logits, but for the step size. */
  function directions(pi, rewards) {
    const A = advantages(pi, rewards);
    const policyGradient = pi.map((p, a) => p * A[a]);
    const isopo = [0, 0, 0];
    for (const arm of [0, 1, 2]) {
      const score = pi.map((p, a) => (a === arm ? 1 : 0) - p);
      const coefficient = policyGradient[arm] / Math.sqrt(squaredLength(pi, score));
      score.forEach((g, a) => (isopo[a] += coefficient * g));
    }
    return { policy: policyGradient, natural: A, isopo };
  }

  /** The policies on the way of PPO's steps from π_old = pi. An arm whose ratio left the range on the side that its
   *  advantage favours is clipped, and adds nothing. */
  function clippedSteps(pi, rewards, stepSize) {
    const A = advantages(pi, rewards);
    const path = [];
    let now = pi;
    for (let step = 0; step < CLIPPED_STEPS; step++) {
      const gradient = [0, 0, 0];
      for (const arm of [0, 1, 2]) {
        const ratio = now[arm] / pi[arm];
        const clipped = A[arm] > 0 ? ratio > 1 + CLIP : ratio < 1 - CLIP;
        if (clipped) continue;
        // π_old r A ∇log π, with the score e_arm − π of the policy as it is now
        now.forEach((p, a) => (gradient[a] += now[arm] * A[arm] * ((a === arm ? 1 : 0) - p)));
      }
      now = moved(now, times(stepSize, gradient));
      path.push(now);
    }
    return path;
  }

  /** One step of each rule: the policy after it, and its velocity `v` = F d, whose end is on the ellipse. */
  function steps(pi, rewards, price) {
    const found = {};
    let plain = 0;
    for (const [rule, d] of Object.entries(directions(pi, rewards))) {
      const squared = squaredLength(pi, d);
      const size = squared > 0 ? Math.sqrt((2 * price) / squared) : 0;
      if (rule === "policy") plain = size;
      found[rule] = { after: moved(pi, times(size, d)), v: fisherTimes(pi, times(size, d)) };
    }
    const way = clippedSteps(pi, rewards, plain / CLIPPED_STEPS);
    found.ppo = { after: way[way.length - 1], way: [pi, ...way] };
    return found;
  }

  /** The policies on the way of many steps of one size. For PPO one step is ten on one batch. */
  function path(rule, pi, rewards) {
    const found = [pi];
    for (let step = 0; step < PATH_STEPS; step++) {
      const now = found[step];
      found.push(
        rule === "ppo"
          ? clippedSteps(now, rewards, STEP_SIZE).pop()
          : moved(now, times(STEP_SIZE, directions(now, rewards)[rule])),
      );
    }
    return found;
  }

  /** All v with ½ Σ v_a²/π_a = price: a circle at right angles to √π, whose coordinates are multiplied by √π. */
  function ellipse(pi, price, points = 120) {
    const root = pi.map(Math.sqrt);
    const across = Math.hypot(root[0], root[1]);
    const one = [-root[1] / across, root[0] / across, 0];
    const two = [(-root[0] * root[2]) / across, (-root[1] * root[2]) / across, across];
    return Array.from({ length: points }, (_, i) => {
      const angle = (2 * Math.PI * i) / points;
      return root.map((s, a) => Math.sqrt(2 * price) * s * (Math.cos(angle) * one[a] + Math.sin(angle) * two[a]));
    });
  }

  return { kl, dot, steps, path, ellipse, PATH_STEPS };
})();
