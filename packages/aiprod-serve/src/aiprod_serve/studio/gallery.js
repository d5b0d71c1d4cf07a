// The clips as cards: a still that plays under the pointer, and where a clip in the making stands.

import { $, h, icon, isCalm, play, since } from "./dom.js";
import { blob } from "./api.js";
import {
  clips,
  isActive,
  isSound,
  library,
  order,
  previews,
  server,
  showOlder,
  stageText,
} from "./library.js";

const HOVER_MS = 250;

const cards = new Map(); // by id: {element, update}
const stills = new Map(); // by id: a promise of the URL of a thumbnail, or of null

// The thumbnail of a finished clip as a URL; null for one without a picture, and while it cannot
// be had: then the next call tries again.
export function still(id) {
  if (isSound(clips.get(id))) return Promise.resolve(null);
  if (!stills.has(id)) {
    stills.set(
      id,
      blob(`/v1/videos/${id}/content?variant=thumbnail`).then(
        (data) => URL.createObjectURL(data),
        () => {
          stills.delete(id);
          return null;
        },
      ),
    );
  }
  return stills.get(id);
}

export function initGallery(examples, onexample) {
  $("show-more").onclick = showOlder;
  for (const text of examples) {
    $("examples").append(
      h("button", { type: "button", class: "example", onclick: () => onexample(text) }, text),
    );
  }
  library.addEventListener("change", showAll);
  library.addEventListener("preview", ({ detail }) => cards.get(detail)?.update());
}

export function markChosen(ids) {
  for (const [id, { link }] of cards) {
    if (ids.includes(id)) link.setAttribute("aria-current", "true");
    else link.removeAttribute("aria-current");
  }
}

function showAll() {
  const list = $("gallery");
  for (const [id, { element }] of cards) {
    if (clips.has(id)) continue;
    element.remove();
    cards.delete(id);
    stills.get(id)?.then((url) => url && URL.revokeObjectURL(url));
    stills.delete(id);
  }
  order.forEach((id, index) => {
    if (!cards.has(id)) cards.set(id, createCard(id));
    const { element, update } = cards.get(id);
    update();
    if (list.children[index] !== element) list.insertBefore(element, list.children[index] ?? null);
  });
  const isKnown = server.state === "ready" || server.state === "idle";
  $("empty").hidden = order.length > 0 || !isKnown;
  $("show-more").hidden = !server.hasOlder;
  $("clips-count").textContent = order.length
    ? `${order.length}${server.hasOlder ? " newest" : ""}`
    : "";
}

function createCard(id) {
  const picture = h("div", { class: "card-picture" });
  const title = h("span", { class: "card-title" });
  const facts = h("span", { class: "card-facts" });
  const link = h("a", { class: "card-link", href: `#${id}` }, picture, title, facts);
  const element = h("li", { class: "card-item" }, link);
  let told = "";

  function update() {
    const clip = clips.get(id);
    if (!clip) return;
    const state = [
      clip.status,
      clip.progress,
      clip.stage,
      previews.get(id)?.length,
      since(clip.created_at),
      clip.status === "queued" ? stageText(clip) : "",
    ].join();
    if (state === told) return;
    const wasActive = !told || told.startsWith("queued") || told.startsWith("in_progress");
    told = state;
    element.dataset.status = clip.status;
    title.textContent = clip.prompt;
    facts.replaceChildren(...factsOf(clip));
    if (isActive(clip)) showMaking(picture, clip);
    else if (wasActive) {
      showFinished(picture, clip).then((isThere) => {
        if (!isThere) told = "";
      });
    }
  }
  playUnderPointer(link, picture, id);
  return { element, link, update };
}

function factsOf(clip) {
  const kind =
    { retake: "Retake", extend: "Longer" }[clip.pipeline] ??
    (clip.remixed_from_video_id ? "Take" : null);
  return [
    kind ? h("span", { class: "badge" }, kind) : null,
    h(
      "span",
      {},
      clip.status === "completed" || isActive(clip)
        ? `${Number(clip.seconds).toFixed(1)} s`
        : { failed: "Failed", cancelled: "Cancelled" }[clip.status],
    ),
    h("span", {}, since(clip.created_at)),
  ].filter(Boolean);
}

function showMaking(picture, clip) {
  let bar = picture.querySelector("progress");
  if (!bar) {
    bar = h("progress", { max: 100, "aria-label": "Progress" });
    picture.replaceChildren(h("div", { class: "making" }), bar);
  }
  if (clip.status === "queued") bar.removeAttribute("value");
  else bar.value = clip.progress;
  const preview = previews.get(clip.id);
  if (!preview) return;
  const image = picture.querySelector("img") ?? picture.insertBefore(h("img", { alt: "" }), bar);
  image.src = preview;
}

async function showFinished(picture, clip) {
  if (clip.status !== "completed") {
    picture.replaceChildren(
      h("div", { class: "nothing" }, icon(clip.status === "failed" ? "alert" : "close")),
    );
    return true;
  }
  const url = await still(clip.id);
  picture.replaceChildren(
    url ? h("img", { src: url, alt: "" }) : h("div", { class: "nothing" }, icon("note")),
  );
  return url !== null || isSound(clip);
}

function playUnderPointer(link, picture, id) {
  let timer = null,
    video = null;
  const begin = () => {
    if (isCalm()) return;
    timer = setTimeout(async () => {
      if (clips.get(id)?.status !== "completed" || !(await still(id))) return;
      const url = URL.createObjectURL(await blob(`/v1/videos/${id}/content`));
      if (timer === null) return URL.revokeObjectURL(url);
      video = h("video", {
        src: url,
        loop: true,
        playsinline: true,
        "aria-hidden": true,
        tabindex: -1,
      });
      video.muted = true;
      picture.append(video);
      play(video);
    }, HOVER_MS);
  };
  const end = () => {
    clearTimeout(timer);
    timer = null;
    if (!video) return;
    URL.revokeObjectURL(video.src);
    video.remove();
    video = null;
  };
  link.addEventListener("pointerenter", begin);
  link.addEventListener("pointerleave", end);
  link.addEventListener("focus", begin);
  link.addEventListener("blur", end);
}
