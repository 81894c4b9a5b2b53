// The first page: how it is, what is wrong, how it goes.

import { fill, h, keep, refill, say } from "../dom.js";
import { ago, bytes, clock, count, duration, moment, number, percent, plural, seconds, short } from "../format.js";
import { chart, placeOf } from "../charts.js";
import { choice, legend, panel, phaseBar, PHASES, PHASE_SAYS, reading, saved, sign, stat, stats, times } from "../parts.js";

const WHERE = { workers: "Workers", shards: "Shards", data: "Data", checkpoints: "Checkpoints", logs: "Logs", events: "Events", steps: "Steps", overview: "below" };

export async function open(ctx) {
  const hero = h("section", { class: "panel hero" });
  const wrong = h("section", { class: "panel" });
  const numbers = h("div");
  const aside = h("div", { class: "stack w4" });
  const latest = h("section", { class: "panel" });
  const failure = h("div", { class: "stack" });
  const charts = h("div", { class: "stack w8" });
  const small = h("div", { class: "small" });
  const node = h("div", { class: "page" }, hero, wrong, failure, numbers,
    h("div", { class: "grid" }, charts, aside), latest);

  let axis = "step";
  let series = null;
  const drawn = new Map();

  const main = { name: "", plot: null };
  const mainRead = reading();
  let logarithmic = false;
  const mainBody = h("div");
  const names = h("select", { class: "field", "aria-label": "which value", onchange: (event) => { main.name = event.target.value; drawMain(); } });
  const mainTitle = h("h2", {}, "Loss");
  const logButton = h("button", { class: "button", type: "button", "aria-pressed": "false", onclick: () => {
    logarithmic = !logarithmic;
    logButton.setAttribute("aria-pressed", String(logarithmic));
    if (main.plot) { main.plot.close(); main.plot = null; }
    drawMain();
  } }, "log");
  charts.append(h("section", { class: "panel" },
    h("header", {}, mainTitle, mainRead, h("div", { class: "tools" },
      names, logButton, choice([["step", "steps"], ["at", "time"]], "step", (value) => { axis = value; redraw(); }, "axis"))),
    h("div", { class: "body" }, mainBody)), small);

  function lineOf(curve, name) {
    return [axis === "step" ? curve.step : curve.at, [{ label: name, y: curve.y, colour: "curve-1", width: 1.6, fill: "shade" }], marksOf(curve)];
  }

  function marksOf(curve) {
    return (series ? series.marks : []).map((mark) => ({
      tone: mark.tone,
      x: axis === "step" ? placeOf(mark.at, curve.at, curve.step) : mark.at,
    })).filter((mark) => mark.x !== null);
  }

  function drawMain() {
    if (!series) return;
    const curve = series.values.find((each) => each.name === main.name) || series.values[0];
    if (!curve) {
      mainTitle.textContent = "What the script logs";
      fill(mainBody, h("p", { class: "empty" }, "Nothing yet: `zml.log(loss=loss)` in the script draws a curve here."));
      return;
    }
    main.name = curve.name;
    mainTitle.textContent = curve.name;
    logButton.hidden = !curve.y.some((value) => value > 0) || curve.y.some((value) => value !== null && value <= 0);
    if (!main.plot) {
      main.plot = chart({ title: curve.name, height: 286, time: axis === "at", crosses: true, sync: "overview", read: mainRead, log: logarithmic && !logButton.hidden });
      fill(mainBody, main.plot.node);
    }
    const [x, lines] = lineOf(curve, curve.name);
    if (logarithmic) lines[0].fill = null;
    main.plot.set(x, lines, marksOf(curve));
  }

  function redraw() {
    if (!series) return;
    for (const each of drawn.values()) each.plot.close();
    drawn.clear();
    small.replaceChildren();
    if (main.plot) { main.plot.close(); main.plot = null; }
    draw();
  }

  function draw() {
    const options = series.values.map((each) => each.name);
    if ([...names.options].map((each) => each.value).join("\0") !== options.join("\0"))
      fill(names, options.map((name) => h("option", { value: name }, name)));
    if (ctx.query.value && options.includes(ctx.query.value) && !main.name) main.name = ctx.query.value;
    if (!options.includes(main.name)) main.name = options.includes("loss") ? "loss" : options[0];
    names.value = main.name;
    names.hidden = options.length < 2;
    drawMain();
    const more = [
      ["samples/s", series.samples_per_s, "rate", { zero: true }],
      ...series.values.filter((each) => each.name !== main.name).map((each) => [each.name, each, "number", { crosses: true }]),
      ["learning rate", series.learning_rate, "number", { step: true, zero: true }],
      ["staleness", series.staleness, "count", { step: true, zero: true }],
      ["workers that are here", series.workers, "count", { step: true, zero: true }],
    ].filter(([, curve]) => curve.y.some((value) => value !== null) || curve.y.length > 1 && series.values.includes(curve));
    for (const [title, curve, unit, about] of more) {
      if (!drawn.has(title)) {
        const read = reading();
        const plot = chart({ title, unit, height: 112, time: axis === "at", sync: "overview", read, ...about });
        small.append(panel(title, { read }, plot.node));
        drawn.set(title, { plot });
      }
      drawn.get(title).plot.set(...lineOf(curve, title));
    }
  }

  function update(view, changed) {
    if (changed.has("head") || changed.has("numbers")) drawHero(view), drawNumbers(view);
    if (changed.has("findings") || changed.has("members")) drawFindings(view);
    if (["members", "phases", "checkpoint", "data", "numbers"].some((field) => changed.has(field))) drawAside(view);
    if (changed.has("events")) drawEvents(view);
    if (changed.has("failures")) drawFailures(view);
  }

  function drawHero({ head, numbers: n, members }) {
    const workers = members.filter((each) => each.role === "worker");
    const here = workers.filter((each) => each.state === "active" || each.state === "joined").length;
    const epochs = n.epochs > 1 && n.epochs <= 60 ? Array.from({ length: n.epochs - 1 }, (_, at) => h("u", { style: { left: `${(100 * (at + 1)) / n.epochs}%` } })) : [];
    refill(hero, [head, n.progress, n.epochs, workers.length, here, members.length], () => [
      h("div", { class: "say" }, sign(head.tone), h("div", {},
        h("h1", {}, head.headline),
        head.because && h("p", { class: "because" }, head.because))),
      n.progress !== null && h("div", {
        class: `progress ${head.over ? head.tone : ""}`, role: "progressbar", "aria-valuenow": Math.round(100 * n.progress), "aria-valuemin": 0, "aria-valuemax": 100, "aria-label": "of the whole job",
      }, h("i", { style: { width: `${100 * n.progress}%` } }), epochs),
      h("div", { class: "facts" },
        h("span", {}, head.script),
        h("span", {}, head.mode),
        h("span", {}, head.over ? plural(workers.length, "worker") : `${count(here)} of ${plural(workers.length, "worker")} here`),
        h("span", {}, plural(members.length - workers.length, "shard")),
        head.began > 0 && h("span", {}, `began ${moment(head.began)}`),
        n.progress !== null && h("span", {}, `${percent(n.progress, n.progress < 0.995 ? 1 : 0)} done`),
        head.silent_s > 5 && h("span", { class: "t-warn" }, `last news ${duration(head.silent_s)} ago`),
        head.exit_code !== null && h("span", {}, `exit code ${head.exit_code}`)),
    ]);
  }

  function drawNumbers({ head, numbers: n }) {
    const [name, value] = Object.entries(n.values).find(([key]) => key === main.name) || Object.entries(n.values)[0] || [null, null];
    const less = saved(n.sent_bytes + n.received_bytes, n.dense_bytes);
    fill(numbers, stats(
      name !== null && stat(name, value === null ? "not finite" : number(value), "", "mean of workers"),
      stat("step", count(n.steps), "", n.epochs ? `epoch ${Math.min(n.epoch + 1, n.epochs)} of ${n.epochs}` : ""),
      stat("samples/s", short(n.samples_per_s), "", head.over ? "mean of the whole run" : n.peak_samples_per_s ? `best ${short(n.peak_samples_per_s)}` : ""),
      stat("step time", seconds(n.step_s), "", n.step_s === null ? "not told yet" : "median worker"),
      head.over ? stat("took", duration(n.elapsed_s), "", `${short(n.samples)} samples`)
        : stat("time left", n.eta_s === null ? "–" : duration(n.eta_s), "", `${duration(n.elapsed_s)} so far`),
      stat("staleness", count(n.staleness), n.staleness === 1 ? "step" : "steps", n.staleness_bound === null ? "not bound" : `bound ${n.staleness_bound}`),
      n.learning_rate !== null && stat("learning rate", number(n.learning_rate), "", "first group"),
      stat("traffic", bytes(n.sent_bytes + n.received_bytes), "", less === null || less < 1.05 ? "of workers" : `${times(less)} less`)));
  }

  const heard = h("span");
  const wrongTitle = h("h2");
  const list = h("div", { class: "findings", role: "status" });

  function drawFindings({ findings, members, head }) {
    const worst = findings.length ? findings[0].level : "";
    wrong.className = `panel ${worst === "note" ? "" : worst}`;
    const here = members.filter((each) => each.state === "active" || each.state === "joined");
    const silent_s = Math.max(0, ...here.map((each) => each.heard_s));
    say(heard, here.length && !head.over ? `All ${count(here.length)} members were heard within ${silent_s < 1 ? "a second" : duration(silent_s)}; ` : "");
    refill(wrong, [findings.length > 0, head.over, here.length > 0], () => (findings.length
      ? [h("header", {}, wrongTitle), h("div", { class: "flush" }, list)]
      : h("div", { class: "well" }, sign("good"), h("span", {}, h("b", { role: "status" }, "Nothing is wrong. "), heard,
        head.over ? "No straggler, no lost member, no value that is not finite."
          : here.length ? "no straggler, no starving loader, no value that is not finite." : ""))));
    const bad = findings.filter((each) => each.level !== "note").length;
    say(wrongTitle, bad ? `What is wrong (${bad})` : "Worth knowing");
    const seen = new Map(); // one member may have two of a kind: by its place among them
    const keyed = findings.map((each) => {
      const name = JSON.stringify([each.kind, each.member, each.level, each.page, each.query]);
      seen.set(name, (seen.get(name) || 0) + 1);
      return { ...each, key: `${name} ${seen.get(name)}` };
    });
    keep(list, keyed, (each) => each.key, finding, (made, each) => {
      say(made.querySelector(".what"), each.what);
      say(made.querySelector(".number"), each.number);
    });
  }

  function finding(each) {
    return h("a", { class: "finding", href: ctx.href(each.page, each.query) }, sign(each.level), h("span", { class: "what" }),
      h("span", { class: "end" }, h("span", { class: "number" }), h("span", { class: "where" }, `${WHERE[each.page] || each.page} →`)));
  }

  const phaseRoom = h("div");
  const memberRoom = h("div");
  const savedRoom = h("div");
  const savedAgo = h("span");
  const dataRoom = h("div");
  const dataTitle = h("h2");
  fill(aside, panel("Where the workers' time goes", {}, phaseRoom), panel("Members", {}, memberRoom), panel("Last checkpoint", {}, savedRoom),
    h("section", { class: "panel" }, h("header", {}, dataTitle), h("div", { class: "body" }, dataRoom)));

  function drawAside({ members, phases, checkpoint, data, head, numbers: n }) {
    const marks = members.map((each) => ({ ...each, heard_s: 0, steps: 0 }));
    const role = (name, title, page) => {
      const all = marks.filter((each) => each.role === name);
      return all.length ? [h("span", {}, title), h("div", { class: "marks" }, all.slice(0, 256).map((each) =>
        h("a", {
          class: `mark t-${each.tone}`, href: ctx.href(page, name === "worker" ? { worker: each.member } : {}),
          title: `${each.member}: ${each.state}${each.because ? `, ${each.because}` : ""}${each.node ? `, on ${each.node}` : ""}`,
        }, each.member, each.tone === "bad" ? " ✖" : each.incarnation > 1 ? "′" : "")))] : [];
    };
    refill(phaseRoom, phases, () => (PHASES.some((phase) => phases[phase])
      ? [phaseBar(phases), legend(PHASES, PHASE_SAYS)]
      : h("p", { class: "empty" }, "Not told yet.")));
    refill(memberRoom, marks, () => (marks.length
      ? h("div", { class: "roles" }, role("worker", "workers", "workers"), role("shard", "shards", "shards"))
      : h("p", { class: "empty" }, "Nobody has joined yet.")));
    say(savedAgo, head.over ? `, ${moment(checkpoint.at)}` : `, ${ago(checkpoint.at, Date.now() / 1000)}`);
    refill(savedRoom, checkpoint, () => (checkpoint.step >= 0 ? h("dl", { class: "pairs" },
      h("dt", {}, "step"), h("dd", {}, h("a", { href: ctx.href("checkpoints") }, count(checkpoint.step)), savedAgo),
      h("dt", {}, "size"), h("dd", {}, `${bytes(checkpoint.bytes)}, written in ${seconds(checkpoint.took_s)}`),
      h("dt", {}, "training stood"), h("dd", {}, seconds(checkpoint.held_s)))
      : h("p", { class: "hint" }, "None yet.")));
    say(dataTitle, `Data, epoch ${n.epoch + 1}`);
    const whole = Math.max(1, data.batches);
    const togo = Math.max(0, data.batches - data.committed - data.skipped - data.leased);
    refill(dataRoom, data, () => (data.batches ? [
      bar(data, whole, togo),
      h("p", { class: "hint" }, `${count(data.committed)} of ${plural(data.batches, "batch").replace("batchs", "batches")} applied, ${count(data.leased)} under way` +
        (data.reissued ? `, ${count(data.reissued)} given out again` : "") + (data.skipped ? `, ${count(data.skipped)} left out` : "")),
    ] : h("p", { class: "hint" }, "No epoch is open.")));
  }

  function bar(data, whole, togo) {
    const parts = [["committed", data.committed, "applied"], ["leased", data.leased, "under way"], ["skipped", data.skipped, "left out"], ["togo", togo, "to go"]];
    return h("div", { class: "bar tall" }, parts.filter(([, size]) => size > 0).map(([name, size, title]) =>
      h("i", { class: `p-${name}`, title: `${title}: ${count(size)}`, style: { width: `${(100 * size) / whole}%` } }, size / whole > 0.12 ? title : "")));
  }

  function drawEvents({ events }) {
    refill(latest, events, () => [h("header", {}, h("h2", {}, "Latest events"), h("span", { class: "read" }, h("a", { href: ctx.href("events") }, "all events →"))),
      h("div", { class: "flush list" }, events.length ? [...events].reverse().map((each) => h("div", { class: "event" },
        h("span", { class: "when", title: moment(each.at) }, clock(each.at)), sign(each.tone),
        h("span", {}, each.member && h("b", {}, `${each.member} `), each.what, each.because && h("span", { class: "because" }, `: ${each.because}`))))
        : h("p", { class: "empty" }, "Nothing has happened yet.")), h("div", { class: "body" })]);
  }

  function drawFailures({ failures }) {
    refill(failure, failures, () => failures.map((each, at) => panel(`${each.member}: ${each.kind}${at === 0 && failures.length > 1 ? " (the cause)" : ""}`, { tone: "bad" },
      h("div", {}, each.text),
      each.source.length > 0 && h("pre", { class: "source" }, each.source.map((line, row) => {
        const number = each.first_source_line + row;
        return h("div", { class: number === each.line ? "hit" : null }, `${number === each.line ? ">" : " "} ${String(number).padStart(4)}  ${line}`);
      })),
      h("p", { class: "hint" }, [each.file && `${each.file}:${each.line}`, each.step >= 0 && `step ${count(each.step)}`, each.batch].filter(Boolean).join(", "),
        " ", h("a", { href: ctx.href("logs", { member: each.member }) }, "its log →")))));
  }

  update(ctx.overview(), new Set(Object.keys(ctx.overview())));
  async function refresh() {
    series = await ctx.get("series");
    draw();
    drawNumbers(ctx.overview());
  }
  refresh().catch(ctx.failed);
  return {
    node,
    title: "Overview",
    watches: ["series"],
    refresh,
    update,
    close() { for (const each of drawn.values()) each.plot.close(); if (main.plot) main.plot.close(); },
  };
}
