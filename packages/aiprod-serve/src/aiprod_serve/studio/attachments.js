// Files that a clip goes by: images, one sound, one reference. Sent at once, shown before that.

import { $, announce, h, icon, iconButton, seconds } from "./dom.js";
import { upload } from "./api.js";
import { drawWave, readPeaks } from "./waveform.js";

const KIND_NAMES = {
  canny: "Edges",
  depth: "Depth",
  pose: "Pose",
  detailer: "Detail",
  reference: "As it is",
  "canny-made": "Edges, made",
  "depth-made": "Depth, made",
  "pose-made": "Pose, made",
};

const items = []; // {role, file, url, id, element, at, strength, kind}
let controls = [];

export function setControls(kinds) {
  controls = kinds;
  const input = $("reference-file"),
    hint = $("reference-hint");
  input.disabled = !kinds.length;
  $("reference-tile").classList.toggle("off", !kinds.length);
  hint.hidden = kinds.length > 0;
  hint.textContent = kinds.length
    ? ""
    : "References need an IC-LoRA beside the model; there is none.";
}

// The fields of a request that the files give. Throws an Error while one is on its way.
export function attachedFields(frameRate, numFrames, pipeline) {
  if (items.some((item) => !item.id))
    throw new Error("A file is still on its way; try again in a moment.");
  const fields = {};
  for (const { role, id, kind, at, strength } of items) {
    const file = { file_id: id };
    if (role === "image") {
      const frame = Math.min(numFrames - 1, Math.round(at * frameRate));
      const name = pipeline === "keyframes" ? "keyframes" : "images";
      fields[name] = [...(fields[name] ?? []), { file, frame, strength }];
    } else if (role === "audio") {
      fields.audio = file;
    } else {
      fields.controls = [{ kind, file, strength }];
    }
  }
  return fields;
}

export const hasReference = () => items.some((item) => item.role === "reference");

export function initAttachments(onchange) {
  for (const role of ["image", "audio", "reference"]) {
    const input = $(`${role}-file`),
      tile = $(`${role}-tile`);
    tile.prepend(icon({ image: "image", audio: "note", reference: "film" }[role]));
    input.addEventListener("change", () => {
      for (const file of input.files) add(role, file, onchange);
      input.value = "";
    });
    tile.addEventListener("dragover", (event) => {
      event.preventDefault();
      tile.classList.add("over");
    });
    tile.addEventListener("dragleave", () => tile.classList.remove("over"));
    tile.addEventListener("drop", (event) => {
      event.preventDefault();
      tile.classList.remove("over");
      if (!input.disabled) for (const file of event.dataTransfer.files) add(role, file, onchange);
    });
  }
  $("prompt").addEventListener("paste", (event) => {
    for (const file of event.clipboardData.files) {
      if (file.type.startsWith("image/")) add("image", file, onchange);
    }
  });
  // A file that misses its tile must not replace the page.
  for (const name of ["dragover", "drop"]) {
    document.addEventListener(name, (event) => event.preventDefault());
  }
}

async function add(role, file, onchange) {
  if (role !== "image") items.filter((item) => item.role === role).forEach(drop);
  const item = { role, url: URL.createObjectURL(file), at: 0, strength: 1, kind: controls[0] };
  const state = h("p", { class: "hint" }, "sending");
  item.element = h(
    "li",
    { class: "attachment" },
    await preview(role, file, item.url),
    h(
      "div",
      { class: "attachment-body" },
      h("p", { class: "attachment-name" }, file.name),
      state,
      options(item),
    ),
    iconButton("close", `Remove ${file.name}`, () => {
      drop(item);
      onchange();
      $(`${role}-file`).focus();
    }),
  );
  items.push(item);
  $("attachments").append(item.element);
  onchange();
  try {
    const { id, media } = await upload(file);
    item.id = id;
    const size = media.width ? `${media.width} x ${media.height}` : "";
    const length = media.duration_s ? seconds(media.duration_s) : "";
    state.textContent = [size, length].filter(Boolean).join(", ");
    announce(`${file.name} added`);
  } catch (error) {
    drop(item);
    $("composer-error").textContent = `${file.name}: ${error.message}`;
  }
  onchange();
}

function drop(item) {
  const index = items.indexOf(item);
  if (index < 0) return;
  items.splice(index, 1);
  item.element.remove();
  URL.revokeObjectURL(item.url);
}

function options(item) {
  const row = h("div", { class: "attachment-options" });
  const number = (label, name, max, step) =>
    h(
      "label",
      { class: "inline" },
      label,
      h("input", {
        type: "number",
        min: 0,
        max,
        step,
        value: item[name],
        onchange: (event) => (item[name] = Number(event.target.value)),
      }),
    );
  if (item.role === "reference") {
    row.append(
      h(
        "label",
        { class: "inline" },
        "Follow ",
        h(
          "select",
          { onchange: (event) => (item.kind = event.target.value) },
          controls.map((kind) => h("option", { value: kind }, KIND_NAMES[kind] ?? kind)),
        ),
      ),
    );
  }
  if (item.role === "image") row.append(number("At second ", "at", 60, 0.1));
  if (item.role !== "audio") row.append(number("Strength ", "strength", 1, 0.1));
  return row;
}

async function preview(role, file, url) {
  if (role === "audio") {
    const canvas = h("canvas", {
      class: "thumb",
      role: "img",
      "aria-label": `Waveform of ${file.name}`,
    });
    file
      .arrayBuffer()
      .then((bytes) => readPeaks(bytes, 80))
      .then((peaks) => {
        if (peaks) drawWave(canvas, peaks);
      });
    return canvas;
  }
  if (file.type.startsWith("video/")) {
    return h("video", {
      class: "thumb",
      src: url,
      muted: true,
      playsinline: true,
      preload: "auto",
      "aria-label": file.name,
    });
  }
  return h("img", { class: "thumb", src: url, alt: file.name });
}
