// How pages get at a run: over HTTP with the token as a header, or out of the file that they are baked into.
//
// A stream is read by fetch and not by EventSource, which cannot send a header: so there is no cookie, and no other page
// can use what this one may see.

const baked = (() => {
  const element = document.getElementById("baked");
  return element === null ? null : JSON.parse(element.textContent);
})();

export const isFile = baked !== null;
const TOKEN = "zml-token";
export const token = {
  get: () => { try { return sessionStorage.getItem(TOKEN) || ""; } catch { return ""; } },
  set: (text) => { try { sessionStorage.setItem(TOKEN, text); } catch { /* then it is asked for again */ } },
};

export class Refused extends Error {
  constructor(status, detail, fix) {
    super(detail);
    this.status = status;
    this.fix = fix || "";
  }
}

const base = document.baseURI.replace(/[?#].*$/, "").replace(/[^/]*$/, "");

async function ask(path, about = {}) {
  const headers = { ...(about.headers || {}) };
  if (token.get()) headers.Authorization = `Bearer ${token.get()}`;
  let answer;
  try {
    answer = await fetch(base + path, { ...about, headers, credentials: "omit", cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, "the server does not answer");
  }
  if (!answer.ok) {
    const problem = await answer.json().catch(() => ({}));
    throw new Refused(answer.status, problem.detail || answer.statusText, problem.fix);
  }
  return answer;
}

// Everything here only reads: what got no answer is asked once more, for a connection may just have been closed.
async function read(path, about) {
  try {
    return await (await ask(path, about)).json();
  } catch (error) {
    if (!(error instanceof Refused) || error.status !== 0) throw error;
    await new Promise((go) => setTimeout(go, 250));
    return (await ask(path, about)).json();
  }
}

export async function get(path, query = {}, signal) {
  if (isFile) return fromFile(path, query);
  const asked = new URLSearchParams(Object.entries(query).filter(([, value]) => value !== undefined && value !== ""));
  return read(`view/${path}${String(asked) ? `?${asked}` : ""}`, { signal });
}

export async function logs(run, asked, signal) {
  if (isFile) return bakedLogs(asked);
  const body = JSON.stringify(asked);
  const headers = { "Content-Type": "application/json" };
  return read(`view/run/${encodeURIComponent(run)}/logs`, { method: "POST", body, headers, signal });
}

// A stream that says nothing for so long is taken for lost, for the server says every 15 s that it is there: else a
// connection whose other end is gone without a word would look alive for ever.
const SILENT_MS = 40000;

// Calls `tell(event, data)` for each event; begins again by itself, ever more slowly, until it is closed or over.
export function stream(path, tell, state) {
  let closed = false;
  let attempt = null;
  let wait = 400;
  (async () => {
    while (!closed) {
      attempt = new AbortController();
      const mine = attempt;
      let silence = 0;
      const heard = () => { clearTimeout(silence); silence = setTimeout(() => mine.abort(), SILENT_MS); };
      heard();
      try {
        const answer = await ask(`view/${path}`, { signal: attempt.signal });
        state("live");
        if (await follow(answer.body, () => { wait = 400; heard(); }, tell)) { state("over"); return; }
      } catch (error) {
        if (closed) return;
        if (error instanceof Refused && error.status === 401) { state("refused", error); return; }
      } finally {
        clearTimeout(silence);
        attempt.abort(); // else its connection would stay, and a browser has six of them
      }
      if (closed) return;
      state("lost");
      await new Promise((go) => setTimeout(go, wait * (0.7 + 0.6 * Math.random())));
      wait = Math.min(2 * wait, 5000);
    }
  })();
  return () => { closed = true; if (attempt) attempt.abort(); };
}

// True when the stream says that the run is over; false when it only ends.
async function follow(body, heard, tell) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return false;
    heard();
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const field = (name) => part.split("\n").find((line) => line.startsWith(name))?.slice(name.length);
      const [event, data] = [field("event: "), field("data: ")]; // not by a pattern: U+2028 in a text would end its line
      if (event === undefined || data === undefined) continue;
      if (event === "over") return true;
      try { tell(event, JSON.parse(data)); } catch (error) { console.error(error); } // ours, and not the network's
    }
  }
}

// -- out of the file --------------------------------------------------------------------------------------------

function fromFile(path, query) {
  if (path === "about") return baked.about;
  const page = path.split("/").pop();
  if (page === "steps" && query.clock !== undefined) {
    const steps = baked.waterfalls;
    const near = steps.reduce((best, each) =>
      Math.abs(each.clock - query.clock) < Math.abs(best.clock - query.clock) ? each : best, steps[0]);
    return { ...baked.views.steps, ...near };
  }
  if (page === "workers" && query.window === "all") return baked.views.workers_all || baked.views.workers;
  const found = baked.views[page];
  if (found === undefined) throw new Refused(404, "the file does not hold this page");
  return found;
}

const LEVELS = ["debug", "info", "warning", "error", "critical"];

function bakedLogs(asked) {
  const all = baked.views.logs;
  if (asked.cursor || asked.until) return { ...all, lines: [], complete: true };
  const text = (asked.text || "").toLowerCase();
  const lines = all.lines.filter((line) =>
    (!asked.members || !asked.members.length || asked.members.includes(line.member)) &&
    (!asked.level || LEVELS.indexOf(line.level) >= LEVELS.indexOf(asked.level)) &&
    (!text || [line.member, line.message, ...line.details, ...line.failure].join("\n").toLowerCase().includes(text)));
  return { ...all, lines, complete: true };
}
