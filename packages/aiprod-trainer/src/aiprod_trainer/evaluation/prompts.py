"""What a model is asked: sentences about scenes of the world, whose truth is known, or a file's."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from aiprod_core.errors import InputError
from aiprod_trainer.world.captions import describe
from aiprod_trainer.world.scene import Scene, sample_scene

PROMPT_SEED = 7  # beside the user's seed; no training script draws from such a pair
WORDS = ("shape", "colour", "size", "material", "motion", "background", "camera", "ambience")


@dataclass(frozen=True)
class Prompt:
    """A sentence, the scene that it describes (None where that is not known), and what it states
    of it; `has_synonyms` where it says so in words that no training caption has."""

    text: str
    scene: Scene | None = None
    stated: frozenset[str] = frozenset()
    has_synonyms: bool = False


def world_prompts(count: int, world: str, seed: int) -> list[Prompt]:
    """Captions of scenes that no training drew, every other one in held-out synonyms."""
    rng = np.random.default_rng([seed, PROMPT_SEED])
    prompts = []
    for number in range(count):
        scene = sample_scene(rng, world=world)
        has_synonyms = number % 2 == 1
        caption = describe(scene, rng, "held_out" if has_synonyms else "train")
        prompts.append(Prompt(caption.text, scene, caption.stated, has_synonyms))
    return prompts


def read_prompts(path: Path, world: str) -> list[Prompt]:
    """One prompt a line: the sentence, or a JSON object with `prompt` and what it states of the
    world, as {"prompt": "a crimson orb rolls", "colour": "red", "shape": "ball"}.

    Empty lines and lines that begin with # are passed over. Raises InputError naming the line.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; give a text file with one prompt a line.")
    prompts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        try:
            prompts.append(_parse(line, world) if line.startswith("{") else Prompt(line))
        except (ValueError, InputError) as error:
            raise InputError(f"{path}, line {number}: {error}") from error
    if not prompts:
        raise InputError(f"{path}: no prompt in this file.")
    return prompts


def _parse(line: str, world: str) -> Prompt:
    fields = json.loads(line)
    text = fields.pop("prompt", None)
    if not isinstance(text, str) or not text.strip():
        raise InputError('an object needs a "prompt".')
    unknown = sorted(fields.keys() - set(WORDS))
    if unknown:
        raise InputError(f"unknown fields {', '.join(unknown)}; known are {', '.join(WORDS)}.")
    if not fields:
        return Prompt(text)
    scene = sample_scene(np.random.default_rng(0), world=world, **fields)
    stated = set(fields)
    # What sounds follows from the motion, for impacts together with the material.
    impacts = fields.get("motion") in ("bounce", "fall", "collide")
    if "motion" in fields and ("material" in fields or not impacts):
        stated.add("sound")
    return Prompt(text, scene, frozenset(stated))
