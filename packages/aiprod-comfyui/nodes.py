"""The nodes. Each is a dict of inputs and one function; what they do is in exchange.py.

Nothing heavy is imported before a node runs: ComfyUI imports this file when it starts. A number
that is 0 by default, and the choice "default", stand for the model's own setting.
"""

from typing import Any

from aiprod_pipelines.catalog import PIPELINES

MODEL, TEXT, CONDITIONS = "AIPROD_MODEL", "AIPROD_TEXT", "AIPROD_CONDITIONS"
OWN = "default"
EDITS = ("retake", "extend")  # have nodes of their own, for they start from a VIDEO

MAX_SEED = 2**53 - 1  # the largest that the page's numbers hold exactly
SEED = ("INT", {"default": 7, "min": 0, "max": MAX_SEED, "control_after_generate": True})
STEPS = ("INT", {"default": 0, "min": 0, "max": 1000, "tooltip": "0: the model's own."})
CFG = (
    "FLOAT",
    {
        "default": 0.0, "min": 0.0, "max": 100.0, "step": 0.1,
        "tooltip": "How closely the prompt is kept to; 1: no guidance, 0: the model's own.",
    },
)  # fmt: skip
TIME = {"default": 0.0, "min": 0.0, "max": 86_400.0, "step": 0.01}
STRENGTH = ("FLOAT", {"default": 1.0, "min": 0.0, "max": 1.0, "step": 0.05})


class LoadModel:
    """Reads the headers of a model; weights are read by the stage that needs them."""

    CATEGORY, FUNCTION = "AIPROD", "load"
    RETURN_TYPES = (MODEL,)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        from aiprod_core.quantization.schemes import SCHEMES
        from aiprod_pipelines.components import DTYPE_NAMES, OFFLOADS

        return {
            "required": {
                "model": (["nano", *_files("checkpoints"), *_files("diffusion_models")],),
                "dtype": ([OWN, *DTYPE_NAMES],),
                "quantization": ([OWN, *SCHEMES],),
                "offload": (list(OFFLOADS), {"default": "none"}),
            },
            "optional": {
                "text_encoder": (
                    "STRING",
                    {"default": "", "tooltip": "A folder or hub repository; empty: the model's."},
                )
            },
        }

    def load(
        self, model: str, dtype: str, quantization: str, offload: str, text_encoder: str = ""
    ) -> tuple[Any]:
        from . import exchange

        options = {
            "model": _path_of(model, "checkpoints", "diffusion_models"),
            "dtype": _own(dtype),
            "quantization": _own(quantization),
            "offload": offload,
            "text_encoder": text_encoder.strip() or None,
            "device": exchange.device(),
        }
        loaded = exchange.Model(options)
        loaded.pipeline("one-stage")  # what is wrong with the model is said here
        return (loaded,)


class LoadLora:
    """Adds a LoRA to a model; its weights are added when a clip is sampled."""

    CATEGORY, FUNCTION = "AIPROD", "load"
    RETURN_TYPES = (MODEL,)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        strength = {"default": 1.0, "min": -100.0, "max": 100.0, "step": 0.05}
        return {
            "required": {
                "model": (MODEL,),
                "lora": (_files("loras"),),
                "strength": ("FLOAT", strength),
            }
        }

    def load(self, model: Any, lora: str, strength: float) -> tuple[Any]:
        return (model.with_lora(_path_of(lora, "loras"), strength),)


class TextEncode:
    """What the clip shows and how it sounds, encoded once and kept between runs."""

    CATEGORY, FUNCTION = "AIPROD", "encode"
    RETURN_TYPES = (TEXT,)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        words = {"default": "", "multiline": True}
        own = {**words, "tooltip": "What to keep out; empty: the model's own list of defects."}
        return {
            "required": {"model": (MODEL,), "prompt": ("STRING", words)},
            "optional": {
                "audio_prompt": ("STRING", {**words, "tooltip": "How it sounds."}),
                "negative_prompt": ("STRING", own),
            },
        }

    def encode(
        self, model: Any, prompt: str, audio_prompt: str = "", negative_prompt: str = ""
    ) -> tuple[Any]:
        from aiprod_pipelines import encoding
        from aiprod_pipelines.request import GenerationRequest

        from . import exchange

        text = exchange.Text(prompt, negative_prompt.strip() or None, audio_prompt.strip() or None)
        pipeline = model.pipeline("one-stage")
        request = pipeline.resolve(GenerationRequest(**text._asdict()))
        if pipeline.models.cache is not None:  # else it would be forgotten at once
            encoding.encode_prompts(pipeline.models, request, exchange.NodeProgress())
        return (text,)


class AddImage:
    """Shows an image at a frame of the clip: of its own latent, as for a first frame."""

    CATEGORY, FUNCTION = "AIPROD/conditions", "add"
    RETURN_TYPES = (CONDITIONS,)
    FIELD = "images"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "image": ("IMAGE",),
                "frame": ("INT", {"default": 0, "min": 0, "max": 100_000}),
                "strength": STRENGTH,
            },
            "optional": {"conditions": (CONDITIONS,)},
        }

    def add(
        self, image: Any, frame: int, strength: float, conditions: tuple[Any, ...] = ()
    ) -> tuple[Any]:
        from . import exchange

        settings = {"frame": frame, "strength": strength}
        return ((*conditions, exchange.Condition(self.FIELD, image, settings)),)


class AddKeyframe(AddImage):
    """Passes through an image at any frame; for the keyframes pipeline."""

    FIELD = "keyframes"


class AddControl:
    """Follows a picture or a batch of frames through an IC-LoRA; for the ic-lora pipeline.

    Frames play at the clip's rate.
    """

    CATEGORY, FUNCTION = "AIPROD/conditions", "add"
    RETURN_TYPES = (CONDITIONS,)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        from aiprod_pipelines.request import CONTROL_KINDS

        return {
            "required": {
                "images": ("IMAGE",),
                "kind": (list(CONTROL_KINDS),),
                "strength": STRENGTH,
            },
            "optional": {"conditions": (CONDITIONS,)},
        }

    def add(
        self, images: Any, kind: str, strength: float, conditions: tuple[Any, ...] = ()
    ) -> tuple[Any]:
        from . import exchange

        settings = {"kind": kind, "strength": strength}
        return ((*conditions, exchange.Condition("controls", images, settings)),)


class AddAudio:
    """A sound that the picture follows and the clip keeps."""

    CATEGORY, FUNCTION = "AIPROD/conditions", "add"
    RETURN_TYPES = (CONDITIONS,)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        start = {**TIME, "tooltip": "Seconds of the sound that are skipped."}
        return {
            "required": {"audio": ("AUDIO",), "start_time": ("FLOAT", start)},
            "optional": {"conditions": (CONDITIONS,)},
        }

    def add(self, audio: Any, start_time: float, conditions: tuple[Any, ...] = ()) -> tuple[Any]:
        from . import exchange

        settings = {"audio_start_time": start_time}
        return ((*conditions, exchange.Condition("audio", audio, settings)),)


class Sample:
    """Makes a clip's latents by one of the pipelines."""

    CATEGORY, FUNCTION = "AIPROD", "sample"
    RETURN_TYPES = ("LATENT",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        size = {"default": 0, "min": 0, "max": 8192, "step": 8, "tooltip": "0: the model's own."}
        frames = {"default": 0, "min": 0, "max": 100_000, "tooltip": "0: the model's own."}
        rate = {"default": 0.0, "min": 0.0, "max": 240.0, "tooltip": "0: the model's own."}
        return {
            "required": {
                "model": (MODEL,),
                "text": (TEXT,),
                "pipeline": ([name for name in PIPELINES if name not in EDITS],),
                "seed": SEED,
                "width": ("INT", size),
                "height": ("INT", size),
                "num_frames": ("INT", frames),
                "frame_rate": ("FLOAT", rate),
                "steps": STEPS,
                "cfg_scale": CFG,
            },
            "optional": {"conditions": (CONDITIONS,), **_choices()},
        }

    def sample(
        self,
        model: Any,
        text: Any,
        pipeline: str,
        seed: int,
        width: int,
        height: int,
        num_frames: int,
        frame_rate: float,
        steps: int,
        cfg_scale: float,
        conditions: tuple[Any, ...] = (),
        **choices: str,
    ) -> tuple[dict[str, Any]]:
        from . import exchange

        fps = frame_rate or model.pipeline(pipeline).models.profile.frame_rate
        fields = exchange.request_fields(conditions, fps)
        fields |= {"width": width or None, "height": height or None, "frame_rate": fps}
        fields["num_frames"] = num_frames or None
        return (_run(model, text, pipeline, seed, steps, cfg_scale, choices, fields),)


class Retake:
    """Makes a span of a clip anew: its picture, its sound or both."""

    CATEGORY, FUNCTION = "AIPROD", "retake"
    RETURN_TYPES = ("LATENT",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        from aiprod_pipelines.request import MODALITIES

        end = {**TIME, "tooltip": "Seconds; 0: the clip's end."}
        return {
            "required": {
                "model": (MODEL,),
                "text": (TEXT,),
                "video": ("VIDEO",),
                "start_time": ("FLOAT", {**TIME, "tooltip": "Seconds."}),
                "end_time": ("FLOAT", end),
                "modality": (list(MODALITIES), {"default": "both"}),
                "seed": SEED,
                "steps": STEPS,
                "cfg_scale": CFG,
            },
            "optional": _choices(),
        }

    def retake(
        self,
        model: Any,
        text: Any,
        video: Any,
        start_time: float,
        end_time: float,
        modality: str,
        seed: int,
        steps: int,
        cfg_scale: float,
        **choices: str,
    ) -> tuple[dict[str, Any]]:
        from . import exchange

        fields = {"source": exchange.clip_file(video), "modality": modality}
        fields |= {"start_time": start_time, "end_time": end_time or None}
        return (_run(model, text, "retake", seed, steps, cfg_scale, choices, fields),)


class Extend:
    """Goes on where a clip ends, picture and sound."""

    CATEGORY, FUNCTION = "AIPROD", "extend"
    RETURN_TYPES = ("LATENT",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        tooltip = "Of the whole clip; 0: the source and the model's usual length."
        frames = {"default": 0, "min": 0, "max": 100_000, "tooltip": tooltip}
        return {
            "required": {
                "model": (MODEL,),
                "text": (TEXT,),
                "video": ("VIDEO",),
                "num_frames": ("INT", frames),
                "seed": SEED,
                "steps": STEPS,
                "cfg_scale": CFG,
            },
            "optional": _choices(),
        }

    def extend(
        self,
        model: Any,
        text: Any,
        video: Any,
        num_frames: int,
        seed: int,
        steps: int,
        cfg_scale: float,
        **choices: str,
    ) -> tuple[dict[str, Any]]:
        from . import exchange

        fields = {"source": exchange.clip_file(video), "num_frames": num_frames or None}
        return (_run(model, text, "extend", seed, steps, cfg_scale, choices, fields),)


class Decode:
    """A clip's pictures, its sound and its rate, for Create Video and all other nodes."""

    CATEGORY, FUNCTION = "AIPROD", "decode"
    RETURN_TYPES, RETURN_NAMES = ("IMAGE", "AUDIO", "FLOAT"), ("images", "audio", "fps")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"samples": ("LATENT",)}}

    def decode(self, samples: dict[str, Any]) -> tuple[Any, Any, float]:
        from . import exchange

        clip = exchange.to_clip(samples)
        fps = clip.request.shape.fps
        return exchange.to_images(clip), exchange.to_audio(clip), fps


class DecodeAudio:
    """A clip's sound alone."""

    CATEGORY, FUNCTION = "AIPROD", "decode"
    RETURN_TYPES = ("AUDIO",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"samples": ("LATENT",)}}

    def decode(self, samples: dict[str, Any]) -> tuple[Any]:
        from . import exchange

        return (exchange.to_audio(exchange.to_clip(samples)),)


class Save:
    """An MP4 in ComfyUI's output folder that carries its recipe: see `aiprod inspect`."""

    CATEGORY, FUNCTION = "AIPROD", "save"
    RETURN_TYPES = ()
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        prefix = {"default": "video/aiprod", "tooltip": "As in Save Video."}
        return {
            "required": {"samples": ("LATENT",), "filename_prefix": ("STRING", prefix)},
        }

    def save(self, samples: dict[str, Any], filename_prefix: str) -> dict[str, Any]:
        from . import exchange

        clip = exchange.to_clip(samples)
        height, width = clip.size
        path, subfolder = exchange.output_path(filename_prefix, width, height)
        clip.save(path)
        shown = {"filename": path.name, "subfolder": subfolder, "type": "output"}
        return {"ui": {"images": [shown], "animated": (True,)}}


NODE_CLASS_MAPPINGS = {
    "AIPRODLoadModel": LoadModel,
    "AIPRODLoadLora": LoadLora,
    "AIPRODTextEncode": TextEncode,
    "AIPRODAddImage": AddImage,
    "AIPRODAddKeyframe": AddKeyframe,
    "AIPRODAddControl": AddControl,
    "AIPRODAddAudio": AddAudio,
    "AIPRODSample": Sample,
    "AIPRODRetake": Retake,
    "AIPRODExtend": Extend,
    "AIPRODDecode": Decode,
    "AIPRODDecodeAudio": DecodeAudio,
    "AIPRODSave": Save,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "AIPRODLoadModel": "AIPROD Load Model",
    "AIPRODLoadLora": "AIPROD Load LoRA",
    "AIPRODTextEncode": "AIPROD Text Encode",
    "AIPRODAddImage": "AIPROD Image at a Frame",
    "AIPRODAddKeyframe": "AIPROD Keyframe",
    "AIPRODAddControl": "AIPROD Control Reference",
    "AIPRODAddAudio": "AIPROD Sound to Follow",
    "AIPRODSample": "AIPROD Sample",
    "AIPRODRetake": "AIPROD Retake",
    "AIPRODExtend": "AIPROD Extend",
    "AIPRODDecode": "AIPROD Decode",
    "AIPRODDecodeAudio": "AIPROD Decode Audio",
    "AIPRODSave": "AIPROD Save with Recipe",
}


# Parts.


def _choices() -> dict[str, Any]:
    """Optional settings that are fields of a request by the same names."""
    from aiprod_core.components.samplers import SAMPLERS
    from aiprod_pipelines.request import CAMERAS, SCHEDULE_NAMES, STEP_CACHES

    return {
        "sampler": ([OWN, *SAMPLERS],),
        "schedule": ([OWN, *SCHEDULE_NAMES],),
        "step_cache": (list(STEP_CACHES),),
        "camera": ([OWN, *CAMERAS],),
    }


def _run(
    model: Any,
    text: Any,
    pipeline: str,
    seed: int,
    steps: int,
    cfg_scale: float,
    choices: dict[str, str],
    fields: dict[str, Any],
) -> dict[str, Any]:
    from aiprod_pipelines.request import GenerationRequest

    from . import exchange

    fields |= {"seed": seed, "num_inference_steps": steps or None, "loras": model.loras}
    fields |= {name: choice for name, choice in choices.items() if choice != OWN}
    if cfg_scale:
        fields["cfg_scale"] = cfg_scale
    request = GenerationRequest(**text._asdict(), **fields)
    exchange.make_room()
    return exchange.to_latent(
        model.pipeline(pipeline).run(request, progress=exchange.NodeProgress())
    )


def _own(choice: str) -> str | None:
    return None if choice == OWN else choice


def _files(kind: str) -> list[str]:
    """Files of one of ComfyUI's model folders, as its own loaders list them."""
    try:
        import folder_paths  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:  # without ComfyUI
        return []
    return list(folder_paths.get_filename_list(kind))


def _path_of(name: str, *kinds: str) -> str:
    """Where a listed file lies; another name, such as nano, is its own."""
    found = next((kind for kind in kinds if name in _files(kind)), None)
    if found is None:
        return name
    import folder_paths  # pyright: ignore[reportMissingImports]

    return str(folder_paths.get_full_path_or_raise(found, name))
