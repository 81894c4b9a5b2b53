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

export async function get(path, query = {}, signal) {
  if (isFile) return fromFile(path, query);
  const asked = new URLSearchParams(Object.entries(query).filter(([, value]) => value !== undefined && value !== ""));
  return (await ask(`view/${path}${String(asked) ? `?${asked}` : ""}`, { signal })).json();
}

export async function logs(run, asked, signal) {
  if (isFile) return bakedLogs(asked);
  const body = JSON.stringify(asked);
  const headers = { "Content-Type": "application/json" };
  return (await ask(`view/run/${encodeURIComponent(run)}/logs`, { method: "POST", body, headers, signal })).json();
}

// Calls `tell(event, data)` for each event; begins again by itself, ever more slowly, until it is closed or over.
export function stream(path, tell, state) {
  const stop = new AbortController();
  let wait = 400;
  (async () => {
    while (!stop.signal.aborted) {
      try {
        const answer = await ask(`view/${path}`, { signal: stop.signal });
        state("live");
        const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
        let rest = "";
        for (;;) {
          const { value, done } = await reader.read();
          if (done) break;
          wait = 400;
          const parts = (rest + value).split("\n\n");
          rest = parts.pop();
          for (const part of parts) {
            const event = /^event: (.*)$/m.exec(part);
            const data = /^data: (.*)$/m.exec(part);
            if (event && data) {
              if (event[1] === "over") { state("over"); return; }
              tell(event[1], JSON.parse(data[1]));
            }
          }
        }
      } catch (error) {
        if (stop.signal.aborted) return;
        if (error instanceof Refused && error.status === 401) { state("refused", error); return; }
      }
      state("lost");
      await new Promise((go) => setTimeout(go, wait * (0.7 + 0.6 * Math.random())));
      wait = Math.min(2 * wait, 5000);
    }
  })();
  return () => stop.abort();
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
