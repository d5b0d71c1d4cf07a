"""Words for a scene: short and long, in many phrasings, never saying what is not true.

A caption is put together from phrases for the object, its motion, the place and the sound; any of
them may be left out, and `Caption.stated` records what was said so that only that is judged.
`HELD_OUT` holds synonyms that training captions never use: prompts written with them test whether
meaning, not spelling, was learnt.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from aiprod_trainer.world.scene import ROUND, Body, Scene

Vocabulary = Literal["train", "held_out"]


@dataclass(frozen=True)
class Caption:
    """The text and the attributes it names: colour, shape, size, material, motion, ..."""

    text: str
    stated: frozenset[str]


WORDS: dict[str, dict[str, tuple[str, ...]]] = {
    "colour": {
        "red": ("red", "bright red"),
        "orange": ("orange", "bright orange"),
        "yellow": ("yellow", "bright yellow"),
        "green": ("green", "grass-green"),
        "cyan": ("cyan", "light cyan"),
        "blue": ("blue", "deep blue"),
        "purple": ("purple", "dark purple"),
        "pink": ("pink", "light pink"),
        "white": ("white", "plain white"),
        "black": ("black", "pitch-black"),
    },
    "shape": {
        "ball": ("ball",),
        "cube": ("cube", "cube", "box"),
        "star": ("star", "star", "five-pointed star"),
        "triangle": ("triangle", "triangle", "triangular block"),
        "ring": ("ring",),
        "heart": ("heart", "heart", "heart shape"),
    },
    "size": {
        "small": ("small", "little", "tiny"),
        "medium": ("medium-sized", "mid-sized"),
        "large": ("large", "big"),
        "huge": ("huge", "very large", "giant"),
    },
    "material": {
        "rubber": ("rubber",),
        "wood": ("wooden",),
        "metal": ("metal", "steel"),
        "glass": ("glass",),
    },
    "background": {
        "grey": ("in a grey room", "in front of a grey wall", "against a plain grey background"),
        "cream": (
            "in a cream-coloured room",
            "in front of a cream wall",
            "on a brown floor before a cream wall",
        ),
        "sky": ("on the grass under a blue sky", "on a green meadow", "outside under a blue sky"),
        "night": ("at night", "under a dark night sky", "in the dark of the night"),
        "sunset": ("at sunset", "under an orange evening sky", "in the glow of the sunset"),
        "sand": ("on the sand", "on a sandy beach", "on the beach"),
    },
    "motion": {
        "bounce": (
            "bounces up and down",
            "bounces on the floor",
            "keeps bouncing",
            "is dropped and bounces",
            "hops up and down again and again",
        ),
        "roll left": (
            "{rolls} from right to left",
            "{rolls} to the left",
            "{rolls} leftwards",
            "{rolls} towards the left side",
            "{rolls} left across the floor",
        ),
        "roll right": (
            "{rolls} from left to right",
            "{rolls} to the right",
            "{rolls} rightwards",
            "{rolls} towards the right side",
            "{rolls} right across the floor",
        ),
        "fall": (
            "falls and stays on the floor",
            "falls down once and lies still",
            "drops to the floor and stays there",
            "falls to the ground without bouncing",
        ),
        "pulse": (
            "pulses",
            "grows and shrinks",
            "swells and shrinks again",
            "hovers and pulses",
            "floats in the air, growing and shrinking",
        ),
    },
    # Keyed by what is heard: the material of an impact, or the kind of a longer sound.
    "sound": {
        "rubber": ("a dull thud", "a low thud", "a deep, soft thump"),
        "wood": ("a wooden knock", "a dry knock", "a hollow wooden clack"),
        "metal": ("a metallic ringing", "a ringing metal clang", "a bell-like ringing"),
        "glass": ("a bright glassy clink", "a high clink", "a glassy ping"),
        "rumble": ("a low rumble", "a deep rolling rumble", "a rumbling noise"),
        "scrape": ("a scraping noise", "a hissing scrape", "a rough scratching noise"),
        "beep": ("a beep", "an electronic beep", "a clear beep"),
    },
}

HELD_OUT: dict[str, dict[str, tuple[str, ...]]] = {
    "colour": {
        "red": ("crimson", "scarlet"),
        "orange": ("tangerine", "amber"),
        "yellow": ("lemon-coloured", "golden"),
        "green": ("emerald", "jade-coloured"),
        "cyan": ("turquoise", "aqua"),
        "blue": ("cobalt", "sapphire-coloured"),
        "purple": ("violet", "plum-coloured"),
        "pink": ("rose-coloured", "salmon-pink"),
        "white": ("snowy", "ivory-white"),
        "black": ("jet-black", "ebony"),
    },
    "shape": {
        "ball": ("sphere", "orb"),
        "cube": ("block", "square"),
        "star": ("starlet", "star with five tips"),
        "triangle": ("pyramid", "three-sided shape"),
        "ring": ("hoop", "doughnut"),
        "heart": ("love heart", "valentine heart"),
    },
    "size": {
        "small": ("mini", "undersized"),
        "medium": ("average-sized", "moderately sized"),
        "large": ("sizeable", "bulky"),
        "huge": ("enormous", "gigantic"),
    },
    "material": {
        "rubber": ("rubbery", "elastic"),
        "wood": ("timber", "oak"),
        "metal": ("iron", "metallic"),
        "glass": ("crystal", "glassy"),
    },
    "background": {
        "grey": ("before a gray backdrop", "in a gray studio"),
        "cream": ("in a beige room", "before an ivory-coloured wall"),
        "sky": ("on a lawn on a clear day", "in a field in daylight"),
        "night": ("at midnight", "in the moonless darkness"),
        "sunset": ("at dusk", "in the evening twilight"),
        "sand": ("by the seaside", "on a dune"),
    },
    "motion": {
        "bounce": ("rebounds off the ground repeatedly", "springs up and down"),
        "roll left": (
            "travels from the right edge over to the left",
            "heads left",
        ),
        "roll right": (
            "travels from the left edge over to the right",
            "heads right",
        ),
        "fall": ("plunges to the ground and rests", "tumbles down and comes to rest"),
        "pulse": ("throbs", "expands and contracts"),
    },
    "sound": {
        "rubber": ("a muffled thwack", "a bassy bump"),
        "wood": ("a timber tap", "a clop"),
        "metal": ("a resounding clank", "a gong-like chime"),
        "glass": ("a crystalline tinkle", "a chime of glass"),
        "rumble": ("a low grumble", "a growling noise"),
        "scrape": ("a grating sound", "a rasping sound"),
        "beep": ("a bleep", "a signal tone"),
    },
}

SOUND_FRAMES = {
    "impact": (", with {s} at each impact", ", landing with {s} each time", ". Each hit makes {s}"),
    "single": (", with {s}", ", landing with {s}", ". It lands with {s}"),
    "pulse": (", with {s} at each pulse", ". Each pulse makes {s}", ", and each pulse gives {s}"),
    "friction": (", with {s}", ", making {s}", ". It makes {s}", ", to the sound of {s}"),
}


def caption(scene: Scene, rng: np.random.Generator, vocabulary: Vocabulary = "train") -> str:
    """One true sentence or two about the scene."""
    return describe(scene, rng, vocabulary).text


def describe(scene: Scene, rng: np.random.Generator, vocabulary: Vocabulary = "train") -> Caption:
    """A caption with the list of what it says; with "held_out" every attribute is said in words
    that training captions never use."""
    body = scene.body
    say = _Speaker(rng, vocabulary)
    detail = rng.random()  # below a third: a few words; above two thirds: everything
    keep = {
        "colour": 0.95,
        "shape": 0.93,
        "size": 0.15 + 0.6 * detail,
        "material": 0.2 + 0.6 * detail,
        "motion": 0.97,
        "background": 0.25 + 0.65 * detail,
        "sound": 0.25 + 0.65 * detail,
    }
    stated = {what for what, share in keep.items() if rng.random() < share}
    if not stated & {"colour", "shape", "motion"}:
        stated |= {"colour", "motion"}

    subject = _subject(say, body, stated)
    verb = _motion(say, body) if "motion" in stated else ""
    place = say("background", scene.background) if "background" in stated else ""
    text = _sentence(rng, subject, verb, place)
    if "sound" in stated:
        frames = SOUND_FRAMES[_sound_frame(body)]
        text += _pick(rng, frames).format(s=say("sound", sound_kind(body)))
    return Caption(text + ".", frozenset(stated))


def sound_kind(body: Body) -> str:
    """What a body sounds like: the material of its impacts, "rumble", "scrape" or "beep"."""
    if body.motion in ("bounce", "fall"):
        return body.material
    if body.motion == "pulse":
        return "beep"
    return "rumble" if body.shape in ROUND else "scrape"


class _Speaker:
    """Draws a phrase for a word; keeps to one vocabulary."""

    def __init__(self, rng: np.random.Generator, vocabulary: Vocabulary):
        self.rng, self.vocabulary = rng, vocabulary

    def __call__(self, what: str, word: str) -> str:
        table = HELD_OUT if self.vocabulary == "held_out" else WORDS
        return _pick(self.rng, table[what][word])


def _subject(say: _Speaker, body: Body, stated: set[str]) -> str:
    words = [
        say(what, getattr(body, what)) for what in ("size", "colour", "material") if what in stated
    ]
    words.append(
        say("shape", body.shape) if "shape" in stated else _pick(say.rng, ("object", "thing"))
    )
    return " ".join(words)


def _motion(say: _Speaker, body: Body) -> str:
    rolls = ("rolls", "rolls", "moves") if body.shape in ROUND else ("slides", "slides", "moves")
    return say("motion", body.motion).format(rolls=_pick(say.rng, rolls))


def _sound_frame(body: Body) -> str:
    return {"bounce": "impact", "fall": "single", "pulse": "pulse"}.get(body.motion, "friction")


def _sentence(rng: np.random.Generator, subject: str, verb: str, place: str) -> str:
    """Object, motion and place in one of several orders, without the full stop."""
    a_subject = ("an " if subject[0] in "aeiou" else "a ") + subject
    if not verb:
        text = _pick(rng, ("{a}", "A clip of {a}", "A video of {a}", "There is {a}"))
        return (_capital(text.format(a=a_subject)) + " " + place).strip()
    if place:
        return _capital(
            _pick(
                rng,
                ("{a} {v} {p}", "{p}, {a} {v}", "{a} {v} {p}", "A video of {a} that {v} {p}"),
            ).format(a=a_subject, v=verb, p=place)
        )
    text = _pick(
        rng, ("{a} {v}", "{a} {v}", "{s} {v}", "A clip of {a} that {v}", "There is {a} that {v}")
    )
    return _capital(text.format(a=a_subject, s=subject, v=verb))


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]
