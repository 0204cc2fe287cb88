// The damping of a layer: a slider for ρ, the spectrum of K beside λ, the coefficients, and the step in both scales.
"use strict";

(function () {
  const { layer, at } = explorables.numbers.damping;
  const ROWS = {
    damping: "λ",
    gradient_length: "length, gradient scale",
    natural_length: "length, natural scale",
    cosine_reinforce: "cosine with REINFORCE",
    cosine_natural: "cosine with natural gradient",
  };
  const CURVES = ["gradient_length", "natural_length", "cosine_reinforce", "cosine_natural"];
  const END = 3; // ρ from 10³ to 10⁻³
  const WIDTH = 330;
  const BOX = { left: 36, right: 322, top: 22, bottom: 180 };
  const LOWEST = 1e-4; // of the axis of the spectrum, in units of tr K/S

  const across = (share) => BOX.left + share * (BOX.right - BOX.left);
  const up = (share) => BOX.bottom - share * (BOX.bottom - BOX.top);
  const written = (rho) => (rho >= 100 ? rho.toFixed(0) : rho.toPrecision(2));
  /** Where ρ, or an eigenvalue in units of tr K/S, stands on the axis of the spectrum. */
  const height = (x) => Math.min(Math.max(Math.log10(x / LOWEST) / 6, 0), 1);

  explorables.kinds.damping = function (root, data) {
    const names = Object.keys(data.grams);
    const layers = names.map((name) => layer(data.grams[name], data.advantages));
    const state = { layer: 0, rho: data.rho };
    const panels = [spectrumPanel(), coefficientsPanel(data.advantages), curvesPanel()];
    const { table, fill } = explorables.table("The step of each layer", names, ROWS);

    function update() {
      const found = layers.map((each) => at(each, state.rho));
      found.forEach((numbers, column) => Object.keys(ROWS).forEach((key) => fill(key, column, numbers[key])));
      panels.forEach((panel) => panel.draw(layers[state.layer], found[state.layer], state.rho));
      root.dataset.state = JSON.stringify(state); // all digits, for whoever checks
    }

    const slider = explorables.slider({
      name: "damping",
      label: "damping ρ",
      ...{ min: -END, max: END, step: 0.1, value: -Math.log10(data.rho) },
      says: (place) => `ρ = ${written(10 ** -place)}`,
      moved: (place) => {
        state.rho = 10 ** -place;
        update();
      },
    });
    const choice = explorables.element(
      "select",
      { name: "layer" },
      names.map((name, i) => explorables.element("option", { value: i }, [name])),
    );
    choice.addEventListener("change", () => {
      state.layer = Number(choice.value);
      update();
    });
    const chosen = explorables.element("label", { class: "explorable-choice" }, ["layer", choice]);
    const help = explorables.element("p", { class: "explorable-help" }, [
      "To the left is REINFORCE, to the right the natural gradient. First panel: dots are the eigenvalues of K, the " +
        "line is λ, bars show which share λ/(κ + λ) of the advantages is kept. Second: outlines are the advantages, " +
        "bars the coefficients c; the gap between them is how much the log-probability of a pull changes, in the " +
        "natural scale. Third: length of the step, and its angle with both ends, for every ρ.",
    ]);
    const drawings = panels.map(({ holder }) => holder);
    root.append(explorables.element("div", { class: "explorable-controls" }, [slider, chosen]));
    root.append(explorables.element("div", { class: "explorable-panels" }, drawings), table, help);
    update();
  };

  /** A titled box with a line at its foot. */
  function box(title, foot, label) {
    const { holder, svg } = explorables.drawing(WIDTH, 216, label);
    explorables.shape(svg, "text", { x: BOX.left, y: 14, class: "explorable-title" }, title);
    explorables.shape(svg, "text", { x: across(0.5), y: 210, class: "explorable-corner" }, foot);
    const axis = { x1: BOX.left, x2: BOX.right, y1: BOX.bottom, y2: BOX.bottom };
    explorables.shape(svg, "line", { class: "explorable-axis", ...axis });
    return { holder, svg };
  }

  function tick(svg, x, y, text, anchor = "end") {
    explorables.shape(svg, "text", { x, y, class: "explorable-tick", "text-anchor": anchor }, text);
  }

  function spectrumPanel() {
    const label = "Spectrum of the Gram matrix and the damping";
    const { holder, svg } = box("eigenvalues κ and λ, over tr K/S", "eigen-direction", label);
    for (const power of [-4, -2, 0, 2]) {
      tick(svg, BOX.left - 4, up(height(10 ** power)) + 4, `1e${power}`.replace("-", "−"));
    }
    const bars = explorables.shape(svg, "g", { class: "explorable-bars" });
    const dots = explorables.shape(svg, "g", { class: "explorable-dots" });
    const level = explorables.shape(svg, "line", { class: "explorable-level", x1: BOX.left, x2: BOX.right });
    const name = explorables.shape(svg, "text", { x: BOX.right, class: "explorable-tick", "text-anchor": "end" }, "λ");
    function draw(found, { factors }, rho) {
      bars.replaceChildren();
      dots.replaceChildren();
      const width = 1 / factors.length;
      factors.forEach((factor, i) => {
        const [x, y] = [across((i + 0.15) * width), up(factor)];
        explorables.shape(bars, "rect", { x, y, width: across(0.7 * width) - BOX.left, height: BOX.bottom - y });
        const share = found.kappa[i] / found.mean;
        const kind = share > 0 ? "explorable-dot" : "explorable-hollow"; // at the foot: an eigenvalue zero
        const cy = share > 0 ? up(height(share)) : BOX.bottom;
        explorables.shape(dots, "circle", { cx: across((i + 0.5) * width), cy, r: 3.5, class: kind });
      });
      level.setAttribute("y1", up(height(rho)));
      level.setAttribute("y2", up(height(rho)));
      name.setAttribute("y", up(height(rho)) + (rho > 1 ? 13 : -4)); // off the bars where they are high
    }
    return { holder, draw };
  }

  function coefficientsPanel(advantages) {
    const label = "Coefficients of the sequences beside their advantages";
    const { holder, svg } = box("advantages A and coefficients c", "sequence", label);
    const largest = Math.max(...advantages.map(Math.abs));
    const y = (value) => up(0.5 + (0.48 * value) / largest);
    const width = 1 / advantages.length;
    tick(svg, BOX.left - 4, y(largest) + 4, largest.toFixed(1));
    tick(svg, BOX.left - 4, y(0) + 4, "0");
    tick(svg, BOX.left - 4, y(-largest) + 4, `−${largest.toFixed(1)}`);
    const bars = explorables.shape(svg, "g", { class: "explorable-coefficients" });
    const outlines = explorables.shape(svg, "g", { class: "explorable-outlines" });
    const bar = (group, value, s) =>
      explorables.shape(group, "rect", {
        ...{ x: across((s + 0.15) * width), width: across(0.7 * width) - BOX.left },
        ...{ y: y(Math.max(value, 0)), height: Math.abs(y(value) - y(0)) },
      });
    advantages.forEach((value, s) => bar(outlines, value, s));
    function draw(_, { coefficients }) {
      bars.replaceChildren();
      coefficients.forEach((value, s) => bar(bars, value, s));
    }
    return { holder, draw };
  }

  function curvesPanel() {
    const { holder, svg } = box("the step", "damping ρ", "Length and angle of the step for every damping");
    const x = (rho) => across((END - Math.log10(rho)) / (2 * END));
    for (const share of [0, 0.5, 1]) tick(svg, BOX.left - 4, up(share) + 4, String(share));
    for (const [power, anchor] of [[3, "middle"], [0, "middle"], [-3, "end"]]) {
      tick(svg, x(10 ** power), BOX.bottom + 14, `1e${power}`.replace("-", "−"), anchor);
    }
    const here = explorables.shape(svg, "line", { class: "explorable-level", y1: BOX.top, y2: BOX.bottom });
    const curves = {};
    const dots = {};
    for (const key of CURVES) {
      curves[key] = explorables.shape(svg, "polyline", { class: `explorable-curve explorable-${key}` });
      dots[key] = explorables.shape(svg, "circle", { r: 4, class: `explorable-point explorable-fill-${key}` });
    }
    const rhos = Array.from({ length: 61 }, (_, i) => 10 ** (END - i / 10));
    function draw(found, now, rho) {
      const all = rhos.map((each) => at(found, each));
      for (const key of CURVES) {
        const points = all.map((numbers, i) => `${x(rhos[i]).toFixed(2)},${up(numbers[key]).toFixed(2)}`);
        curves[key].setAttribute("points", points.join(" "));
        dots[key].setAttribute("cx", x(rho));
        dots[key].setAttribute("cy", up(now[key]));
      }
      here.setAttribute("x1", x(rho));
      here.setAttribute("x2", x(rho));
    }
    return { holder, draw };
  }
})();
