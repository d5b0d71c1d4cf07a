// A clip that plays: its picture, or its sound alone, and the buttons that go with it.

import { h, icon, iconButton, isCalm, play, seconds, setIcon } from "./dom.js";

// `url` is the clip's blob. ontime(time) follows it while it plays.
export function createPlayer({ url, poster, hasPicture, label, duration, ontime }) {
  const video = h("video", {
    class: "picture",
    src: url,
    poster,
    playsinline: true,
    loop: true,
    preload: "auto",
    "aria-label": label,
    onclick: toggle,
  });
  const glow = h("canvas", { class: "glow", width: 16, height: 16, "aria-hidden": true });
  const big = h(
    "button",
    { type: "button", class: "big-play", "aria-label": "Play the clip", onclick: toggle },
    icon("play"),
  );
  const screen = h(
    "div",
    { class: hasPicture ? "screen" : "screen sound-only" },
    glow,
    video,
    hasPicture ? null : icon("note"),
    big,
  );

  const button = iconButton("play", "Play", toggle);
  const loop = h(
    "button",
    {
      type: "button",
      class: "icon-button",
      "aria-label": "Repeat",
      "aria-pressed": true,
      title: "Repeat",
      onclick: () => {
        video.loop = !video.loop;
        loop.setAttribute("aria-pressed", video.loop);
      },
    },
    icon("loop"),
  );
  const mute = iconButton("sound", "Mute", () => (video.muted = !video.muted));
  const full = iconButton("full", "Full screen", () => video.requestFullscreen?.());
  const clock = h("span", { class: "clock" });
  const transport = h(
    "div",
    { class: "transport", role: "group", "aria-label": "Player" },
    button,
    clock,
    h("span", { class: "gap" }),
    loop,
    mute,
    hasPicture ? full : null,
  );

  function toggle() {
    if (video.paused) play(video);
    else video.pause();
  }

  function show() {
    const time = Math.min(video.currentTime, duration);
    clock.textContent = `${seconds(time)} / ${seconds(duration)}`;
    ontime(time);
  }

  function draw() {
    if (hasPicture && video.videoWidth) glow.getContext("2d").drawImage(video, 0, 0, 16, 16);
  }

  function follow() {
    show();
    if (!isCalm()) draw();
    if (!video.paused && video.isConnected) requestAnimationFrame(follow);
  }

  function onstate() {
    setIcon(button, video.paused ? "play" : "pause", video.paused ? "Play" : "Pause");
    big.hidden = !video.paused;
    if (!video.paused) follow();
  }

  for (const name of ["play", "pause", "ended"]) video.addEventListener(name, onstate);
  for (const name of ["seeked", "loadedmetadata"]) video.addEventListener(name, show);
  for (const name of ["loadeddata", "seeked"]) video.addEventListener(name, draw);
  video.addEventListener("volumechange", () =>
    setIcon(mute, video.muted ? "muted" : "sound", video.muted ? "Unmute" : "Mute"),
  );
  show();
  return { video, screen, transport, seek: (time) => (video.currentTime = time) };
}
