// A clip's timeline: film strip, waveform, playhead, and a span to be chosen by pointer or keys.

import { h } from "./dom.js";
import { drawWave, prepare, readPeaks } from "./waveform.js";

const NUM_PEAKS = 1200;
const DRAG_PX = 4; // less is a click
const SPRITE_HEIGHT = 120,
  SPRITE_COLUMNS = 5,
  NUM_SPRITES = 20; // as the server makes them

// onseek(time), onspan([start, end] or null). Times are in seconds.
export function createTimeline({ duration, fps, hasPicture, onseek, onspan }) {
  const frame = 1 / fps;
  let span = null,
    peaks = null,
    sheet = null,
    aspect = 1,
    numSprites = NUM_SPRITES;

  const strip = h("canvas", { class: "strip", hidden: !hasPicture, "aria-hidden": true });
  const wave = h("canvas", { class: "wave", role: "img", "aria-label": "Waveform of the sound" });
  const playhead = h("div", { class: "playhead", "aria-hidden": true });
  const handles = ["start", "end"].map((edge, index) =>
    h("div", {
      class: `handle ${edge}`,
      role: "slider",
      tabindex: 0,
      "aria-label": `Span ${edge}`,
      "aria-valuemin": 0,
      "aria-valuemax": duration.toFixed(2),
      onkeydown: (event) => onkey(event, index),
      onpointerdown: (event) => ondown(event, index),
    }),
  );
  const band = h("div", { class: "band", hidden: true }, handles);
  const surface = h(
    "div",
    { class: "surface", onpointerdown: (event) => ondown(event, null) },
    strip,
    wave,
    band,
    playhead,
  );
  const scrub = h("input", {
    class: "scrub",
    type: "range",
    min: 0,
    max: duration,
    step: frame / 2,
    value: 0,
    "aria-label": "Position",
    oninput: () => onseek(Number(scrub.value)),
  });
  const element = h(
    "div",
    { class: "timeline", role: "group", "aria-label": "Timeline" },
    scrub,
    surface,
  );

  const snap = (time) => Math.min(duration, Math.max(0, Math.round(time * fps) / fps));

  function setSpan(next) {
    span = next;
    band.hidden = !span;
    if (span) {
      band.style.left = `${(span[0] / duration) * 100}%`;
      band.style.width = `${((span[1] - span[0]) / duration) * 100}%`;
      handles.forEach((handle, index) => {
        handle.setAttribute("aria-valuenow", span[index].toFixed(2));
        handle.setAttribute("aria-valuetext", `${span[index].toFixed(2)} seconds`);
      });
    }
    draw();
    onspan(span);
  }

  // Moves one edge; it stops a frame before the other.
  function moveEdge(index, time) {
    const next = [...span];
    next[index] = index
      ? Math.max(snap(time), Math.min(duration, span[0] + frame))
      : Math.min(snap(time), Math.max(0, span[1] - frame));
    setSpan(next);
  }

  function onkey(event, index) {
    const moves = {
      ArrowLeft: -frame,
      ArrowRight: frame,
      ArrowDown: -frame,
      ArrowUp: frame,
      PageDown: -5 * frame,
      PageUp: 5 * frame,
      Home: -duration,
      End: duration,
    };
    if (event.key === "Escape") setSpan(null);
    else if (event.key in moves) moveEdge(index, span[index] + moves[event.key]);
    else return;
    event.preventDefault();
  }

  function ondown(event, handle) {
    if (event.button) return;
    event.stopPropagation();
    const box = surface.getBoundingClientRect();
    const timeAt = (x) => snap(((x - box.left) / box.width) * duration);
    const origin = event.clientX;
    let isDragged = false;
    surface.setPointerCapture(event.pointerId);
    surface.onpointermove = ({ clientX }) => {
      isDragged ||= hasPicture && Math.abs(clientX - origin) > DRAG_PX; // else nothing to retake
      if (!isDragged) return;
      if (handle !== null) return moveEdge(handle, timeAt(clientX));
      const [a, b] = [timeAt(origin), timeAt(clientX)].sort((x, y) => x - y);
      if (b - a >= frame / 2) setSpan([a, b]);
    };
    surface.onpointerup = surface.onpointercancel = ({ type, clientX }) => {
      surface.onpointermove = surface.onpointerup = surface.onpointercancel = null;
      if (!isDragged && handle === null && type === "pointerup") onseek(timeAt(clientX));
    };
  }

  function draw() {
    if (!element.isConnected) return;
    if (peaks)
      drawWave(
        wave,
        peaks,
        (share) => span && share * duration >= span[0] && share * duration < span[1],
      );
    if (sheet) drawStrip();
  }

  function drawStrip() {
    const { context, width, height } = prepare(strip);
    const count = Math.max(1, Math.ceil(width / (height * aspect)));
    const tile = width / count;
    const spriteWidth = sheet.width / Math.min(SPRITE_COLUMNS, numSprites);
    for (let i = 0; i < count; i++) {
      const sprite = Math.min(numSprites - 1, Math.floor(((i + 0.5) / count) * numSprites));
      const column = sprite % SPRITE_COLUMNS,
        row = Math.floor(sprite / SPRITE_COLUMNS);
      // Cut to the tile's shape, from the sprite's middle.
      const cut = Math.min(spriteWidth, (tile / height) * SPRITE_HEIGHT);
      const tall = Math.min(SPRITE_HEIGHT, (cut * height) / tile);
      context.drawImage(
        sheet,
        column * spriteWidth + (spriteWidth - cut) / 2,
        row * SPRITE_HEIGHT + (SPRITE_HEIGHT - tall) / 2,
        cut,
        tall,
        i * tile,
        0,
        tile + 0.5,
        height,
      );
    }
  }

  new ResizeObserver(draw).observe(surface);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);

  return {
    element,
    setSpan: (next) => {
      setSpan(next);
      if (next) handles[0].focus();
    },
    setTime(time) {
      scrub.value = time;
      scrub.setAttribute("aria-valuetext", `${time.toFixed(2)} seconds`);
      playhead.style.left = `${Math.min(1, time / duration) * 100}%`;
    },
    async setSound(blob) {
      peaks = await readPeaks(await blob.arrayBuffer(), NUM_PEAKS);
      if (!peaks) wave.setAttribute("aria-label", "This clip has no sound");
      surface.dataset.sound = peaks ? "yes" : "no";
      draw();
    },
    async setSheet(blob, width, height, numFrames) {
      sheet = await createImageBitmap(blob);
      aspect = width / height;
      numSprites = Math.min(NUM_SPRITES, numFrames);
      draw();
    },
  };
}
