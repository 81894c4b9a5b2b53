// Numbers, sizes and times as people read them, with their units.

const whole = new Intl.NumberFormat("en-US", { maximumFractionDigits: 0 });

export const count = (n) => (n === null || n === undefined ? "–" : whole.format(n));

export function number(n, digits = 4) {
  if (n === null || n === undefined || !Number.isFinite(n)) return "not finite";
  if (n === 0) return "0";
  const size = Math.abs(n);
  if (size >= 1e6 || size < 1e-3) return n.toExponential(digits - 2).replace(/\.?0+e/, "e").replace("e+", "e");
  if (size >= 1000) return whole.format(n);
  return String(Number(n.toPrecision(digits)));
}

export function short(n) {
  if (n === null || n === undefined) return "–";
  for (const [size, unit] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e4, "k"]])
    if (Math.abs(n) >= size) return `${Number((n / (unit === "k" ? 1e3 : size)).toPrecision(3))} ${unit}`;
  return Math.abs(n) >= 100 ? whole.format(n) : number(n, 3);
}

export function bytes(n) {
  if (n === null || n === undefined) return "–";
  if (n < 1000) return `${whole.format(n)} B`;
  for (const [size, unit] of [[1e15, "PB"], [1e12, "TB"], [1e9, "GB"], [1e6, "MB"], [1e3, "kB"]])
    if (n >= size) return `${Number((n / size).toPrecision(3))} ${unit}`;
}

export function seconds(s) {
  if (s === null || s === undefined) return "–";
  if (s === 0) return "0 s";
  if (s < 0.001) return `${Number((s * 1e6).toPrecision(3))} µs`;
  if (s < 1) return `${Number((s * 1e3).toPrecision(3))} ms`;
  return `${Number(s.toPrecision(3))} s`;
}

export function duration(s) {
  if (s === null || s === undefined) return "–";
  const all = Math.max(0, Math.round(s));
  if (all < 60) return `${all} s`;
  const [d, hh, m] = [Math.floor(all / 86400), Math.floor(all / 3600) % 24, Math.floor(all / 60) % 60];
  if (d) return `${d} d ${hh} h`;
  if (hh) return `${hh} h ${m} min`;
  return all < 600 ? `${m} min ${all % 60} s` : `${m} min`;
}

export const percent = (x, digits = 0) => (x === null || x === undefined ? "–" : `${(100 * x).toFixed(digits)} %`);

const two = (n) => String(n).padStart(2, "0");

export function clock(at) {
  const t = new Date(1000 * at);
  return `${two(t.getHours())}:${two(t.getMinutes())}:${two(t.getSeconds())}`;
}

export function millis(at) {
  return `.${String(Math.floor(1000 * (at % 1))).padStart(3, "0")}`;
}

export function day(at) {
  const t = new Date(1000 * at);
  return `${t.getFullYear()}-${two(t.getMonth() + 1)}-${two(t.getDate())}`;
}

export const moment = (at) => (at ? `${day(at)} ${clock(at)}` : "–");

export function ago(at, now) {
  return at ? `${duration(now - at)} ago` : "–";
}

export const cut = (text, most) => (text.length > most ? `${text.slice(0, most - 1)}…` : text);

export const plural = (n, noun) => `${count(n)} ${noun}${n === 1 ? "" : "s"}`;
