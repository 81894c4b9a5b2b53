// The shards: how evenly the parameters lie, what waits, and what compression saves.

import { fill, h } from "../dom.js";
import { bytes, count, duration, percent, seconds, short } from "../format.js";
import { chart } from "../charts.js";
import { bar, empty, legend, panel, pill, reading, saved, stat, stats, table, times } from "../parts.js";

export async function open(ctx) {
  let view = null;
  const numbers = h("div");
  const balance = h("div");
  const traffic = h("div");
  const flowRead = reading();
  const flow = chart({ title: "traffic of all shards", unit: "byterate", height: 170, time: true, sync: "shards", read: flowRead, zero: true });
  const queueRead = reading();
  const queue = chart({ title: "what waits at the shards", unit: "count", height: 170, time: true, sync: "shards", read: queueRead, zero: true, step: true });
  const list = table([
    { title: "shard", of: (s) => s.member },
    { title: "state", of: (s) => s.state, cell: (s) => h("span", {}, pill(s.tone, s.state), s.because && s.tone === "bad" ? h("span", { class: "hint" }, ` ${s.because}`) : ""), class: "long" },
    { title: "version", n: true, of: (s) => s.version, about: "of its newest chunk" },
    { title: "updates", n: true, of: (s) => s.updates },
    { title: "updates/s", n: true, of: (s) => s.updates_per_s, cell: (s) => short(s.updates_per_s) },
    { title: "apply", n: true, of: (s) => s.apply_s, cell: (s) => seconds(s.apply_s), about: "seconds of an update" },
    { title: "chunks", n: true, of: (s) => s.chunks },
    { title: "parameters", n: true, of: (s) => s.parameter_bytes, cell: (s) => bytes(s.parameter_bytes) },
    { title: "optimizer", n: true, of: (s) => s.optimizer_bytes, cell: (s) => bytes(s.optimizer_bytes) },
    { title: "push log", n: true, of: (s) => s.log_bytes, cell: (s) => bytes(s.log_bytes) },
    { title: "parked", n: true, of: (s) => s.parked, about: "pulls that wait for other workers" },
    { title: "staged", n: true, of: (s) => s.staged, about: "pushes that wait for their commit or their clock" },
    { title: "pushes", n: true, of: (s) => s.pushes },
    { title: "duplicates", n: true, of: (s) => s.duplicates, about: "had counted before: sent again, and answered so" },
    { title: "refused", n: true, of: (s) => s.refused, cell: (s) => (s.refused ? h("b", { class: "t-warn" }, count(s.refused)) : "0") },
    { title: "received", n: true, of: (s) => s.received_bytes, cell: (s) => bytes(s.received_bytes) },
    { title: "sent", n: true, of: (s) => s.sent_bytes, cell: (s) => bytes(s.sent_bytes) },
    { title: "less", n: true, of: (s) => saved(s.received_bytes + s.sent_bytes, s.dense_received_bytes + s.dense_sent_bytes), cell: (s) => times(saved(s.received_bytes + s.sent_bytes, s.dense_received_bytes + s.dense_sent_bytes)), about: "what compression saved, both ways" },
    { title: "memory", n: true, of: (s) => s.memory_bytes, cell: (s) => (s.memory_bytes ? bytes(s.memory_bytes) : "–") },
    { title: "where", of: (s) => s.node, class: "tight" },
    { title: "heard", n: true, of: (s) => s.heard_s, cell: (s) => (s.heard_s < 0 ? "never" : s.heard_s < 1 ? "now" : `${duration(s.heard_s)} ago`) },
  ]);
  const node = h("div", { class: "page" },
    h("div", { class: "title" }, h("h1", {}, "Shards")),
    numbers,
    h("div", { class: "grid" },
      panel("What each shard holds", { wide: "w6" }, balance),
      panel("What compression saves", { wide: "w6" }, traffic),
      panel("Traffic", { read: flowRead, wide: "w6" }, flow.node),
      panel("Queue", { read: queueRead, wide: "w6" }, queue.node)),
    h("section", { class: "panel" }, h("div", { class: "flush" }, list.node)));

  const sum = (of) => view.shards.reduce((all, s) => all + of(s), 0);

  function saving(title, sent, dense) {
    const ratio = saved(sent, dense);
    return [h("p", {}, h("b", {}, bytes(sent)), dense > 0 ? ` of ${title}, instead of ${bytes(dense)}` : ` of ${title}`, ratio !== null && ratio > 1.005 && h("b", { class: "t-good" }, `: ${times(ratio)} less`)),
      bar([["sent", sent, "what travelled", ""], ["saved", Math.max(0, dense - sent), "what did not have to", ratio !== null && ratio > 1.05 ? percent(1 - sent / dense, 1) + " saved" : ""]], Math.max(sent, dense), true)];
  }

  function draw() {
    const dead = view.shards.filter((s) => s.tone === "bad");
    fill(numbers, stats(
      stat("shards here", count(view.shards.filter((s) => s.state === "active" || s.state === "joined").length), `of ${count(view.shards.length)}`, dead.length ? `${dead.map((s) => s.member).slice(0, 3).join(", ")} lost` : ""),
      stat("parameters", bytes(sum((s) => s.parameter_bytes)), "", `${count(sum((s) => s.chunks))} chunks`),
      stat("balance", view.imbalance === null ? "–" : `${view.imbalance.toFixed(2)} ×`, "", "fullest against even"),
      stat("version", count(Math.max(0, ...view.shards.map((s) => s.version))), "", "newest"),
      stat("updates/s", short(Math.max(0, ...view.shards.map((s) => s.updates_per_s || 0)) || null), "", view.window_s && !view.whole ? `last ${duration(view.window_s)}` : ""),
      stat("waiting", count(sum((s) => s.parked + s.staged)), "", "pulls and pushes"),
      stat("refused", count(sum((s) => s.refused)), "", `${count(sum((s) => s.duplicates))} duplicates`)));
    const fullest = Math.max(1, ...view.shards.map((s) => s.parameter_bytes + s.optimizer_bytes + s.log_bytes));
    if (!view.shards.some((s) => s.parameter_bytes)) fill(balance, empty("No shard has told what it holds yet."));
    else {
      const rows = h("div", { class: `rows no-median${view.shards.length > 24 ? " dense" : ""}` });
      for (const s of view.shards) rows.append(
        h("span", { class: `name${s.tone === "bad" ? " t-bad" : ""}` }, s.tone === "bad" ? `✖ ${s.member}` : s.member),
        h("div", { class: "track" }, bar([
          ["parameters", s.parameter_bytes, `parameters: ${bytes(s.parameter_bytes)}`, bytes(s.parameter_bytes)],
          ["optimizer", s.optimizer_bytes, `optimizer state: ${bytes(s.optimizer_bytes)}`, bytes(s.optimizer_bytes)],
          ["pushlog", s.log_bytes, `push log: ${bytes(s.log_bytes)}`, bytes(s.log_bytes)]], fullest)),
        h("span", { class: "end" }, `${count(s.chunks)} chunks`));
      fill(balance, rows, legend(["parameters", "optimizer", ["pushlog", "push log"]]));
    }
    const [up, upDense, down, downDense] = [(s) => s.received_bytes, (s) => s.dense_received_bytes, (s) => s.sent_bytes, (s) => s.dense_sent_bytes].map(sum);
    fill(traffic, up + down > 0 ? [saving("gradients", up, upDense), saving("parameters", down, downDense)] : empty("Nothing has travelled yet."));
    flow.set(view.at, [
      { label: "gradients in", y: view.received_per_s, colour: "curve-1", width: 1.6 },
      { label: "parameters out", y: view.sent_per_s, colour: "curve-2", width: 1.6, dash: [5, 3] }]);
    queue.set(view.at, [{ label: "waiting", y: view.queue, colour: "curve-1", width: 1.6, fill: "shade" }]);
    list.set(view.shards);
  }

  async function refresh() { view = await ctx.get("shards"); draw(); }
  return { node, title: "Shards", watches: ["members"], ready: refresh, refresh, close() { flow.close(); queue.close(); } };
}
