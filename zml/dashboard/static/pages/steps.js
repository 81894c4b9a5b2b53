// One step across all workers: who computed, who waited, for whom.

import { fill, h } from "../dom.js";
import { bytes, count, seconds } from "../format.js";
import { chart } from "../charts.js";
import { choice, empty, legend, panel, PHASES, PHASE_SAYS, phaseParts, bar, reading } from "../parts.js";

const WIDE = 20; // times the usual distance of two points: no line is drawn over it, for no step was there

// The curve with nothing in its wide gaps: steps of two epochs may be far apart.
function broken(step, y) {
  const distances = step.slice(1).map((each, at) => each - step[at]).sort((a, b) => a - b);
  const usual = distances[Math.floor(distances.length / 2)];
  const [x, values] = [[], []];
  step.forEach((each, at) => {
    if (at > 0 && each - step[at - 1] > WIDE * usual) { x.push((each + step[at - 1]) / 2); values.push(null); }
    x.push(each);
    values.push(y[at]);
  });
  return [x, values];
}

export async function open(ctx) {
  let view = null;
  let clock = ctx.query.clock === undefined || ctx.query.clock === "" ? null : Number(ctx.query.clock);
  let order = "name";
  const bars = h("div");
  const note = h("span", { class: "read" });
  const read = reading();
  const plot = chart({ title: "the slowest worker's step", unit: "seconds", height: 120, read, zero: true, onpick: (step) => go(Math.round(step)) });
  const slow = h("div", { class: "tools" });
  const field = h("input", { class: "field", type: "number", min: "0", "aria-label": "step", size: "9", onchange: () => go(Number(field.value)) });
  const move = (by) => go((clock === null ? view.clock : clock) + by);
  const newest = h("button", { class: "button", type: "button", onclick: () => go(null) }, "newest");
  const node = h("div", { class: "page" },
    h("div", { class: "title" }, h("h1", {}, "Steps"), h("div", { class: "tools" },
      h("button", { class: "button", type: "button", "aria-label": "the step before", onclick: () => move(-1) }, "←"), field,
      h("button", { class: "button", type: "button", "aria-label": "the next step", onclick: () => move(1) }, "→"), newest)),
    panel("The slowest worker's step, over the run", { read }, plot.node, slow),
    h("section", { class: "panel" }, h("header", {}, h("h2", { id: "which" }, "Step"), note, h("div", { class: "tools" },
      choice([["name", "by name"], ["slow", "slowest first"]], order, (value) => { order = value; draw(); }, "order"))), h("div", { class: "body" }, bars)));

  function go(step) {
    clock = step === null || Number.isNaN(step) ? null : Math.max(0, step);
    ctx.note({ clock: clock === null ? "" : String(clock) });
    refresh().catch(ctx.failed);
  }

  function draw() {
    newest.setAttribute("aria-pressed", String(clock === null));
    const [step, whole_s] = broken(view.step, view.whole_s);
    plot.set(step, [{ label: "", y: whole_s, colour: "curve-1", width: 1.3, fill: "shade" }],
      view.clock >= 0 ? [{ x: view.clock, tone: "warn" }] : []);
    fill(slow, view.slow.length > 0 && h("span", { class: "hint" }, "slowest:"), view.slow.map((step) =>
      h("button", { class: "button", type: "button", "aria-pressed": String(step === view.clock), onclick: () => go(step) }, count(step))));
    node.querySelector("#which").textContent = view.clock < 0 ? "Step" : `Step ${count(view.clock)}`;
    if (view.clock < 0) { note.textContent = ""; fill(bars, empty("No step is recorded yet.")); return; }
    field.value = view.clock;
    const longest = Math.max(1e-9, ...view.bars.map((b) => b.start_s + b.whole_s));
    const busy = (b) => b.whole_s - (b.phases.wait || 0);
    const sorted = order === "slow" ? [...view.bars].sort((a, b) => busy(b) - busy(a)) : view.bars;
    const last = [...view.bars].sort((a, b) => busy(b) - busy(a))[0];
    note.textContent = last ? `${seconds(longest)}; most work: ${last.worker}, ${seconds(busy(last))}` : "";
    const rows = h("div", { class: `rows no-median${view.bars.length > 24 ? " dense" : ""}` });
    for (const b of sorted) {
      const track = bar([["none", b.start_s], ...phaseParts(b.phases)], longest);
      const beside = h("div", { class: "thin", title: `beside it: push ${seconds(b.beside.push)}, pull ${seconds(b.beside.pull)}` },
        h("i", { style: { width: `${(100 * (b.start_s + busy(b) - (b.phases.apply || 0))) / longest}%` } }),
        h("i", { class: "p-push", style: { width: `${Math.min(100, (100 * b.beside.push) / longest)}%` } }),
        h("i", { class: "p-pull", style: { width: `${Math.min(100, (100 * b.beside.pull) / longest)}%` } }));
      rows.append(h("a", { class: `name${b === last && view.bars.length > 1 ? " chosen" : ""}`, href: ctx.href("workers", { worker: b.worker }) }, b.worker),
        h("div", { class: "track", title: `up ${bytes(b.bytes_up)}, down ${bytes(b.bytes_down)}` }, track, view.bars.length <= 24 && beside),
        h("span", { class: "end" }, seconds(b.whole_s)));
    }
    fill(bars, rows, h("div", { class: "scale" }, h("span", {}, "0"), h("span", {}, view.apart ? `each from its own beginning: ${view.apart}` : "from the first worker's beginning"), h("span", {}, seconds(longest))),
      legend([...PHASES, ...(view.bars.length <= 24 ? ["push", "pull"] : [])], PHASE_SAYS),
      view.lacking.length > 0 && h("p", { class: "hint" }, `Not recorded of ${view.lacking.slice(0, 12).join(", ")}${view.lacking.length > 12 ? ` and ${view.lacking.length - 12} more` : ""}.`));
  }

  async function refresh() {
    view = await ctx.get("steps", { clock: clock === null ? undefined : clock });
    draw();
  }
  return { node, title: "Steps", watches: ["steps"], ready: refresh, refresh: () => (clock === null ? refresh() : undefined), focus: field, close() { plot.close(); } };
}
