// The chosen clip, large: while it is made, when it plays, and what can be made from it.

import { $, announce, h, iconButton, once, randomSeed, seconds, segments, since } from "./dom.js";
import { blob, call, create, json } from "./api.js";
import {
  add,
  clips,
  family,
  isActive,
  isSound,
  library,
  prefer,
  previews,
  remove,
  stageText,
} from "./library.js";
import { still } from "./gallery.js";
import { createPlayer } from "./player.js";
import { recipeDetails } from "./recipe.js";
import { createTimeline } from "./timeline.js";

let shown = null; // {id, status}: what the stage was built for
let building = null; // aborts what is still being fetched for it
let edit = null; // puts a recipe into the composer

export function initStage(onedit) {
  edit = onedit;
  library.addEventListener("change", update);
  library.addEventListener("preview", update);
}

export function showClip(id, hasFocus) {
  prefer(id);
  shown = null;
  update(id);
  if (!hasFocus || !clips.has(id)) return;
  $("stage").scrollIntoView({ block: "start" });
  $("stage-title").focus({ preventScroll: true });
}

export function hideStage() {
  building?.abort();
  shown = null;
  prefer(null);
  $("stage").hidden = true;
  $("stage").replaceChildren();
}

function update(idOrEvent) {
  const id = typeof idOrEvent === "string" ? idOrEvent : shown?.id;
  const clip = clips.get(id);
  if (id && !clip && shown) location.hash = ""; // it was removed
  if (!clip) return;
  const kind = isActive(clip) ? "making" : clip.status;
  if (shown?.id !== id || shown.kind !== kind) {
    // Whoever watched the making stays on the clip; whoever is elsewhere is not moved.
    const hadFocus = $("stage").contains(document.activeElement) && shown?.id === id;
    building?.abort();
    building = new AbortController();
    shown = { id, kind };
    $("stage").hidden = false;
    $("stage").replaceChildren(...head(clip));
    if (kind === "making") buildMaking(clip);
    else if (kind === "completed") buildFinished(clip, building.signal);
    else buildEnded(clip);
    if (hadFocus) $("stage-title").focus({ preventScroll: true });
  }
  if (kind === "making") showMaking(clip);
  showTakes(clip);
}

function head(clip) {
  return [
    h(
      "div",
      { class: "stage-head" },
      h("h2", { id: "stage-title", tabindex: -1 }, clip.prompt),
      iconButton("close", "Close the clip", () => {
        location.hash = "";
        $("clips-title").focus();
      }),
    ),
  ];
}

// While it is made.

function buildMaking(clip) {
  const [width, height] = clip.size.split("x").map(Number);
  const screen = h(
    "div",
    { class: "screen developing" },
    h("div", { class: "making" }),
    h("img", { id: "preview", alt: "Preview of the clip", hidden: true, width, height }),
  );
  const error = h("p", { class: "error", role: "alert" });
  const cancel = h(
    "button",
    {
      type: "button",
      class: "quiet",
      onclick: () =>
        once(cancel, error, () => call(`/v1/videos/${clip.id}/cancel`, { method: "POST" })),
    },
    "Cancel",
  );
  $("stage").append(
    screen,
    h(
      "div",
      { class: "making-state" },
      h(
        "div",
        { class: "making-text" },
        h("span", { id: "making-stage" }),
        h("span", { id: "making-percent", class: "clock" }),
      ),
      h("progress", { id: "making-progress", max: 100, "aria-labelledby": "making-stage" }),
      cancel,
    ),
    error,
    facts(clip),
  );
}

function showMaking(clip) {
  $("making-stage").textContent = stageText(clip);
  const bar = $("making-progress");
  if (clip.status === "queued") bar.removeAttribute("value");
  else bar.value = clip.progress;
  $("making-percent").textContent = clip.status === "queued" ? "" : `${clip.progress} %`;
  const preview = previews.get(clip.id);
  if (preview && $("preview").src !== preview) {
    $("preview").src = preview;
    $("preview").hidden = false;
  }
}

function buildEnded(clip) {
  const text =
    clip.status === "failed" ? (clip.error?.message ?? "It failed.") : "This clip was cancelled.";
  $("stage").append(h("p", { class: "ended" }, text), facts(clip), actions(clip, null), takes());
}

// When it is finished.

async function buildFinished(clip, signal) {
  const stage = $("stage");
  const duration = Number(clip.seconds);
  const [recipe, data, poster] = await Promise.all([
    json(`/v1/videos/${clip.id}/recipe`, { signal }),
    blob(`/v1/videos/${clip.id}/content`, signal),
    still(clip.id),
  ]).catch((error) => {
    if (!signal.aborted) stage.append(h("p", { class: "error" }, error.message));
    return [];
  });
  if (signal.aborted || !data) return;
  const url = URL.createObjectURL(data);
  signal.addEventListener("abort", () => URL.revokeObjectURL(url));

  const request = recipe.request;
  const hasPicture = !isSound(clip);
  const retake = hasPicture ? retakeForm(clip, request) : null;
  const timeline = createTimeline({
    duration,
    fps: request.frame_rate,
    hasPicture,
    onseek: (time) => player.seek(time),
    onspan: (span) => retake?.show(span),
  });
  const player = createPlayer({
    url,
    poster: poster ?? undefined,
    hasPicture,
    label: clip.prompt,
    duration,
    ontime: timeline.setTime,
  });
  retake?.connect(timeline, player);
  stage.append(
    player.screen,
    player.transport,
    timeline.element,
    ...(retake ? [retake.element] : []),
    actions(clip, recipe, url),
    facts(clip),
    takes(),
    recipeDetails(recipe),
  );
  showTakes(clip);
  timeline.setSound(data);
  if (hasPicture) {
    const sheet = await blob(`/v1/videos/${clip.id}/content?variant=spritesheet`, signal).catch(
      () => null,
    );
    const [width, height] = clip.size.split("x").map(Number);
    if (sheet && !signal.aborted) timeline.setSheet(sheet, width, height, request.num_frames);
  }
}

function retakeForm(clip, request) {
  const parts = request.generate_audio
    ? [
        ["both", "Picture and sound"],
        ["video", "Picture"],
        ["audio", "Sound"],
      ]
    : [["video", "Picture"]];
  let span = null,
    timeline = null,
    modality = parts[0][0];
  const hint = h(
    "p",
    { class: "hint" },
    "Drag across the timeline to make a span anew, or ",
    h(
      "button",
      {
        type: "button",
        class: "link",
        onclick: () => {
          const third = Number(clip.seconds) / 3;
          timeline.setSpan(
            [third, 2 * third].map(
              (time) => Math.round(time * request.frame_rate) / request.frame_rate,
            ),
          );
        },
      },
      "choose one here",
    ),
    ".",
  );
  const title = h("p", { class: "span-text" });
  const prompt = h("input", {
    type: "text",
    id: "retake-prompt",
    autocomplete: "off",
    required: true,
    value: clip.prompt,
  });
  const error = h("p", { class: "error", role: "alert" });
  const submit = h("button", { type: "submit", class: "primary" }, "Retake");
  const form = h(
    "form",
    {
      class: "retake",
      hidden: true,
      "aria-label": "Retake the span",
      onsubmit: (event) => {
        event.preventDefault();
        once(submit, error, async () => {
          const made = await create({
            prompt: prompt.value,
            model: clip.model,
            pipeline: "retake",
            source: { video_id: clip.id },
            start_time: span[0],
            end_time: span[1],
            modality,
            seed: randomSeed(),
          });
          add(made);
          location.hash = made.id;
        });
      },
    },
    h(
      "div",
      { class: "retake-head" },
      title,
      segments("retake-part", "What is made anew", parts, modality, (value) => (modality = value)),
    ),
    h(
      "div",
      { class: "field" },
      h("label", { for: "retake-prompt" }, "What happens there"),
      prompt,
    ),
    error,
    h(
      "div",
      { class: "row" },
      submit,
      h(
        "button",
        { type: "button", class: "quiet", onclick: () => timeline.setSpan(null) },
        "Leave the span",
      ),
    ),
  );

  return {
    element: h("div", { class: "retake-box" }, hint, form),
    connect: (line) => (timeline = line),
    show(next) {
      span = next;
      form.hidden = !span;
      hint.hidden = span !== null;
      if (span) title.textContent = `${span[0].toFixed(2)} to ${seconds(span[1])}`;
    },
  };
}

// What can be done with it.

function actions(clip, recipe, url) {
  const error = h("p", { class: "error", role: "alert" });
  const button = (text, title, onclick) =>
    h(
      "button",
      {
        type: "button",
        class: "quiet",
        title,
        onclick: ({ currentTarget }) => once(currentTarget, error, () => onclick(currentTarget)),
      },
      text,
    );
  const open = (made) => {
    add(made);
    location.hash = made.id;
  };
  const row = h(
    "div",
    { class: "actions", role: "group", "aria-label": "With this clip" },
    button("Re-roll", "The same request with a new seed", async () =>
      open(
        await json(`/v1/videos/${clip.id}/remix`, {
          method: "POST",
          body: { prompt: clip.prompt, seed: randomSeed() },
        }),
      ),
    ),
    recipe &&
      h(
        "a",
        { class: "button quiet", href: `#compare=${clip.id}`, title: "Beside another take" },
        "Compare",
      ),
    recipe && !isSound(clip)
      ? button("Make longer", "Go on where it ends", async () =>
          open(
            await create({
              prompt: clip.prompt,
              model: clip.model,
              pipeline: "extend",
              source: { video_id: clip.id },
              seed: randomSeed(),
            }),
          ),
        )
      : null,
    recipe && button("Edit", "Put its prompt and settings into the form", () => edit(clip, recipe)),
    url && h("a", { class: "button quiet", href: url, download: `${clip.id}.mp4` }, "Download"),
    button("Delete", "Remove the clip for good", async (target) => {
      if (target.dataset.sure) {
        await call(`/v1/videos/${clip.id}`, { method: "DELETE" });
        location.hash = "";
        remove(clip.id);
        announce("The clip is deleted");
        $("clips-title").focus();
        return;
      }
      target.dataset.sure = "yes";
      target.textContent = "Delete for good?";
      target.onblur = () => {
        delete target.dataset.sure;
        target.textContent = "Delete";
      };
    }),
  );
  return h("div", {}, row, error);
}

function facts(clip) {
  const pairs = [
    ["Size", clip.size.replace("x", " x ")],
    ["Length", seconds(Number(clip.seconds))],
    ["Seed", String(clip.seed)],
    ["Pipeline", clip.pipeline],
    ["Model", clip.model],
  ];
  if (clip.timings.total) pairs.push(["Made in", seconds(clip.timings.total)]);
  return h(
    "dl",
    { class: "facts" },
    pairs.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))),
  );
}

const takes = () => h("div", { id: "takes-row", class: "takes-row", hidden: true });

// Other takes of the same clip, as small stills.
function showTakes(clip) {
  const row = $("takes-row");
  if (!row) return;
  const all = family(clip.id);
  const told = all.map((take) => take.id + take.status).join();
  row.hidden = all.length < 2;
  if (row.dataset.told === told) return;
  row.dataset.told = told;
  row.replaceChildren(
    h("h3", {}, "Takes"),
    h(
      "ul",
      {},
      all.map((take, index) => {
        const picture = h("span", { class: "take-picture" });
        if (take.status === "completed") {
          still(take.id).then((url) => url && picture.append(h("img", { src: url, alt: "" })));
        }
        return h(
          "li",
          {},
          h(
            "a",
            {
              href: `#${take.id}`,
              "aria-current": take.id === clip.id ? "true" : null,
              title: `Seed ${take.seed}, ${since(take.created_at)}`,
            },
            picture,
            `Take ${index + 1}`,
          ),
        );
      }),
    ),
  );
}
