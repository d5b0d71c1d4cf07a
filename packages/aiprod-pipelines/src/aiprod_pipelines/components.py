"""The networks of one model: found by name, checked by their headers, lent stage by stage.

A model is named by `nano`, by a path (one file, shards, or a folder of split files), or by a hub
repository (`org/name`, or `org/name/file.safetensors` where it holds several). Opening reads
headers only; what cannot work is refused there, before any gigabyte.
"""

import dataclasses
import gc
import importlib.resources
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aiprod_core.errors import CheckpointError, InputError
from aiprod_core.kernels.apply import enable_kernels
from aiprod_core.loader import networks
from aiprod_core.loader.checkpoint import DTYPES, Checkpoint, TensorInfo, open_checkpoint
from aiprod_core.loader.lora import Lora, fuse
from aiprod_core.loader.offload import BlockStream, stream_from_file, stream_from_memory
from aiprod_core.model.audio_vae import AudioDecoder, AudioEncoder, AudioVAEConfig
from aiprod_core.model.text_connector import TextConfig, TextProjector
from aiprod_core.model.text_encoder import TextEncoder
from aiprod_core.model.transformer import Transformer, TransformerConfig
from aiprod_core.model.upsampler import LatentUpsampler
from aiprod_core.model.video_vae import VideoDecoder, VideoEncoder, VideoVAEConfig
from aiprod_core.model.vocoder import Vocoder, VocoderConfig
from aiprod_core.parallel import WAYS, join
from aiprod_core.quantization.schemes import check_scheme
from aiprod_pipelines import companions, recipe
from aiprod_pipelines.cache import Cache, open_cache, parse_size
from aiprod_pipelines.request import ModelProfile, PerModality
from aiprod_pipelines.tiles import free_memory

logger = logging.getLogger(__name__)

BUNDLED = {
    "nano": ("aiprod_nano", "nano-dev.safetensors"),
    "nano-distilled": ("aiprod_nano", "nano-distilled.safetensors"),
}

DTYPE_NAMES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Models up to this size stay in memory between stages and calls; larger ones are freed.
KEEP_LOADED_BYTES = 2 * 2**30

# Where the networks are while they do not work.
OFFLOADS = {
    "auto": "the first of these that fits, as `aiprod plan` finds",
    "none": "on the device; networks of models over 2 GiB are freed after their stage",
    "model": "in main memory, and on the device for their stage only; on a CPU, freed after it",
    "block": "as model, and the transformer's blocks come from main memory one at a time",
    "disk": "as model, and the transformer's blocks come from the file one at a time",
}

COMPONENT_PREFIXES = {
    "transformer": ("model.diffusion_model.",),
    "text connectors": (
        "model.diffusion_model.video_embeddings_connector.",
        "model.diffusion_model.audio_embeddings_connector.",
    ),
    "text projection": ("text_embedding_projection.",),
    "video encoder": ("vae.encoder.", "encoder."),
    "video decoder": ("vae.decoder.", "decoder."),
    "audio encoder": ("audio_vae.encoder.",),
    "audio decoder": ("audio_vae.decoder.",),
    "vocoder": ("vocoder.",),
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
        if prefers_distilled and _is_installed(f"{model}-distilled"):
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
        return found and {name: tensor.to(self.device) for name, tensor in found.items()}

    def keep(self, identity: Mapping[str, Any], made: Mapping[str, Tensor], network: str) -> None:
        if self.cache is not None and network not in self._given:
            tensors = {name: tensor.cpu().contiguous() for name, tensor in made.items()}
            self.cache.put(self._identity(identity), tensors)

    def _identity(self, identity: Mapping[str, Any]) -> dict[str, Any]:
        """With all that decides the last bits: the files' contents, the machine, the versions."""
        encoder = recipe.text_encoder_identity(self.text_encoder_source)
        files = [recipe.file_identity(path) for path in self.checkpoint.paths]
        return {
            **identity,
            "model": [recipe.contents_of(file) for file in files],
            "text_encoder": [recipe.contents_of(file) for file in encoder["files"]]
            or encoder["source"],
            **recipe.circumstances(self.device, self.dtype),
            "versions": recipe.versions(),
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
        """With LoRAs in its weights for the length of the loan; or its audio half alone."""
        load = partial(
            networks.load_transformer,
            self.checkpoint,
            # Streamed blocks wait in main memory or in the file.
            device="cpu" if self.offload == "block" else self.device,
            dtype=self.dtype,
            audio_only=audio_only,
            quantization=self.quantization,
            leaves_blocks=self.offload == "disk",
        )
        name = "audio transformer" if audio_only else "transformer"
        self.check_adapters(loras)
        with self._lend(name, load) as net:
            # A network that is freed afterwards needs no way back: "meta" keeps no copy.
            kept_on = None if self._keeps(name) else "meta"
            fusion = fuse(net, loras, allow_unmatched=audio_only, keep_originals_on=kept_on)
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
    def video_encoder(self) -> Iterator[VideoEncoder]:
        with self._lend("video_encoder", lambda: self._load(networks.load_video_encoder)) as net:
            yield net

    @contextmanager
    def video_decoder(self) -> Iterator[VideoDecoder]:
        with self._lend("video_decoder", lambda: self._load(networks.load_video_decoder)) as net:
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
            network = load()
            if self.device.type == "cpu" and isinstance(network, nn.Module):
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


# Finding a model.


def resolve_model(model: str, text_encoder: str | Path | None = None) -> list[Path]:
    """The files of a model by its name. Raises InputError saying what was looked for."""
    if model in BUNDLED:
        return [_bundled_path(model)]
    path = Path(model).expanduser()
    if path.is_dir():
        return _files_of_folder(path)
    if path.is_file():
        return _with_other_shards(path)
    if re.fullmatch(r"[\w.-]+/[\w.-]+(/[\w./-]+\.safetensors)?", model) and not path.is_absolute():
        return _fetch_from_hub(model, text_encoder)
    raise InputError(
        f"{model}: no such model; give {', '.join(BUNDLED)}, a path to a .safetensors file or a "
        "folder of them, or a hub repository as org/name."
    )


def _bundled_path(name: str) -> Path:
    package, file_name = BUNDLED[name]
    try:
        path = Path(str(importlib.resources.files(package) / file_name))
    except ModuleNotFoundError:
        path = None
    if path is None or not path.is_file():
        raise InputError(
            f"{name}: its weights are not installed; run pip install packages/aiprod-nano, or give "
            "another --model."
        )
    return path


def _is_installed(name: str) -> bool:
    try:
        return name in BUNDLED and _bundled_path(name).is_file()
    except InputError:
        return False


def _with_other_shards(path: Path) -> list[Path]:
    """All of `x-00001-of-00003.safetensors` and its siblings, for any one of them."""
    match = re.fullmatch(r"(.*)-\d{5}-of-(\d{5})(\.safetensors)", path.name)
    if match is None:
        return [path]
    stem, count, suffix = match.groups()
    shards = [path.with_name(f"{stem}-{i:05}-of-{count}{suffix}") for i in range(1, int(count) + 1)]
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise CheckpointError(
            f"{path.parent}: {len(missing)} of {int(count)} shards are missing: "
            f"{', '.join(missing[:3])}."
        )
    return shards


def _files_of_folder(folder: Path) -> list[Path]:
    """The files of the split layout, transformer first, or the folder's single model.

    LoRAs, upsamplers and other files that are no part of a base model are left out.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InputError(f"{folder}: no .safetensors file in this folder.")
    kinds = {path: _components(open_checkpoint(path)) for path in files}
    with_transformer = [path for path in files if "transformer" in kinds[path]]
    if not with_transformer:
        raise CheckpointError(f"{folder}: none of its files holds a transformer.")
    chosen = _with_other_shards(with_transformer[0])
    if any(path not in chosen for path in with_transformer):
        names = ", ".join(path.name for path in with_transformer)
        raise InputError(f"{folder}: holds several models; give one of {names}.")
    have = set[str]().union(*(kinds[path] for path in chosen))
    for path in files:
        if path not in chosen and kinds[path] - have:
            have |= kinds[path]
            chosen.append(path)
    return chosen


def _fetch_from_hub(model: str, text_encoder: str | Path | None) -> list[Path]:
    """Downloads a model (or finds it in the cache), its header first.

    Raises InputError when the repository is unknown, gated, out of reach or holds several models.
    """
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    parts = model.split("/", 2)
    repo_id, file_name = "/".join(parts[:2]), parts[2] if len(parts) == 3 else None
    api = HfApi()
    try:
        names = [n for n in api.list_repo_files(repo_id) if n.endswith(".safetensors")]
        file_name = file_name or _base_model_name(repo_id, names)
        header = api.parse_safetensors_file_metadata(repo_id, file_name)
        check_supported(
            Checkpoint(
                (Path(model),),
                {k: _parsed(v) for k, v in header.metadata.items()},
                {
                    key: TensorInfo(Path(file_name), tuple(info.shape), DTYPES[info.dtype])
                    for key, info in header.tensors.items()
                    if info.dtype in DTYPES
                },
            ),
            text_encoder,
        )
        return _with_other_shards(Path(hf_hub_download(repo_id, file_name)))
    except GatedRepoError as error:
        raise InputError(
            f"{repo_id}: access is gated; accept the licence on its page, then run `hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise InputError(f"{model}: neither a file here nor a repository on the hub.") from error
    except Exception as error:
        if not (isinstance(error, HfHubHTTPError | OSError) or _is_http_client_error(error)):
            raise
        cached = _cached_file(repo_id, file_name)
        if cached is not None:
            logger.warning("%s: the hub is out of reach, using the cached %s", repo_id, cached.name)
            return _with_other_shards(cached)
        raise InputError(
            f"{model}: no such file here, and the hub is out of reach and its cache has no copy."
        ) from error


def _is_http_client_error(error: Exception) -> bool:
    # By name: the hub's client has used three HTTP libraries, and lets their errors through.
    return type(error).__module__.split(".")[0] in ("httpx", "httpx2", "requests")


def _base_model_name(repo_id: str, names: list[str]) -> str:
    """The one file at the top of a repository that can be meant, preferring `-dev`."""
    top = [name for name in names if "/" not in name]
    for candidates in (top, [n for n in top if n.endswith("-dev.safetensors")]):
        if len(candidates) == 1:
            return candidates[0]
    if not top:
        raise InputError(f"{repo_id}: no .safetensors file at the top of this repository.")
    raise InputError(f"{repo_id}: holds several files; give one, e.g. {repo_id}/{top[0]}.")


def _cached_file(repo_id: str, file_name: str | None) -> Path | None:
    files = {name: path for repo, name, path in _cached_files() if repo == repo_id}
    if file_name is None and files:
        file_name = _base_model_name(repo_id, sorted(files))
    return files.get(file_name or "")


def _cached_files() -> list[tuple[str, str, Path]]:
    """(repository, file name in it, path) of every safetensors file in the hub's cache."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repositories = scan_cache_dir().repos
    except CacheNotFound:
        return []
    return [
        (repo.repo_id, str(file.file_path.relative_to(revision.snapshot_path)), file.file_path)
        for repo in repositories
        for revision in repo.revisions
        for file in revision.files
        if file.file_name.endswith(".safetensors")
    ]


def _parsed(value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return value


# What a header says.


def check_supported(checkpoint: Checkpoint, text_encoder: str | Path | None = None) -> None:
    """Raises CheckpointError, naming what is in the way, for a model that no pipeline can run.

    Every section of the config is read as the networks will read it, and the text encoder must be
    known, so that nothing is refused only after gigabytes.
    """
    name, config = checkpoint.paths[0], checkpoint.config  # refuses a LoRA, or no metadata
    found = _components(checkpoint)
    if "transformer" not in found:
        held = ", ".join(sorted(found)) or "nothing that belongs to a base model"
        raise CheckpointError(
            f"{name}: no transformer in this file (it holds {held}). Give the base model."
        )
    diffusion = next((key for key in config if "diffusion" in key), None)
    is_decoder_unknown = "vae" in config and "video decoder" not in found
    if diffusion or (checkpoint.version >= (2, 5) and is_decoder_unknown):
        raise CheckpointError(
            f"{name}: its video decoder is the diffusion decoder of LTX-2.5 "
            f"({diffusion or 'no vae.decoder tensors'}), which is not supported yet; give a model "
            "with the convolutional decoder."
        )
    networks.check_text_encoder(checkpoint, text_encoder)
    lacking = [part for part in ("video decoder", "text projection") if part not in found]
    if lacking:
        raise CheckpointError(
            f"{name}: no {' and no '.join(lacking)} in it. Give the whole model: the single file, "
            "or the folder that holds all of its parts."
        )
    TransformerConfig.from_metadata(checkpoint.section("transformer"))
    TextConfig.from_metadata(checkpoint.section("transformer"))
    VideoVAEConfig.from_metadata(checkpoint.section("vae"))
    if _has_sound(checkpoint):
        AudioVAEConfig.from_metadata(checkpoint.section("audio_vae"))
        VocoderConfig.from_metadata(checkpoint.section("vocoder"))


def read_profile(checkpoint: Checkpoint) -> ModelProfile:
    """The grid, LTX-2's defaults by version, then the file's own `generation` metadata."""
    transformer = TransformerConfig.from_metadata(checkpoint.section("transformer"))
    video_vae = VideoVAEConfig.from_metadata(checkpoint.section("vae"))
    is_2_0 = checkpoint.version < (2, 3)
    num_layers = transformer.num_layers
    profile = ModelProfile(
        scale=video_vae.scale,
        num_inference_steps=40 if is_2_0 else 30,
        # A smaller model is perturbed at the same relative depth.
        stg_blocks=((29 if is_2_0 else 28) * num_layers // 48,),
        image_crf=18 if checkpoint.version >= (2, 4) else 33,
        num_layers=num_layers,
        has_audio=_has_sound(checkpoint),
    )
    generation = checkpoint.metadata.get("generation")
    return profile.replaced(generation) if isinstance(generation, dict) else profile


def _has_sound(checkpoint: Checkpoint) -> bool:
    return "audio_vae" in checkpoint.config and "vocoder" in checkpoint.config


def count_parameters(checkpoint: Checkpoint) -> dict[str, int]:
    """Parameters by component, from the header. Connectors are not counted in the transformer."""
    counts = dict.fromkeys(COMPONENT_PREFIXES, 0)
    for key, info in checkpoint.tensors.items():
        component = _component_of(key)
        if component is not None:
            counts[component] += torch.Size(info.shape).numel()
    return {name: count for name, count in counts.items() if count}


def _components(checkpoint: Checkpoint) -> set[str]:
    if checkpoint.is_lora:
        return set()
    return {name for key in checkpoint.tensors if (name := _component_of(key)) is not None}


def _component_of(key: str) -> str | None:
    matches = [
        (len(prefix), name)
        for name, prefixes in COMPONENT_PREFIXES.items()
        for prefix in prefixes
        if key.startswith(prefix)
    ]
    return max(matches)[1] if matches else None


# For the command line.


def available_models() -> list[dict[str, Any]]:
    """Models that can be named without a path: shipped ones, and base models in the hub's cache."""
    found = []
    for name in BUNDLED:
        try:
            size = _bundled_path(name).stat().st_size
            found.append({"name": name, "bytes": size, "note": "ships with AIPROD, runs on a CPU"})
        except InputError:
            note = "not installed: pip install packages/aiprod-nano"
            found.append({"name": name, "bytes": None, "note": note})
    for repo_id, file_name, path in _cached_files():
        try:
            if "transformer" in _components(open_checkpoint(path)):
                entry = {"name": f"{repo_id}/{file_name}", "bytes": path.stat().st_size}
                found.append({**entry, "note": "in the hub cache"})
        except CheckpointError:
            continue  # half a download: it is not available
    return found


def describe_model(model: str) -> dict[str, Any]:
    """Version, grid, defaults, precision and parameter counts of a model, from its headers."""
    checkpoint = open_checkpoint(*resolve_model(model))
    dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in checkpoint.tensors.values()})
    facts: dict[str, Any] = {
        "model": model,
        "files": [path.name for path in checkpoint.paths],
        "bytes": sum(path.stat().st_size for path in checkpoint.paths),
        "version": ".".join(map(str, checkpoint.version)) or "2.0 (none in the header)",
        "dtypes": dtypes,
        "text_encoder": (checkpoint.config.get("text_encoder") or {}).get("type", "gemma3"),
        "parameters": count_parameters(checkpoint),
        "defaults": {},
    }
    if "transformer" not in checkpoint.config or "vae" not in checkpoint.config:
        return facts  # a part of a model: it has no grid or defaults of its own
    profile = read_profile(checkpoint)
    grid = profile.scale
    facts["grid"] = (
        f"{grid.time}k+1 frames, width a multiple of {grid.width}, height of {grid.height}"
    )
    facts["has_audio"] = profile.has_audio
    facts["defaults"] = {
        name: value._asdict() if isinstance(value, PerModality) else value
        for name, value in dataclasses.asdict(profile).items()
        if name not in ("scale", "num_layers", "has_audio")
    }
    return facts


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
