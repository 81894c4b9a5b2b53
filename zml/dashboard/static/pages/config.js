// Every setting and where it comes from; versions and places.

import { fill, h, later } from "../dom.js";
import { panel, table } from "../parts.js";

export async function open(ctx) {
  let view = null;
  let text = "";
  let only = false;
  const about = h("dl", { class: "pairs" });
  const members = h("dl", { class: "pairs" });
  const filter = h("input", { class: "field", type: "search", placeholder: "filter", "aria-label": "filter settings", oninput: later(100, () => { text = filter.value.toLowerCase(); draw(); }) });
  const changed = h("button", { class: "button", type: "button", "aria-pressed": "false", onclick: () => { only = !only; changed.setAttribute("aria-pressed", String(only)); draw(); } }, "changed only");
  const list = table([
    { title: "setting", of: (s) => s.name, cell: (s) => h("span", { class: "mono" }, s.name), class: "tight" },
    { title: "value", of: (s) => s.value, cell: (s) => h("span", { class: "mono" }, s.value === "" ? "–" : s.value) },
    { title: "from", of: (s) => s.origin, cell: (s) => (s.origin === "default" ? h("span", { class: "hint" }, "default") : h("b", {}, s.origin)) },
  ]);
  const node = h("div", { class: "page" }, h("div", { class: "title" }, h("h1", {}, "Config"), h("div", { class: "tools" }, changed, filter)),
    h("div", { class: "grid" },
      h("section", { class: "panel w6" }, h("div", { class: "flush" }, list.node)),
      h("div", { class: "stack w6" }, panel("The run", {}, about), panel("Who runs where", {}, members))));

  function draw() {
    fill(about, view.about.map(([name, value]) => [h("dt", {}, name), h("dd", { class: "mono" }, value || "–")]));
    fill(members, view.nodes.length ? view.nodes.map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]) : h("dd", {}, "Nobody has joined yet."));
    list.set(view.settings.filter((s) => (!only || s.origin !== "default") && (!text || `${s.name} ${s.value} ${s.origin}`.toLowerCase().includes(text))));
  }

  async function refresh() { view = await ctx.get("config"); draw(); }
  return { node, title: "Config", watches: [], ready: refresh, refresh, focus: filter, close() {} };
}
