// What can be resumed from.

import { fill, h } from "../dom.js";
import { ago, bytes, count, duration, moment, seconds } from "../format.js";
import { pill, stat, stats, table } from "../parts.js";

export async function open(ctx) {
  let view = null;
  const numbers = h("div");
  const place = h("p", { class: "hint" });
  const now = () => Date.now() / 1000;
  const at = (c) => (c.created ? Date.parse(c.created) / 1000 : null);
  const list = table([
    { title: "checkpoint", of: (c) => c.name, cell: (c) => h("span", {}, h("span", { class: "mono" }, c.name), c.newest && h("span", { class: "hint" }, "  newest")), class: "tight" },
    { title: "state", of: (c) => c.state, cell: (c) => h("span", {}, pill({ complete: "good", wrong: "bad", "being written": "busy" }[c.state], c.state === "wrong" ? "not usable" : c.state), c.wrong && h("span", { class: "hint" }, ` ${c.wrong}`)) },
    { title: "step", n: true, of: (c) => c.step },
    { title: "epoch", n: true, of: (c) => (c.epoch === null ? null : c.epoch + 1) },
    { title: "size", n: true, of: (c) => c.bytes, cell: (c) => bytes(c.bytes) },
    { title: "parameters", n: true, of: (c) => c.parameters },
    { title: "files", n: true, of: (c) => c.files },
    { title: "taken", of: (c) => at(c) || 0, cell: (c) => { const t = at(c); return t ? `${moment(t)}${ctx.overview().head.over ? "" : `, ${ago(t, now())}`}` : "–"; }, class: "tight" },
    { title: "because", of: (c) => c.because },
  ], { order: ["step", true], none: "None yet." });
  const node = h("div", { class: "page" }, h("div", { class: "title" }, h("h1", {}, "Checkpoints"), place), numbers,
    h("section", { class: "panel" }, h("div", { class: "flush" }, list.node)),
    h("p", { class: "hint" }, "Complete: the manifest is whole and every file has its size. `zml ckpt verify` reads every byte; `zml resume` goes on from the newest that verifies."));

  function draw() {
    const last = view.last;
    const sound = view.checkpoints.filter((c) => c.state === "complete");
    place.textContent = view.folder;
    fill(numbers, stats(
      stat("usable", count(sound.length), `of ${count(view.checkpoints.length)}`),
      stat("newest", last.step >= 0 ? count(last.step) : sound.length ? count(sound[sound.length - 1].step) : "none", "", "step"),
      stat("age", last.at && !ctx.overview().head.over ? duration(now() - last.at) : "–", "", [view.every_minutes > 0 && `every ${duration(60 * view.every_minutes)}`, view.every_steps > 0 && `every ${count(view.every_steps)} steps`].filter(Boolean).join(", ")),
      stat("size", last.bytes ? bytes(last.bytes) : "–", "", "newest"),
      stat("written in", last.at ? seconds(last.took_s) : "–", "", "newest"),
      stat("training stood", last.at ? seconds(last.held_s) : "–", "", "for the newest"),
      stat("failed", count(last.failed), "", last.because || `${count(last.taken)} taken`)));
    list.set(view.checkpoints);
  }

  async function refresh() { view = await ctx.get("checkpoints"); draw(); }
  return { node, title: "Checkpoints", watches: ["checkpoints"], ready: refresh, refresh, close() {} };
}
