// Draws the charts of the page. Text and lines use `currentColor`, so they follow the page's light or dark colours.
"use strict";
(() => {
  const { specs, config } = JSON.parse(document.getElementById("charts").textContent);
  const options = {
    mode: "vega-lite",
    renderer: "svg",
    actions: false,
    defaultStyle: false,
    // Expressions are interpreted: the page's security policy allows no eval.
    ast: true,
    config,
    tooltip: { disableDefaultStyle: true },
  };
  for (const box of document.querySelectorAll("[data-chart]")) {
    vegaEmbed(box, specs[box.dataset.chart], options).then(
      () => {
        const svg = box.querySelector("svg");
        // A chart may shrink to a narrow screen a little; beyond that its box scrolls.
        if (svg) svg.style.minWidth = `${0.78 * svg.getAttribute("width")}px`;
        box.dataset.drawn = "true";
      },
      (error) => {
        box.textContent = `This chart could not be drawn: ${error.message}`;
        console.error(error);
      },
    );
  }
})();
