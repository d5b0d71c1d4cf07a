// Elements, icons and announcements: what every part of the page uses.

export const $ = (id) => document.getElementById(id);

// h("button", {class: "quiet", onclick: f, disabled: false}, "text", child)
export function h(tag, props = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "value") element.value = value;
    else element.setAttribute(name, value === true && !name.startsWith("aria-") ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

const PATHS = {
  play: "M7 4.500v15l12.500-7.500z",
  pause: "M7 4.500h3.500v15H7zM13.500 4.500H17v15h-3.500z",
  loop: "M4 12a6 6 0 0 1 6-6h7M14 3l3 3-3 3M20 12a6 6 0 0 1-6 6H7M10 21l-3-3 3-3",
  sound:
    "M4 9.500v5h3.500L12 18.500v-13L7.500 9.500zM15 9c1.400 1.700 1.400 4.300 0 6M17.800 6.500c2.800 3.200 2.800 7.800 0 11",
  muted: "M4 9.500v5h3.500L12 18.500v-13L7.500 9.500zM16 9.500l5 5M21 9.500l-5 5",
  full: "M4 9V4h5M15 4h5v5M20 15v5h-5M9 20H4v-5",
  image: "M4 5.500h16v13H4zM4 16l4.500-4.500 3.500 3.500 3-3 5 5M15.500 9.500h.01",
  note: "M9 18V6l10-2v12M9 18a2.500 2.500 0 1 1-5 0 2.500 2.500 0 0 1 5 0zM19 16a2.500 2.500 0 1 1-5 0 2.500 2.500 0 0 1 5 0z",
  film: "M4 5h16v14H4zM8 5v14M16 5v14M4 9.700h4M4 14.300h4M16 9.700h4M16 14.300h4",
  close: "M6 6l12 12M18 6L6 18",
  alert: "M12 8v5M12 16.500h.01M12 3.500l9.500 16.500h-19z",
};
const FILLED = new Set(["play", "pause"]);

export function icon(name) {
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("class", FILLED.has(name) ? "icon filled" : "icon");
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS(space, "path");
  path.setAttribute("d", PATHS[name]);
  svg.append(path);
  return svg;
}

export function iconButton(name, label, onclick, props = {}) {
  return h(
    "button",
    { type: "button", class: "icon-button", "aria-label": label, title: label, onclick, ...props },
    icon(name),
  );
}

export function setIcon(button, name, label) {
  if (button.dataset.icon === name) return;
  button.dataset.icon = name;
  button.replaceChildren(icon(name));
  button.setAttribute("aria-label", label);
  button.title = label;
}

// A row of radio buttons that looks like one control; onchange gets the value.
export function segments(name, label, options, chosen, onchange) {
  const row = h("div", { class: "segment-row" });
  for (const [value, text] of options) {
    row.append(
      h(
        "label",
        { class: "segment" },
        h("input", {
          type: "radio",
          name,
          value,
          checked: value === chosen,
          onchange: () => onchange(value),
        }),
        h("span", {}, text),
      ),
    );
  }
  return h("fieldset", { class: "segments" }, h("legend", { class: "hidden" }, label), row);
}

// Spoken by screen readers, once each.
export function announce(text) {
  $("announcer").textContent = text;
}

export const isCalm = () => matchMedia("(prefers-reduced-motion: reduce)").matches;

// Runs what a button is for, not twice at a time, and tells an error in `errors`. The button is not
// disabled meanwhile, for it would lose the focus.
export async function once(button, errors, work) {
  if (button.ariaBusy === "true") return;
  button.ariaBusy = "true";
  errors.textContent = "";
  try {
    await work();
  } catch (error) {
    errors.textContent = error.message;
  }
  button.ariaBusy = "false";
}

// Begins to play; that a pause or a removal came first is no failure.
export function play(video) {
  video.play().catch((error) => {
    if (error.name !== "AbortError") throw error;
  });
}

export function seconds(value) {
  return `${value.toFixed(2)} s`;
}

export function since(unixTime) {
  const passed = Math.max(0, Date.now() / 1000 - unixTime);
  const steps = [
    [60, 1, "just now"],
    [3600, 60, "min"],
    [86400, 3600, "h"],
    [Infinity, 86400, "d"],
  ];
  const [, unit, text] = steps.find(([below]) => passed < below);
  return unit === 1 ? text : `${Math.floor(passed / unit)} ${text} ago`;
}

export function randomSeed() {
  return crypto.getRandomValues(new Uint32Array(1))[0] >>> 1;
}
