// The form: what a new clip is asked for with. Its choices are those that the server has.

import { $, announce, h, once, randomSeed } from "./dom.js";
import { create } from "./api.js";
import { attachedFields, hasReference, initAttachments, setControls } from "./attachments.js";
import { add } from "./library.js";

const DRAFT = "aiprod.prompt";
const USUAL_PRESET = "standard";
const SHAPES = [
  ["wide", 16, 9],
  ["classic", 3, 2],
  ["square", 1, 1],
  ["upright", 2, 3],
  ["tall", 9, 16],
];
const NEEDS_A_CLIP = "source"; // pipelines that need one are for the stage

let choices = null;
let tellOffered;
const offered = new Promise((resolve) => (tellOffered = resolve)); // once there are choices
let preset = null; // one of choices.presets
let wantedSize = ""; // of a clip that is edited; the grid may not offer it

export function initComposer() {
  $("prompt").value = sessionStorage.getItem(DRAFT) ?? "";
  $("prompt").addEventListener("input", () => sessionStorage.setItem(DRAFT, $("prompt").value));
  $("composer").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("composer").requestSubmit();
  });
  $("composer").addEventListener("submit", submit);
  $("length").addEventListener("input", showLength);
  $("pipeline").addEventListener("change", showWay);
  initAttachments(showWay);
}

export function fillPrompt(text) {
  $("prompt").value = text;
  sessionStorage.setItem(DRAFT, text);
  $("prompt").focus();
}

// Offers what a model can do; `choices` is the answer of /v1/models/MODEL/choices.
export function offer(given) {
  choices = given;
  preset = choices.presets.find(({ name }) => name === USUAL_PRESET) ?? choices.presets[0] ?? null;
  $("presets").hidden = !preset;
  $("preset-row").replaceChildren(
    ...choices.presets.map(({ name }) =>
      h(
        "label",
        { class: "segment" },
        h("input", {
          type: "radio",
          name: "preset",
          value: name,
          checked: name === preset.name,
          onchange: () => {
            preset = choices.presets.find((other) => other.name === name);
            $("pipeline").value = "";
            showWay();
          },
        }),
        h("span", {}, name),
      ),
    ),
  );
  const pipelines = choices.pipelines.filter(
    ({ name, needs }) => !needs.includes(NEEDS_A_CLIP) && name !== "ic-lora",
  );
  $("pipeline").replaceChildren(
    h("option", { value: "" }, "as the quality says"),
    ...pipelines.map(({ name }) => h("option", { value: name }, name)),
  );
  $("camera-field").hidden = !choices.camera_motions.length;
  $("camera").replaceChildren(
    h("option", { value: "" }, "as it comes"),
    ...choices.camera_motions.map((name) =>
      h("option", { value: name }, name.replaceAll("-", " ")),
    ),
  );
  setControls(choices.controls);
  const usual_s = choices.num_frames / choices.frame_rate;
  const most_s = Math.min(choices.limits.max_clip_s, Math.max(4 * usual_s, 10));
  $("length").max = Math.floor((most_s * choices.frame_rate - 1) / choices.grid_frames);
  $("length").value = (choices.num_frames - 1) / choices.grid_frames;
  $("length").disabled = false;
  $("prompt").maxLength = choices.limits.max_prompt_chars;
  $("steps").max = choices.limits.max_steps;
  $("silent").closest("label").hidden = $("audio-tile").hidden = !choices.has_audio;
  showLength();
  showWay();
  tellOffered();
}

// Puts a clip's prompt and settings into the form; its files stay with it.
export function editRecipe(clip, { pipeline, request }) {
  fillPrompt(request.prompt);
  $("seed").value = String(request.seed);
  $("steps").value = request.num_inference_steps;
  $("negative").value = request.negative_prompt ?? "";
  $("audio-prompt").value = request.audio_prompt ?? "";
  $("cfg-video").value = request.cfg_scale?.video ?? "";
  $("cfg-audio").value = request.cfg_scale?.audio ?? "";
  $("enlarge").value = String(request.enlarge);
  $("silent").checked = !request.generate_audio;
  $("length").value = (request.num_frames - 1) / choices.grid_frames;
  const isOffered = [...$("pipeline").options].some(({ value }) => value === pipeline);
  $("pipeline").value = isOffered ? pipeline : "";
  wantedSize = `${request.width}x${request.height}`;
  document.querySelector(".composer .more").open = true;
  showLength();
  showWay();
  announce("The settings of the clip are in the form");
}

function numFrames() {
  return Number($("length").value) * choices.grid_frames + 1;
}

function showLength() {
  const length = `${(numFrames() / choices.frame_rate).toFixed(1)} s`;
  $("length-text").textContent = length;
  $("length").setAttribute("aria-valuetext", `${length}, ${numFrames()} frames`);
}

// The pipeline, picture and steps that the form stands for now.
function way() {
  const name = hasReference() ? "ic-lora" : $("pipeline").value;
  const pipeline = choices.pipelines.find((other) => other.name === name);
  if (pipeline)
    return { settings: { pipeline: name }, frame: pipeline.frame, summary: pipeline.summary };
  return preset ?? { settings: {}, frame: choices.pipelines[0].frame, summary: "" };
}

function showWay() {
  if (!choices) return; // shown when they come
  const { frame, summary, settings } = way();
  const isPreset = way() === preset;
  for (const input of $("preset-row").querySelectorAll("input"))
    input.checked = isPreset && input.value === preset.name;
  $("preset-summary").textContent = isPreset
    ? summary
    : `Set by the pipeline ${settings.pipeline}.`;
  $("pipeline-summary").textContent = isPreset ? "" : summary;
  $("pipeline").disabled = hasReference();
  $("steps").placeholder = frame.num_inference_steps;
  $("cfg-video").placeholder = choices.cfg_scale.video;
  $("cfg-audio").placeholder = choices.cfg_scale.audio;
  showSizes(frame);
}

function showSizes(frame) {
  const area = frame.width * frame.height;
  const usual = `${frame.width}x${frame.height}`;
  const sizes = new Map([[usual, "usual"]]);
  for (const [name, across, down] of SHAPES) {
    const width =
      Math.max(1, Math.round(Math.sqrt((area * across) / down) / frame.grid_width)) *
      frame.grid_width;
    const height =
      Math.max(1, Math.round(Math.sqrt((area * down) / across) / frame.grid_height)) *
      frame.grid_height;
    if (!sizes.has(`${width}x${height}`)) sizes.set(`${width}x${height}`, name);
  }
  const chosen = wantedSize || $("size").value;
  if (wantedSize && !sizes.has(wantedSize)) sizes.set(wantedSize, "as the clip");
  wantedSize = "";
  $("size").replaceChildren(
    ...[...sizes].map(([size, name]) =>
      h("option", { value: size }, `${size.replace("x", " x ")}, ${name}`),
    ),
  );
  $("size").value = sizes.has(chosen) ? chosen : usual;
}

function readForm() {
  const { settings } = way();
  const text = (id) => $(id).value.trim() || undefined;
  const number = (id) => ($(id).value === "" ? undefined : Number($(id).value));
  const [width, height] = $("size").value.split("x").map(Number);
  const video = number("cfg-video"),
    audio = number("cfg-audio");
  const isGuided = video !== undefined || audio !== undefined;
  return {
    ...settings,
    model: choices.model,
    prompt: $("prompt").value.trim(),
    num_frames: numFrames(),
    ...(settings.pipeline !== "text-to-audio" && { width, height }),
    camera_motion: text("camera"),
    audio_prompt: text("audio-prompt"),
    negative_prompt: text("negative"),
    num_inference_steps: number("steps") ?? settings.num_inference_steps,
    cfg_scale: isGuided
      ? { video: video ?? choices.cfg_scale.video, audio: audio ?? choices.cfg_scale.audio }
      : undefined,
    enlarge: Number($("enlarge").value) === 1 ? undefined : Number($("enlarge").value),
    generate_audio: $("silent").checked ? false : undefined,
    ...attachedFields(choices.frame_rate, numFrames(), settings.pipeline),
  };
}

function submit(event) {
  event.preventDefault();
  once($("generate"), $("composer-error"), async () => {
    await offered; // whoever is faster than the server waits
    const body = readForm();
    const count = Number($("takes").value);
    const given = $("seed").value.trim();
    let first = null;
    for (let take = 0; take < count; take++) {
      const seed = given ? String(BigInt(given) + BigInt(take)) : randomSeed();
      const made = await create({ ...body, seed });
      add(made);
      first ??= made.id;
    }
    announce(count > 1 ? `${count} takes are queued` : "The clip is queued");
    location.hash = first;
  });
}
