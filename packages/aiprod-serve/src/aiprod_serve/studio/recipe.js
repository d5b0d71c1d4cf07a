// What a clip was made from, as its file carries it.

import { h } from "./dom.js";

// The settings of a recipe by name, as text; what is absent is left out.
export function settingsOf(recipe) {
  const settings = new Map([
    ["pipeline", recipe.pipeline],
    ["model", recipe.model?.name],
  ]);
  for (const [name, value] of Object.entries(recipe.request)) settings.set(name, textOf(value));
  return new Map([...settings].filter(([, text]) => text));
}

export function recipeDetails(recipe) {
  const copied = h("span", { class: "hint", role: "status" });
  const copy = h(
    "button",
    {
      type: "button",
      class: "quiet",
      onclick: async () => {
        await navigator.clipboard.writeText(JSON.stringify(recipe, null, 2));
        copied.textContent = "copied";
      },
    },
    "Copy as JSON",
  );
  return h(
    "details",
    { class: "more recipe" },
    h("summary", {}, "Recipe"),
    h(
      "p",
      { class: "hint" },
      "It is in the file too: ",
      h("code", {}, "aiprod replay"),
      " makes the same clip from it.",
    ),
    table(["Setting", "Value"], [...settingsOf(recipe)]),
    // Over plain HTTP from elsewhere, browsers have no clipboard to write to.
    navigator.clipboard ? h("div", { class: "row" }, copy, copied) : null,
  );
}

// The rows in which two recipes differ.
export function differences(a, b) {
  const [left, right] = [settingsOf(a), settingsOf(b)];
  const names = [...new Set([...left.keys(), ...right.keys()])];
  return names
    .map((name) => [name, left.get(name) ?? "", right.get(name) ?? ""])
    .filter(([, x, y]) => x !== y);
}

export function table(names, rows) {
  return h(
    "div",
    { class: "table", tabindex: 0, role: "region", "aria-label": names.join(", ") },
    h(
      "table",
      {},
      h(
        "thead",
        {},
        h(
          "tr",
          {},
          names.map((name) => h("th", { scope: "col" }, name)),
        ),
      ),
      h(
        "tbody",
        {},
        rows.map(([name, ...values]) =>
          h(
            "tr",
            {},
            h("th", { scope: "row" }, name),
            values.map((value) => h("td", {}, value)),
          ),
        ),
      ),
    ),
  );
}

function textOf(value) {
  if (value === null || value === "" || (Array.isArray(value) && !value.length)) return "";
  if (Array.isArray(value)) return value.map(textOf).join(", ");
  if (typeof value === "number")
    return String(Number.isInteger(value) ? value : Number(value.toFixed(4)));
  if (typeof value !== "object") return String(value);
  if ("path" in value) return value.path.split("/").at(-1); // of a file, its name is enough
  return Object.entries(value)
    .map(([name, part]) => `${name} ${part}`)
    .join(", ");
}
