"""Clips of the model in training, made by the pipelines that will run it: MP4 and contact sheet.

The texts are encoded before the transformer is loaded, so that a large text encoder never shares
the card with it. The pipelines are lent the very network that is being trained.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from aiprod_core.components import conditioning
from aiprod_core.errors import InputError
from aiprod_core.loader import networks
from aiprod_pipelines import encoding, media, stages
from aiprod_pipelines.clip import Clip
from aiprod_pipelines.components import ModelSet
from aiprod_pipelines.ic_lora import ICLoraPipeline
from aiprod_pipelines.pipeline import Pipeline
from aiprod_pipelines.progress import Progress
from aiprod_pipelines.request import (
    ControlCondition,
    GenerationRequest,
    ImageCondition,
    PerModality,
)
from aiprod_pipelines.text_to_audio import TextToAudioPipeline
from aiprod_pipelines.ti2vid_one_stage import TI2VidOneStagePipeline
from aiprod_pipelines.tiles import free_memory
from aiprod_trainer.modes import tensor_name
from aiprod_trainer.training_config import TrainingConfig, ValidationSample

File = tuple[Path, np.ndarray]
GEMMA_BYTES = 26e9  # in bfloat16, where only a hub id is known


class KnownTexts:
    """Stands in for a text encoder: texts that were encoded beforehand, kept in RAM."""

    def __init__(self, encoder: Any, texts: Sequence[str]):
        self._known = {}
        for text in dict.fromkeys(texts):
            hidden, mask = encoder.encode([text])
            self._known[text] = hidden.cpu(), mask.cpu()

    def encode(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        hidden, mask = zip(*(self._known[text] for text in texts), strict=True)
        return torch.cat(hidden), torch.cat(mask)


class Validation:
    """The samples of a configuration as requests, checked before the training starts."""

    def __init__(
        self,
        config: TrainingConfig,
        models: ModelSet,
        requests: list[tuple[GenerationRequest, ValidationSample]],
        reference_factors: tuple[int, int],
    ):
        self.config, self.models, self.requests = config, models, requests
        self.reference_factors = reference_factors

    @classmethod
    def prepare(
        cls, config: TrainingConfig, device: torch.device, reference_factors: tuple[int, int]
    ) -> "Validation | None":
        """None without samples. Raises InputError for a request that no pipeline could run.

        `reference_factors` say by how much references are smaller in space and in time.
        """
        settings = config.validation
        prompts = tuple(ValidationSample(prompt=prompt) for prompt in settings.prompts)
        samples = settings.samples + prompts
        if not samples or settings.interval is None:
            return None
        model = config.model
        precision = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}
        parts = [path for path in (model.video_vae_path, model.audio_vae_path) if path is not None]
        models = ModelSet.open(
            model.model_path,
            text_encoder=model.text_encoder_path,
            device=str(device),
            dtype=precision[config.acceleration.mixed_precision_mode],
            other_parts=parts,
        )
        pipeline = _pipeline(config, models)
        requests = [(pipeline.resolve(_request(config, s)), s) for s in samples]
        texts = [t for r, _ in requests for t in (r.text, r.negative_prompt or "")]
        models.use("text_encoder", _encoded(models, texts))
        return cls(config, models, requests, reference_factors)

    @torch.no_grad()
    def run(self, transformer: nn.Module, folder: Path, step: int, writes: bool) -> list[File]:
        """Makes all clips by the network as it is now; where it `writes`, their files.

        Every process of a sharded network takes part, and one writes. The network is left in the
        mode it was in.
        """
        is_sound_alone = self.config.mode.video is None
        self.models.use("audio transformer" if is_sound_alone else "transformer", transformer)
        pipeline = _pipeline(self.config, self.models)
        was_training = transformer.training
        transformer.eval()
        files: list[File] = []
        for number, (request, sample) in enumerate(self.requests):
            if sample.reference is not None:
                clip = self._follow(request, sample)
            else:
                clip = pipeline.run(request)
            if not writes:
                continue
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"step-{step:06d}-{number}.{'wav' if is_sound_alone else 'mp4'}"
            clip.save(path)
            files.append((path, _write_sheet(path, clip)))
        transformer.train(was_training)
        return files

    @torch.inference_mode()
    def _follow(self, request: GenerationRequest, sample: ValidationSample) -> Clip:
        """One guided stage with the reference beside the clip, as an IC-LoRA is trained."""
        models, progress = self.models, Progress()
        generators = stages.window_generators(models, request)
        contexts = encoding.encode_prompts(models, request, progress)
        images = encoding.encode_images(models, request, request.images, progress)
        states = stages.add_images(stages.initial_states(models, request), images)
        assert sample.reference is not None and states.video is not None
        assert states.video_grid is not None
        downscale, temporal_scale = self.reference_factors
        control = ControlCondition(sample.control, sample.reference)
        latent = ICLoraPipeline(models).encode_reference(
            request, control, downscale, temporal_scale, progress
        )
        video = conditioning.append_reference_video(
            states.video,
            states.video_grid,
            latent,
            downscale=downscale,
            temporal_scale=temporal_scale,
        )
        windows = stages.denoise(
            models, request, replace(states, video=video), contexts, generators, progress
        )
        return Clip("validation", models, request, stages.finished(windows), progress)


def _encoded(models: ModelSet, texts: Sequence[str]) -> KnownTexts:
    """On the model's device where the encoder's files fit into its free memory, else on the CPU."""
    source = Path(models.text_encoder_source or "")
    size = sum(file.stat().st_size for file in source.glob("*.safetensors")) or GEMMA_BYTES
    device = models.device if size < free_memory(models.device) else torch.device("cpu")
    encoder = networks.load_text_encoder(
        models.checkpoint, models.text_encoder_source, device=device
    )
    return KnownTexts(encoder, texts)


def _pipeline(config: TrainingConfig, models: ModelSet) -> Pipeline:
    is_sound_alone = config.mode.video is None
    return TextToAudioPipeline(models) if is_sound_alone else TI2VidOneStagePipeline(models)


def _request(config: TrainingConfig, sample: ValidationSample) -> GenerationRequest:
    settings, mode = config.validation, config.mode
    has_references = mode.video is not None and any(
        condition.type == "reference" and condition.probability == 1
        for condition in mode.video.conditions
    )
    if has_references and sample.reference is None:
        raise InputError(
            f'validation: "{sample.prompt}" needs a reference, since the training always shows '
            f"{tensor_name('video', None, 'reference')}; give samples with reference: VIDEO."
        )
    width, height, num_frames = sample.video_dims or settings.video_dims or (None, None, None)
    pairs: dict[str, Any] = {}
    for name, video, audio in (
        ("cfg_scale", settings.video_cfg_scale, settings.audio_cfg_scale),
        ("stg_scale", settings.video_stg_scale, settings.audio_stg_scale),
    ):
        if video is not None or audio is not None:
            both = [value for value in (video, audio) if value is not None]
            pairs[name] = PerModality(
                both[0] if video is None else video, both[-1] if audio is None else audio
            )
    return GenerationRequest(
        prompt=sample.prompt,
        negative_prompt=settings.negative_prompt,
        seed=settings.seed if sample.seed is None else sample.seed,
        width=width,
        height=height,
        num_frames=num_frames,
        frame_rate=settings.frame_rate or config.data.frame_rate,
        num_inference_steps=settings.inference_steps,
        rescale_scale=_both(settings.guidance_rescale),
        modality_scale=_both(settings.modality_scale),
        stg_blocks=settings.stg_blocks,
        images=() if sample.image is None else (ImageCondition(sample.image),),
        audio=sample.audio,
        generate_audio=settings.generate_audio and mode.audio is not None,
        **pairs,
    )


def _both(value: float | None) -> PerModality | None:
    return None if value is None else PerModality(value, value)


def _write_sheet(path: Path, clip: Clip) -> np.ndarray:
    from aiprod_trainer.world.contact_sheet import contact_sheet, write_png  # slow to import

    sound = clip.audio or media.Audio(np.zeros((1, 16000), dtype=np.float32), 16000)
    if clip.latents.video is None:
        frames = np.zeros((1, 16, 16, 3), dtype=np.uint8)
        fps = 1 / max(1e-3, sound.samples.shape[1] / sound.sample_rate)
    else:
        frames = torch.cat(list(clip.frames())).numpy()
        fps = clip.request.shape.fps
    sheet = contact_sheet(
        frames,
        sound.samples,
        title=clip.request.prompt,
        sample_rate=sound.sample_rate,
        fps=fps,
    )
    write_png(path.with_suffix(".png"), sheet)
    return sheet
