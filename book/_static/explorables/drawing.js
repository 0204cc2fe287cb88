// What every explorable is made of: elements, sliders, tables of numbers; and the start, when the page is there.
//
// These are plain scripts, not modules: a browser loads no module from a file, and the book is also read from a folder.
// They share the one global name `explorables`. In `explorables.kinds` each picture puts the function that draws it.
"use strict";

const explorables = { kinds: {}, numbers: {} };

/** An element with attributes and children; a text is a child. */
explorables.element = function (tag, attributes = {}, children = []) {
  return explorables.filled(document.createElement(tag), attributes, children);
};

/** The same for a part of a drawing, put into `parent`. */
explorables.shape = function (parent, tag, attributes = {}, text = "") {
  const shape = document.createElementNS("http://www.w3.org/2000/svg", tag);
  parent.append(explorables.filled(shape, attributes, text ? [text] : []));
  return shape;
};

explorables.filled = function (node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
};

/** An empty drawing of this size, which grows and shrinks with the page. `label` says what it shows. */
explorables.drawing = function (width, height, label) {
  const holder = explorables.element("div", { class: "explorable-drawing" });
  const svg = explorables.shape(holder, "svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
  return { holder, svg };
};

/** A slider with its label and its value in words: a native one, so that keys, fingers and screen readers know it. */
explorables.slider = function ({ name, label, min, max, step, value, says, moved }) {
  const input = explorables.element("input", { type: "range", min, max, step, name });
  const shown = explorables.element("span", { class: "explorable-value" });
  const show = () => {
    shown.textContent = says(Number(input.value));
    input.setAttribute("aria-valuetext", shown.textContent);
  };
  input.value = value;
  input.addEventListener("input", () => {
    show();
    moved(Number(input.value));
  });
  show();
  return explorables.element("label", { class: "explorable-slider" }, [
    explorables.element("span", {}, [label]),
    input,
    shown,
  ]);
};

/** A table with one row for each of `rows` (key → heading); `fill(key, column, number)` writes a cell.
 *  A cell shows a few digits. Its attribute `data-value` holds all of them, for whoever checks.
 */
explorables.table = function (caption, columns, rows, digits = 4) {
  const cells = {};
  const body = Object.entries(rows).map(([key, heading]) => {
    cells[key] = columns.map(() => explorables.element("td", {}));
    const first = explorables.element("th", { scope: "row", class: `explorable-${key}` }, [heading]);
    return explorables.element("tr", { "data-row": key }, [first, ...cells[key]]);
  });
  const head = ["", ...columns].map((text) =>
    text ? explorables.element("th", { scope: "col" }, [text]) : explorables.element("td", {}),
  );
  const table = explorables.element("table", {}, [
    explorables.element("caption", {}, [caption]),
    explorables.element("thead", {}, [explorables.element("tr", {}, head)]),
    explorables.element("tbody", {}, body),
  ]);
  const fill = (key, column, number) => {
    const cell = cells[key][column];
    const text = number.toFixed(digits);
    cell.textContent = Number(text) === 0 ? (0).toFixed(digits) : text.replace("-", "−"); // no −0.0000
    cell.dataset.value = String(number);
  };
  return { table, fill };
};

/** Put every moving picture where the page has a place for it; its still picture is then for print only. */
explorables.start = function () {
  for (const place of document.querySelectorAll(".explorable[data-explorable]")) {
    const data = JSON.parse(place.querySelector("script").textContent);
    place.querySelector("p").remove();
    explorables.kinds[place.dataset.explorable](place, data);
    place.closest(".cell_output")?.classList.add("explorable-moves");
  }
};

document.addEventListener("DOMContentLoaded", explorables.start);
