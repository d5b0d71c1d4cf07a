// Two takes side by side: they play together, and one of them is heard.

import { $, h, iconButton, play, seconds, segments, setIcon } from "./dom.js";
import { blob, json } from "./api.js";
import { clips, family, order } from "./library.js";
import { still } from "./gallery.js";
import { differences, table } from "./recipe.js";
import { drawWave, readPeaks } from "./waveform.js";

const DRIFT_S = 0.1; // between the two, above which one is set right
const NUM_PEAKS = 600;

let building = null;

const finished = () =>
  order.map((id) => clips.get(id)).filter((clip) => clip.status === "completed");

// The other take that one would compare with: what it was made from, or the newest relative.
function usualOther(id) {
  const parent = clips.get(clips.get(id).remixed_from_video_id);
  const relatives = family(id)
    .filter((clip) => clip.id !== id && clip.status === "completed")
    .reverse();
  const candidates = [parent, ...relatives, ...finished()];
  return candidates.find((clip) => clip && clip.id !== id && clip.status === "completed")?.id;
}

export function hideCompare() {
  building?.abort();
}

export async function showCompare(a, b) {
  building?.abort();
  building = new AbortController();
  const { signal } = building;
  const stage = $("stage");
  b ??= usualOther(a);
  stage.hidden = false;
  stage.replaceChildren(
    h(
      "div",
      { class: "stage-head" },
      h("h2", { id: "stage-title", tabindex: -1 }, "Two takes"),
      iconButton("close", "Close the comparison", () => (location.hash = a)),
    ),
  );
  stage.scrollIntoView({ block: "start" });
  $("stage-title").focus({ preventScroll: true });
  if (!b) {
    stage.append(
      h("p", { class: "ended" }, "There is no other clip yet to compare this one with."),
    );
    return;
  }
  const sides = await Promise.all(
    [a, b].map((id, index) => createSide(id, index, [a, b], signal)),
  ).catch((error) => {
    if (!signal.aborted) stage.append(h("p", { class: "error" }, error.message));
  });
  if (signal.aborted || !sides) return;
  stage.append(
    h(
      "div",
      { class: "sides" },
      sides.map((side) => side.element),
    ),
    transport(sides, signal),
  );
  const rows = differences(sides[0].recipe, sides[1].recipe);
  stage.append(h("h3", {}, "What differs"), table(["Setting", "A", "B"], rows));
  for (const side of sides) side.drawSound();
}

async function createSide(id, index, chosen, signal) {
  const letter = "AB"[index];
  const [recipe, data] = await Promise.all([
    json(`/v1/videos/${id}/recipe`, { signal }),
    blob(`/v1/videos/${id}/content`, signal),
  ]);
  const url = URL.createObjectURL(data);
  signal.addEventListener("abort", () => URL.revokeObjectURL(url));
  const poster = await still(id);
  const video = h("video", {
    class: "picture",
    src: url,
    poster: poster ?? undefined,
    playsinline: true,
    preload: "auto",
    "aria-label": `${letter}: ${clips.get(id)?.prompt ?? ""}`,
  });
  const wave = h("canvas", { class: "wave", role: "img", "aria-label": `Waveform of ${letter}` });
  const choice = h(
    "select",
    {
      onchange: () => {
        const next = [...chosen];
        next[index] = choice.value;
        location.hash = `compare=${next.join(",")}`;
      },
    },
    finished().map((clip) =>
      h(
        "option",
        { value: clip.id, selected: clip.id === id },
        `${clip.prompt.slice(0, 60)} (seed ${clip.seed}${clip.pipeline === "retake" ? ", retake" : ""})`,
      ),
    ),
  );
  const element = h(
    "div",
    { class: "side" },
    h("label", { class: "side-choice" }, h("span", { class: "letter" }, letter), choice),
    h("div", { class: "screen" }, video),
    wave,
  );
  const drawSound = async () => {
    const peaks = await readPeaks(await data.arrayBuffer(), NUM_PEAKS);
    if (!peaks) return;
    new ResizeObserver(() => drawWave(wave, peaks)).observe(wave);
  };
  return { element, video, recipe, drawSound, duration: Number(clips.get(id)?.seconds ?? 0) };
}

function transport(sides, signal) {
  const videos = sides.map((side) => side.video);
  const duration = Math.max(...sides.map((side) => side.duration));
  const leader = sides[0].duration >= sides[1].duration ? videos[0] : videos[1];
  const clock = h("span", { class: "clock" });
  const hear = (letter) => videos.forEach((video, index) => (video.muted = "AB"[index] !== letter));
  const button = iconButton("play", "Play both", () => {
    if (leader.paused) {
      if (leader.ended) seek(0);
      videos.forEach(play);
    } else {
      videos.forEach((video) => video.pause());
    }
  });
  const scrub = h("input", {
    type: "range",
    class: "scrub",
    min: 0,
    max: duration,
    step: 0.01,
    value: 0,
    "aria-label": "Position in both",
    oninput: () => seek(Number(scrub.value)),
  });

  function seek(time) {
    for (const video of videos) video.currentTime = Math.min(time, video.duration || time);
  }

  function show() {
    const time = leader.currentTime;
    scrub.value = time;
    clock.textContent = `${seconds(Math.min(time, duration))} / ${seconds(duration)}`;
    for (const video of videos) {
      if (!video.paused && !video.seeking && Math.abs(video.currentTime - time) > DRIFT_S)
        video.currentTime = time;
    }
    if (!leader.paused && !signal.aborted) requestAnimationFrame(show);
  }

  leader.addEventListener("ended", () => {
    seek(0);
    videos.forEach(play);
  });
  for (const name of ["play", "pause", "seeked"]) {
    leader.addEventListener(name, () => {
      setIcon(button, leader.paused ? "play" : "pause", leader.paused ? "Play both" : "Pause both");
      show();
    });
  }
  hear("A");
  show();
  return h(
    "div",
    { class: "transport", role: "group", "aria-label": "Both players" },
    button,
    clock,
    scrub,
    segments(
      "hear",
      "Which one is heard",
      [
        ["A", "Hear A"],
        ["B", "Hear B"],
      ],
      "A",
      hear,
    ),
  );
}
