"use strict";
// What a reader can do with a report: read values off a chart, hide series, switch axes, sort and filter tables.
(() => {
  const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];
  const format = (v) => {
    if (v === null || v === undefined) return "–";
    if (v === 0) return "0";
    const a = Math.abs(v);
    return a >= 1e5 || a < 1e-3 ? v.toExponential(2) : a >= 100 ? v.toFixed(1) : v.toFixed(a >= 10 ? 2 : 3);
  };
  const axis = (text) => {
    const [lo, hi, log] = text.split(",").map(Number);
    const f = log ? Math.log : (v) => v;
    return { at: (v) => (f(v) - f(lo)) / (f(hi) - f(lo)), from: (p) => (log ? lo * (hi / lo) ** p : lo + p * (hi - lo)) };
  };
  const nearest = (xs, x) => {
    let a = 0, b = xs.length - 1;
    while (b - a > 1) { const m = (a + b) >> 1; if (xs[m] < x) a = m; else b = m; }
    return Math.abs(xs[a] - x) <= Math.abs(xs[b] - x) ? a : b;
  };

  let closed = [];
  addEventListener("beforeprint", () => { closed = $$("details:not([open])"); for (const d of closed) d.open = true; });
  addEventListener("afterprint", () => { for (const d of closed) d.open = false; });

  for (const figure of $$(".line-figure")) {
    const data = JSON.parse(figure.querySelector(".figure-data").textContent);
    const stage = figure.querySelector(".stage"), readout = figure.querySelector(".readout");
    const off = new Set();
    let role = "both";
    const visible = (s) => !off.has(s.g) && (role === "both" || !s.r || s.r === role);

    const refresh = () => {
      for (const node of $$(".series", figure)) {
        const r = node.dataset.role;
        node.classList.toggle("is-off", off.has(node.dataset.group) || (role !== "both" && r && r !== role));
      }
      for (const node of $$(".end-label, .mark, .off-scale", figure)) node.classList.toggle("is-off", off.has(node.dataset.group));
      for (const item of $$(".legend-item", figure)) item.setAttribute("aria-pressed", String(!off.has(item.dataset.group)));
    };
    const focus = (group) => {
      figure.classList.toggle("has-focus", Boolean(group));
      for (const node of $$("[data-group]", figure)) node.classList.toggle("is-focus", node.dataset.group === group);
    };
    for (const item of $$(".legend-item", figure)) {
      const group = item.dataset.group;
      item.addEventListener("click", (event) => {
        if (event.shiftKey) {
          const others = data.series.map((s) => s.g).filter((g) => g !== group);
          const alone = others.every((g) => off.has(g)) && !off.has(group);
          off.clear();
          if (!alone) others.forEach((g) => off.add(g));
        } else if (!off.delete(group)) off.add(group);
        focus(null);
        refresh();
      });
      item.addEventListener("mouseenter", () => { if (!off.has(group)) focus(group); });
      item.addEventListener("mouseleave", () => focus(null));
    }
    for (const button of $$("[data-switch]", figure)) {
      button.addEventListener("click", () => {
        const { switch: kind, value } = button.dataset;
        for (const other of $$(`[data-switch="${kind}"]`, figure)) other.setAttribute("aria-pressed", String(other === button));
        if (kind === "role") { role = value; figure.dataset.showing = value; refresh(); }
        else for (const part of $$(".scale", figure)) part.hidden = part.dataset.scale !== value;
      });
    }

    let at = null;
    const steps = [...new Set(data.series.flatMap((s) => s.x))].sort((a, b) => a - b);
    const show = (x) => {
      const chart = $$(".scale", figure).find((part) => !part.hidden);
      const plot = chart && chart.querySelector(".plot");
      const rows = data.series.filter((s) => visible(s) && s.x.length).map((s) => {
        const i = nearest(s.x, x);
        return { s, i, gap: Math.abs(s.x[i] - x) };
      });
      if (!plot || !rows.length) return hide();
      const closest = rows.reduce((a, b) => (a.gap <= b.gap ? a : b));
      at = closest.s.x[closest.i];
      const scale = axis(plot.dataset.x), cursor = plot.querySelector(".cursor");
      const p = scale.at(at);
      cursor.setAttribute("x1", `${100 * p}%`);
      cursor.setAttribute("x2", `${100 * p}%`);
      const reach = 1.5 * Math.abs(scale.from(1) - scale.from(0)) / Math.max(20, rows[0].s.x.length);
      const table = new Map();
      for (const { s, i, gap } of rows) {
        const line = table.get(s.g) || { c: s.c, cells: {} };
        const beyond = at > s.x[s.x.length - 1] + reach;
        line.cells[s.r] = beyond ? "ended" : s.lo ? `${format(s.y[i])}  [${format(s.lo[i])}, ${format(s.hi[i])}]`
          : gap > reach ? `${format(s.y[i])} (${data.x} ${Math.round(s.x[i])})` : s.y[i] === null ? "NaN" : format(s.y[i]);
        table.set(s.g, line);
      }
      const roles = [...new Set(rows.map((r) => r.s.r))];
      readout.replaceChildren();
      const head = document.createElement("b");
      head.textContent = `${data.x} ${Number.isInteger(at) ? at : format(at)}`;
      const body = document.createElement("table");
      if (roles.length > 1) body.append(row(["", ...roles], null));
      for (const [group, line] of table) body.append(row([group, ...roles.map((r) => line.cells[r] ?? "–")], line.c));
      readout.append(head, body);
      readout.hidden = false;
      stage.classList.add("is-reading");
      const box = plot.querySelector(".hit").getBoundingClientRect(), outer = stage.getBoundingClientRect();
      const pixel = box.left - outer.left + p * box.width;
      const right = pixel + 14 + readout.offsetWidth <= outer.width;
      readout.style.left = `${Math.max(0, right ? pixel + 14 : pixel - 14 - readout.offsetWidth)}px`;
    };
    const row = (cells, colour) => {
      const tr = document.createElement("tr");
      cells.forEach((text, i) => {
        const td = document.createElement("td");
        if (i === 0 && colour) { const key = document.createElement("i"); key.className = colour; td.append(key); }
        td.append(text);
        tr.append(td);
      });
      return tr;
    };
    const hide = () => { at = null; readout.hidden = true; stage.classList.remove("is-reading"); };
    stage.addEventListener("pointermove", (event) => {
      const hit = $$(".scale", figure).find((part) => !part.hidden).querySelector(".hit").getBoundingClientRect();
      const p = (event.clientX - hit.left) / hit.width;
      if (p < -0.02 || p > 1.02) return hide();
      show(axis($$(".scale", figure).find((part) => !part.hidden).querySelector(".plot").dataset.x).from(p));
    });
    stage.addEventListener("pointerleave", hide);
    stage.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (event.key === "Escape") return hide();
      if (!move || !steps.length) return;
      event.preventDefault();
      const stride = Math.max(1, Math.round(steps.length / 100)) * (event.shiftKey ? 10 : 1);
      const i = at === null ? (move > 0 ? -stride : steps.length - 1 + stride) : nearest(steps, at);
      show(steps[Math.min(steps.length - 1, Math.max(0, i + move * stride))]);
    });
    stage.addEventListener("blur", hide);
  }

  for (const table of $$("table.sortable")) {
    const heads = $$("thead th", table), body = table.tBodies[0];
    heads.forEach((head, column) => {
      head.querySelector("button").addEventListener("click", () => {
        const up = head.getAttribute("aria-sort") !== "ascending";
        heads.forEach((other) => other.setAttribute("aria-sort", "none"));
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        const numeric = head.classList.contains("num");
        const key = (tr) => {
          const cell = tr.cells[column];
          if (!numeric) return (cell.dataset.sort ?? cell.textContent).trim();
          return cell.dataset.sort === undefined ? NaN : Number(cell.dataset.sort);
        };
        const rows = [...body.rows].map((tr) => [key(tr), tr]);
        rows.sort(([a], [b]) => {
          if (!numeric) return up ? a.localeCompare(b, undefined, { numeric: true }) : b.localeCompare(a, undefined, { numeric: true });
          if (Number.isNaN(a) || Number.isNaN(b)) return Number.isNaN(a) - Number.isNaN(b);
          return a === b ? 0 : (a < b ? -1 : 1) * (up ? 1 : -1);
        });
        body.append(...rows.map(([, tr]) => tr));
      });
    });
  }

  for (const box of $$(".filterable")) {
    const input = box.querySelector(".filter"), rows = $$("tbody tr", box), count = box.querySelector(".filter-count");
    const apply = () => {
      const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      for (const tr of rows) {
        const text = tr.textContent.toLowerCase();
        tr.hidden = !words.every((word) => text.includes(word));
        shown += !tr.hidden;
      }
      count.textContent = words.length ? `${shown} of ${rows.length} rows` : `${rows.length} rows`;
    };
    input.addEventListener("input", apply);
    apply();
  }

  // The map of cells: choosing one says what is known of it and keeps its layer and its role lit.
  for (const map of $$(".map")) {
    const reading = map.querySelector(".map-reading"), cells = $$("td.cell[data-layer]", map), hint = reading.textContent;
    const button = (cell) => cell && cell.querySelector("button");
    const enter = (cell) => cells.forEach((other) => { button(other).tabIndex = other === cell ? 0 : -1; });
    enter(cells.find((cell) => cell.classList.contains("caused")) ?? cells[0]);
    const ways = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    map.addEventListener("keydown", (event) => {
      const way = ways[event.key], table = map.querySelector("table");
      let cell = event.target.closest("td.cell");
      if (!way || !cell) return;
      event.preventDefault();
      do {
        const line = table.rows[cell.parentNode.rowIndex + way[1]];
        cell = line && line.cells[cell.cellIndex + way[0]];
      } while (cell && cell.tagName === "TD" && !button(cell));
      if (button(cell)) { enter(cell); button(cell).focus(); }
    });
    for (const cell of cells) {
      button(cell).addEventListener("click", () => {
        enter(cell);
        const same = cell.classList.contains("is-chosen");
        for (const other of cells) {
          const near = other.dataset.layer === cell.dataset.layer || other.dataset.role === cell.dataset.role;
          other.classList.toggle("is-dim", !same && !near);
          other.classList.toggle("is-chosen", !same && other === cell);
          button(other).setAttribute("aria-pressed", String(!same && other === cell));
        }
        reading.textContent = same ? hint : cell.title;
      });
    }
  }
})();
