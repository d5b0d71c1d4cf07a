// Begins: the key, the models, the clips; then the address decides what is on the stage.
//
//   #video_ID            one clip
//   #compare=A,B         two of them

import { $, h } from "./dom.js";
import { forgetKey, hasKey, json } from "./api.js";
import { editRecipe, fillPrompt, initComposer, offer } from "./composer.js";
import { hideCompare, showCompare } from "./compare.js";
import { initGallery, markChosen } from "./gallery.js";
import { clips, library, refresh, server } from "./library.js";
import { hideStage, initStage, showClip } from "./stage.js";

const EXAMPLES = [
  "a large blue ball rolls to the right, with a rumbling noise",
  "a red rubber ball bounces on the floor, with a thud at each bounce",
  "a small yellow star pulses in the middle, with a beep at each pulse",
];
const RETRY_MS = 2000;

async function begin() {
  $("forget-key").onclick = forgetKey;
  $("forget-key").hidden = !hasKey();
  initComposer();
  initGallery(EXAMPLES, fillPrompt);
  initStage((clip, recipe) => {
    editRecipe(clip, recipe);
    $("composer").scrollIntoView({ block: "start" });
  });
  library.addEventListener("change", showServer);
  await offerModels();
  await refresh();
  window.addEventListener("hashchange", () => route(true));
  await route(false);
}

// Asks until the server is there: a page that was opened too early need not be loaded again.
async function offerModels() {
  for (;;) {
    try {
      const { data } = await json("/v1/models");
      const select = $("model");
      select.replaceChildren(...data.map(({ id }) => h("option", { value: id }, id)));
      $("model-field").hidden = false;
      select.disabled = data.length === 1;
      select.onchange = async () =>
        offer(await json(`/v1/models/${encodeURIComponent(select.value)}/choices`));
      await select.onchange();
      return;
    } catch (error) {
      Object.assign(server, { state: "lost", message: error.message });
      showServer();
      await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
    }
  }
}

async function route(hasFocus) {
  const address = location.hash.slice(1);
  hideCompare();
  const ids = address.replace("compare=", "").split(",").filter(Boolean);
  await Promise.all(ids.filter((id) => !clips.has(id)).map(find));
  const known = ids.filter((id) => clips.has(id));
  if (!known.length) hideStage();
  else if (address.startsWith("compare=")) {
    hideStage();
    await showCompare(known[0], known[1]);
  } else showClip(known[0], hasFocus);
  markChosen(known);
}

// A clip of the address that is older than the list.
async function find(id) {
  try {
    clips.set(id, await json(`/v1/videos/${encodeURIComponent(id)}`));
  } catch {
    // It has expired; the list is shown instead.
  }
}

function showServer() {
  const text = {
    waiting: "connecting",
    ready: server.workers > 1 ? `${server.workers} workers ready` : "ready",
    idle: "no worker yet",
    refused: server.message,
    lost: "not reached, trying again",
  }[server.state];
  $("server").dataset.state = server.state;
  if ($("server-text").textContent !== text) $("server-text").textContent = text;
}

begin();
