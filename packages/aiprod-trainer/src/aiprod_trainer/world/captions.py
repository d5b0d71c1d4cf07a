"""Words for a scene: short and long, in many phrasings, never saying what is not true.

A caption is put together from phrases for the object, its motion, the place and the sound; any of
them may be left out, and `Caption.stated` records what was said so that only that is judged.
`HELD_OUT` holds synonyms that training captions never use: prompts written with them test whether
meaning, not spelling, was learnt.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from aiprod_trainer.world.scene import FIGURE, ROUND, Body, Scene

Vocabulary = Literal["train", "held_out"]


@dataclass(frozen=True)
class Caption:
    """The text and the attributes it names: colour, shape, size, material, motion, ..."""

    text: str
    stated: frozenset[str]


WORDS: dict[str, dict[str, tuple[str, ...]]] = {
    # Many words for one colour or shape: with a name alone a model learns its spelling, not its
    # meaning, and so does it with six.
    "colour": {
        "red": (
            "red",
            "red",
            "bright red",
            "cherry-red",
            "ruby",
            "tomato-red",
            "blood-red",
            "vermilion",
            "brick-red",
            "wine-red",
            "poppy-red",
            "strawberry-red",
            "carmine",
            "fire-engine red",
            "cardinal-red",
        ),
        "orange": (
            "orange",
            "orange",
            "bright orange",
            "burnt orange",
            "pumpkin-coloured",
            "carrot-coloured",
            "apricot",
            "marigold",
            "clementine-coloured",
            "terracotta",
            "papaya-coloured",
            "flame-orange",
            "ginger",
        ),
        "yellow": (
            "yellow",
            "yellow",
            "bright yellow",
            "canary-yellow",
            "sunflower-yellow",
            "mustard-yellow",
            "butter-yellow",
            "banana-yellow",
            "corn-yellow",
            "honey-yellow",
            "daffodil-yellow",
            "saffron",
            "straw-coloured",
        ),
        "green": (
            "green",
            "green",
            "grass-green",
            "forest green",
            "lime-green",
            "leaf-green",
            "olive",
            "moss-green",
            "pine-green",
            "apple-green",
            "shamrock-green",
            "fern-green",
            "malachite",
            "avocado-coloured",
        ),
        "cyan": (
            "cyan",
            "cyan",
            "light cyan",
            "pale cyan",
            "teal",
            "blue-green",
            "cerulean",
            "lagoon-coloured",
            "ice-blue",
            "seafoam-coloured",
            "peacock-coloured",
        ),
        "blue": (
            "blue",
            "blue",
            "deep blue",
            "navy blue",
            "royal blue",
            "ocean-blue",
            "azure",
            "indigo",
            "ultramarine",
            "midnight blue",
            "denim-blue",
            "lapis-coloured",
            "marine blue",
        ),
        "purple": (
            "purple",
            "purple",
            "dark purple",
            "lilac",
            "lavender-coloured",
            "grape-coloured",
            "mauve",
            "amethyst",
            "aubergine-coloured",
            "orchid-purple",
            "mulberry-coloured",
            "heather-coloured",
            "wisteria-coloured",
        ),
        "pink": (
            "pink",
            "pink",
            "light pink",
            "bubblegum pink",
            "hot pink",
            "blush-pink",
            "flamingo-pink",
            "coral-pink",
            "fuchsia",
            "carnation-pink",
            "candy-pink",
            "peony-pink",
            "raspberry-pink",
        ),
        "white": (
            "white",
            "white",
            "plain white",
            "chalk-white",
            "milk-white",
            "pearl-white",
            "cloud-white",
            "paper-white",
            "alabaster",
            "bone-white",
            "frost-white",
            "porcelain-white",
            "lily-white",
        ),
        "black": (
            "black",
            "black",
            "pitch-black",
            "coal-black",
            "raven-black",
            "inky black",
            "charcoal",
            "obsidian",
            "onyx",
            "soot-black",
            "tar-black",
            "sable",
        ),
    },
    "shape": {
        "ball": (
            "ball",
            "ball",
            "ball",
            "round ball",
            "globe",
            "beach ball",
            "football",
            "bowling ball",
            "bead",
            "balloon",
        ),
        "cube": (
            "cube",
            "cube",
            "cube",
            "box",
            "crate",
            "dice",
            "cubic box",
            "parcel",
            "chest",
            "four-cornered box",
        ),
        "star": (
            "star",
            "star",
            "star",
            "five-pointed star",
            "star shape",
            "starfish",
            "star-shaped toy",
            "sheriff's star",
            "pentagram",
        ),
        "triangle": (
            "triangle",
            "triangle",
            "triangle",
            "triangular block",
            "triangular piece",
            "wedge",
            "arrowhead",
            "three-cornered piece",
            "triangular shape",
            "slice of pizza",
        ),
        "ring": (
            "ring",
            "ring",
            "ring",
            "round loop",
            "circular band",
            "bracelet",
            "bagel",
            "tyre",
            "bangle",
            "wheel rim",
        ),
        "heart": (
            "heart",
            "heart",
            "heart",
            "heart shape",
            "heart-shaped toy",
            "heart symbol",
            "heart-shaped box",
            "heart-shaped cushion",
        ),
        "figure": ("stick figure", "stick man", "stickman"),
    },
    "size": {
        "small": ("small", "little", "tiny", "miniature", "wee"),
        "medium": ("medium-sized", "mid-sized", "middle-sized", "normal-sized", "medium"),
        "large": ("large", "big", "rather large", "fairly big", "hefty"),
        "huge": ("huge", "very large", "giant", "colossal", "massive", "very big"),
    },
    "material": {
        "rubber": ("rubber", "soft rubber", "bouncy rubber", "india-rubber"),
        "wood": ("wooden", "carved wooden", "beech-wood", "plywood", "pine-wood"),
        "metal": ("metal", "steel", "brass", "chrome", "tin"),
        "glass": ("glass", "clear glass", "blown-glass", "see-through glass"),
    },
    "background": {
        "grey": (
            "in a grey room",
            "in front of a grey wall",
            "against a plain grey background",
            "in an ashen room",
        ),
        "cream": (
            "in a cream-coloured room",
            "in front of a cream wall",
            "on a brown floor before a cream wall",
        ),
        "sky": ("on the grass under a blue sky", "on a green meadow", "outside under a blue sky"),
        "night": (
            "at night",
            "under a dark night sky",
            "in the dark of the night",
            "late at night",
        ),
        "sunset": (
            "at sunset",
            "under an orange evening sky",
            "in the glow of the sunset",
            "at sundown",
        ),
        "sand": ("on the sand", "on a sandy beach", "on the beach", "on a sandy shore"),
        "brick": ("in front of a brick wall", "before a wall of bricks"),
        "checker": ("in front of a checkered wall", "before a chequerboard wall"),
        "curtain": ("in front of a striped curtain", "before a teal curtain"),
        "hills": ("in front of rolling hills", "in a landscape of hills"),
    },
    "motion": {
        "bounce": (
            "bounces up and down",
            "bounces on the floor",
            "keeps bouncing",
            "is dropped and bounces",
            "jumps up and down",
            "drops and bounces back up",
            "hops up and down again and again",
        ),
        "roll left": (
            "{rolls} from right to left",
            "{rolls} to the left",
            "{rolls} leftwards",
            "{rolls} towards the left side",
            "{rolls} left across the floor",
            "{rolls} over to the left-hand side",
            "goes from right to left",
        ),
        "roll right": (
            "{rolls} from left to right",
            "{rolls} to the right",
            "{rolls} rightwards",
            "{rolls} towards the right side",
            "{rolls} right across the floor",
            "{rolls} over to the right-hand side",
            "goes from left to right",
        ),
        "fall": (
            "falls and stays on the floor",
            "falls down once and lies still",
            "drops to the floor and stays there",
            "falls to the ground without bouncing",
            "lands on the floor and stops there",
            "comes down and stays where it lands",
        ),
        "pulse": (
            "pulses",
            "grows and shrinks",
            "swells and shrinks again",
            "hovers and pulses",
            "floats in the air, growing and shrinking",
            "becomes bigger and smaller",
            "inflates and deflates",
        ),
        "pendulum": (
            "swings to and fro on a rope",
            "swings like a pendulum",
            "hangs from a rope and swings",
        ),
        "spin": ("spins in the air", "spins around", "turns round and round"),
        "walk left": ("walks to the left", "walks from right to left", "walks leftwards"),
        "walk right": ("walks to the right", "walks from left to right", "walks rightwards"),
        "collide": ("bumps into {other}", "collides with {other}", "crashes into {other}"),
    },
    # Keyed by what is heard: the material of an impact, or the kind of a longer sound.
    "sound": {
        "rubber": (
            "a dull thud",
            "a low thud",
            "a deep, soft thump",
            "a dull boom",
            "a soft bump",
            "a thump",
            "a muted thud",
            "a plop",
        ),
        "wood": (
            "a wooden knock",
            "a dry knock",
            "a hollow wooden clack",
            "a hollow tock",
            "a rap",
            "a knock on wood",
            "a woody clunk",
            "a clack",
        ),
        "metal": (
            "a metallic ringing",
            "a ringing metal clang",
            "a bell-like ringing",
            "the clang of a bell",
            "a clang",
            "a ringing of steel",
            "the ring of a bell",
        ),
        "glass": (
            "a bright glassy clink",
            "a high clink",
            "a glassy ping",
            "a high ding",
            "a clink",
            "the clink of a wine glass",
            "a bright ping",
        ),
        "rumble": (
            "a low rumble",
            "a deep rolling rumble",
            "a rumbling noise",
            "a rolling sound",
            "a rumble",
            "the rumble of distant thunder",
            "a deep murmur",
        ),
        "scrape": (
            "a scraping noise",
            "a hissing scrape",
            "a rough scratching noise",
            "the noise of dragging",
            "a scrape",
            "the scrape of sandpaper",
            "a harsh scratching",
        ),
        "beep": (
            "a beep",
            "an electronic beep",
            "a clear beep",
            "a blip",
            "a short pure tone",
            "a beeping tone",
            "a computer beep",
            "a short whistle",
        ),
        "steps": ("footsteps", "the sound of footsteps"),
        "whoosh": ("a whoosh", "a soft whoosh of air"),
        "whirr": ("a whirring buzz", "a buzzing noise"),
    },
    "camera": {
        "static": ("the camera stands still", "static camera", "a fixed camera"),
        "dolly in": ("the camera moves in", "the camera dollies in", "the camera gets closer"),
        "dolly out": ("the camera moves out", "the camera dollies out", "the camera backs away"),
        "dolly left": ("the camera moves left", "the camera dollies to the left"),
        "dolly right": ("the camera moves right", "the camera dollies to the right"),
        "jib up": ("the camera rises", "the camera jibs up", "the camera moves up"),
        "jib down": ("the camera sinks", "the camera jibs down", "the camera moves down"),
    },
    "ambience": {
        "silence": ("the room is quiet", "no other sound"),
        "rain": ("rain falls in the background", "the hiss of rain"),
        "wind": ("wind blows in the background", "the sound of wind"),
        "hum": ("a low electric hum in the background", "an engine hums quietly"),
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
        "figure": ("matchstick person", "line-drawn pedestrian"),
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
        "brick": ("before red masonry", "by a wall of masonry"),
        "checker": ("before a tiled board", "by a wall of squares"),
        "curtain": ("before a pleated drape", "by a folded drape"),
        "hills": ("amid mountains", "before a mountain range"),
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
        "pendulum": ("sways from a string", "dangles and sways back and forth"),
        "spin": ("rotates", "twirls on the spot"),
        "walk left": ("strolls towards the left edge", "marches left"),
        "walk right": ("strolls towards the right edge", "marches right"),
        "collide": ("knocks against {other}", "rams {other}"),
    },
    "sound": {
        "rubber": ("a muffled thwack", "a bassy bump"),
        "wood": ("a timber tap", "a clop"),
        "metal": ("a resounding clank", "a gong-like chime"),
        "glass": ("a crystalline tinkle", "a chime of glass"),
        "rumble": ("a low grumble", "a growling noise"),
        "scrape": ("a grating sound", "a rasping sound"),
        "beep": ("a bleep", "a signal tone"),
        "steps": ("footfalls", "the patter of feet"),
        "whoosh": ("a swish", "a rush of air"),
        "whirr": ("a drone", "the purr of a motor"),
    },
    "camera": {
        "static": ("a locked-off shot", "filmed from a tripod"),
        "dolly in": ("a push-in shot", "the view closes in"),
        "dolly out": ("a pull-back shot", "the view widens"),
        "dolly left": ("a leftward tracking shot", "the view glides leftward"),
        "dolly right": ("a rightward tracking shot", "the view glides rightward"),
        "jib up": ("a crane shot upwards", "the view lifts"),
        "jib down": ("a crane shot downwards", "the view lowers"),
    },
    "ambience": {
        "silence": ("in a hushed setting", "otherwise noiseless"),
        "rain": ("a drizzle patters", "a shower outside"),
        "wind": ("a breeze whispers", "gusts of air"),
        "hum": ("a transformer drones faintly", "a faint mains drone"),
    },
}

SOUND_FRAMES = {
    "impact": (", with {s} at each impact", ", landing with {s} each time", ". Each hit makes {s}"),
    "single": (", with {s}", ", landing with {s}", ". It lands with {s}"),
    "pulse": (", with {s} at each pulse", ". Each pulse makes {s}", ", and each pulse gives {s}"),
    "step": (", with {s}", ". One hears {s}"),
    "swing": (", with {s} at each pass", ", making {s} as it passes the lowest point"),
    "clash": (", with {s}", ". They meet with {s}"),
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
    if scene.world != "v1":  # v1 has neither, and its captions stay as they were
        stated |= {what for what in ("camera", "ambience") if rng.random() < 0.2 + 0.6 * detail}
    if body.motion == "collide":
        stated.add("motion")  # or the second object could not be named
    if body.shape == FIGURE:
        stated.discard("material")
    if not stated & {"colour", "shape", "motion"}:
        stated |= {"colour", "motion"}

    subject = _subject(say, body, stated)
    verb = _motion(say, scene, stated) if "motion" in stated else ""
    place = say("background", scene.background) if "background" in stated else ""
    text = _sentence(rng, subject, verb, place)
    if "sound" in stated:
        frames = SOUND_FRAMES[_sound_frame(body)]
        text += _pick(rng, frames).format(s=say("sound", sound_kind(body)))
    text += "."
    for what, word in (("camera", scene.camera), ("ambience", scene.ambience)):
        if what in stated:
            text += f" {_capital(say(what, word))}."
    return Caption(text, frozenset(stated))


def sound_kind(body: Body) -> str:
    """What a body sounds like: the material of its impacts, "rumble", "scrape", "beep", "steps",
    "whoosh" or "whirr"."""
    if body.motion in ("bounce", "fall", "collide"):
        return body.material
    kinds = {"pulse": "beep", "pendulum": "whoosh", "spin": "whirr"}
    kinds |= {"walk left": "steps", "walk right": "steps"}
    if body.motion in kinds:
        return kinds[body.motion]
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


def _motion(say: _Speaker, scene: Scene, stated: set[str]) -> str:
    body = scene.body
    if body.motion == "collide":
        other = _subject(say, scene.bodies[1], stated - {"material"})
        return say("motion", "collide").format(other=_with_article(other))
    rolls = ("rolls", "rolls", "moves") if body.shape in ROUND else ("slides", "slides", "moves")
    return say("motion", body.motion).format(rolls=_pick(say.rng, rolls))


def _sound_frame(body: Body) -> str:
    frames = {"bounce": "impact", "fall": "single", "pulse": "pulse", "pendulum": "swing"}
    frames |= {"walk left": "step", "walk right": "step", "collide": "clash"}
    return frames.get(body.motion, "friction")


def _sentence(rng: np.random.Generator, subject: str, verb: str, place: str) -> str:
    """Object, motion and place in one of several orders, without the full stop."""
    a_subject = _with_article(subject)
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


def _with_article(subject: str) -> str:
    return ("an " if subject[0] in "aeiou" else "a ") + subject


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]
