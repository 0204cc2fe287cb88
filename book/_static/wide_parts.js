/* Tables, code and formulas that are wider than the page scroll by themselves. Here they learn to be reached with the
   Tab key, so that arrow keys scroll them, and to say what they are; and a table or a formula fades out where more of
   it is hidden. (In code, a line that is cut shows it by itself.) */
"use strict";

const WIDE = {
  ".pst-scrollable-table-container, .cell_output .text_html": "table",
  "div.highlight pre": "code",
  "div.math": "formula",
};

function showMore(part) {
  part.classList.toggle("has-more", part.scrollLeft + part.clientWidth < part.scrollWidth - 1);
}

function markWideParts() {
  for (const [selector, kind] of Object.entries(WIDE)) {
    for (const [index, part] of document.querySelectorAll(`.bd-article :is(${selector})`).entries()) {
      const wide = part.scrollWidth > part.clientWidth + 1;
      if (kind !== "code") {
        showMore(part);
        part.onscroll = () => showMore(part);
      }
      if (wide) {
        part.tabIndex = 0;
        part.setAttribute("role", "region");
        part.setAttribute("aria-label", `${kind} ${index + 1}, scrolls sideways`);
      } else {
        part.removeAttribute("tabindex");
        part.removeAttribute("role");
        part.removeAttribute("aria-label");
      }
    }
  }
}

/* The arrow that opens a list of pages in the sidebar has no text: it is named after the page above the list. */
function nameArrows() {
  for (const arrow of document.querySelectorAll(".bd-sidebar-primary summary")) {
    const page = arrow.closest("li").querySelector("a");
    arrow.setAttribute("aria-label", `Pages under ${page.textContent.trim()}`);
  }
}

window.addEventListener("load", () => {
  nameArrows();
  markWideParts();
  // Formulas are set, and folded parts opened, after the page has loaded.
  new ResizeObserver(markWideParts).observe(document.querySelector(".bd-article") || document.body);
});
