// The frame: which run and which page, the theme, keys, and the stream that tells what changes.

import { fill, h, say } from "./dom.js";
import { get, isFile, Refused, stream, token } from "./api.js";
import { repaint } from "./charts.js";
import { percent } from "./format.js";
import { sign } from "./parts.js";
import { open as overview } from "./pages/overview.js";
import { open as workers } from "./pages/workers.js";
import { open as shards } from "./pages/shards.js";
import { open as data } from "./pages/data.js";
import { open as checkpoints } from "./pages/checkpoints.js";
import { open as logs } from "./pages/logs.js";
import { open as events } from "./pages/events.js";
import { open as steps } from "./pages/steps.js";
import { open as config } from "./pages/config.js";
import { open as runs } from "./pages/runs.js";
import { open as jobs } from "./pages/jobs.js";

const PAGES = { overview, workers, shards, data, checkpoints, logs, events, steps, config };
const TITLES = { overview: "Overview", workers: "Workers", shards: "Shards", data: "Data", checkpoints: "Checkpoints", logs: "Logs", events: "Events", steps: "Steps", config: "Config" };
const KEYS = { o: "overview", w: "workers", s: "shards", d: "data", c: "checkpoints", l: "logs", e: "events", t: "steps", i: "config" };
const AGAIN_MS = 2000;

const app = document.getElementById("app");
let about = null;
let view = null; // the newest overview of the run that is shown
let run = "";
let page = null;
let stop = null;
let turn = 0; // of what is shown: an answer for a former one is dropped
let state = isFile ? "file" : "wait";
const seen = {}; // the versions that the page has

// -- the frame ---------------------------------------------------------------------------------------------------

const nav = h("nav", { class: "nav", "aria-label": "pages", onscroll: () => nav.toggleAttribute("data-scrolled", nav.scrollLeft > 0) });
const which = h("div", { class: "which" });
const link = h("span", { class: "link-state", role: "status" });
const version = h("span", { class: "version" });
const theme = h("button", { class: "button", type: "button", onclick: turnTheme });
const main = h("main", { class: "main", tabindex: "-1" });
const banner = h("div", { class: "banner", role: "alert", hidden: true });
const brand = h("a", { class: "brand", href: "#/" }, logo(), h("span", {}, "zml"));
const frame = h("div", { class: "frame" }, h("aside", { class: "side" }, brand, which, nav,
  h("div", { class: "foot" }, link, h("div", { class: "row" }, version, theme))), main);

function logo() {
  const svg = (name, about) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(about)) made.setAttribute(key, value);
    return made;
  };
  const drawn = svg("svg", { viewBox: "0 0 32 32", "aria-hidden": "true" });
  drawn.append(svg("rect", { width: 32, height: 32, rx: 7, fill: "#23405f" }),
    svg("path", { d: "M9 9h14L9 23h14", fill: "none", stroke: "#f2c14e", "stroke-width": 3.4, "stroke-linecap": "round", "stroke-linejoin": "round" }));
  return drawn;
}

// -- theme -------------------------------------------------------------------------------------------------------

const dark = matchMedia("(prefers-color-scheme: dark)");
const remembered = () => { try { return localStorage.getItem("zml-theme"); } catch { return null; } };

function setTheme() {
  const now = remembered() || (dark.matches ? "dark" : "light");
  document.documentElement.dataset.theme = now;
  fill(theme, now === "dark" ? "☀" : "☾", h("span", { class: "words" }, now === "dark" ? " light" : " dark"));
  theme.setAttribute("aria-label", `change to the ${now === "dark" ? "light" : "dark"} theme`);
  repaint();
}

function turnTheme() {
  const next = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  try { localStorage.setItem("zml-theme", next); } catch { document.documentElement.dataset.theme = next; }
  setTheme();
}

dark.addEventListener("change", setTheme);

// -- where we are ------------------------------------------------------------------------------------------------

function where() {
  const [path, query] = location.hash.replace(/^#\/?/, "").split("?");
  const parts = path.split("/").map((part) => { try { return decodeURIComponent(part); } catch { return ""; } });
  return { run: parts[0] || "", page: parts[1] || "", query: Object.fromEntries(new URLSearchParams(query || "")) };
}

function to(name, target, query = {}) {
  const asked = new URLSearchParams(Object.entries(query).filter(([, value]) => value));
  return `#/${encodeURIComponent(name)}/${target}${String(asked) ? `?${asked}` : ""}`;
}

async function show() {
  const mine = ++turn;
  delete document.documentElement.dataset.shown;
  const asked = mine === 1 ? 0 : performance.now(); // the first time: since the browser was sent here
  const place = where();
  if (about.kind === "run") place.run = about.run;
  if (page) { page.close(); page = null; }
  if (place.run !== run) {
    if (stop) stop();
    stop = null;
    run = place.run;
    view = null;
    for (const key of Object.keys(seen)) delete seen[key];
  }
  try {
    if (run && view === null) {
      if (!main.firstChild) fill(main, h("p", { class: "empty" }, "Reading the run …"));
      view = await get(`run/${encodeURIComponent(run)}/overview`);
      if (mine !== turn) return;
      Object.assign(seen, view.versions);
      listen();
    }
    const opens = run ? PAGES[place.page] || overview : about.kind === "hub" ? jobs : runs;
    const name = run ? (PAGES[place.page] ? place.page : "overview") : "";
    drawNav(name);
    const opened = await opens(context(place, mine));
    if (mine !== turn) { opened.close(); return; }
    page = opened;
    page.name = name;
    fill(main, banner, page.node);
    if (page.ready) await page.ready();
    if (mine !== turn) return;
    drawTitle();
    main.scrollTop = 0;
    document.documentElement.dataset.shown = `${run}/${name}`;
    document.documentElement.dataset.took = String(Math.round(performance.now() - asked));
    if (page.every) repeat(page, mine);
  } catch (error) {
    if (mine === turn) failed(error);
  }
}

function context(place, mine) {
  return {
    run,
    query: place.query,
    overview: () => view,
    get: (what, query) => get(`run/${encodeURIComponent(run)}/${what}`, query),
    href: (target, query) => to(run, target, query),
    to,
    note(query) { // the address says what is shown, without another entry in the history
      const asked = new URLSearchParams(Object.entries(query).filter(([, value]) => value));
      history.replaceState(null, "", `${location.hash.split("?")[0] || "#/"}${String(asked) ? `?${asked}` : ""}`);
    },
    failed: (error) => { if (mine === turn) failed(error); },
  };
}

async function repeat(mine, at) {
  while (page === mine && at === turn) {
    await new Promise((go) => setTimeout(go, mine.every));
    if (page !== mine || document.hidden) continue;
    try { await mine.refresh(); setState("live"); } catch (error) { failed(error); }
  }
}

// -- what changes ------------------------------------------------------------------------------------------------

function listen() {
  if (isFile) { setState("file"); return; }
  if (view.head.over) { setState("over"); return; }
  const mine = run;
  stop = stream(`run/${encodeURIComponent(run)}/live`, (event, changes) => {
    if (run !== mine) return;
    const fields = new Set(Object.keys(changes));
    view = { ...view, ...changes };
    if (page && page.update) page.update(view, fields);
    if (fields.has("versions")) freshen();
    if (fields.has("head") || fields.has("findings") || fields.has("numbers")) { drawNav(page ? page.name : ""); drawTitle(); }
  }, (now, error) => {
    if (run !== mine) return;
    if (now === "refused") failed(error);
    else setState(now);
    if (now === "over") freshen(true);
  });
}

let timer = 0;
let refreshed = 0;

function freshen(all = false) {
  clearTimeout(timer);
  if (!page || !view || !page.watches) return;
  const behind = page.watches.filter((name) => seen[name] !== view.versions[name]);
  if (!behind.length && !all) return;
  const wait = page.quick ? 300 : page.slow || AGAIN_MS;
  timer = setTimeout(async () => {
    if (!page || !view || document.hidden) return;
    refreshed = Date.now();
    for (const name of behind) seen[name] = view.versions[name];
    try { await page.refresh(); } catch (error) { failed(error); }
  }, Math.max(0, wait - (Date.now() - refreshed)));
}

// A page that nobody sees holds no connection: a browser has six for one server, over all its tabs.
function sleep() {
  if (stop) stop();
  stop = null;
}

function wake() {
  if (document.hidden || !view || stop || !run || view.head.over) return;
  listen();
  freshen();
}

document.addEventListener("visibilitychange", () => (document.hidden ? sleep() : wake()));
window.addEventListener("pagehide", sleep);
window.addEventListener("pageshow", wake);

function setState(now) {
  state = now;
  document.documentElement.dataset.link = now;
  const [tone, text] = {
    live: ["good", "live"], over: ["quiet", "finished"], lost: ["warn", "reconnecting"], file: ["quiet", "a file"], wait: ["busy", "connecting"],
  }[now] || ["quiet", now];
  fill(link, sign(tone), h("span", { class: "words" }, text));
  banner.hidden = now !== "lost";
  if (now === "lost") { banner.className = "banner"; say(banner, "The server does not answer. What is shown is the last that was told; the page tries again by itself. When the run is over, `zml dashboard` shows it."); }
}

function failed(error) {
  if (error.name === "AbortError") return;
  if (error instanceof Refused && error.status === 401) { askForToken(error.message); return; }
  if (error instanceof Refused && error.status === 0) { setState("lost"); again(); return; }
  banner.className = "banner bad";
  banner.hidden = false;
  say(banner, `${error.message}.${error.fix ? ` ${error.fix}` : ""}`);
  if (!page) fill(main, banner);
  if (!(error instanceof Refused)) console.error(error);
}

function again() { // what is to be shown is not there yet: ask until it is
  const mine = turn;
  if (!document.documentElement.dataset.shown) setTimeout(() => { if (mine === turn) show(); }, 1500);
}

// -- drawing -----------------------------------------------------------------------------------------------------

function drawNav(name) {
  say(version, about.version ? `zml ${about.version}` : "");
  brand.href = about.kind === "run" ? to(run, "overview") : "#/";
  if (!run) {
    fill(which, h("b", {}, about.kind === "hub" ? "Jobs" : "Runs"), about.title);
    fill(nav, h("a", { href: "#/", "aria-current": "page" }, about.kind === "hub" ? "Jobs" : "Runs"));
    setState(state === "lost" ? "lost" : "live");
    return;
  }
  fill(which, h("b", {}, view.head.script), view.head.name);
  const wrong = { bad: 0, warn: 0 };
  for (const each of view.findings) if (each.level !== "note") wrong[each.level] += 1;
  const links = [];
  if (about.kind !== "run") links.push(h("a", { href: "#/" }, about.kind === "hub" ? "← Jobs" : "← Runs"));
  for (const key of Object.keys(PAGES)) {
    const here = view.findings.filter((each) => each.page === key && each.level !== "note");
    const level = key === "overview" ? (wrong.bad ? "bad" : wrong.warn ? "warn" : "") : here.some((each) => each.level === "bad") ? "bad" : here.length ? "warn" : "";
    const many = key === "overview" ? wrong.bad + wrong.warn : here.length;
    links.push(h("a", { href: to(run, key), "aria-current": key === name ? "page" : null }, TITLES[key], level && h("span", { class: `count t-${level}`, "aria-label": `${many} found` }, many)));
  }
  if (nav.dataset.said !== links.map((each) => each.outerHTML).join()) {
    const scroll = nav.scrollLeft;
    nav.dataset.said = links.map((each) => each.outerHTML).join();
    fill(nav, links);
    nav.scrollLeft = scroll;
    const current = nav.querySelector("[aria-current]");
    if (current && nav.scrollWidth > nav.clientWidth) nav.scrollLeft = leftOf(current);
  }
}

// From the start where the page's name can be seen from there, else with the name before it in front: no name is cut.
function leftOf(current) {
  const first = nav.firstChild.offsetLeft;
  if (current.offsetLeft + current.offsetWidth - first <= nav.clientWidth - 24) return 0;
  return (current.previousSibling || current).offsetLeft - first;
}

function drawTitle() {
  const at = page ? page.title : "";
  if (!run || !view) { document.title = `${at} · zml`; return; }
  const n = view.numbers;
  const mark = { bad: "✖ ", warn: "▲ " }[view.head.tone] || "";
  document.title = `${mark}${n.progress !== null ? `${percent(n.progress)} ` : ""}${view.head.script} · ${at} · zml`;
}

// Whatever asks by itself ends here: it would only be refused again, and the field is not to vanish while one types.
function askForToken(because) {
  if (app.querySelector(".gate")) return;
  turn += 1;
  clearTimeout(timer);
  sleep();
  view = null; // read again with the token, and listened to from there
  const field = h("input", { class: "field", type: "password", autocomplete: "off", "aria-label": "token", required: true });
  fill(app, h("div", { class: "gate" }, logo(), h("h1", {}, "This page needs a token"),
    h("p", { class: "hint" }, token.get() ? `${because}. ` : "", "It is in the file that the server was started with; it stays in this tab only."),
    h("form", { onsubmit: (event) => { event.preventDefault(); token.set(field.value.trim()); begin(); } }, field, h("button", { class: "button" }, "Open"))));
  document.documentElement.dataset.shown = "gate";
  field.focus();
}

// -- keys --------------------------------------------------------------------------------------------------------

const help = h("dialog", { class: "keys", "aria-label": "keys" }, h("h2", {}, "Keys"), h("dl", { class: "pairs" },
  Object.entries(KEYS).map(([key, name]) => [h("dt", {}, h("kbd", {}, key)), h("dd", {}, TITLES[name])]),
  [["/", "filter"], ["m", "dark or light"], ["?", "this"], ["Esc", "close"]].map(([key, text]) => [h("dt", {}, h("kbd", {}, key)), h("dd", {}, text)])));

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, select, textarea")) return;
  if (event.key === "?") { if (help.open) help.close(); else { document.body.append(help); help.showModal(); } }
  else if (event.key === "m") turnTheme();
  else if (event.key === "/" && page && page.focus) { event.preventDefault(); page.focus.focus(); }
  else if (KEYS[event.key] && run) location.hash = to(run, KEYS[event.key]);
});

async function begin() {
  fill(app, frame);
  setState(state);
  try {
    about = await get("about");
  } catch (error) {
    about = about || { kind: "runs", version: "", title: "" };
    failed(error);
    if (error instanceof Refused && error.status === 0) setTimeout(begin, 1500);
    return;
  }
  await show();
}

window.addEventListener("hashchange", show);
setTheme();
begin();
