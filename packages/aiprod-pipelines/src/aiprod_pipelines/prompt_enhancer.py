"""Longer prompts from short ones, in the manner in which a model's training captions are written.

Three writers: a language model (Gemma, the text encoder's own, where the model has one), any server
that speaks OpenAI's chat protocol, and for nano a few rules. Each gets a bounded time, and where it
fails the prompt stays as it was, with a warning: enhancement never costs a clip.
"""

import json
import os
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from aiprod_core.errors import InputError
from aiprod_core.model.text_encoder import GEMMA_HUB_ID
from aiprod_pipelines.components import ModelSet
from aiprod_pipelines.progress import Progress
from aiprod_pipelines.request import GenerationRequest

TIMEOUT_S = 120.0
MAX_NEW_TOKENS = 512
TEMPERATURE = 0.7

# Sent to servers that want one. The variable's name is the one that OpenAI's own clients read.
KEY_VARIABLE, MODEL_VARIABLE = "OPENAI_API_KEY", "AIPROD_ENHANCER_MODEL"

INSTRUCTIONS = """\
You turn a short request into the caption of a video clip with sound, as a careful observer who \
has seen and heard the clip would write it.

Write one paragraph of plain English in the present tense, in the order in which things happen, of \
at most 150 words.
- Keep every element of the request; add nothing that contradicts it or changes its subject.
- Add what can be seen: looks, materials, colours, place, light, how things and people move.
- Say what is heard and when, from the nearest sound to the background. If someone speaks, quote \
the words of the request exactly, and name the voice; invent no speech.
- Do not move the camera, cut, or count seconds unless the request does.
- Start with the content itself: no title, no comment, no "the video shows".\
"""


class Enhanced(NamedTuple):
    """The prompt to use and who wrote it; `warning` says why it is still the original."""

    prompt: str
    original: str
    writer: str
    warning: str | None = None


Writer = Callable[[str], str]


def enhance_request(
    models: ModelSet, request: GenerationRequest, enhancer: str, progress: Progress
) -> GenerationRequest:
    """The request with its prompt enhanced, and the original kept beside it; or as it was, with a
    note why. Raises InputError for an `enhancer` that cannot be (see `choose_writer`)."""
    kind = (models.checkpoint.config.get("text_encoder") or {}).get("type", "gemma3")
    writer, name = choose_writer(enhancer, kind, models.text_encoder_source)
    with progress.stage("enhance prompt"):
        enhanced = enhance(request.prompt, writer, name)
    if enhanced.warning is not None:
        progress.note(f"warning: {enhanced.warning}")
        return request
    progress.note(f"enhanced prompt: {enhanced.prompt}")
    return replace(
        request,
        prompt=enhanced.prompt,
        original_prompt=enhanced.original,
        enhanced_by=enhanced.writer,
    )


def enhance(prompt: str, writer: Writer, name: str, *, timeout_s: float = TIMEOUT_S) -> Enhanced:
    """What `writer` makes of a prompt within `timeout_s`; else the prompt itself and a warning.

    A writer that is late is left to itself and its answer dropped.
    """
    outcome: dict[str, Any] = {}

    def run() -> None:
        try:
            outcome["text"] = clean(writer(prompt))
        except Exception as error:  # whatever a model or a server may raise
            outcome["error"] = error

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeout_s)
    if "error" in outcome:
        reason = str(outcome["error"]).strip().split("\n")[0] or type(outcome["error"]).__name__
    elif "text" not in outcome:
        reason = f"it took longer than {timeout_s:g} s"
    elif not outcome["text"]:
        reason = "it wrote nothing"
    else:
        return Enhanced(outcome["text"], prompt, name)
    return Enhanced(prompt, prompt, name, f"the prompt stays as it is: {name} failed, {reason}")


def clean(text: str) -> str:
    """One paragraph without curly quotes, long dashes, or anything before the first letter."""
    for pattern, plain in (
        ("[\u2018\u2019]", "'"),
        ("[\u201c\u201d]", '"'),
        ("\\s*[\u2013\u2014]\\s*", ", "),
        (r"\s+", " "),
        (r"^[^\w\"']+", ""),
    ):
        text = re.sub(pattern, plain, text)
    return text.strip()


def choose_writer(
    enhancer: str, text_encoder_type: str, source: str | Path | None
) -> tuple[Writer, str]:
    """The writer that `enhancer` names, and its name for messages.

    "auto" is what fits the model: rules where the text encoder writes nothing, else Gemma. A URL
    is a server; "rules" and "gemma" are themselves; anything else is a folder or hub id of a
    language model. `source` is the text encoder's. Raises InputError for one that cannot be.
    """
    if enhancer == "auto":
        enhancer = "rules" if text_encoder_type == "minilm" else "gemma"
    if enhancer == "rules":
        return by_rules, "rules"
    if re.match(r"https?://", enhancer):
        return (lambda prompt: by_server(prompt, enhancer)), enhancer
    if enhancer == "gemma":
        model = (
            str(source) if source is not None and text_encoder_type != "minilm" else GEMMA_HUB_ID
        )
    else:
        model = enhancer
        if not Path(model).exists() and not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
            raise InputError(
                f"enhancer must be auto, rules, gemma, a URL, a folder or a hub id; got {enhancer}."
            )
    return (lambda prompt: by_language_model(prompt, model)), model


def by_server(prompt: str, url: str, *, timeout_s: float = TIMEOUT_S) -> str:
    """Asks a server by OpenAI's chat protocol. `url` may end in /v1 or in /chat/completions.

    The key and the name of the model come from OPENAI_API_KEY and AIPROD_ENHANCER_MODEL.
    """
    if not url.rstrip("/").endswith("/chat/completions"):
        url = url.rstrip("/") + "/chat/completions"
    body = {
        "model": os.environ.get(MODEL_VARIABLE, "default"),
        "messages": _messages(prompt),
        "temperature": TEMPERATURE,
        "max_tokens": MAX_NEW_TOKENS,
    }
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get(KEY_VARIABLE):
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as response:
            answer = json.load(response)
        return answer["choices"][0]["message"]["content"]
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"the server answered {error.code} {error.reason}") from error
    except urllib.error.URLError as error:
        raise RuntimeError(f"the server cannot be reached ({error.reason})") from error
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise RuntimeError("the server's answer is not OpenAI's chat format") from error


def by_language_model(
    prompt: str, model: str | Path, *, seed: int = 10, max_new_tokens: int = MAX_NEW_TOKENS
) -> str:
    """Samples from an instruction-tuned model of transformers, by default Gemma 3.

    The same seed gives the same text; the global random state is left as it was.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    network = network.to(device)
    tokens = tokenizer.apply_chat_template(
        _messages(prompt), add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(device)
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(seed)
        written = network.generate(
            **tokens,
            do_sample=True,
            temperature=TEMPERATURE,
            max_new_tokens=max_new_tokens,
            max_time=TIMEOUT_S,
        )
    return tokenizer.decode(written[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True)


def _messages(prompt: str) -> list[dict[str, str]]:
    return [
        {"role": "system", "content": INSTRUCTIONS},
        {"role": "user", "content": f"Request: {prompt}"},
    ]


# Nano's world in its own words: what it can show, and what it should hear of it.

SHAPES = {
    "ball": "ball", "sphere": "ball", "orb": "ball", "cube": "cube", "box": "cube", "block": "cube",
    "star": "star", "triangle": "triangle", "pyramid": "triangle", "ring": "ring", "hoop": "ring",
    "heart": "heart", "figure": "stick figure", "man": "stick figure", "person": "stick figure",
}  # fmt: skip
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink", "white", "black")
MATERIALS = {
    "rubber": "rubber", "wood": "wooden", "wooden": "wooden", "metal": "metal", "steel": "metal",
    "iron": "metal", "glass": "glass", "crystal": "glass",
}  # fmt: skip
IMPACTS = {
    "rubber": "a dull thud", "wooden": "a dry knock", "metal": "a metallic ringing",
    "glass": "a bright glassy clink",
}  # fmt: skip
# Words that name a motion, how the caption says it, and its sound; None sounds by the material.
MOTIONS: tuple[tuple[str, str, str | None], ...] = (
    (r"roll\w*.*left|left.*roll", "rolls from right to left", "a low rumble"),
    (r"roll\w*.*right|right.*roll|\broll", "rolls from left to right", "a low rumble"),
    (r"swing|pendulum|rope", "swings to and fro on a rope", "a soft whoosh of air"),
    (r"spin|turn|rotat", "spins in the air", "a whirring buzz"),
    (r"puls|grow|shrink|float|hover", "grows and shrinks", "a beep"),
    (r"walk.*left", "walks from right to left", "footsteps"),
    (r"walk|\bgo(es)?\b", "walks from left to right", "footsteps"),
    (r"fall|drop", "falls and stays on the floor", None),
    (r"", "bounces up and down", None),
)
PLACE = re.compile(
    r"\b(in|on|at|under|before|against|outside|front)\b.*"
    r"\b(room|wall|grass|meadow|sky|night|sunset|sand|beach|bricks?|curtain|hills?|background)\b"
)
SOUND = re.compile(
    r"\b(sound|thud|thump|knock|clack|ring(s|ing)|clang|clink|ping|rumbl|scrap|beep|footsteps|"
    r"whoosh|buzz|whirr|nois[ey]|silen|quiet|hears?)"
)


def by_rules(prompt: str) -> str:
    """Says what the prompt leaves open, in the words of nano's captions; keeps what it says."""
    words = re.findall(r"[a-z]+", prompt.lower())
    shape = next((SHAPES[word] for word in words if word in SHAPES), None)
    material = next((MATERIALS[word] for word in words if word in MATERIALS), "rubber")
    motion = next(m for m in MOTIONS if re.search(m[0], prompt.lower()))
    named_motion = bool(motion[0])
    text = prompt.strip().rstrip(".!")
    if shape is None:
        text = f"{text}, a rubber ball"
    if not named_motion and not re.search(r"bounc|hop|jump|rebound", prompt.lower()):
        if shape == "stick figure":
            motion = MOTIONS[6]
        text = f"{text} {motion[1]}" if shape else f"{text} that {motion[1]}"
    if not PLACE.search(text.lower()) and "floor" not in words:
        text += " in front of a grey wall"
    if not SOUND.search(prompt.lower()):
        sound = motion[2] or IMPACTS[material]
        text += f", with {sound}" + (" at each impact" if motion[1].startswith("bounce") else "")
    return f"{text[0].upper()}{text[1:]}."
