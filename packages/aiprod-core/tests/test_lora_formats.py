"""Every tool's way of writing an adapter gives the same change; what is not understood is said."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from aiprod_core.errors import CheckpointError, InputError
from aiprod_core.loader.checkpoint import open_checkpoint
from aiprod_core.loader.lora import coverage, fuse, open_lora
from aiprod_core.model.transformer import Transformer, TransformerConfig

Build = Callable[[TransformerConfig], Transformer]

BLOCK, TOP = "transformer_blocks.0.audio_to_video_attn.to_out.0", "audio_patchify_proj"
RANK = 2

FLAT, DIFFUSERS_TOP = BLOCK.replace(".", "_"), "audio_proj_in"
PEFT, OLD = ("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight")
NAMED = ("lora_A.default.weight", "lora_B.default.weight")

# How each tool calls the two layers and the two matrices, and whether it states an alpha.
STYLES = {
    "ltx-2": ("diffusion_model.{}", (BLOCK, TOP), PEFT, False),
    "diffusers": ("transformer.{}", (BLOCK, DIFFUSERS_TOP), PEFT, False),
    "peft": ("base_model.model.{}", (BLOCK, DIFFUSERS_TOP), NAMED, False),
    "comfyui": ("diffusion_model.{}", (BLOCK, TOP), OLD, True),
    "kohya": ("lora_unet_{}", (FLAT, TOP), OLD, True),
    "kohya, diffusers' names": ("lora_transformer_{}", (FLAT, DIFFUSERS_TOP), OLD, True),
    "diffsynth": ("{}", (BLOCK, TOP), NAMED, False),
    "old diffusers": (
        "transformer.{}", (BLOCK, DIFFUSERS_TOP), ("lora.down.weight", "lora.up.weight"), False
    ),
}  # fmt: skip


@pytest.fixture
def transformer(tiny_config: TransformerConfig, randomised: Build) -> Transformer:
    return randomised(tiny_config)


def pairs(transformer: Transformer) -> dict[str, tuple[Tensor, Tensor]]:
    """Random (down, up) for the two layers."""
    generator = torch.Generator().manual_seed(3)
    shapes = {name: transformer.get_submodule(name).weight.shape for name in (BLOCK, TOP)}
    return {
        name: (
            torch.randn((RANK, width), generator=generator),
            torch.randn((out, RANK), generator=generator),
        )
        for name, (out, width) in shapes.items()
    }


def write(style: str, matrices: dict[str, tuple[Tensor, Tensor]], path: Path, alpha: float) -> Path:
    pattern, names, (down, up), states_alpha = STYLES[style]
    tensors = {}
    for name, (first, second) in zip(names, matrices.values(), strict=True):
        stem = pattern.format(name)
        tensors |= {f"{stem}.{down}": first, f"{stem}.{up}": second.clone()}
        if states_alpha:
            tensors[f"{stem}.alpha"] = torch.tensor(alpha)
    save_file(tensors, path)
    return path


def changed(transformer: Transformer, path: Path, strength: float = 1.0) -> dict[str, Tensor]:
    """How far a file moves the two weights; they are put back bit for bit."""
    before = {name: p.clone() for name, p in transformer.named_parameters()}
    fusion = fuse(transformer, [(open_lora(path), strength)])
    moved = {n: transformer.get_submodule(n).weight - before[f"{n}.weight"] for n in (BLOCK, TOP)}
    fusion.unfuse()
    assert all(torch.equal(p, before[name]) for name, p in transformer.named_parameters())
    return moved


@pytest.mark.parametrize("style", STYLES)
def test_every_style_adds_the_same_product_scaled_by_the_alpha_it_states(
    style: str, transformer: Transformer, tmp_path: Path
):
    matrices = pairs(transformer)
    path = write(style, matrices, tmp_path / "lora.safetensors", alpha=0.5)
    scale = 0.5 / RANK if STYLES[style][3] else 1.0
    for name, moved in changed(transformer, path, strength=0.8).items():
        down, up = matrices[name]
        torch.testing.assert_close(moved, 0.8 * scale * up @ down, atol=1e-5, rtol=1e-5)
    lora = open_lora(path)
    assert str(coverage(transformer, lora)) == "2 of 2 layers applied"
    assert lora.rank == RANK
    assert open_checkpoint(path).is_lora


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({"lora_alpha": 8, "r": 2}, 4.0),
        ({"lora_alpha": 8, "r": 2, "use_rslora": True}, 8 / 2**0.5),
        ({"lora_alpha": 2, "r": 2, "alpha_pattern": {"to_out.0": 6}}, (3.0, 1.0)),
        ({"r": 2}, 1.0),
    ],
)
@pytest.mark.parametrize("place", ["header", "beside"])
def test_pefts_settings_scale_the_change(
    settings: dict, scale, place: str, transformer: Transformer, tmp_path: Path
):
    matrices = pairs(transformer)
    path = write("diffusers", matrices, tmp_path / "adapter_model.safetensors", alpha=0)
    if place == "beside":
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    else:
        in_header = {f"transformer.{key}": value for key, value in settings.items()}
        save_file(load_file(path), path, {"lora_adapter_metadata": json.dumps(in_header)})
    of_block, of_top = scale if isinstance(scale, tuple) else (scale, scale)
    moved = changed(transformer, path)
    for name, factor in ((BLOCK, of_block), (TOP, of_top)):
        down, up = matrices[name]
        torch.testing.assert_close(moved[name], factor * up @ down, atol=1e-4, rtol=1e-5)


def factors_of(shape: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    return (2, 4), (shape[0] // 2, shape[1] // 4)


@pytest.mark.parametrize("decomposed", ["neither", "w1", "w2", "both"])
def test_lokr_adds_the_kronecker_product_scaled_only_where_a_matrix_has_a_rank(
    decomposed: str, transformer: Transformer, tmp_path: Path
):
    torch.manual_seed(1)
    shape = tuple(transformer.get_submodule(BLOCK).weight.shape)
    tensors, matrices = {"lycoris_" + BLOCK.replace(".", "_") + ".alpha": torch.tensor(6.0)}, []
    for name, (height, width) in zip(("w1", "w2"), factors_of(shape), strict=True):
        stem = "lycoris_" + BLOCK.replace(".", "_") + f".lokr_{name}"
        if decomposed in (name, "both"):
            a, b = torch.randn(height, 3), torch.randn(3, width)
            tensors |= {f"{stem}_a": a, f"{stem}_b": b}
            matrices.append(a @ b)
        else:
            tensors[stem] = torch.randn(height, width)
            matrices.append(tensors[stem])
    save_file(tensors, tmp_path / "lokr.safetensors")
    scale = 1.0 if decomposed == "neither" else 6.0 / 3
    want = scale * torch.kron(*matrices)
    moved = changed(transformer, tmp_path / "lokr.safetensors")
    torch.testing.assert_close(moved[BLOCK], want, atol=1e-4, rtol=1e-5)
    assert not moved[TOP].any()
    assert open_checkpoint(tmp_path / "lokr.safetensors").is_lora


def test_loha_adds_the_elementwise_product_and_diff_adds_itself(
    transformer: Transformer, tmp_path: Path
):
    torch.manual_seed(2)
    out, width = transformer.get_submodule(BLOCK).weight.shape
    a1, a2 = torch.randn(out, 2), torch.randn(out, 2)
    b1, b2 = torch.randn(2, width), torch.randn(2, width)
    whole = torch.randn(transformer.get_submodule(TOP).weight.shape)
    stem = f"diffusion_model.{BLOCK}.hada"
    save_file(
        {
            f"{stem}_w1_a": a1, f"{stem}_w1_b": b1, f"{stem}_w2_a": a2, f"{stem}_w2_b": b2,
            f"diffusion_model.{BLOCK}.alpha": torch.tensor(1.0),
            f"diffusion_model.{TOP}.diff": whole,
        },
        tmp_path / "loha.safetensors",
    )  # fmt: skip
    moved = changed(transformer, tmp_path / "loha.safetensors")
    torch.testing.assert_close(moved[BLOCK], 0.5 * (a1 @ b1) * (a2 @ b2), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(moved[TOP], whole, atol=1e-5, rtol=1e-5)


def test_keys_that_are_no_adapters_are_errors_not_silence(transformer: Transformer, tmp_path: Path):
    path = write("ltx-2", pairs(transformer), tmp_path / "lora.safetensors", alpha=0)
    tensors = load_file(path)
    tensors["text_encoder.layers.0.mlp.strange"] = torch.zeros(2)
    tensors["diffusion_model.nowhere.alpha"] = torch.tensor(1.0)
    save_file(tensors, path)
    covered = coverage(transformer, open_lora(path))
    assert str(covered) == "2 of 4 layers applied"
    with pytest.raises(InputError, match=r"2 of 4 layers.*text_encoder\.layers\.0\.mlp\.strange"):
        fuse(transformer, [(open_lora(path), 1.0)])


def test_a_lora_for_another_model_is_one_sentence(
    transformer: Transformer, tiny_config: TransformerConfig, randomised: Build, tmp_path: Path
):
    stranger = {
        "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.zeros(2, 8),
        "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": torch.zeros(24, 2),
    }
    save_file(stranger, tmp_path / "flux.safetensors")
    with pytest.raises(InputError, match=r"flux.*1 of 1 layers are not in this model.*another"):
        fuse(transformer, [(open_lora(tmp_path / "flux.safetensors"), 1.0)])
    wide = randomised(replace(tiny_config, audio_in_channels=tiny_config.audio_in_channels + 2))
    path = write("kohya", pairs(wide), tmp_path / "wide.safetensors", alpha=1)
    with pytest.raises(CheckpointError, match=r"do not fit .*The LoRA is for another model"):
        fuse(transformer, [(open_lora(path), 1.0)])


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("x.dora_scale", "DoRA, which is not supported"),
        ("x.lora_magnitude_vector.default.weight", "DoRA"),
        ("x.lokr_t2", "Tucker-decomposed LoKr"),
        ("x.lokr_w1_a", "lokr_w1_a has no"),
        ("x.lora_up.weight", "lora_up.weight has no x.lora_A / lora_down beside it"),
        ("x.alpha", "no LoRA, LoKr or LoHa matrices"),
    ],
)
def test_unsupported_and_incomplete_adapters_are_refused_on_opening(
    key: str, message: str, tmp_path: Path
):
    save_file({key: torch.zeros(1, 1)}, tmp_path / "odd.safetensors")
    with pytest.raises(CheckpointError, match=message):
        open_lora(tmp_path / "odd.safetensors")


def test_one_layer_under_two_names_is_refused(transformer: Transformer, tmp_path: Path):
    down, up = pairs(transformer)[TOP]
    tensors = {
        f"diffusion_model.{TOP}.lora_A.weight": down,
        f"diffusion_model.{TOP}.lora_B.weight": up,
        "transformer.audio_proj_in.lora_A.weight": down.clone(),
        "transformer.audio_proj_in.lora_B.weight": up.clone(),
    }
    save_file(tensors, tmp_path / "twice.safetensors")
    with pytest.raises(CheckpointError, match="audio_patchify_proj is changed twice"):
        fuse(transformer, [(open_lora(tmp_path / "twice.safetensors"), 1.0)])
