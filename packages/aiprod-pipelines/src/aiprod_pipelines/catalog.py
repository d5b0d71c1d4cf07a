"""The pipelines by name, and what each is for. Imports no torch, so that help is there at once."""

import difflib
from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from aiprod_pipelines.pipeline import Pipeline


class Entry(NamedTuple):
    module: str  # in aiprod_pipelines; also runs by itself: python -m aiprod_pipelines.MODULE
    class_name: str
    summary: str
    inputs: str  # the flags that make it what it is


PIPELINES = {
    "one-stage": Entry(
        "ti2vid_one_stage",
        "TI2VidOneStagePipeline",
        "Text, or text and images, to a clip with sound at full size in one guided pass.",
        "--image",
    ),
    "two-stages": Entry(
        "ti2vid_two_stages",
        "TI2VidTwoStagesPipeline",
        "Guided at half size, upsampled x2 in latents, refined in 3 distilled steps: large "
        "pictures.",
        "--image",
    ),
    "two-stages-hq": Entry(
        "ti2vid_two_stages_hq",
        "TI2VidTwoStagesHQPipeline",
        "Two stages with the second-order sampler res-2s and the distilled LoRA in both.",
        "--image",
    ),
    "distilled": Entry(
        "distilled",
        "DistilledPipeline",
        "The fast one: a distilled model at half size in 8 fixed steps, then 3 at full size.",
        "--image",
    ),
    "ic-lora": Entry(
        "ic_lora",
        "ICLoraPipeline",
        "Follows a reference video or image (edges, depth, pose, detail) through an IC-LoRA.",
        "--control KIND=PATH, --lora, --image",
    ),
    "keyframes": Entry(
        "keyframe_interpolation",
        "KeyframeInterpolationPipeline",
        "Passes through any number of images at given frames, in two stages.",
        "--keyframe PATH:FRAME",
    ),
    "audio-to-video": Entry(
        "a2vid_two_stage",
        "AudioToVideoPipeline",
        "A picture that follows a given sound, which the clip keeps as it is.",
        "--audio FILE, --image",
    ),
    "retake": Entry(
        "retake",
        "RetakePipeline",
        "Makes a span of an existing clip anew: its picture, its sound or both.",
        "--source CLIP --start-time S --end-time S --modality video|audio|both",
    ),
    "text-to-audio": Entry(
        "text_to_audio",
        "TextToAudioPipeline",
        "Sound alone, from the audio half of the model.",
        "--num-frames and --frame-rate give the length",
    ),
    "extend": Entry(
        "extend",
        "ExtendPipeline",
        "Goes on where an existing clip ends, picture and sound.",
        "--source CLIP --num-frames TOTAL",
    ),
}


def find_pipeline(name: str) -> "type[Pipeline]":
    """The class of a pipeline. Raises InputError naming the nearest one that there is."""
    from aiprod_core.errors import InputError

    entry = PIPELINES.get(name)
    if entry is None:
        near = difflib.get_close_matches(name, PIPELINES, 1, cutoff=0.4)
        hint = f", try {near[0]}" if near else ""
        raise InputError(f"pipeline must be one of {', '.join(PIPELINES)}; got {name}{hint}.")
    return getattr(import_module(f"aiprod_pipelines.{entry.module}"), entry.class_name)
