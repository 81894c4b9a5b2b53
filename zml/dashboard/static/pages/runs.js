// The runs of a folder.

import { h, later } from "../dom.js";
import { get } from "../api.js";
import { ago, cut, duration, moment, number, percent, plural } from "../format.js";
import { pill, table } from "../parts.js";

export async function open(ctx) {
  let view = null;
  let text = "";
  const note = h("span", { class: "side-note" });
  const filter = h("input", { class: "field", type: "search", placeholder: "filter", "aria-label": "filter runs", oninput: later(100, () => { text = filter.value.toLowerCase(); draw(); }) });
  const list = table([
    { title: "run", of: (r) => r.name, cell: (r) => h("a", { href: ctx.to(r.name, "overview") }, r.name), class: "tight" },
    { title: "state", of: (r) => r.state, cell: (r) => h("span", { title: r.because || null }, pill(r.tone, `${r.state.toLowerCase()}${r.silent_s ? `, silent for ${duration(r.silent_s)}` : ""}`)) },
    { title: "script", of: (r) => r.script, cell: (r) => cut(r.script, 40), class: "tight" },
    { title: "done", n: true, of: (r) => r.progress, cell: (r) => percent(r.progress) },
    { title: "step", n: true, of: (r) => r.steps },
    { title: "workers", n: true, of: (r) => r.workers },
    { title: "values", of: (r) => Object.entries(r.values).map(([name, value]) => `${name} ${value === null ? "not finite" : number(value)}`).join(", "), class: "tight" },
    { title: "took", n: true, of: (r) => r.at - r.began, cell: (r) => (r.began ? duration(r.at - r.began) : "–") },
    { title: "began", of: (r) => r.began, cell: (r) => h("span", { title: ago(r.began, Date.now() / 1000) }, moment(r.began)), class: "tight" },
  ], { order: ["began", true], none: "No run is here, or none is called like this: `zml run` makes one." });
  const node = h("div", { class: "page" }, h("div", { class: "title" }, h("h1", {}, "Runs"), note, h("div", { class: "tools" }, filter)),
    h("section", { class: "panel" }, h("div", { class: "flush" }, list.node)));
  function draw() {
    const found = view.runs.filter((r) => !text || `${r.name} ${r.script} ${r.state}`.toLowerCase().includes(text));
    note.textContent = `${plural(found.length, "run")}${view.left_out ? `, ${plural(view.left_out, "older one")} not listed` : ""}`;
    list.set(found);
  }
  async function refresh() { view = await get("runs"); draw(); }
  return { node, title: "Runs", watches: [], every: 5000, ready: refresh, refresh, focus: filter, close() {} };
}
