// Charts: uPlot with our colours, a reading in words beside the title, events on the time axis, and a cross wherever a
// value was not finite. Colours are read from the style sheet when they are drawn, so that the theme can change.

import { h, say } from "./dom.js";
import { bytes, clock, count, day, number, seconds, short } from "./format.js";

const open = new Set();
const colours = new Map();

export function colour(name) {
  if (!colours.has(name)) colours.set(name, getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim());
  return colours.get(name);
}

export function repaint() {
  colours.clear();
  for (const chart of open) chart.redraw(false, true);
}

const AS = {
  number: (v) => number(v, 4),
  count,
  short,
  rate: (v) => `${short(v)}/s`,
  bytes: (v) => bytes(v),
  byterate: (v) => `${bytes(v)}/s`,
  seconds,
  share: (v) => `${(100 * v).toFixed(0)} %`,
};

function axes(unit, time, log) {
  const font = '11px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif';
  const common = {
    stroke: () => colour("faint"),
    font,
    grid: { stroke: () => colour("grid"), width: 1 },
    ticks: { show: false },
  };
  return [
    {
      ...common,
      space: 70,
      size: 24,
      gap: 4,
      grid: { show: false },
      values: time ? timeTicks : (_, ticks) => ticks.map((tick) => (tick === null || tick % 1 ? "" : short(tick))),
    },
    {
      ...common,
      size: (u, values) => 14 + 6.3 * Math.max(2, ...(values || []).map((value) => (value || "").length)),
      gap: 4,
      space: log ? 22 : 30,
      incrs: unit === "count" ? [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 1e4, 2e4, 5e4, 1e5, 1e6] : undefined,
      values: (_, ticks) => ticks.map((tick) => (tick === null ? "" : tickText(unit, tick))),
    },
  ];
}

function tickText(unit, tick) {
  if (unit === "number") return number(tick, 3);
  return (AS[unit] || AS.number)(tick);
}

function timeTicks(u, ticks) {
  const span = u.scales.x.max - u.scales.x.min;
  return ticks.map((tick) => {
    if (span > 3 * 86400) return day(tick).slice(5);
    const text = clock(tick);
    return span > 1200 ? text.slice(0, 5) : text;
  });
}

// `lines`: [{label, y, colour, width, dash, fill}]. Returns {node, set(x, lines), close()}.
export function chart({ title, unit = "number", height = 150, time = false, step = false, log = false, crosses = false,
  sync, read, marks, onpick, zero = false, tip }) {
  const room = h("div", { class: `chart${onpick ? " pick" : ""}`, role: "img" });
  let plot = null;
  let shape = "";
  let x = [];
  let lines = [];
  let marked = [];

  const data = () => [x, ...lines.map((line) => line.y)];

  function describe() {
    const first = lines[0];
    const values = first ? first.y.filter((value) => value !== null) : [];
    const last = values.length ? (AS[unit] || AS.number)(values[values.length - 1]) : "no value";
    room.setAttribute("aria-label", `${title}: ${last}${values.length > 1
      ? `, between ${(AS[unit] || AS.number)(Math.min(...values))} and ${(AS[unit] || AS.number)(Math.max(...values))}` : ""}`);
  }

  function reading() {
    if (!read) return;
    const at = plot && plot.cursor.idx !== null && plot.cursor.idx !== undefined ? plot.cursor.idx : x.length - 1;
    if (tip) return say(read, tip(at, plot && plot.cursor.idx != null) || "");
    if (at < 0) return say(read, "");
    const shown = lines.filter((line) => line.read !== false).slice(0, 4).map((line) => {
      const value = line.y[at];
      const text = value === null || value === undefined ? (crosses ? "not finite" : "–") : (AS[unit] || AS.number)(value);
      return lines.length > 1 && line.label ? `${line.label} ${text}` : text;
    });
    const where = plot && plot.cursor.idx !== null && plot.cursor.idx !== undefined
      ? `${time ? clock(x[at]) : `step ${count(x[at])}`}: ` : "";
    say(read, where + shown.join("  ·  "));
  }

  function build() {
    if (plot) { open.delete(plot); plot.destroy(); }
    const width = Math.max(120, room.clientWidth || 600);
    plot = new uPlot({
      width,
      height,
      padding: [8, 18, 0, 0],
      legend: { show: false },
      cursor: {
        y: false,
        points: { size: 7, width: 1.5, fill: (u, i) => colour(lines[i - 1] ? lines[i - 1].colour : "ink") },
        drag: { x: true, y: false, setScale: true },
        sync: sync ? { key: sync, setSeries: false } : undefined,
        focus: { prox: -1 },
      },
      scales: {
        x: { time: false },
        y: {
          distr: log ? 3 : 1,
          range: log ? undefined : (u, low, high) => {
            if (low === null || high === null) return [0, 1];
            if (zero) low = Math.min(0, low);
            if (low === high) return low === 0 ? [0, 1] : [Math.min(0, 2 * low), Math.max(0, 2 * high)];
            const room = 0.06 * (high - low);
            return [zero || (low >= 0 && low - room < 0) ? Math.min(0, low) : low - room, high + room];
          },
        },
      },
      axes: axes(unit, time, log),
      series: [
        {},
        ...lines.map((line) => ({
          label: line.label || title,
          stroke: () => colour(line.colour),
          width: line.width || 1.5,
          dash: line.dash,
          alpha: line.alpha === undefined ? 1 : line.alpha,
          fill: line.fill ? () => (line.fill === "solid" ? colour(line.colour) : colour("shade")) : undefined,
          paths: step ? uPlot.paths.stepped({ align: 1 }) : undefined,
          points: { show: x.length < 2 },
          spanGaps: false,
        })),
      ],
      hooks: {
        setCursor: [reading],
        draw: [drawMarks, drawCrosses],
      },
    }, data(), room);
    open.add(plot);
    if (onpick) plot.over.addEventListener("click", () => {
      if (plot.cursor.idx !== null && plot.cursor.idx !== undefined) onpick(x[plot.cursor.idx]);
    });
  }

  function drawCrosses(u) {
    if (!crosses) return;
    const { ctx, bbox } = u;
    ctx.save();
    ctx.strokeStyle = colour("bad");
    ctx.lineWidth = 1.6 * devicePixelRatio;
    let last = -99;
    for (let row = 0; row < x.length; row += 1) {
      if (lines[0].y[row] !== null) continue;
      const left = u.valToPos(x[row], "x", true);
      if (left - last < 7 * devicePixelRatio || left < bbox.left) continue;
      last = left;
      const [top, r] = [bbox.top + 7 * devicePixelRatio, 3.2 * devicePixelRatio];
      ctx.beginPath();
      ctx.moveTo(left - r, top - r); ctx.lineTo(left + r, top + r);
      ctx.moveTo(left + r, top - r); ctx.lineTo(left - r, top + r);
      ctx.stroke();
    }
    ctx.restore();
  }

  function drawMarks(u) {
    if (!marked.length) return;
    const { ctx, bbox } = u;
    ctx.save();
    ctx.lineWidth = devicePixelRatio;
    for (const mark of marked) {
      const left = Math.round(u.valToPos(mark.x, "x", true));
      if (left < bbox.left || left > bbox.left + bbox.width) continue;
      ctx.strokeStyle = colour(mark.tone);
      ctx.globalAlpha = 0.5;
      ctx.setLineDash([2 * devicePixelRatio, 3 * devicePixelRatio]);
      ctx.beginPath();
      ctx.moveTo(left, bbox.top);
      ctx.lineTo(left, bbox.top + bbox.height);
      ctx.stroke();
      ctx.setLineDash([]);
      ctx.globalAlpha = 1;
      ctx.fillStyle = colour(mark.tone);
      ctx.beginPath();
      ctx.moveTo(left - 4 * devicePixelRatio, bbox.top + bbox.height);
      ctx.lineTo(left + 4 * devicePixelRatio, bbox.top + bbox.height);
      ctx.lineTo(left, bbox.top + bbox.height - 6 * devicePixelRatio);
      ctx.fill();
    }
    ctx.restore();
  }

  const watch = new ResizeObserver(() => {
    if (!plot || !room.clientWidth) { if (x.length && room.clientWidth) build(); return; }
    if (Math.abs(plot.width - room.clientWidth) > 1) plot.setSize({ width: room.clientWidth, height });
  });
  watch.observe(room);

  return {
    node: room,
    set(newX, newLines, newMarks) {
      x = newX;
      lines = newLines;
      marked = newMarks || marks || [];
      const wanted = lines.map((line) => [line.label, line.colour, line.width, line.alpha, line.fill].join()).join("|") + (x.length < 2);
      describe();
      if (!room.isConnected || !room.clientWidth) { shape = ""; }
      if (plot && wanted === shape) {
        const zoomed = plot.scales.x.min > plot.data[0][0] || plot.scales.x.max < plot.data[0][plot.data[0].length - 1];
        plot.setData(data(), !zoomed);
      } else if (room.clientWidth) {
        shape = wanted;
        build();
      }
      reading();
    },
    log(on) { log = on; if (x.length) build(); },
    close() {
      watch.disconnect();
      if (plot) { open.delete(plot); plot.destroy(); plot = null; }
    },
  };
}

// Where on the axis of steps a moment lies.
export function placeOf(at, times, steps) {
  if (!times.length || at < times[0]) return null;
  let [low, high] = [0, times.length - 1];
  if (at >= times[high]) return steps[high];
  while (high - low > 1) {
    const half = (low + high) >> 1;
    if (times[half] <= at) low = half; else high = half;
  }
  const share = times[high] > times[low] ? (at - times[low]) / (times[high] - times[low]) : 0;
  return steps[low] + share * (steps[high] - steps[low]);
}
