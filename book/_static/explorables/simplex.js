// The triangle of policies: drag the policy, move the rewards and the price, see one step and many of four rules.
"use strict";

(function () {
  const { kl, dot, steps, path, ellipse, PATH_STEPS } = explorables.numbers.simplex;
  const RULES = { policy: "Policy gradient", natural: "Natural gradient", isopo: "ISOPO (Fisher)", ppo: "PPO" };
  const SIDE = 300;
  const HEIGHT = (SIDE * Math.sqrt(3)) / 2;
  const LEFT = 45;
  const BOTTOM = 300;
  const SMALLEST = 0.01; // a probability never gets smaller: at 0 nothing moves, and nothing is defined
  const KEY_STEP = 0.02;

  /** Where a policy lies in the drawing: arm 1 at the lower left, 2 at the lower right, 3 on top. */
  const place = (pi) => [LEFT + SIDE * (pi[1] + pi[2] / 2), BOTTOM - HEIGHT * pi[2]];
  const line = (points) => points.map((pi) => place(pi).map((x) => x.toFixed(2)).join(",")).join(" ");
  const sum = (u, v) => u.map((x, a) => x + v[a]);

  /** The nearest thing to a policy: no probability below the smallest, and their sum one. */
  function policyOf(numbers) {
    const high = numbers.map((x) => Math.max(x, SMALLEST));
    const spare = high.map((x) => x - SMALLEST);
    const total = spare.reduce((all, x) => all + x);
    return spare.map((x) => SMALLEST + ((1 - 3 * SMALLEST) * x) / total);
  }

  function policyAt(x, y) {
    const third = (BOTTOM - y) / HEIGHT;
    const second = (x - LEFT) / SIDE - third / 2;
    return policyOf([1 - second - third, second, third]);
  }

  const inWords = (pi) => pi.map((p, a) => `arm ${a + 1}: ${(100 * p).toFixed(0)} %`).join(", ");

  explorables.kinds.simplex = function (root, data) {
    const state = { pi: data.probs, rewards: data.rewards, price: data.price };
    const { holder, svg } = explorables.drawing(390, 345, "Triangle of policies over three arms");
    svg.setAttribute("role", "group"); // it holds something to drag
    const parts = drawnParts(svg);
    const { table, fill } = explorables.table(
      `One step of each rule, and J after ${PATH_STEPS} small ones`,
      ["gain of J", "KL", `J after ${PATH_STEPS}`],
      RULES,
    );

    function update() {
      const { pi, rewards, price } = state;
      const found = steps(pi, rewards, price);
      parts.ring.setAttribute("points", line(ellipse(pi, price).map((v) => sum(pi, v))));
      drawLevels(parts.levels, rewards);
      for (const rule of Object.keys(RULES)) {
        const way = path(rule, pi, rewards);
        const { after, v, way: clipped } = found[rule];
        parts.paths[rule].setAttribute("points", line(way));
        parts.arrows[rule].setAttribute("points", line(clipped ?? [pi, sum(pi, v)]));
        fill(rule, 0, dot(after, rewards) - dot(pi, rewards));
        fill(rule, 1, kl(pi, after));
        fill(rule, 2, dot(way[way.length - 1], rewards));
      }
      const [x, y] = place(pi);
      parts.handle.setAttribute("transform", `translate(${x.toFixed(2)} ${y.toFixed(2)})`);
      parts.handle.setAttribute("aria-valuenow", pi[0].toFixed(3));
      parts.handle.setAttribute("aria-valuetext", inWords(pi));
      parts.corners.forEach((corner, a) => (corner.textContent = `r = ${rewards[a].toFixed(2)}`));
      root.dataset.state = JSON.stringify(state); // all digits, for whoever checks
    }

    const go = (pi) => {
      state.pi = pi;
      update();
    };
    listen(svg, parts.handle, go, () => state.pi);
    const sliders = [0, 1, 2].map((arm) =>
      explorables.slider({
        name: `reward-${arm + 1}`,
        label: `reward of arm ${arm + 1}`,
        ...{ min: 0, max: 1, step: 0.05, value: state.rewards[arm] },
        says: (reward) => reward.toFixed(2),
        moved: (reward) => {
          state.rewards = state.rewards.map((old, a) => (a === arm ? reward : old));
          update();
        },
      }),
    );
    const price = explorables.slider({
      name: "price",
      label: "price of a step",
      ...{ min: 0.002, max: 0.06, step: 0.002, value: state.price },
      says: (nats) => `${nats.toFixed(3)} nats`,
      moved: (nats) => {
        state.price = nats;
        update();
      },
    });
    const help = explorables.element("p", { class: "explorable-help" }, [
      "Drag the dot, or move it with the arrow keys. The ellipse holds all steps of one price in KL, straight grey " +
        "lines the policies of equal J. Thick: one step of each rule, for PPO ten small ones with its clip at 0.2. " +
        `Thin: ${PATH_STEPS} steps with step size 0.2.`,
    ]);
    const controls = explorables.element("div", { class: "explorable-controls" }, [...sliders, price]);
    root.append(explorables.element("div", { class: "explorable-columns" }, [holder, controls]), table, help);
    update();
  };

  /** The parts of the drawing, from the back to the front. */
  function drawnParts(svg) {
    const { shape } = explorables;
    const levels = shape(svg, "g", { class: "explorable-levels" });
    shape(svg, "polygon", { class: "explorable-outline", points: line([[1, 0, 0], [0, 1, 0], [0, 0, 1]]) });
    const corners = [[LEFT, BOTTOM + 24], [LEFT + SIDE, BOTTOM + 24], [LEFT + SIDE / 2, BOTTOM - HEIGHT - 10]].map(
      ([x, y], a) => {
        shape(svg, "text", { x, y: a === 2 ? y - 16 : y + 1, class: "explorable-corner" }, `arm ${a + 1}`);
        return shape(svg, "text", { x, y: a === 2 ? y : y + 17, class: "explorable-corner" });
      },
    );
    const ring = shape(svg, "polygon", { class: "explorable-ring" });
    const paths = {};
    const arrows = {};
    for (const rule of Object.keys(RULES)) {
      paths[rule] = shape(svg, "polyline", { class: `explorable-path explorable-${rule}` });
    }
    for (const rule of Object.keys(RULES)) {
      const head = shape(svg, "marker", {
        ...{ id: `explorable-head-${rule}`, viewBox: "0 0 10 10", refX: 8, refY: 5, orient: "auto" },
        ...{ markerWidth: 4, markerHeight: 4 },
      });
      shape(head, "path", { d: "M 0 0 L 10 5 L 0 10 z", class: `explorable-fill-${rule}` });
      arrows[rule] = shape(svg, "polyline", {
        class: `explorable-arrow explorable-${rule}`,
        "marker-end": `url(#explorable-head-${rule})`,
      });
    }
    const handle = shape(svg, "g", {
      ...{ class: "explorable-handle", role: "slider", tabindex: 0, "aria-label": "Policy" },
      ...{ "aria-valuemin": 0, "aria-valuemax": 1 },
    });
    shape(handle, "circle", { r: 24, class: "explorable-touch" }); // large enough for a finger
    shape(handle, "circle", { r: 7, class: "explorable-dot" });
    return { levels, corners, ring, paths, arrows, handle };
  }

  /** Lines of equal J: where it is a multiple of a tenth. J is linear, so each is cut out by two sides. */
  function drawLevels(group, rewards) {
    group.replaceChildren();
    for (let tenth = 1; tenth < 10; tenth++) {
      const ends = [];
      for (const [a, b] of [[0, 1], [1, 2], [2, 0]]) {
        const share = (tenth / 10 - rewards[a]) / (rewards[b] - rewards[a]);
        if (share >= 0 && share < 1) ends.push([0, 1, 2].map((c) => (c === a ? 1 - share : c === b ? share : 0)));
      }
      if (ends.length === 2) explorables.shape(group, "polyline", { points: line(ends) });
    }
  }

  /** Mouse, finger, pen and keys move the policy. */
  function listen(svg, handle, go, policy) {
    const at = (event) => {
      const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
      go(policyAt(point.x, point.y));
    };
    handle.addEventListener("pointerdown", (event) => {
      handle.setPointerCapture(event.pointerId);
      handle.focus({ preventScroll: true });
      event.preventDefault();
    });
    // A finger on the dot does not scroll. (For a part of a drawing, not every browser heeds CSS's touch-action.)
    handle.addEventListener("touchstart", (event) => event.preventDefault(), { passive: false });
    handle.addEventListener("pointermove", (event) => {
      if (handle.hasPointerCapture(event.pointerId)) at(event);
    });
    // Elsewhere a finger must be able to scroll the page, so only a click or a tap calls the dot there.
    svg.addEventListener("click", (event) => {
      if (!handle.contains(event.target)) at(event);
    });
    const along = {
      ArrowLeft: [1, -1, 0],
      ArrowRight: [-1, 1, 0],
      ArrowUp: [-0.5, -0.5, 1],
      ArrowDown: [0.5, 0.5, -1],
    };
    handle.addEventListener("keydown", (event) => {
      const direction = along[event.key];
      if (!direction) return;
      event.preventDefault(); // the page stays where it is
      go(policyOf(policy().map((p, a) => p + KEY_STEP * direction[a])));
    });
  }
})();
