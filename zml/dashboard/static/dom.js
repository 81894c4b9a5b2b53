// Elements out of plain calls. Rule: whatever comes from a run goes in as text; there is no way here to write markup.

export function h(name, about = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(about)) {
    if (value === undefined || value === null || value === false) continue;
    if (key === "class") made.className = value;
    else if (key === "style") for (const [name, to] of Object.entries(value)) made.style.setProperty(name, to);
    else if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (key === "value" || key === "checked") made[key] = value;
    else made.setAttribute(key, value === true ? "" : String(value));
  }
  return put(made, ...children);
}

export function put(into, ...children) {
  for (const child of children.flat(4)) {
    if (child === null || child === undefined || child === false) continue;
    into.append(child instanceof Node ? child : String(child));
  }
  return into;
}

export function fill(into, ...children) {
  into.replaceChildren();
  return put(into, ...children);
}

// A section is made again only when what it shows has changed: else a click, the focus and a selection in it would be
// lost with every update, and a screen reader would say it again. `of` is all that `make` reads and that changes.
export function refill(into, of, make) {
  const now = JSON.stringify(of);
  if (into.madeOf === now) return;
  into.madeOf = now;
  fill(into, make());
}

// Only what differs is written: a screen reader and a selection stay where they are.
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

// The same list again, with as few changes as may be: keyed children are kept.
export function keep(into, items, key, make, update) {
  const there = into.kept || new Map();
  const now = new Map();
  let before = null;
  for (const item of items) {
    const name = key(item);
    let element = there.get(name);
    if (element === undefined) element = make(item);
    update(element, item);
    now.set(name, element);
    const place = before === null ? into.firstChild : before.nextSibling;
    if (place !== element) into.insertBefore(element, place);
    before = element;
  }
  for (const [name, element] of there) if (!now.has(name)) element.remove();
  into.kept = now;
}

export function later(wait, act) {
  let timer = 0;
  return (...values) => {
    clearTimeout(timer);
    timer = setTimeout(() => act(...values), wait);
  };
}
