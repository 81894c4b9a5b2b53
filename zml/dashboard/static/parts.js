// What several pages are made of: signs, panels, numbers, stacked bars, tables.

import { h, put, fill } from "./dom.js";
import { count, percent, seconds } from "./format.js";

export const PHASES = ["data", "compute", "encode", "wait", "apply"];
export const PHASE_SAYS = {
  data: "waiting for the data loader",
  compute: "the script's forward and backward pass",
  encode: "compressing gradients",
  wait: "waiting for shards and the other workers",
  apply: "writing parameters back",
  push: "until every shard has counted the step",
  pull: "until the parameters are here",
};

const SIGNS = { good: "●", warn: "▲", bad: "✖", busy: "◐", quiet: "○", note: "ℹ" };
const SIGN_SAYS = { good: "well", warn: "warning", bad: "bad", busy: "under way", quiet: "over or idle", note: "to know" };

export function sign(tone) {
  return h("span", { class: `sign t-${tone}`, role: "img", "aria-label": SIGN_SAYS[tone] || tone }, SIGNS[tone] || "○");
}

export function pill(tone, text) {
  return h("span", { class: `pill t-${tone}` }, sign(tone), text);
}

export function panel(title, { read, tools, flush = false, wide = "", tone = "" } = {}, ...children) {
  return h("section", { class: `panel ${wide} ${tone}` },
    title && h("header", {}, h("h2", {}, title), read, tools),
    flush ? h("div", { class: "flush" }, ...children) : h("div", { class: "body" }, ...children));
}

export const reading = () => h("span", { class: "read" });

export function stat(title, value, unit = "", sub = "", about = "") {
  return h("div", { class: "stat", title: about || null },
    h("dt", {}, title),
    h("dd", {}, value, unit && h("small", {}, ` ${unit}`)),
    h("div", { class: "sub" }, sub));
}

export function stats(...all) {
  return h("dl", { class: "stats" }, ...all);
}

export function choice(options, chosen, pick, label) {
  const group = h("div", { class: "group", role: "group", "aria-label": label });
  for (const [value, text] of options) {
    put(group, h("button", {
      class: "button", type: "button", "aria-pressed": String(value === chosen),
      onclick: (event) => {
        for (const each of group.children) each.setAttribute("aria-pressed", String(each === event.currentTarget));
        pick(value);
      },
    }, text));
  }
  return group;
}

// Names of parts, or pairs of a name and the word for it.
export function legend(names, says = {}) {
  return h("div", { class: "legend" }, names.map((each) => {
    const [name, text] = Array.isArray(each) ? each : [each, each];
    return h("span", { title: says[name] || null }, h("i", { class: `key p-${name}` }), text);
  }));
}

// A bar of parts: [[name, size, title, text]], of `whole`. Text is shown where there is room for it.
export function bar(parts, whole, tall = false) {
  return h("div", { class: `bar${tall ? " tall" : ""}` }, parts.filter(([, size]) => size > 0).map(([name, size, title, text]) =>
    h("i", {
      class: `p-${name}`, title: title || null,
      style: { width: `${(100 * size) / (whole || 1)}%` },
    }, size / (whole || 1) > 0.055 ? text || "" : "")));
}

export function phaseBar(shares, tall = true) {
  return bar(PHASES.map((phase) => [phase, shares[phase] || 0, `${phase}: ${percent(shares[phase], 1)}, ${PHASE_SAYS[phase]}`,
    percent(shares[phase])]), 1, tall);
}

export function phaseParts(phases) {
  return PHASES.map((phase) => [phase, phases[phase] || 0, `${phase}: ${seconds(phases[phase] || 0)}, ${PHASE_SAYS[phase]}`, seconds(phases[phase])]);
}

// Columns: {title, of(row), sort(row)?, n: right, cell(row)?, about?}. Sorts where a header is pressed.
export function table(columns, { chosen, onrow, order, none = "Nothing yet." } = {}) {
  const body = h("tbody");
  let by = order ? columns.findIndex((column) => column.title === order[0]) : -1;
  let down = order ? order[1] : false;
  let rows = [];
  const heads = columns.map((column, at) => h("th", { class: column.n ? "n" : null, scope: "col", title: column.about || null },
    h("button", {
      type: "button",
      onclick: () => { [by, down] = by === at ? [at, !down] : [at, Boolean(column.n)]; draw(); },
    }, column.title)));
  function draw() {
    let shown = rows;
    if (by >= 0) {
      const value = columns[by].sort || columns[by].of;
      const rank = (row) => { const v = value(row); return v === null || v === undefined ? -Infinity : v; };
      shown = [...rows].sort((a, b) => {
        const [x, y] = [rank(a), rank(b)];
        const less = typeof x === "string" && typeof y === "string" ? x.localeCompare(y, "en", { numeric: true }) : x - y || 0;
        return down ? -less : less;
      });
    }
    heads.forEach((head, at) => {
      head.setAttribute("aria-sort", at === by ? (down ? "descending" : "ascending") : "none");
      head.firstChild.textContent = columns[at].title + (at === by ? (down ? " ↓" : " ↑") : "");
    });
    if (!shown.length) { fill(body, h("tr", {}, h("td", { colspan: columns.length }, none))); return; }
    fill(body, shown.map((row) => h("tr", {
      class: chosen && chosen(row) ? "chosen" : null,
      onclick: onrow ? () => onrow(row) : null,
    }, columns.map((column) => h("td", { class: [column.n ? "n" : "", column.class || ""].join(" ").trim() || null },
      column.cell ? column.cell(row) : text(column.of(row)))))));
  }
  return {
    node: h("div", { class: "table", tabindex: "0", role: "region", "aria-label": "table" }, h("table", {}, h("thead", {}, h("tr", {}, heads)), body)),
    set(newRows) { rows = newRows; draw(); },
    draw,
  };
}

const text = (value) => (value === null || value === undefined || value === "" ? "–" : typeof value === "number" ? count(value) : value);

export function saved(sent, dense) {
  return dense > 0 && sent > 0 ? dense / sent : null;
}

export const times = (ratio) => (ratio === null ? "–" : `${Number(ratio.toPrecision(ratio >= 10 ? 3 : 2))} ×`);

export function empty(words) {
  return h("p", { class: "empty" }, words);
}
