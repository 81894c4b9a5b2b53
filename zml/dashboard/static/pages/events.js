// What was decided, and why.

import { fill, h, later } from "../dom.js";
import { clock, day, moment, plural } from "../format.js";
import { empty, sign } from "../parts.js";

const SHOWN = 600;

export async function open(ctx) {
  let view = null;
  let text = ctx.query.text || "";
  const list = h("div", { class: "events" });
  const note = h("span", { class: "side-note" });
  const filter = h("input", { class: "field", type: "search", placeholder: "filter", "aria-label": "filter events", value: text,
    oninput: later(120, () => { text = filter.value; ctx.note({ text }); draw(); }) });
  const node = h("div", { class: "page" }, h("div", { class: "title" }, h("h1", {}, "Events"), note, h("div", { class: "tools" }, filter)),
    h("section", { class: "panel" }, h("div", { class: "flush" }, list)));

  function draw() {
    const wanted = text.toLowerCase();
    const found = view.events.filter((e) => !wanted || `${e.member} ${e.what} ${e.because}`.toLowerCase().includes(wanted));
    note.textContent = `${found.length > SHOWN ? `the newest ${SHOWN} of ` : ""}${plural(found.length, "event")}${view.left_out ? ", older ones are in events.jsonl" : ""}`;
    let today = "";
    const rows = [];
    for (const e of found.slice(-SHOWN).reverse()) {
      if (day(e.at) !== today) { today = day(e.at); rows.push(h("div", { class: "day" }, today)); }
      rows.push(h("div", { class: "event" }, h("span", { class: "when", title: moment(e.at) }, clock(e.at)), sign(e.tone),
        h("span", {}, e.member && h("b", {}, `${e.member} `), e.what, e.because && h("span", { class: "because" }, `: ${e.because}`))));
    }
    fill(list, rows.length ? rows : empty(wanted ? "No event holds this text." : "Nothing has happened yet."));
  }

  async function refresh() { view = await ctx.get("events"); draw(); }
  return { node, title: "Events", watches: ["events"], ready: refresh, refresh, focus: filter, close() {} };
}
