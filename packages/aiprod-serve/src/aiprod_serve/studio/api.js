// The server's API: requests with the tab's key, events as they come, files as blobs.

import { $ } from "./dom.js";

const KEY = "aiprod.key";
let asking = null;

export class ApiError extends Error {
  constructor(status, body) {
    super(body?.message ?? `the server answered ${status}`);
    this.status = status;
    this.code = body?.code;
  }
}

// A response that is fine, or an ApiError; TypeError where the server is not reached.
export async function call(path, { method = "GET", body, headers = {}, signal } = {}) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const sent = { ...headers, ...(key && { authorization: `Bearer ${key}` }) };
    if (body !== undefined && !(body instanceof FormData)) {
      sent["content-type"] = "application/json";
    }
    const response = await fetch(path, {
      method,
      signal,
      headers: sent,
      body: body === undefined || body instanceof FormData ? body : JSON.stringify(body),
    });
    if (response.ok) return response;
    if (response.status !== 401) throw new ApiError(response.status, await errorOf(response));
    if (sessionStorage.getItem(KEY) === key) await askForKey(key !== null);
  }
}

export async function json(path, options) {
  return exactly(await (await call(path, options)).text());
}

// Seeds go up to 2^63: those that a double cannot hold stay text, which the server takes as well.
export function exactly(text) {
  return JSON.parse(text, (name, value, context) =>
    name === "seed" && !Number.isSafeInteger(value) && context ? context.source : value,
  );
}

export function blob(path, signal) {
  return call(path, { signal }).then((response) => response.blob());
}

export async function upload(file) {
  const form = new FormData();
  form.append("file", file);
  return json("/v1/files", { method: "POST", body: form });
}

export function create(body) {
  const random = crypto.getRandomValues(new Uint8Array(16));
  const once = Array.from(random, (byte) => byte.toString(16).padStart(2, "0")).join("");
  return json("/v1/videos", { method: "POST", body, headers: { "idempotency-key": once } });
}

// Server-sent events by fetch, for EventSource cannot send a key: yields {name, data}.
export async function* events(path, signal) {
  const response = await call(path, { signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const blocks = text.split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const fields = Object.fromEntries(
        block
          .split("\n")
          .map((line) => [line.split(": ", 1)[0], line.slice(line.indexOf(": ") + 2)]),
      );
      if (fields.event) yield { name: fields.event, data: exactly(fields.data) };
    }
  }
}

export const hasKey = () => sessionStorage.getItem(KEY) !== null;

export function forgetKey() {
  sessionStorage.removeItem(KEY);
  location.reload();
}

async function errorOf(response) {
  try {
    return (await response.json()).error;
  } catch {
    return null;
  }
}

function askForKey(wasRefused) {
  asking ??= new Promise((resolve) => {
    const dialog = $("key-dialog");
    $("key-error").textContent = wasRefused ? "The server does not know that key." : "";
    $("key").value = "";
    dialog.onclose = () => asking && dialog.showModal(); // without a key there is nothing to see
    $("key-form").onsubmit = () => {
      sessionStorage.setItem(KEY, $("key").value.trim());
      $("forget-key").hidden = false;
      asking = null;
      resolve();
    };
    dialog.showModal();
  });
  return asking;
}
