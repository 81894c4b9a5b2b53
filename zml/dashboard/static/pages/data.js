// The proof that every batch counted once.

import { fill, h } from "../dom.js";
import { clock, count } from "../format.js";
import { bar, empty, legend, panel, sign, table } from "../parts.js";

export async function open(ctx) {
  let view = null;
  const proof = h("div");
  const now = h("div");
  const faults = h("div", { class: "stack" });
  const bad = (value) => (value ? h("b", { class: "t-bad" }, count(value)) : "0");
  const list = table([
    { title: "epoch", n: true, of: (e) => e.epoch + 1 },
    { title: "state", of: (e) => e.sound, cell: (e) => h("span", {}, sign(e.sound ? (e.closed ? "good" : "busy") : "bad"), e.sound ? (e.closed ? " every batch once" : " so far") : " wrong") },
    { title: "batches", n: true, of: (e) => e.batches },
    { title: "samples", n: true, of: (e) => e.samples },
    { title: "committed", n: true, of: (e) => e.committed },
    { title: "given out again", n: true, of: (e) => e.reissued, about: "because the worker that had it was gone" },
    { title: "skipped", n: true, of: (e) => e.skipped, cell: (e) => (e.skipped ? h("b", { class: "t-warn" }, count(e.skipped)) : "0") },
    { title: "duplicates", n: true, of: (e) => e.duplicates, cell: (e) => bad(e.duplicates) },
    { title: "missing", n: true, of: (e) => e.missing, cell: (e) => bad(e.missing) },
    { title: "to go", n: true, of: (e) => e.to_go },
  ], { order: ["epoch", true], none: "No epoch is on record." });
  const node = h("div", { class: "page" },
    h("div", { class: "title" }, h("h1", {}, "Data"), h("span", { class: "side-note" }, "the same proof as `zml data audit`")),
    proof, panel("The newest epoch", {}, now), h("section", { class: "panel" }, h("div", { class: "flush" }, list.node)), faults);

  function draw() {
    const tone = { proved: "good", wrong: "bad", unknown: "note" }[view.state];
    fill(proof, h("div", { class: `banner ${tone}`, role: "status" }, sign(tone), ` ${view.says.charAt(0).toUpperCase()}${view.says.slice(1)}`,
      view.state !== "unknown" && h("span", { class: "hint" }, `  checked at ${clock(view.at)}`)));
    const n = view.now;
    const togo = Math.max(0, n.batches - n.committed - n.skipped - n.leased);
    fill(now, n.batches ? [
      bar([["committed", n.committed, `applied: ${count(n.committed)}`, "applied"], ["leased", n.leased, `under way: ${count(n.leased)}`, "under way"],
        ["skipped", n.skipped, `left out: ${count(n.skipped)}`, "left out"], ["togo", togo, `to go: ${count(togo)}`, "to go"]], n.batches, true),
      h("p", { class: "hint" }, `${count(n.batches)} batches of ${count(n.batch_size)}: ${count(n.committed)} applied, ${count(n.leased)} under way, ${count(n.skipped)} left out, ${count(togo)} to go.` + (n.reissued ? ` In all epochs ${count(n.reissued)} were given out again.` : "")),
      legend([["committed", "applied"], ["leased", "under way"], ["skipped", "left out"], ["togo", "to go"]])] : empty("No epoch is open."));
    list.set(view.epochs);
    const said = view.epochs.flatMap((e) => [...e.faults.map((text) => ["bad", `epoch ${e.epoch + 1}: ${text}`]), ...e.left_out.map((text) => ["warn", `epoch ${e.epoch + 1}: ${text}`])]);
    fill(faults, said.length > 0 && panel("In words", {}, h("div", { class: "list" }, said.map(([tone, text]) => h("div", {}, sign(tone), ` ${text}`)))));
  }

  async function refresh() { view = await ctx.get("data"); draw(); }
  return { node, title: "Data", watches: ["data"], slow: 5000, ready: refresh, refresh, close() {} };
}
