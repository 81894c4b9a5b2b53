// Where each worker's time goes: the picture that finds a straggler and a starving loader.

import { fill, h } from "../dom.js";
import { bytes, count, duration, number, percent, seconds, short } from "../format.js";
import { chart } from "../charts.js";
import { bar, choice, empty, legend, panel, phaseParts, PHASES, PHASE_SAYS, pill, reading, saved, stat, stats, table, times } from "../parts.js";

function gpu(w) {
  const said = [w.gpu_utilization !== null && percent(w.gpu_utilization), w.gpu_memory_used !== null && bytes(w.gpu_memory_used),
    w.gpu_power_w !== null && `${number(w.gpu_power_w, 3)} W`].filter(Boolean);
  return said.join(", ") || "–";
}

export async function open(ctx) {
  let window = ctx.query.window || "lately";
  let order = "name";
  let scale = "seconds";
  let chosen = ctx.query.worker || "";
  let view = null;

  const numbers = h("div");
  const picture = h("div");
  const note = h("span", { class: "read" });
  const stepRead = reading();
  const stepPlot = chart({ title: "step time", unit: "seconds", height: 190, time: true, sync: "workers", read: stepRead, zero: true, tip: stepTip });
  const phaseRead = reading();
  const phasePlot = chart({ title: "phases", unit: "seconds", height: 190, time: true, sync: "workers", read: phaseRead, zero: true, tip: phaseTip });

  const columns = [
    { title: "worker", of: (w) => w.member, cell: (w) => h("a", { href: ctx.href("workers", { worker: w.member }) }, w.member) },
    { title: "state", of: (w) => w.state, cell: (w) => h("span", { title: w.because || null }, pill(w.tone, w.straggler ? `straggler: ${w.why_slow}` : w.state), w.tone === "bad" && w.because ? h("span", { class: "hint" }, ` ${w.because}`) : "") },
    { title: "step", n: true, of: (w) => (w.steps < 0 ? null : w.steps) },
    { title: "step time", n: true, of: (w) => w.step_s, cell: (w) => seconds(w.step_s), about: "mean" },
    { title: "work", n: true, of: (w) => w.busy_s, cell: (w) => seconds(w.busy_s), about: "of a step, all but waiting" },
    { title: "× median", n: true, of: (w) => w.ratio, cell: (w) => (w.ratio === null ? "–" : w.ratio.toFixed(2)), about: "its work against the median of all" },
    { title: "data", n: true, of: (w) => w.phases.data ?? null, cell: (w) => (w.step_s ? percent((w.phases.data || 0) / w.step_s) : "–"), about: PHASE_SAYS.data },
    { title: "wait", n: true, of: (w) => w.phases.wait ?? null, cell: (w) => (w.step_s ? percent((w.phases.wait || 0) / w.step_s) : "–"), about: PHASE_SAYS.wait },
    { title: "samples/s", n: true, of: (w) => w.samples_per_s, cell: (w) => short(w.samples_per_s) },
    { title: "stale", n: true, of: (w) => w.staleness, about: "steps ahead of the slowest" },
    { title: "sent", n: true, of: (w) => w.sent_bytes, cell: (w) => bytes(w.sent_bytes) },
    { title: "less", n: true, of: (w) => saved(w.sent_bytes + w.received_bytes, w.dense_bytes), cell: (w) => times(saved(w.sent_bytes + w.received_bytes, w.dense_bytes)), about: "what compression saved, both ways" },
    { title: "left out", n: true, of: (w) => w.left_out, cell: (w) => (w.left_out ? h("b", { class: "t-bad" }, count(w.left_out)) : "0"), about: "steps whose gradient was not finite" },
    { title: "memory", n: true, of: (w) => w.memory_bytes, cell: (w) => (w.memory_bytes ? bytes(w.memory_bytes) : "–") },
    { title: "GPU", n: true, of: (w) => w.gpu_utilization, cell: gpu, about: "how busy, memory used, power" },
    { title: "where", of: (w) => w.node, cell: (w) => `${w.node || "–"} ${w.device}`, class: "tight" },
    { title: "starts", n: true, of: (w) => w.incarnation },
    { title: "heard", n: true, of: (w) => w.heard_s, cell: (w) => (w.heard_s < 0 ? "never" : w.heard_s < 1 ? "now" : `${duration(w.heard_s)} ago`) },
  ];
  const list = table(columns, { chosen: (w) => w.member === chosen, onrow: (w) => pick(w.member), none: "No worker has joined yet." });

  const node = h("div", { class: "page" },
    h("div", { class: "title" }, h("h1", {}, "Workers"), h("div", { class: "tools" },
      choice([["lately", "lately"], ["all", "since its start"]], window, (value) => { window = value; refresh().catch(ctx.failed); }, "of which time"))),
    numbers,
    h("section", { class: "panel" },
      h("header", {}, h("h2", {}, "A step of each worker"), note, h("div", { class: "tools" },
        choice([["name", "by name"], ["slow", "slowest first"]], order, (value) => { order = value; drawPicture(); }, "order"),
        choice([["seconds", "time"], ["share", "share"]], scale, (value) => { scale = value; drawPicture(); }, "scale"))),
      h("div", { class: "body" }, picture)),
    h("div", { class: "grid" },
      panel("Step time of every worker", { read: stepRead, wide: "w6" }, stepPlot.node),
      panel("Where the time of a step went", { read: phaseRead, wide: "w6" }, phasePlot.node, legend(PHASES, PHASE_SAYS))),
    h("section", { class: "panel" }, h("div", { class: "flush" }, list.node)));

  function pick(member) {
    chosen = chosen === member ? "" : member;
    ctx.note({ worker: chosen, window: window === "all" ? "all" : "" });
    draw();
  }

  function drawNumbers() {
    const there = view.workers.filter((w) => w.step_s !== null);
    const slow = view.workers.filter((w) => w.straggler);
    const here = view.workers.filter((w) => w.state === "active" || w.state === "joined").length;
    const share = (phase) => {
      const whole = there.reduce((sum, w) => sum + w.step_s, 0);
      return whole ? there.reduce((sum, w) => sum + (w.phases[phase] || 0), 0) / whole : null;
    };
    const rate = there.reduce((sum, w) => sum + (w.samples_per_s || 0), 0);
    const gpus = view.workers.filter((w) => w.gpu_utilization !== null);
    fill(numbers, stats(
      stat("workers here", count(here), `of ${count(view.workers.length)}`),
      stat("step time", seconds(view.median_step_s), "", "median"),
      stat("work in it", seconds(view.median_busy_s), "", "without waiting"),
      stat("stragglers", count(slow.length), "", slow.length ? slow.slice(0, 3).map((w) => w.member).join(", ") : "none"),
      stat("wait for data", percent(share("data")), "", "of all workers' time"),
      stat("wait for others", percent(share("wait")), "", "of all workers' time"),
      stat("samples/s", there.length ? short(rate) : "–", "", "all together"),
      gpus.length > 0 && stat("GPUs busy", percent(gpus.reduce((sum, w) => sum + w.gpu_utilization, 0) / gpus.length), "", "mean")));
  }

  function drawPicture() {
    const there = view.workers.filter((w) => w.step_s !== null);
    note.textContent = view.whole ? (view.workers.some((w) => w.incarnation > 1) ? "mean since each worker's last start" : "mean of the whole run") : view.window_s ? `mean of the last ${duration(view.window_s)}` : "";
    if (!there.length) { fill(picture, empty("No worker has told where its time goes yet.")); return; }
    const shown = order === "slow" ? [...there].sort((a, b) => b.busy_s - a.busy_s) : there;
    const longest = Math.max(...there.map((w) => w.step_s));
    const rows = h("div", { class: `rows${there.length > 24 ? " dense" : ""}${scale === "share" ? " no-median" : ""}` });
    if (scale === "seconds" && view.median_busy_s !== null) rows.style.setProperty("--median", `${(100 * view.median_busy_s) / longest}%`);
    for (const w of shown) {
      const whole = scale === "share" ? w.step_s : longest;
      const tone = w.straggler || w.tone === "bad" ? w.tone : "";
      rows.append(
        h("a", { class: `name${tone ? ` t-${tone}` : ""}${w.member === chosen ? " chosen" : ""}`, href: ctx.href("workers", { worker: w.member }), title: w.straggler ? `straggler: ${w.why_slow}` : null }, w.straggler ? `▲ ${w.member}` : w.member),
        h("div", { class: "track" }, bar(phaseParts(w.phases), whole)),
        h("span", { class: "end" }, w.straggler ? h("b", { class: `t-${tone}` }, `${w.ratio.toFixed(1)} × ${w.why_slow}`) : seconds(w.busy_s)));
    }
    fill(picture, rows,
      scale === "seconds" && h("div", { class: "scale" }, h("span", {}, "0"), h("span", {}, "dashed: the median's work"), h("span", {}, seconds(longest))),
      legend(PHASES, PHASE_SAYS));
  }

  const bright = () => view.workers.filter((w) => w.member === chosen || (!chosen && w.straggler)).map((w) => w.member).slice(0, 3);

  function drawCurves() {
    const names = Object.keys(view.step_s);
    const marked = bright();
    const lines = names.filter((name) => !marked.includes(name)).map((name) => ({ label: name, y: view.step_s[name], colour: "faint", width: 1, alpha: names.length > 16 ? 0.28 : 0.5 }));
    marked.forEach((name, at) => lines.push({ label: name, y: view.step_s[name], colour: ["curve-2", "curve-4", "curve-3"][at], width: 2 }));
    stepPlot.set(view.at, lines.length ? lines : [{ label: "", y: [], colour: "faint" }]);
    let below = view.at.map(() => 0);
    const stacked = [];
    for (const phase of PHASES) {
      below = below.map((value, at) => (value === null || view.phases[phase][at] === null ? null : value + view.phases[phase][at]));
      stacked.push({ label: phase, y: below, colour: phase, width: 1, fill: "solid" });
    }
    phasePlot.set(view.at, stacked.reverse());
  }

  function stepTip(at, hovered) {
    if (!view || at < 0) return "";
    const values = Object.values(view.step_s).map((y) => y[at]).filter((value) => value !== null && value !== undefined).sort((a, b) => a - b);
    if (!values.length) return "";
    const middle = values[Math.floor(values.length / 2)];
    const said = [`median ${seconds(middle)}`, `slowest ${seconds(values[values.length - 1])}`, ...bright().map((name) => `${name} ${seconds(view.step_s[name][at])}`)];
    return said.slice(0, hovered ? 4 : 3).join("  ·  ");
  }

  function phaseTip(at) {
    if (!view || at < 0 || !view.at.length) return "";
    return PHASES.filter((phase) => view.phases[phase][at]).map((phase) => `${phase} ${seconds(view.phases[phase][at])}`).slice(0, 4).join("  ·  ");
  }

  function draw() { drawNumbers(); drawPicture(); drawCurves(); list.set(view.workers); }

  async function refresh() {
    view = await ctx.get("workers", { window: window === "all" ? "all" : "" });
    draw();
  }
  return { node, title: "Workers", watches: ["members"], ready: refresh, refresh, close() { stepPlot.close(); phasePlot.close(); } };
}
