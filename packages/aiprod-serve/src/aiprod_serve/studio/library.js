// The clips as the server has them: listed, followed while they are made, found again.
//
// Events: "change" (some clips or the server's state changed), "preview" (detail: id).

import { announce } from "./dom.js";
import { ApiError, events, json } from "./api.js";

const PAGE = 48;
const POLL_ACTIVE_MS = 1500,
  POLL_IDLE_MS = 20000,
  RETRY_MS = 2000;
const STAGES = {
  "encode prompt": "Reading the prompt",
  "encode images": "Looking at the image",
  "encode audio": "Listening to the sound",
  "encode video": "Looking at the clip",
  denoise: "Denoising",
  upsample: "Enlarging",
  refine: "Refining",
  "decode audio": "Decoding the sound",
  "decode video": "Decoding the picture",
};

export const library = new EventTarget();
export const clips = new Map(); // by id, as /v1/videos tells them
export const previews = new Map(); // by id: a data: URI
export const server = { state: "waiting", workers: 0, hasOlder: false };
export let order = []; // ids, newest first
let followed = null; // the id whose events are read
let stopFollowing = null;
let preferred = null; // the clip on the stage
let timer = null;

export const isActive = (clip) => clip.status === "queued" || clip.status === "in_progress";

export const isSound = (clip) => clip.pipeline === "text-to-audio"; // alone, without a picture

export function stageText(clip) {
  if (clip.status === "queued") {
    const waiting = order.map((id) => clips.get(id)).filter((other) => other.status === "queued");
    const before = waiting.filter((other) => other.created_at < clip.created_at).length;
    return before ? `In the queue, ${before} before it` : "Next in the queue";
  }
  return STAGES[clip.stage] ?? "Starting";
}

// All takes of one clip: what it was made from and what was made from it, oldest first.
export function family(id) {
  const root = (clip) => {
    const parent = clips.get(clip.remixed_from_video_id);
    return parent ? root(parent) : (clip.remixed_from_video_id ?? clip.id);
  };
  const own = root(clips.get(id));
  return order
    .map((other) => clips.get(other))
    .filter((clip) => root(clip) === own)
    .reverse();
}

export function prefer(id) {
  preferred = id;
  follow();
}

export function add(clip) {
  if (!clips.has(clip.id)) order = [clip.id, ...order];
  clips.set(clip.id, clip);
  changed();
  schedule(POLL_ACTIVE_MS);
}

export function remove(id) {
  clips.delete(id);
  order = order.filter((other) => other !== id);
  changed();
}

// Reads the newest page; what is older than its last stays as it was.
export async function refresh() {
  try {
    const page = await json(`/v1/videos?limit=${PAGE}`);
    const last = page.data.at(-1);
    const seen = new Set(page.data.map((clip) => clip.id));
    const older = page.has_more
      ? order.filter((id) => !seen.has(id) && clips.get(id).created_at <= last.created_at)
      : [];
    if (!older.length) server.hasOlder = page.has_more;
    for (const id of order) if (!seen.has(id) && !older.includes(id)) clips.delete(id);
    for (const clip of page.data) note(clip);
    order = [...page.data.map((clip) => clip.id), ...older];
    const ready = await fetch("/ready");
    server.workers = (await ready.json()).workers;
    server.state = server.workers ? "ready" : "idle";
  } catch (error) {
    server.state = error instanceof ApiError && error.status < 500 ? "refused" : "lost";
    server.message = error.message;
  }
  changed();
  const isAnyActive = order.some((id) => isActive(clips.get(id)));
  const isWell = server.state === "ready";
  schedule(isAnyActive ? POLL_ACTIVE_MS : isWell ? POLL_IDLE_MS : RETRY_MS);
}

export async function showOlder() {
  const page = await json(`/v1/videos?limit=${PAGE}&after=${order.at(-1)}`);
  for (const clip of page.data) clips.set(clip.id, clip);
  order = [...order, ...page.data.map((clip) => clip.id).filter((id) => !order.includes(id))];
  server.hasOlder = page.has_more;
  changed();
}

document.addEventListener("visibilitychange", () => {
  if (!document.hidden) schedule(0);
});

function schedule(wait_ms) {
  clearTimeout(timer);
  timer = setTimeout(() => (document.hidden ? null : refresh()), wait_ms);
}

// Keeps what was heard last of a clip, and says what a person would want to hear.
function note(clip) {
  const before = clips.get(clip.id);
  if (
    before &&
    isActive(before) &&
    before.progress > clip.progress &&
    isActive(clip) &&
    before.status === clip.status
  ) {
    clip = { ...clip, progress: before.progress }; // a list that was read before the event
  }
  clips.set(clip.id, clip);
  if (!before || !isActive(before)) return;
  if (!isActive(clip)) {
    announce(
      {
        completed: "A clip is finished",
        failed: "A clip failed",
        cancelled: "A clip was cancelled",
      }[clip.status] + `: ${clip.prompt}`,
    );
    previews.delete(clip.id);
  } else if (
    clip.id === preferred &&
    clip.status === "in_progress" &&
    Math.floor(clip.progress / 25) > Math.floor(before.progress / 25)
  ) {
    announce(`${stageText(clip)}, ${clip.progress} percent`);
  }
}

function changed() {
  library.dispatchEvent(new Event("change"));
  follow();
}

// Reads the events of one clip: that on the stage, or else the one being made. One only, for
// browsers open few connections to a server; the others are polled.
function follow() {
  const active = order
    .map((id) => clips.get(id))
    .filter(isActive)
    .reverse();
  const wanted =
    active.find((clip) => clip.id === preferred) ??
    active.find((clip) => clip.status === "in_progress") ??
    active[0];
  if (wanted?.id === followed) return;
  stopFollowing?.abort();
  followed = wanted?.id ?? null;
  if (followed) read(followed, (stopFollowing = new AbortController()).signal);
}

async function read(id, signal) {
  try {
    for await (const { name, data } of events(`/v1/videos/${id}/events`, signal)) {
      if (name === "preview") {
        previews.set(id, data.image);
        library.dispatchEvent(new CustomEvent("preview", { detail: id }));
      } else if (name === "deleted") {
        remove(id);
      } else {
        note(data);
        changed();
      }
    }
  } catch (error) {
    if (signal.aborted) return;
  }
  // It ended, or the server went away: the list tells what became of it, and follows again.
  if (followed === id) followed = null;
  schedule(RETRY_MS / 4);
}
