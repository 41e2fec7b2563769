// Brings the conflict maps of the page to life: a grid of heads, a budget, and a table, all showing one state.
// The order of heads by each score comes from castune (`order`), which sorts by full precision: here it is only cut.
"use strict";
(() => {
  const missing = "not measured";
  const signed = (text) => text.replace(/-/g, "−");
  const shorten = (value, digits) => signed(String(Number(value.toPrecision(digits))));
  const shown = (value) => (value === null ? missing : signed(value.toPrecision(4)));
  const counted = (count, word) => `${count.toLocaleString("en")} ${word}${count === 1 ? "" : "s"}`;

  // Python's round(): halves go to the even number. `castune select` counts heads with it, and takes at least one.
  function headCount(percent, total) {
    const exact = (percent / 100) * total;
    const below = Math.floor(exact);
    const up = exact - below > 0.5 || (exact - below === 0.5 && below % 2 === 1);
    return Math.max(1, below + (up ? 1 : 0));
  }

  // Bucket of every row, 1 for the highest scores; sizes differ by at most one, larger buckets first.
  function bucketNumbers(order, parts) {
    const numbers = new Array(order.length);
    const size = Math.floor(order.length / parts);
    const larger = order.length % parts;
    let at = 0;
    for (let number = 1; number <= parts; number++) {
      for (const end = at + size + (number <= larger ? 1 : 0); at < end; at++) numbers[order[at]] = number;
    }
    return numbers;
  }

  // An element with text that is never read as HTML.
  function make(name, properties = {}, ...children) {
    const element = document.createElement(name);
    for (const [key, value] of Object.entries(properties)) {
      if (key in element) element[key] = value;
      else element.setAttribute(key, value);
    }
    element.append(...children);
    return element;
  }

  function colours(ramp) {
    const stops = ramp.map((colour) => [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16)));
    return (share) => {
      const place = Math.min(Math.max(share, 0), 1) * (stops.length - 1);
      const from = Math.min(Math.floor(place), stops.length - 2);
      const rgb = stops[from].map((low, i) => Math.round(low + (place - from) * (stops[from + 1][i] - low)));
      // Marks on the cell are black or white, whichever can be seen on it.
      return { fill: `rgb(${rgb.join(",")})`, pale: 0.3 * rgb[0] + 0.59 * rgb[1] + 0.11 * rgb[2] > 130 };
    };
  }

  function explore(root, serial) {
    const data = JSON.parse(root.querySelector('[data-part="data"]').textContent);
    const part = (name) => root.querySelector(`[data-part="${name}"]`);
    const controls = Object.fromEntries(
      ["score", "map", "budget", "parts", "colour", "bring-out"].map((name) => [name, part(name)]),
    );
    const noun = data.noun; // "head" or "unit"
    const capitalNoun = noun[0].toUpperCase() + noun.slice(1);
    const total = data.layers.length;
    const rows = [...Array(total).keys()];
    const named = (row) => `Layer ${data.layers[row]}, ${noun} ${data.heads[row]}`;
    const ramp = colours(data.ramp);
    const armsOf = rows.map(() => []);
    for (const arm of data.arms) for (const row of arm.rows) armsOf[row].push(arm.name);
    // How sure it is on which side of the safe quarter's border a row is; empty for a map that does not tell.
    const standing = data.standing.rows.map((at) => data.standing.words[at]);
    // What can be brought out beside all, risky and safe.
    const sets = data.arms.map((arm) => new Set(arm.rows));
    sets.push(new Set(rows.filter((row) => standing[row] === "undecided")));

    // All that is shown follows from this and from the controls.
    const state = { selected: null, sort: null };
    let [map, score] = [data.maps[0], data.scores[0]];
    const value = (column, row) => (map.columns[column] ? map.columns[column][row] : null);

    // --- What follows from the controls -----------------------------------------------------------------------------

    let cut; // count, bucket of every row, zone of every row ("", "risky", "safe" or "risky safe"), place in the order
    function recut() {
      map = data.maps[controls.map ? Number(controls.map.value) : 0];
      score = data.scores[Number(controls.score.value)];
      const order = map.order[score.column];
      const count = headCount(Number(controls.budget.value), total);
      const zone = new Array(total).fill("");
      const place = new Array(total);
      order.forEach((row, at) => {
        place[row] = at;
        zone[row] = [at < count ? "risky" : "", at >= total - count ? "safe" : ""].filter(Boolean).join(" ");
      });
      cut = { order, count, zone, place, bucket: bucketNumbers(order, Number(controls.parts.value)) };
    }

    function statistics(group) {
      const measures = score.column === "conflict_score" ? ["conflict_score"] : ["conflict_score", score.column];
      const means = measures.map((column) => {
        const values = group.map((row) => value(column, row)).filter((one) => one !== null);
        return values.length ? values.reduce((sum, one) => sum + one, 0) / values.length : null;
      });
      return [group.length, new Set(group.map((row) => data.layers[row])).size, ...means];
    }

    const zoneWords = (row) =>
      ({ "": "neither zone", risky: "risky zone", safe: "safe zone", "risky safe": "both zones" })[cut.zone[row]];

    // --- The grid ---------------------------------------------------------------------------------------------------

    const cells = new Array(total);
    const layers = [...new Set(data.layers)];
    const byLayer = layers.map((layer) => rows.filter((row) => data.layers[row] === layer));
    const columns = [...new Set(data.heads)].sort((a, b) => a - b);

    function buildGrid() {
      const grid = part("grid");
      grid.parentElement.style.setProperty("--columns", columns.length);
      // As many labels as there is room for.
      const every = (room, apart) => 2 ** Math.max(0, Math.ceil(Math.log2(apart / room)));
      const height = Math.max(8, Math.min(20, Math.floor(560 / layers.length)));
      const acrossEvery = every(Math.min(36, 440 / columns.length), 24);
      const downEvery = every(height, 14);
      grid.style.setProperty("--cell", `${height}px`);
      grid.setAttribute("aria-rowcount", layers.length + 1);
      grid.setAttribute("aria-colcount", columns.length + 1);
      const heading = make("div", { className: "grid-row axis", role: "row", "aria-rowindex": 1 });
      heading.append(make("span", { role: "columnheader", className: "corner" }, `Layer / ${noun}`));
      for (const column of columns) {
        const label = column % acrossEvery === 0 ? column : "";
        heading.append(make("span", { role: "columnheader", "aria-label": `${capitalNoun} ${column}` }, String(label)));
      }
      const lines = layers.map((layer, at) => {
        const line = make("div", { className: "grid-row", role: "row", "aria-rowindex": at + 2 });
        const label = layer % downEvery === 0 ? layer : "";
        line.append(make("span", { role: "rowheader", className: "axis", "aria-label": `Layer ${layer}` }, String(label)));
        for (const row of byLayer[at]) {
          const cell = make("div", { className: "cell", role: "gridcell", tabIndex: -1 });
          const column = columns.indexOf(data.heads[row]) + 2;
          cell.style.gridColumn = column;
          cell.setAttribute("aria-colindex", column);
          cell.setAttribute("aria-label", named(row));
          cell.dataset.row = row;
          cells[row] = cell;
          line.append(cell);
        }
        return line;
      });
      grid.replaceChildren(heading, ...lines);
      cells[0].tabIndex = 0;
    }

    function colourGrid() {
      const column = map.columns[score.column] || rows.map(() => null);
      const byBucket = controls.colour.value === "1";
      const parts = Number(controls.parts.value);
      let [low, high] = [Infinity, -Infinity];
      for (const one of column) if (one !== null) [low, high] = [Math.min(low, one), Math.max(high, one)];
      const share = (row) =>
        byBucket
          ? (parts - cut.bucket[row]) / (parts - 1)
          : high > low ? (column[row] - low) / (high - low) : 0.5;
      for (const row of rows) {
        const { fill, pale } = column[row] === null ? { fill: "", pale: true } : ramp(share(row));
        cells[row].style.backgroundColor = fill;
        ground[row] = column[row] === null ? "pale empty" : pale ? "pale" : "";
      }
      dressGrid();
      const bar = make("span", { className: "bar" });
      bar.style.backgroundImage = `linear-gradient(90deg, ${data.ramp.join(",")})`;
      const ends = byBucket
        ? [`bucket ${parts}, lowest`, "bucket 1, highest"]
        : low > high ? [missing, missing] : [shown(low), shown(high)];
      part("legend").replaceChildren(make("strong", {}, score.label), make("span", {}, ends[0]), bar, ends[1]);
    }

    const ground = rows.map(() => "");
    const worn = new Array(total);
    function dressGrid(some = rows) {
      const choice = Number(controls["bring-out"].value);
      for (const row of some) {
        const zone = cut.zone[row];
        const out = [true, zone.startsWith("risky"), zone.endsWith("safe")][choice] ?? sets[choice - 3].has(row);
        const classes = `cell ${ground[row]} ${zone} ${out ? "" : "dim"} ${row === state.selected ? "selected" : ""}`;
        // Among thousands of cells only those that change are touched, and each of them once.
        if (worn[row] !== classes) cells[row].className = worn[row] = classes;
      }
    }

    // --- The numbers at this budget ---------------------------------------------------------------------------------

    function numbersTable(caption, first, groups) {
      const means = score.column === "conflict_score" ? ["C(h)"] : ["C(h)", score.symbol];
      const head = [first, `${capitalNoun}s`, "Layers", ...means.map((symbol) => `Mean ${symbol}`)];
      const lines = groups.map(([name, group]) => {
        const [count, inLayers, ...found] = statistics(group);
        const shownCells = [count.toLocaleString("en"), String(inLayers), ...found.map(shown)];
        return make("tr", {}, make("th", { scope: "row" }, name), ...shownCells.map((text) => make("td", {}, text)));
      });
      return make(
        "table",
        {},
        make("caption", {}, caption),
        make("thead", {}, make("tr", {}, ...head.map((text) => make("th", { scope: "col" }, text)))),
        make("tbody", {}, ...lines),
      );
    }

    function tellNumbers() {
      const percent = Number(controls.budget.value);
      const parts = Number(controls.parts.value);
      const said = `${shorten(percent, 4)} %`;
      part("budget-shown").textContent = said;
      controls.budget.setAttribute("aria-valuetext", `${said}, ${counted(cut.count, noun)}`);
      const both = Math.max(0, 2 * cut.count - total);
      part("budget-said").textContent =
        `${said} of ${counted(total, noun)}: ${counted(cut.count, noun)} in each zone` +
        (both ? `, ${both.toLocaleString("en")} of them in both.` : ".");
      const zones = [
        ["Risky zone", cut.order.slice(0, cut.count)],
        ["Safe zone", cut.order.slice(total - cut.count)],
      ];
      part("zones").replaceChildren(numbersTable(`Zones by ${score.symbol}`, "Zone", zones));
      const buckets = Array.from({ length: parts }, () => []);
      for (const row of cut.order) buckets[cut.bucket[row] - 1].push(row);
      const numbered = buckets.map((group, i) => [String(i + 1), group]);
      part("buckets").replaceChildren(
        numbersTable(`${parts} equal buckets by ${score.symbol}, 1 has the highest`, "Bucket", numbered),
      );
      const command = `castune select RUN --zone safe --fraction ${percent / 100} --score ${score.select}`;
      const line = part("command");
      if (!score.select) line.textContent = `castune select does not sort by ${score.symbol}.`;
      else if (map !== data.maps[0]) line.textContent = "castune select takes the combined map of a run.";
      else line.replaceChildren("The safe zone as a selection: ", make("code", {}, command));
    }

    // --- The table of heads: only rows in sight are in the document, so that thousands cost no more than thirty ------

    const byNumber = (key) => (a, b) => key(a) - key(b) || a - b;
    const tableColumns = [
      { title: "Layer", compare: byNumber((row) => data.layers[row]), text: (row) => String(data.layers[row]) },
      { title: capitalNoun, compare: byNumber((row) => data.heads[row]), text: (row) => String(data.heads[row]) },
      ...data.scores.map((one) => ({
        title: one.symbol,
        score: one.column,
        text: (row) => (value(one.column, row) === null ? "–" : shown(value(one.column, row))),
      })),
      { title: "Bucket", compare: byNumber((row) => cut.bucket[row]), text: (row) => String(cut.bucket[row]) },
      { title: "Zone", compare: byNumber((row) => cut.zone[row].length), text: (row) => cut.zone[row] || "–" },
      ...(standing.length
        ? [{ title: "Standing", compare: byNumber((row) => data.standing.rows[row]), text: (row) => standing[row] }]
        : []),
      {
        title: "Trained in",
        compare: (a, b) => armsOf[a].join().localeCompare(armsOf[b].join(), "en") || a - b,
        text: (row) => armsOf[row].join(", ") || "no arm",
      },
    ];
    const box = part("heads");
    const body = make("tbody");
    const sorters = [];
    let sorted = rows;
    let rowHeight = 30;

    function buildTable() {
      const heads = tableColumns.map((column, at) => {
        const button = make("button", { type: "button" }, column.title);
        button.addEventListener("click", () => {
          const same = state.sort.column === at;
          // What is looked for first: the highest scores, and the first layer, head or bucket.
          sortBy(at, same ? !state.sort.descending : Boolean(column.score));
        });
        const cell = make("th", { scope: "col", role: "columnheader" }, button);
        sorters.push(cell);
        return cell;
      });
      const table = make("table", { role: "grid", "aria-label": `${capitalNoun}s`, "aria-rowcount": total + 1 });
      table.append(make("thead", {}, make("tr", { "aria-rowindex": 1 }, ...heads)), body);
      box.append(table);
    }

    function sortBy(at, descending) {
      state.sort = { column: at, descending };
      resort();
      box.scrollTop = 0;
      fillTable();
    }

    function resort() {
      const { column: at, descending } = state.sort;
      const column = tableColumns[at];
      sorters.forEach((cell, i) => {
        cell.setAttribute("aria-sort", i !== at ? "none" : descending ? "descending" : "ascending");
      });
      if (!column.score) {
        sorted = [...rows].sort(descending ? (a, b) => column.compare(b, a) : column.compare);
      } else {
        // Ascending is the same order from its end, which begins with the safe zone; rows without a value stay last.
        const order = map.order[column.score];
        const known = order.filter((row) => value(column.score, row) !== null);
        const unknown = order.filter((row) => value(column.score, row) === null);
        sorted = [...(descending ? known : known.reverse()), ...unknown];
      }
    }

    function fillTable() {
      const hadFocus = body.contains(document.activeElement);
      const above = 8; // rows beyond the edge, so that scrolling meets no gap
      const room = Math.ceil((box.clientHeight || 400) / rowHeight) + 2 * above;
      const first = Math.max(0, Math.min(Math.floor(box.scrollTop / rowHeight) - above, total - room));
      const inSight = sorted.slice(first, first + room);
      const filler = (count) => {
        const line = make("tr", { "aria-hidden": "true", className: "filler" }, make("td", { colSpan: tableColumns.length }));
        line.style.height = `${count * rowHeight}px`;
        return line;
      };
      const lines = inSight.map((row, i) => {
        const texts = tableColumns.map((column) => column.text(row));
        const line = make("tr", { tabIndex: -1, "aria-rowindex": first + i + 2 });
        line.append(...texts.map((text) => make("td", { role: "gridcell" }, text)));
        line.setAttribute("aria-selected", row === state.selected);
        line.dataset.row = row;
        return line;
      });
      const entry = Math.max(0, inSight.indexOf(state.selected));
      lines[entry].tabIndex = 0;
      body.replaceChildren(filler(first), ...lines, filler(Math.max(0, total - first - room)));
      // Rows are made anew; a focus that was on one stays on its head.
      if (hadFocus) (inSight.includes(state.selected) ? lines[entry] : box).focus({ preventScroll: true });
    }

    // How high a row is follows from the reader's font; it is asked once for each width of the window.
    function measureTable() {
      fillTable();
      rowHeight = body.querySelector("[data-row]").getBoundingClientRect().height || rowHeight;
      fillTable();
    }

    // Into the middle of the table's own box: the page itself must not move.
    function reveal(row) {
      const top = sorted.indexOf(row) * rowHeight;
      const headHeight = sorters[0].getBoundingClientRect().height;
      const room = box.clientHeight - headHeight;
      if (top < box.scrollTop || top + rowHeight > box.scrollTop + room) box.scrollTop = top - room / 2;
    }

    // --- Selection and tooltip --------------------------------------------------------------------------------------

    function select(row) {
      if (state.selected === row) return;
      const old = state.selected;
      const before = cells[old ?? 0];
      before.tabIndex = -1;
      before.removeAttribute("aria-selected");
      state.selected = row;
      cells[row].tabIndex = 0;
      dressGrid(old === null ? [row] : [old, row]);
      cells[row].setAttribute("aria-selected", "true");
      reveal(row);
      fillTable();
    }

    const tip = part("tip");
    tip.id = `explorer-tip-${serial}`;

    function describe(row) {
      const lines = data.scores.map(({ column, label }) => {
        const [low, high] = [value(`${column}_low`, row), value(`${column}_high`, row)];
        const error = value(`${column}_se`, row);
        let text = shown(value(column, row));
        if (value(column, row) !== null && map.columns[`${column}_se`]) {
          text += error === null ? ", error not measured" : ` ± ${shorten(error, 2)}`;
        }
        return [label, text, low === null || high === null ? "" : `${shorten(low, 3)} to ${shorten(high, 3)}`];
      });
      const parts = controls.parts.value;
      lines.push(
        ["Bucket", `${cut.bucket[row]} of ${parts}`, `place ${cut.place[row] + 1} of ${total} by ${score.symbol}`],
        ["Zone", zoneWords(row), ""],
        ...(standing.length ? [["Standing", standing[row], ""]] : []),
        ["Trained in", armsOf[row].join(", ") || "no arm", ""],
      );
      return lines;
    }

    function showTip(target) {
      const row = Number(target.dataset.row);
      const head = ["", "value ± standard error", "95 % interval"];
      const filled = describe(row).map(([label, text, note]) =>
        make("tr", {}, make("th", { scope: "row" }, label), make("td", {}, text), make("td", {}, note)),
      );
      tip.replaceChildren(
        make("strong", {}, named(row)),
        make("table", {}, make("tr", {}, ...head.map((text) => make("td", {}, text))), ...filled),
      );
      tip.hidden = false;
      // Beside what it tells of, and inside the window.
      const at = target.getBoundingClientRect();
      const own = tip.getBoundingClientRect();
      const isCell = target.classList.contains("cell");
      const below = at.bottom + 10 + own.height < innerHeight || at.top < own.height + 10;
      const left = isCell ? at.left + at.width / 2 - own.width / 2 : at.right - own.width;
      tip.style.left = `${Math.max(8, Math.min(left, document.documentElement.clientWidth - own.width - 8))}px`;
      tip.style.top = `${below ? at.bottom + 10 : at.top - own.height - 10}px`;
      for (const old of root.querySelectorAll("[aria-describedby]")) old.removeAttribute("aria-describedby");
      target.setAttribute("aria-describedby", tip.id);
    }

    const headOf = (event) => event.target.closest?.("[data-row]");
    const hideTip = () => { tip.hidden = true; };

    function listen() {
      root.addEventListener("pointerover", (event) => {
        const target = headOf(event);
        if (target) showTip(target);
        else hideTip();
      });
      root.addEventListener("pointerleave", hideTip);
      root.addEventListener("focusin", (event) => {
        const target = headOf(event);
        if (!target) return hideTip();
        const row = Number(target.dataset.row);
        const isCell = target.classList.contains("cell");
        // Selecting draws the rows of the table anew: the tooltip belongs to the one that is there afterwards.
        select(row);
        showTip(isCell ? target : body.querySelector(`[data-row="${row}"]`) || target);
      });
      root.addEventListener("focusout", hideTip);
      root.addEventListener("keydown", (event) => {
        if (event.key === "Escape") hideTip();
        const target = headOf(event);
        if (!target || event.altKey || event.metaKey) return;
        const row = Number(target.dataset.row);
        const to = target.classList.contains("cell") ? inGrid(row, event) : inTable(row, event);
        if (to === undefined) return;
        event.preventDefault();
        if (target.classList.contains("cell")) cells[to].focus();
        else select(to);
      });
      // The tooltip tells of what was before: it goes.
      const untold = (work) => () => {
        hideTip();
        work();
      };
      controls.budget.addEventListener("input", untold(() => redraw({ coloured: false })));
      controls["bring-out"].addEventListener("input", untold(() => dressGrid()));
      controls.colour.addEventListener("input", untold(colourGrid));
      controls.parts.addEventListener("input", untold(() => redraw({ coloured: controls.colour.value === "1" })));
      controls.map?.addEventListener("input", untold(() => redraw({ coloured: true })));
      controls.score.addEventListener("input", untold(() => {
        const column = tableColumns.findIndex((one) => one.score === score.column);
        state.sort = { column, descending: true };
        redraw({ coloured: true });
      }));
      box.addEventListener("scroll", () => requestAnimationFrame(fillTable));
      addEventListener("resize", measureTable);
    }

    // Where a key leads from a head; undefined for keys that are not ours.
    function inGrid(row, { key, ctrlKey }) {
      const layer = layers.indexOf(data.layers[row]);
      const line = byLayer[layer];
      const at = line.indexOf(row);
      // Layers may have different numbers of heads: the nearest one is taken.
      const across = (to) => {
        const near = (one) => Math.abs(data.heads[one] - data.heads[row]);
        return byLayer[Math.max(0, Math.min(to, layers.length - 1))].reduce((a, b) => (near(b) < near(a) ? b : a));
      };
      switch (key) {
        case "ArrowLeft": return line[Math.max(0, at - 1)];
        case "ArrowRight": return line[Math.min(line.length - 1, at + 1)];
        case "ArrowUp": return across(layer - 1);
        case "ArrowDown": return across(layer + 1);
        case "PageUp": return across(layer - 8);
        case "PageDown": return across(layer + 8);
        case "Home": return ctrlKey ? 0 : line[0];
        case "End": return ctrlKey ? total - 1 : line[line.length - 1];
        case "Enter": case " ": return row;
      }
    }

    function inTable(row, { key }) {
      const at = sorted.indexOf(row);
      const page = Math.max(1, Math.floor(box.clientHeight / rowHeight) - 2);
      const steps = { ArrowUp: -1, ArrowDown: 1, PageUp: -page, PageDown: page, Home: -total, End: total, Enter: 0, " ": 0 };
      return key in steps ? sorted[Math.max(0, Math.min(at + steps[key], total - 1))] : undefined;
    }

    function redraw({ coloured }) {
      recut();
      if (coloured) colourGrid();
      else dressGrid();
      tellNumbers();
      resort();
      fillTable();
    }

    buildGrid();
    buildTable();
    listen();
    part("live").hidden = false;
    state.sort = { column: tableColumns.findIndex((one) => one.score === score.column), descending: true };
    redraw({ coloured: true });
    measureTable();
    root.dataset.ready = "true";
  }

  document.querySelectorAll(".explorer").forEach(explore);
})();
