"""The networks of one model, lent stage by stage.

Opening reads headers only (`model_files`); what cannot work is refused there, before any gigabyte.
"""

import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aiprod_core.errors import InputError
from aiprod_core.kernels import onednn
from aiprod_core.kernels.apply import enable_kernels
from aiprod_core.loader import networks
from aiprod_core.loader.checkpoint import Checkpoint, open_checkpoint
from aiprod_core.loader.lora import Lora, fuse, put_fused
from aiprod_core.loader.offload import BlockStream, stream_from_file, stream_from_memory
from aiprod_core.model.audio_vae import AudioDecoder, AudioEncoder, AudioVAEConfig
from aiprod_core.model.reward import RewardModel
from aiprod_core.model.text_connector import TextProjector
from aiprod_core.model.text_encoder import TextEncoder
from aiprod_core.model.transformer import Transformer, TransformerConfig
from aiprod_core.model.upsampler import LatentUpsampler
from aiprod_core.model.video_vae import VideoDecoder, VideoEncoder
from aiprod_core.model.vocoder import Vocoder, VocoderConfig
from aiprod_core.parallel import WAYS, join
from aiprod_core.quantization.schemes import check_scheme
from aiprod_pipelines import analytics, companions, recipe
from aiprod_pipelines.cache import Cache, open_cache, parse_size
from aiprod_pipelines.model_files import (
    check_supported,
    is_installed,
    read_profile,
    resolve_model,
)
from aiprod_pipelines.request import ModelProfile
from aiprod_pipelines.tiles import free_memory

DTYPE_NAMES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Models up to this size stay in memory between stages and calls; larger ones are freed.
KEEP_LOADED_BYTES = 2 * 2**30

# Fewer weights than this are changed by adapters in 0.2 s, and not remembered.
MIN_MERGED_WEIGHTS = 30_000_000

# Where the networks are while they do not work.
OFFLOADS = {
    "auto": "the first of these that fits, as `aiprod plan` finds",
    "none": "on the device; networks of models over 2 GiB are freed after their stage",
    "model": "in main memory, and on the device for their stage only; on a CPU, freed after it",
    "block": "as model, and the transformer's blocks come from main memory one at a time",
    "disk": "as model, and the transformer's blocks come from the file one at a time",
}


@dataclass
class ModelSet:
    """One model, ready to lend its networks. Build it with `ModelSet.open`."""

    name: str
    checkpoint: Checkpoint
    profile: ModelProfile
    device: torch.device
    dtype: torch.dtype
    text_encoder_source: Path | str | None = None
    keeps_loaded: bool = True
    other_parts: tuple[Path, ...] = ()  # of a split model, given besides `name`
    cache: Cache | None = None  # what earlier runs have computed of prompts and images
    quantization: str | None = None  # of the transformer: one of SCHEMES
    offload: str = "none"  # one of OFFLOADS
    parallel: str = "none"  # how processes share a generation: one of aiprod_core.parallel.WAYS
    max_memory: int | None = None  # bytes that a run may take of the device's memory
    _loaded: dict[str, Any] = field(default_factory=dict)
    _given: set[str] = field(default_factory=set)
    _stream: BlockStream | None = None

    @classmethod
    def open(
        cls,
        model: str | Path,
        *,
        text_encoder: str | Path | None = None,
        device: str | None = None,
        dtype: str | None = None,
        other_parts: Sequence[str | Path] = (),
        prefers_distilled: bool = False,
        quantization: str | None = None,
        offload: str = "none",
        max_memory: int | str | None = None,
        parallel: str = "none",
    ) -> "ModelSet":
        """Finds the model and reads its headers, no weights.

        `quantization` and `offload` are those of SCHEMES and OFFLOADS; `max_memory` is a number of
        bytes or text such as 12GiB, to which tiles and plans keep; `parallel` is how the processes
        that torchrun has started share the transformer's work.

        `other_parts` are files of a split model besides the named one. With `prefers_distilled`
        the name of a shipped model stands for its distilled sibling, where there is one.

        `text_encoder` is a folder or hub repository; by default the folder `text_encoder` beside
        the file, else what the checkpoint's metadata names. Raises InputError or CheckpointError
        for a model that cannot be found or is not supported.
        """
        chosen_device = choose_device(device)
        chosen_dtype = choose_dtype(dtype, chosen_device)
        if prefers_distilled and is_installed(f"{model}-distilled"):
            model = f"{model}-distilled"
        checkpoint = open_checkpoint(*resolve_model(str(model), text_encoder), *other_parts)
        beside = checkpoint.paths[0].parent / "text_encoder"
        if text_encoder is None and beside.is_dir():
            text_encoder = beside
        check_supported(checkpoint, text_encoder)
        size = sum(path.stat().st_size for path in checkpoint.paths)
        offload = "block" if offload == "cpu" else offload  # LTX-2's name for it
        if offload not in OFFLOADS:
            raise InputError(f"offload must be one of {', '.join(OFFLOADS)}; got {offload}.")
        if parallel not in WAYS:
            raise InputError(f"parallel must be one of {', '.join(WAYS)}; got {parallel}.")
        if parallel != "none":
            join(chosen_device)
        if isinstance(max_memory, str):
            max_memory = parse_size(max_memory)
        if max_memory is not None and chosen_device.type == "cuda":
            total = torch.cuda.get_device_properties(chosen_device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, max_memory / total), chosen_device)
        return cls(
            name=str(model),
            checkpoint=checkpoint,
            profile=read_profile(checkpoint),
            device=chosen_device,
            dtype=chosen_dtype,
            text_encoder_source=text_encoder,
            keeps_loaded=size <= KEEP_LOADED_BYTES,
            other_parts=tuple(Path(part) for part in other_parts),
            cache=open_cache(),
            quantization=None if quantization is None else check_scheme(quantization),
            offload=offload,
            max_memory=max_memory,
            parallel=parallel,
        )

    @property
    def stays_loaded(self) -> bool:
        """Whether networks wait where they work, so that a loan costs nothing."""
        return self.keeps_loaded and self.offload in ("none", "auto") and self.parallel == "none"

    def free_memory(self) -> int:
        """Bytes that a run can still take on the device, within `max_memory`."""
        return free_memory(self.device, self.max_memory)

    def check_adapters(self, loras: Sequence[Any]) -> None:
        """Raises InputError where adapters cannot be added to the weights."""
        if loras and self.offload == "disk":
            raise InputError(
                "offload disk reads weights from the file as they are, so no LoRA can be added to "
                "them; use --offload block, or aiprod models convert to write the sum."
            )

    @property
    def transformer_config(self) -> TransformerConfig:
        return TransformerConfig.from_metadata(self.checkpoint.section("transformer"))

    @property
    def is_distilled(self) -> bool:
        return companions.is_distilled(self.checkpoint)

    @property
    def audio_config(self) -> AudioVAEConfig:
        return AudioVAEConfig.from_metadata(self.checkpoint.section("audio_vae"))

    @property
    def sample_rate(self) -> int:
        """Of the vocoder's sound, in Hz."""
        return VocoderConfig.from_metadata(self.checkpoint.section("vocoder")).output_sampling_rate

    def use(self, name: str, network: Any) -> None:
        """Lends `network` in place of the file's: a transformer in training, texts known before.

        Names are those of the lending methods; it stays where it is and is never freed.
        """
        self._loaded[name] = network
        self._given.add(name)

    # What a network of the file makes of one input is the same every time.

    def recall(self, identity: Mapping[str, Any], network: str) -> dict[str, Tensor] | None:
        """What `network` made of an input before, on this device; None if it is not known.

        `identity` says what the input is, and as `kind` what is made of it.
        """
        if self.cache is None or network in self._given:
            return None
        found = self.cache.get(self._identity(identity))
        analytics.count("cache_misses" if found is None else "cache_hits")
        return found and {name: tensor.to(self.device) for name, tensor in found.items()}

    def keep(self, identity: Mapping[str, Any], made: Mapping[str, Tensor], network: str) -> None:
        if self.cache is not None and network not in self._given:
            tensors = {name: tensor.cpu().contiguous() for name, tensor in made.items()}
            self.cache.put(self._identity(identity), tensors)

    def _identity(self, identity: Mapping[str, Any]) -> dict[str, Any]:
        """With all that decides the last bits: the files' contents, the machine, the versions."""
        encoder = recipe.text_encoder_identity(self.text_encoder_source)
        return {
            **identity,
            "text_encoder": [recipe.contents_of(file) for file in encoder["files"]]
            or encoder["source"],
            **self._computed_by(),
        }

    def _computed_by(self) -> dict[str, Any]:
        files = [recipe.file_identity(path) for path in self.checkpoint.paths]
        return {
            "model": [recipe.contents_of(file) for file in files],
            **recipe.circumstances(self.device, self.dtype),
            "versions": recipe.versions(),
        }

    def _merged_identity(
        self, name: str, loras: Sequence[tuple[Lora, float]]
    ) -> dict[str, Any] | None:
        """Of the network's weights with adapters in them; None where they are not remembered.

        Those that are added up on a GPU are not: there the sum is quick, and far from the file.
        """
        active = [(lora, strength) for lora, strength in loras if strength != 0]
        sizes = [
            sum(math.prod(c.shape(lora.checkpoint.tensors)) for c in lora.layers.values())
            for lora, _ in active
        ]
        is_on_cpu = self.device.type == "cpu" or self.offload == "block"
        is_worth_it = max(sizes, default=0) >= MIN_MERGED_WEIGHTS
        if self.cache is None or name in self._given or not is_on_cpu or not is_worth_it:
            return None
        return {
            "kind": "merged",
            "network": name,
            "quantization": self.quantization,
            "adapters": [
                [*map(recipe.input_sha256, lora.checkpoint.paths), strength]
                for lora, strength in active
            ],
            **self._computed_by(),
        }

    # Lending. Each is a context: the network is freed at its end unless the model is small.

    @contextmanager
    def text_encoder(self) -> Iterator[TextEncoder]:
        with self._lend("text_encoder", self._load_text_encoder) as encoder:
            yield encoder

    @contextmanager
    def text_projector(self) -> Iterator[TextProjector]:
        with self._lend("text_projector", lambda: self._load(networks.load_text_projector)) as net:
            yield net

    @contextmanager
    def transformer(
        self, loras: Sequence[tuple[Lora, float]] = (), *, audio_only: bool = False
    ) -> Iterator[Transformer]:
        """With LoRAs in its weights for the length of the loan; or its audio half alone.

        What large adapters make of the weights is remembered between runs.
        """
        name = "audio transformer" if audio_only else "transformer"
        self.check_adapters(loras)
        identity = self._merged_identity(name, loras)
        merged = self.cache.get(identity) if self.cache and identity else None
        # A network that is freed afterwards needs no way back: "meta" keeps no copy.
        kept_on = None if self._keeps(name) else "meta"
        # Quantising placeholders takes PyTorch longer than quantising weights.
        needs_base = kept_on is None or self.quantization is not None
        load = partial(
            networks.load_transformer,
            self.checkpoint,
            # Streamed blocks wait in main memory or in the file.
            device="cpu" if self.offload == "block" else self.device,
            dtype=self.dtype,
            audio_only=audio_only,
            quantization=self.quantization,
            leaves_blocks=self.offload == "disk",
            left=() if needs_base or merged is None else merged,
        )
        with self._lend(name, load) as net:
            if merged is not None:
                fusion = put_fused(net, merged, keep_originals_on=kept_on)
            else:
                fusion = fuse(net, loras, allow_unmatched=audio_only, keep_originals_on=kept_on)
                if self.cache and identity:
                    self.cache.put(identity, fusion.fused())
            if name not in self._given and self.offload == "block":
                self._stream = stream_from_memory(net, self.device)
            elif name not in self._given and self.offload == "disk":
                self._stream = stream_from_file(net, self.checkpoint, self.device)
            try:
                yield net
            finally:
                if self._stream is not None:
                    self._stream.close()
                    self._stream = None
                if self._keeps(name):
                    fusion.unfuse()

    def lighten(self, transformer: Transformer) -> str | None:
        """Makes a transformer that is lent hold less from now on, and says how.

        None where nothing is left to do.
        """
        if self._stream is not None or self._given & {"transformer", "audio transformer"}:
            return None
        if self.device.type == "cpu":
            return None  # what its blocks would wait in is the memory that ran out
        self._stream = stream_from_memory(transformer, self.device)
        self.offload = "block"
        return "blocks in main memory"

    @contextmanager
    def upsampler(self, path: Path) -> Iterator[LatentUpsampler]:
        load = partial(networks.load_upsampler, device=self.device, dtype=self.dtype)
        with self._lend(f"upsampler {path}", lambda: load(open_checkpoint(path))) as net:
            yield net

    @contextmanager
    def reward(self, path: Path) -> Iterator[RewardModel]:
        # In float32: it is small, and its scores are compared.
        load = partial(networks.load_reward, device=self.device, dtype=torch.float32)
        with self._lend(f"reward {path}", lambda: load(open_checkpoint(path))) as net:
            yield net

    @contextmanager
    def video_encoder(self) -> Iterator[VideoEncoder]:
        with self._lend("video_encoder", lambda: self._load(networks.load_video_encoder)) as net:
            yield net

    @contextmanager
    def video_decoder(self) -> Iterator[VideoDecoder]:
        with self._lend("video_decoder", lambda: self._load(networks.load_video_decoder)) as net:
            yield net

    @contextmanager
    def tiny_decoder(self) -> Iterator[VideoDecoder]:
        path = companions.tiny_decoder(self.checkpoint)
        load = partial(networks.load_video_decoder, device=self.device, dtype=self.dtype)
        with self._lend(f"tiny decoder {path}", lambda: load(open_checkpoint(path))) as net:
            yield net

    @contextmanager
    def audio_encoder(self) -> Iterator[AudioEncoder]:
        with self._lend("audio_encoder", lambda: self._load(networks.load_audio_encoder)) as net:
            yield net

    @contextmanager
    def audio_decoder(self) -> Iterator[AudioDecoder]:
        with self._lend("audio_decoder", lambda: self._load(networks.load_audio_decoder)) as net:
            yield net

    @contextmanager
    def vocoder(self) -> Iterator[Vocoder]:
        with self._lend("vocoder", lambda: self._load(networks.load_vocoder)) as net:
            yield net

    @contextmanager
    def _lend(self, name: str, load: Callable[[], Any]) -> Iterator[Any]:
        network = self._loaded.get(name)
        if network is None:
            with analytics.span("load"):
                network = load()
                has_kernels = self.device.type == "cpu" and onednn.is_available()
                if has_kernels and isinstance(network, nn.Module):
                    enable_kernels(network, self.device)
        if self._keeps(name):
            self._loaded[name] = network
        waits_in_memory = self._waits_in_memory(name)
        if waits_in_memory:
            _weights_of(network).to(self.device)
        try:
            yield network
        finally:
            if waits_in_memory:
                _weights_of(network).to("cpu")
            del network
            if not self._keeps(name) or waits_in_memory:
                gc.collect()
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()

    def _keeps(self, name: str) -> bool:
        """Whether a network stays: small models do, except where each stage is to make room."""
        if name in self._given:
            return True
        if self.offload == "model":
            return self.device.type != "cpu"
        return self.keeps_loaded

    def _waits_in_memory(self, name: str) -> bool:
        """Whether a network is on the device for its stage only, and in main memory otherwise."""
        is_elsewhere = self.offload == "model" and self.device.type != "cpu"
        return is_elsewhere and name not in self._given

    def _load(self, load: Callable[..., nn.Module]) -> nn.Module:
        return load(self.checkpoint, device=self.device, dtype=self.dtype)

    def _load_text_encoder(self) -> TextEncoder:
        # In the encoder's own precision: the rest of the model is told apart by `dtype`.
        return networks.load_text_encoder(
            self.checkpoint, self.text_encoder_source, device=self.device
        )


def _weights_of(network: Any) -> nn.Module:
    """The network itself, or what a text encoder wraps."""
    return network if isinstance(network, nn.Module) else network.model


# Where and how to compute.


def choose_device(name: str | None = None) -> torch.device:
    """The named device, or the best there is: cuda, then mps, then cpu."""
    if name is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"device must be cpu, cuda, cuda:N or mps; got {name}.") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError("device cuda: PyTorch finds no CUDA GPU here; use --device cpu.")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise InputError("device mps: PyTorch finds no Apple GPU here; use --device cpu.")
    return device


def choose_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The named precision, or float32 on the CPU and bfloat16 on a GPU."""
    if name is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if name not in DTYPE_NAMES:
        raise InputError(f"dtype must be one of {', '.join(DTYPE_NAMES)}; got {name}.")
    return DTYPE_NAMES[name]
