// A hub's jobs: who runs where, who waits, and why.

import { fill, h, later } from "../dom.js";
import { get } from "../api.js";
import { ago, bytes, clock, count, duration, moment } from "../format.js";
import { empty, panel, pill, sign, stat, stats, table } from "../parts.js";

const ENDS = new Set(["SUCCEEDED", "FAILED", "CANCELLED", "TIMED_OUT"]);

export async function open(ctx) {
  let view = null;
  let text = "";
  let chosen = ctx.query.job || "";
  const numbers = h("div");
  const map = h("div");
  const why = h("div", { class: "stack" });
  const now = () => Date.now() / 1000;
  const filter = h("input", { class: "field", type: "search", placeholder: "filter", "aria-label": "filter jobs", oninput: later(100, () => { text = filter.value.toLowerCase(); draw(); }) });
  const name = (j) => (j.opens ? h("a", { href: ctx.to(j.id, "overview") }, j.id) : h("span", {}, j.id));
  const waits = table([
    { title: "job", of: (j) => j.id, cell: name },
    { title: "name", of: (j) => j.name },
    { title: "user", of: (j) => j.user },
    { title: "state", of: (j) => j.state, cell: (j) => pill(j.tone, j.state.toLowerCase()) },
    { title: "why", of: (j) => j.because || j.why, class: "long" },
    { title: "workers", n: true, of: (j) => j.workers, cell: (j) => `${j.workers} of ${j.workers_min === j.workers_max ? j.workers_max : `${j.workers_min}..${j.workers_max}`}` },
    { title: "shards", n: true, of: (j) => j.shards },
    { title: "priority", n: true, of: (j) => j.priority },
    { title: "on", of: (j) => j.nodes.join(", "), cell: (j) => (j.nodes.length > 3 ? `${j.nodes.slice(0, 3).join(", ")} and ${j.nodes.length - 3} more` : j.nodes.join(", ") || "–") },
    { title: "attempts", n: true, of: (j) => j.attempts },
    { title: "age", n: true, of: (j) => now() - j.submitted_at, cell: (j) => h("span", { title: `submitted ${moment(j.submitted_at)}` }, j.ended_at ? ago(j.ended_at, now()) : duration(now() - (j.began_at || j.submitted_at))) },
  ], { onrow: (j) => choose(j.id).catch(ctx.failed), chosen: (j) => j.id === chosen, none: "No job is like this: `zml submit` makes one." });
  const node = h("div", { class: "page" }, h("div", { class: "title" }, h("h1", {}, "Jobs"), h("div", { class: "tools" }, filter)),
    numbers, h("section", { class: "panel" }, h("div", { class: "flush" }, waits.node)), why, panel("Machines", {}, map));

  let asking = 0; // an answer about a job that is no longer chosen is dropped
  async function choose(job) {
    const mine = ++asking;
    chosen = chosen === job ? "" : job;
    waits.draw();
    fill(why);
    if (!chosen) return;
    const told = await get(`jobs/${encodeURIComponent(chosen)}`);
    if (mine !== asking) return;
    fill(why, panel(`Why ${chosen} has what it has`, {},
      told.ahead_count > 0 && h("p", {}, `Ahead of it: ${told.ahead.join(", ")}${told.ahead_count > told.ahead.length ? ` and ${told.ahead_count - told.ahead.length} more` : ""}.`),
      h("div", { class: "list" }, told.decisions.length ? told.decisions.slice(-20).reverse().map((d) => h("div", { class: "event" }, h("span", { class: "when", title: moment(d.at) }, clock(d.at)), sign(d.tone), h("span", {}, d.what, d.because && h("span", { class: "because" }, `: ${d.because}`)))) : empty("Nothing has been decided about it yet."))));
  }

  function cells(used, all) {
    if (all > 64) return h("div", { class: "hint" }, `${count(used)} of ${count(all)} used`);
    return h("div", { class: "cells", role: "img", "aria-label": `${used} of ${all} used` }, Array.from({ length: all }, (_, at) => h("i", { class: at < used ? "used" : null })));
  }

  function draw() {
    const order = (j) => (ENDS.has(j.state) ? 2 : j.state === "QUEUED" || j.state === "PAUSED" ? 1 : 0);
    const ended = (j) => j.ended_at || j.submitted_at; // what is over stands newest first
    const sum = (of) => view.nodes.reduce((all, node) => all + of(node), 0);
    const [gpus, cpus] = [sum((n) => n.gpus), sum((n) => n.cpus)];
    fill(numbers, stats(
      stat("running", count((view.counts.RUNNING || 0) + (view.counts.STARTING || 0) + (view.counts.DRAINING || 0))),
      stat("waiting", count((view.counts.QUEUED || 0) + (view.counts.PAUSED || 0))),
      stat("finished", count(view.counts.SUCCEEDED || 0)),
      stat("failed", count((view.counts.FAILED || 0) + (view.counts.TIMED_OUT || 0))),
      stat("machines", count(view.nodes.length)),
      gpus > 0 && stat("GPUs free", count(sum((n) => n.gpus_free)), `of ${count(gpus)}`),
      stat("processors free", count(sum((n) => n.cpus_free)), `of ${count(cpus)}`)));
    const racks = new Map();
    for (const n of view.nodes) racks.set(n.rack, [...(racks.get(n.rack) || []), n]);
    fill(map, view.nodes.length ? [...racks].map(([rack, nodes]) => [
      racks.size > 1 || rack ? h("p", { class: "hint" }, rack ? `rack ${rack}` : "no rack") : null,
      h("div", { class: "nodes" }, nodes.map((n) => h("div", { class: `node t-${n.tone}`, title: `heard ${duration(n.heard_s)} ago` },
        h("b", {}, n.id, sign(n.heard_s > 10 ? "warn" : n.tone)),
        n.gpus > 0 ? cells(n.gpus - n.gpus_free, n.gpus) : cells(n.cpus - n.cpus_free, n.cpus),
        h("div", { class: "hint" }, [n.gpus > 0 && `${n.gpus_free} of ${n.gpus} GPUs free`, `${n.cpus_free} of ${n.cpus} CPUs free`, `${bytes(1048576 * n.memory_mb_free)} free`].filter(Boolean).join(", ")),
        h("div", { class: "hint" }, n.jobs.length ? n.jobs.slice(0, 4).join(", ") + (n.jobs.length > 4 ? ` and ${n.jobs.length - 4} more` : "") : "idle"))))]) : empty("No machine offers anything yet: `zml node` on each."));
    waits.set(view.jobs.filter((j) => !text || `${j.id} ${j.name} ${j.user} ${j.state} ${j.because}`.toLowerCase().includes(text)).sort((a, b) => order(a) - order(b) || (order(a) === 2 ? ended(b) - ended(a) : a.submitted_at - b.submitted_at)));
  }

  async function refresh() { view = await get("jobs"); draw(); }
  return { node, title: "Jobs", watches: [], every: 2000, ready: refresh, refresh, focus: filter, close() { asking += 1; } };
}
