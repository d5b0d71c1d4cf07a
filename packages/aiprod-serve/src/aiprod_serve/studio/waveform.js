// Sound as a picture: peaks by WebAudio, drawn on a canvas in the page's colours.

// Peaks (0 to 1) in `count` columns, or null for a file without sound that can be decoded.
export async function readPeaks(bytes, count) {
  const context = new OfflineAudioContext(1, 1, 48000); // decodes without a click from the user
  let sound;
  try {
    sound = await context.decodeAudioData(bytes);
  } catch {
    return null;
  }
  const peaks = new Float32Array(count);
  for (let channel = 0; channel < sound.numberOfChannels; channel++) {
    const samples = sound.getChannelData(channel);
    for (let i = 0; i < samples.length; i++) {
      const column = Math.min(count - 1, Math.floor((i * count) / samples.length));
      peaks[column] = Math.max(peaks[column], Math.abs(samples[i]));
    }
  }
  return peaks;
}

// Peaks as upright bars; `isInSpan(share)` tells which are drawn in the span's colour.
export function drawWave(canvas, peaks, isInSpan = () => false) {
  const { context, width, height } = prepare(canvas);
  const style = getComputedStyle(canvas);
  const usual = style.getPropertyValue("--wave"),
    chosen = style.getPropertyValue("--span");
  const step = 4,
    bar = 2.5;
  const loudest = Math.max(0.05, ...peaks);
  for (let x = 0; x < width; x += step) {
    const from = Math.floor((x / width) * peaks.length);
    const to = Math.max(from + 1, Math.floor(((x + step) / width) * peaks.length));
    const peak = Math.max(...peaks.subarray(from, to)) / loudest;
    const tall = Math.max(2, Math.sqrt(peak) * height * 0.9);
    context.fillStyle = isInSpan((x + bar / 2) / width) ? chosen : usual;
    context.beginPath();
    context.roundRect(x, (height - tall) / 2, bar, tall, bar / 2);
    context.fill();
  }
}

// A canvas cleared and scaled to the pixels of the screen; sizes are in CSS pixels.
export function prepare(canvas) {
  const { clientWidth: width, clientHeight: height } = canvas;
  const scale = devicePixelRatio || 1;
  canvas.width = Math.max(1, Math.round(width * scale));
  canvas.height = Math.max(1, Math.round(height * scale));
  const context = canvas.getContext("2d");
  context.scale(scale, scale);
  return { context, width, height };
}
