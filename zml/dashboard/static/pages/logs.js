// What all processes say, merged by time: the newest first to be here, older ones as they are scrolled to. Only the rows
// that can be seen are in the page.

import { fill, h, later } from "../dom.js";
import { clock, count, millis, moment, plural } from "../format.js";
import { isFile, logs } from "../api.js";

const ROW = 22;
const PAGE = 600;
const MOST = 20000; // lines that are kept: what is beyond is asked for again when it is wanted

export async function open(ctx) {
  let lines = [];
  let cursor = "";
  let complete = false;
  let follow = true;
  let gap = false; // the newest lines are not here: nothing is put behind a hole, and to follow is to read anew
  let chosen = null;
  let asking = 0;
  let members = [];
  const wanted = { member: ctx.query.member || "", level: ctx.query.level || "", text: ctx.query.text || "" };

  const who = h("select", { class: "field", "aria-label": "member", onchange: () => changed({ member: who.value }) });
  const level = h("select", { class: "field", "aria-label": "level", onchange: () => changed({ level: level.value }) },
    [["", "every level"], ["info", "info and worse"], ["warning", "warning and worse"], ["error", "error and worse"]].map(([value, text]) => h("option", { value }, text)));
  level.value = wanted.level;
  const text = h("input", { class: "field grow", type: "search", placeholder: "text in any line", "aria-label": "text", value: wanted.text, oninput: later(250, () => changed({ text: text.value })) });
  const followButton = h("button", { class: "button", type: "button", "aria-pressed": "true", onclick: () => setFollow(!follow, true) }, "follow");
  followButton.hidden = isFile;
  const note = h("span", { class: "hint", role: "status" });
  const room = h("div", { class: "room" });
  const view = h("div", { class: "log", tabindex: "0", role: "log", "aria-label": "log lines", onscroll: scrolled, onkeydown: keyed }, room);
  const detail = h("div", { class: "detail", hidden: true });
  const node = h("div", { class: "page" }, h("div", { class: "title" }, h("h1", {}, "Logs"), note),
    h("section", { class: "panel" }, h("div", { class: "body tools" }, who, level, text, followButton), detail, view));

  function changed(what) {
    Object.assign(wanted, what);
    ctx.note(wanted);
    load().catch(ctx.failed);
  }

  const asked = (more) => ({ members: wanted.member ? [wanted.member] : [], level: wanted.level, text: wanted.text, most: PAGE, ...more });

  async function load() {
    const mine = ++asking;
    const page = await logs(ctx.run, asked({}));
    if (mine !== asking) return;
    lines = page.lines;
    cursor = page.cursor;
    complete = page.complete;
    gap = false;
    chosen = null;
    showDetail();
    setMembers(page.members);
    setFollow(true);
    draw();
  }

  function setMembers(names) {
    if (names.join() === members.join() && who.options.length) return;
    members = names;
    fill(who, h("option", { value: "" }, "all members"), names.map((name) => h("option", { value: name }, name)),
      wanted.member && !names.includes(wanted.member) && h("option", { value: wanted.member }, wanted.member));
    who.value = wanted.member;
  }

  let loading = false;
  async function older() {
    if (loading || complete || !lines.length || isFile) return;
    loading = true;
    const mine = asking;
    try {
      const page = await logs(ctx.run, asked({ until: lines[0].at }));
      if (mine !== asking) return;
      complete = page.lines.length === 0;
      lines = [...page.lines, ...lines];
      if (lines.length > MOST) { lines = lines.slice(0, MOST); gap = true; }
      if (chosen !== null) { chosen += page.lines.length; if (chosen >= lines.length) { chosen = null; showDetail(); } }
      view.scrollTop += page.lines.length * ROW;
      draw();
    } finally { loading = false; }
  }

  let behind = false;
  async function newer() {
    if (isFile || !cursor || behind || gap) return;
    behind = true;
    const mine = asking;
    try {
      for (let pages = 0; pages < 10; pages += 1) {
        const page = await logs(ctx.run, asked({ cursor }));
        if (mine !== asking || gap) return;
        if (!follow && lines.length + page.lines.length > MOST) { gap = true; draw(); return; }
        const moved = page.cursor !== cursor;
        cursor = page.cursor;
        setMembers(page.members);
        if (page.lines.length) {
          lines.push(...page.lines);
          const over = follow ? lines.length - MOST : 0;
          if (over > 0) { lines.splice(0, over); complete = false; if (chosen !== null) chosen = chosen >= over ? chosen - over : null; }
          draw();
        }
        if ((page.lines.length < PAGE && page.complete) || !moved) break;
      }
    } finally { behind = false; }
  }

  function setFollow(on, jump = false) {
    follow = on;
    followButton.setAttribute("aria-pressed", String(on));
    if (on && gap) load().catch(ctx.failed);
    else if (jump && on) draw();
  }

  function scrolled() {
    const end = view.scrollHeight - view.scrollTop - view.clientHeight;
    if (end > 3 * ROW && follow && !drawing) setFollow(false);
    else if (end < ROW && !follow && !gap) setFollow(true);
    paint();
    if (view.scrollTop < 20 * ROW) older().catch(ctx.failed);
  }

  let drawing = false;
  function draw() {
    drawing = true;
    room.style.setProperty("height", `${Math.max(1, lines.length) * ROW}px`);
    if (follow) view.scrollTop = view.scrollHeight;
    note.textContent = lines.length ? `${plural(lines.length, "line")}${complete ? "" : ", and older ones"}${gap ? "; newer lines: follow" : ""}` : "";
    paint();
    requestAnimationFrame(() => { drawing = false; });
  }

  function paint() {
    const first = Math.max(0, Math.floor(view.scrollTop / ROW) - 8);
    const last = Math.min(lines.length, Math.ceil((view.scrollTop + view.clientHeight) / ROW) + 8);
    const rows = [];
    for (let at = first; at < last; at += 1) {
      const line = lines[at];
      rows.push(h("div", { class: `l t-${line.level}${at === chosen ? " chosen" : ""}`, style: { top: `${at * ROW}px` }, onclick: () => choose(at) },
        h("span", { class: "when", title: moment(line.at) }, line.at > 0 && [clock(line.at), h("span", { class: "ms" }, millis(line.at))]),
        h("span", { class: "who" }, line.member), h("span", { class: "lvl" }, line.level),
        h("span", { class: "what" }, line.message, line.failure.length > 0 && `  ${line.failure[line.failure.length - 1]}`, line.details.length > 0 && h("span", { class: "more" }, `  ${line.details.join(" ")}`))));
    }
    if (!lines.length) rows.push(h("p", { class: "empty" }, wanted.member || wanted.level || wanted.text ? "No line is like this." : "Nobody has said anything yet."));
    fill(room, rows);
  }

  function choose(at) {
    chosen = chosen === at ? null : at;
    showDetail();
    paint();
  }

  function showDetail() {
    detail.hidden = chosen === null || !lines[chosen];
    if (detail.hidden) return;
    const line = lines[chosen];
    fill(detail, line.message, h("dl", {},
      h("dt", {}, "when"), h("dd", {}, line.at > 0 ? `${moment(line.at)}` : "unknown"),
      h("dt", {}, "who"), h("dd", {}, `${line.member}${line.role ? `, ${line.role}` : ""}${line.step !== null ? `, step ${count(line.step)}` : ""}`),
      line.details.map((each) => { const cut = each.indexOf("="); return [h("dt", {}, each.slice(0, cut)), h("dd", {}, each.slice(cut + 1))]; })),
    line.failure.length > 0 && h("pre", { class: "source" }, line.failure.join("\n")));
  }

  function keyed(event) {
    const move = { ArrowDown: 1, ArrowUp: -1, j: 1, k: -1 }[event.key];
    if (move === undefined || !lines.length) return;
    event.preventDefault();
    chosen = chosen === null ? lines.length - 1 : Math.max(0, Math.min(lines.length - 1, chosen + move));
    const top = chosen * ROW;
    if (top < view.scrollTop) view.scrollTop = top;
    if (top + ROW > view.scrollTop + view.clientHeight) view.scrollTop = top + ROW - view.clientHeight;
    showDetail();
    paint();
  }

  return { node, title: "Logs", watches: ["logs"], quick: true, ready: load, refresh: newer, focus: text, close() { asking += 1; } };
}
