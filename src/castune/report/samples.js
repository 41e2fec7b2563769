// Narrows the sample replies down to a suite, an outcome and some arms. It only hides: nothing is opened, so that
// harmful replies stay behind their click.
"use strict";
(() => {
  for (const root of document.querySelectorAll(".sample-replies")) {
    const controls = root.querySelector('[data-part="controls"]');
    const part = (name) => controls.querySelector(`[data-part="${name}"]`);
    const arms = [...controls.querySelectorAll('[data-part="arm"]')];
    const suites = [...root.querySelectorAll("[data-suite]")];

    const narrow = () => {
      const fates = part("fate")?.value.split(" ").filter(Boolean) ?? [];
      // Cell 0 of a row is the prompt; arm i is cell i + 1, and base has no box: it is always there.
      const hidden = new Set(arms.filter((box) => !box.checked).map((box) => Number(box.value) + 1));
      let [shown, total] = [0, 0];
      for (const suite of suites) {
        suite.hidden = part("suite").value !== "" && suite.dataset.suite !== part("suite").value;
        for (const row of suite.querySelectorAll("tr")) {
          [...row.cells].forEach((cell, i) => { cell.hidden = hidden.has(i); });
          if (row.parentElement.tagName === "THEAD") continue;
          row.hidden = fates.length > 0 && ![...row.cells].some((cell) => !cell.hidden && fates.includes(cell.dataset.fate));
          total += 1;
          if (!row.hidden && !suite.hidden) shown += 1;
        }
      }
      part("count").textContent = `${shown} of the ${total} examples on this page`;
    };

    controls.addEventListener("input", narrow);
    controls.hidden = false;
    narrow();
  }
})();
