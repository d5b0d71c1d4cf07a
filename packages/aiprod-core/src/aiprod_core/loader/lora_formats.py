"""The ways adapters are written down: one table of key endings, one class for each kind of change.

Trainers agree on the mathematics and on little else. A key is a prefix, the name of a layer and an
ending; prefixes and endings are told apart here, whichever tool wrote them:

    LTX-2      diffusion_model.LAYER.lora_A.weight
    diffusers  transformer.LAYER.lora_A.weight
    PEFT       base_model.model.LAYER.lora_A.default.weight
    ComfyUI    diffusion_model.LAYER.lora_down.weight, and .alpha
    kohya      lora_unet_LAYER.lora_down.weight, with "_" for the layer's dots, and .alpha
    DiffSynth  LAYER.lora_A.default.weight
    LyCORIS    lycoris_LAYER.lokr_w1, .hada_w1_a, or .diff for a whole difference

A layer is called as published or as diffusers calls it. LTX-2's own files have no alpha; where a
file states one, in a tensor or in PEFT's configuration, the change is scaled by alpha / rank.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from aiprod_core.errors import CheckpointError
from aiprod_core.loader.checkpoint import Checkpoint, TensorInfo

PREFIXES = (
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "pipe.dit.",
    "lora_unet_",
    "lora_transformer_",
    "lycoris_",
)

# Key endings and the part that the tensor plays.
ROLES = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lokr_w1": "kron_w1",
    ".lokr_w1_a": "kron_w1_a",
    ".lokr_w1_b": "kron_w1_b",
    ".lokr_w2": "kron_w2",
    ".lokr_w2_a": "kron_w2_a",
    ".lokr_w2_b": "kron_w2_b",
    ".hada_w1_a": "hada_w1_a",
    ".hada_w1_b": "hada_w1_b",
    ".hada_w2_a": "hada_w2_a",
    ".hada_w2_b": "hada_w2_b",
    ".diff": "difference",
    ".alpha": "alpha",
}

# To leave these out would apply another change than the one that was trained.
UNSUPPORTED = {
    ".dora_scale": "DoRA",
    ".lora_magnitude_vector": "DoRA",
    ".lora_magnitude_vector.weight": "DoRA",
    ".lora_mid.weight": "a Tucker-decomposed LoRA",
    ".lokr_t2": "a Tucker-decomposed LoKr",
    ".hada_t1": "a Tucker-decomposed LoHa",
    ".hada_t2": "a Tucker-decomposed LoHa",
    ".diff_b": "a bias difference",
    ".lora_B.bias": "a LoRA with biases",
}

# PEFT may put the adapter's own name, "default", before "weight".
ADAPTER_NAME = re.compile(r"\.(lora_[AB]|lora_magnitude_vector)\.[^.]+\.(weight|bias)$")

# Published names, and what diffusers calls the same layers.
DIFFUSERS_NAMES = {
    "patchify_proj": "proj_in",
    "audio_patchify_proj": "audio_proj_in",
    "adaln_single": "time_embed",
    "audio_adaln_single": "audio_time_embed",
    "prompt_adaln_single": "prompt_adaln",
    "audio_prompt_adaln_single": "audio_prompt_adaln",
    "av_ca_video_scale_shift_adaln_single": "av_cross_attn_video_scale_shift",
    "av_ca_audio_scale_shift_adaln_single": "av_cross_attn_audio_scale_shift",
    "av_ca_a2v_gate_adaln_single": "av_cross_attn_video_a2v_gate",
    "av_ca_v2a_gate_adaln_single": "av_cross_attn_audio_v2a_gate",
}

Infos = Mapping[str, TensorInfo]
Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class LowRank:
    """LoRA (arXiv:2106.09685): up (out, rank) times down (rank, in)."""

    down: str
    up: str
    scale: float = 1.0

    @property
    def keys(self) -> tuple[str, ...]:
        return self.down, self.up

    def rank(self, infos: Infos) -> int:
        return infos[self.down].shape[0]

    def shape(self, infos: Infos) -> tuple[int, ...]:
        return _product_shape(infos[self.up].shape, infos[self.down].shape)

    def delta(self, tensors: Tensors) -> Tensor:
        return self.scale * (tensors[self.up] @ tensors[self.down])


@dataclass(frozen=True)
class Kronecker:
    """LoKr (arXiv:2309.14859): the Kronecker product of two matrices, each whole or a product."""

    w1: tuple[str, ...]  # one key, or two whose product it is
    w2: tuple[str, ...]
    scale: float = 1.0

    @property
    def keys(self) -> tuple[str, ...]:
        return self.w1 + self.w2

    def rank(self, infos: Infos) -> int | None:
        """None where neither matrix is decomposed: then there is nothing to divide alpha by."""
        ranks = [infos[w[1]].shape[0] for w in (self.w1, self.w2) if len(w) == 2]
        return ranks[-1] if ranks else None

    def shape(self, infos: Infos) -> tuple[int, ...]:
        first, second = (_shape_of(w, infos) for w in (self.w1, self.w2))
        if len(first) != 2 or len(second) != 2:
            return ()
        return first[0] * second[0], first[1] * second[1]

    def delta(self, tensors: Tensors) -> Tensor:
        first, second = (_matrix(w, tensors) for w in (self.w1, self.w2))
        return self.scale * torch.kron(first, second)


@dataclass(frozen=True)
class Hadamard:
    """LoHa (arXiv:2108.06098): two low-rank products, multiplied element by element."""

    w1: tuple[str, str]
    w2: tuple[str, str]
    scale: float = 1.0

    @property
    def keys(self) -> tuple[str, ...]:
        return self.w1 + self.w2

    def rank(self, infos: Infos) -> int:
        return infos[self.w1[1]].shape[0]

    def shape(self, infos: Infos) -> tuple[int, ...]:
        first, second = (_shape_of(w, infos) for w in (self.w1, self.w2))
        return first if first == second else ()

    def delta(self, tensors: Tensors) -> Tensor:
        return self.scale * _matrix(self.w1, tensors) * _matrix(self.w2, tensors)


@dataclass(frozen=True)
class Difference:
    """The whole change of a weight (out, in)."""

    key: str

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.key,)

    def rank(self, infos: Infos) -> int:
        return min(infos[self.key].shape)

    def shape(self, infos: Infos) -> tuple[int, ...]:
        return infos[self.key].shape

    def delta(self, tensors: Tensors) -> Tensor:
        return tensors[self.key]


Change = LowRank | Kronecker | Hadamard | Difference


def read_changes(checkpoint: Checkpoint) -> tuple[dict[str, Change], tuple[str, ...]]:
    """What a file changes, by the name it gives each layer, and the keys that are no adapter's.

    Alphas are read, nothing else. Raises CheckpointError for half a pair, for a layer that is
    there twice, and for kinds of adapter that are not supported.
    """
    parts, unrecognised = _group_by_layer(checkpoint)
    alphas = _read_alphas(checkpoint, parts)
    peft = _peft_config(checkpoint)
    changes: dict[str, Change] = {}
    for stem, roles in parts.items():
        if roles.keys() == {"alpha"}:
            unrecognised.append(roles["alpha"])
            continue
        layer = layer_name(stem)
        if layer in changes:
            raise CheckpointError(f"{checkpoint.paths[0]}: {layer} is changed twice in this file.")
        change = _as_change(checkpoint, stem, roles)
        scale = _scale(change.rank(checkpoint.tensors), alphas.get(stem), peft, stem)
        if not isinstance(change, Difference):
            change = replace(change, scale=scale)
        changes[layer] = change
    return changes, tuple(unrecognised)


def layer_name(stem: str) -> str:
    """A layer's name without what tools put before it."""
    prefix = next((p for p in PREFIXES if stem.startswith(p)), None)
    return stem if prefix is None else layer_name(stem[len(prefix) :])


def aliases(layers: Iterable[str]) -> dict[str, str]:
    """Every name by which a file may call a network's layer, with the layer's own name."""
    names: dict[str, str] = {}
    for layer in layers:
        top, dot, rest = layer.partition(".")
        other = DIFFUSERS_NAMES.get(top, top) + dot + rest
        for alias in (layer, other, layer.replace(".", "_"), other.replace(".", "_")):
            names[alias] = layer
    return names


def _group_by_layer(checkpoint: Checkpoint) -> tuple[dict[str, dict[str, str]], list[str]]:
    """{stem: {role: key}}, and the keys that have no known ending."""
    parts: dict[str, dict[str, str]] = {}
    unrecognised: list[str] = []
    for key in checkpoint.tensors:
        # PEFT puts the adapter's own name between the matrix and "weight".
        plain = re.sub(
            r"\.(lora_[AB]|lora_magnitude_vector)\.[^.]+\.(weight|bias)$", r".\1.\2", key
        )
        kind = next((UNSUPPORTED[end] for end in UNSUPPORTED if plain.endswith(end)), None)
        if kind is not None:
            raise CheckpointError(
                f"{checkpoint.paths[0]}: {key} belongs to {kind}, which is not supported; "
                "merge the adapter with the tool that made it, or export it as a plain LoRA."
            )
        ending = next((end for end in ROLES if plain.endswith(end)), None)
        if ending is None:
            unrecognised.append(key)
        else:
            parts.setdefault(plain.removesuffix(ending), {})[ROLES[ending]] = key
    return parts, unrecognised


def _as_change(checkpoint: Checkpoint, stem: str, roles: Mapping[str, str]) -> Change:
    if "down" in roles and "up" in roles:
        return LowRank(roles["down"], roles["up"])
    if "difference" in roles:
        return Difference(roles["difference"])
    if any(role.startswith("hada") for role in roles):
        keys = [roles.get(f"hada_w{i}_{part}") for i in (1, 2) for part in "ab"]
        if all(keys):
            return Hadamard((keys[0], keys[1]), (keys[2], keys[3]))  # pyright: ignore[reportArgumentType]
    if any(role.startswith("kron") for role in roles):
        matrices = [_kronecker_keys(roles, f"kron_w{i}") for i in (1, 2)]
        if all(matrices):
            return Kronecker(matrices[0], matrices[1])
    present = next(iter(roles.values()))
    absent = {"down": "lora_B / lora_up", "up": "lora_A / lora_down"}.get(
        next(iter(roles)), "other matrices"
    )
    raise CheckpointError(
        f"{checkpoint.paths[0]}: {present} has no {stem}.{absent} beside it. "
        "The file is incomplete; fetch it again."
    )


def _kronecker_keys(roles: Mapping[str, str], name: str) -> tuple[str, ...]:
    if name in roles:
        return (roles[name],)
    pair = [roles[f"{name}_{part}"] for part in "ab" if f"{name}_{part}" in roles]
    return tuple(pair) if len(pair) == 2 else ()


def _read_alphas(
    checkpoint: Checkpoint, parts: Mapping[str, Mapping[str, str]]
) -> dict[str, float]:
    keys = {stem: roles["alpha"] for stem, roles in parts.items() if "alpha" in roles}
    tensors = checkpoint.read(keys.values())
    for key, tensor in tensors.items():
        if tensor.numel() != 1 or not torch.isfinite(tensor.float()).all():
            raise CheckpointError(f"{checkpoint.paths[0]}: {key} is not one finite number.")
    return {stem: float(tensors[key].float()) for stem, key in keys.items()}


def _peft_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """PEFT's settings: in the header where diffusers wrote the file, else in a file beside it."""
    in_header = checkpoint.metadata.get("lora_adapter_metadata")
    if isinstance(in_header, dict):
        # diffusers puts the model's name before each setting.
        config = {key.removeprefix("transformer."): value for key, value in in_header.items()}
    else:
        path = checkpoint.paths[0]
        beside = path.with_name("adapter_config.json")
        if path.stem != "adapter_model" or not beside.is_file():
            return {}
        try:
            config = json.loads(beside.read_text())
        except ValueError as error:
            raise CheckpointError(f"{beside}: damaged ({error}). Fetch it again.") from error
    if config.get("use_dora"):
        raise CheckpointError(
            f"{checkpoint.paths[0]}: use_dora true is not supported; export a plain LoRA."
        )
    return config


def _scale(rank: int | None, alpha: float | None, peft: Mapping[str, Any], stem: str) -> float:
    """alpha / rank where the file states an alpha; 1 otherwise."""
    if alpha is None:
        patterns: Mapping[str, Any] = peft.get("alpha_pattern") or {}
        alpha = next(
            (value for key, value in patterns.items() if re.fullmatch(rf"(.*\.)?{key}", stem)),
            peft.get("lora_alpha"),
        )
    if alpha is None or not rank:
        return 1.0
    return float(alpha) / (math.sqrt(rank) if peft.get("use_rslora") else rank)


def _product_shape(left: tuple[int, ...], right: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a matrix product, () where there is none."""
    fits = len(left) == len(right) == 2 and left[1] == right[0]
    return (left[0], right[1]) if fits else ()


def _shape_of(keys: tuple[str, ...], infos: Infos) -> tuple[int, ...]:
    shapes = [infos[key].shape for key in keys]
    return shapes[0] if len(shapes) == 1 else _product_shape(*shapes)


def _matrix(keys: tuple[str, ...], tensors: Tensors) -> Tensor:
    matrices = [tensors[key] for key in keys]
    return matrices[0] if len(matrices) == 1 else matrices[0] @ matrices[1]
