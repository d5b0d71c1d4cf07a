"""The joint transformer: identities between ways of calling it, its config and its start."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from aiprod_core.errors import CheckpointError, InputError
from aiprod_core.model.transformer import (
    Perturbations,
    Transformer,
    TransformerConfig,
    attention_weight_bias,
    denoised_from_velocity,
    init_weights,
    keep_per_block,
)
from aiprod_core.types import Modality

Build = Callable[[TransformerConfig], Transformer]
Inputs = Callable[..., tuple[Modality, Modality]]

ISOLATED = {"SKIP_A2V_CROSS_ATTN": None, "SKIP_V2A_CROSS_ATTN": None}


def test_one_modality_alone_equals_both_isolated_from_each_other(
    tiny_config: TransformerConfig, randomised: Build, modalities: Inputs
):
    transformer = randomised(tiny_config)
    video, audio = modalities(tiny_config)
    isolated = transformer(video, audio, Perturbations((ISOLATED, ISOLATED)))
    torch.testing.assert_close(transformer(video, None)[0], isolated[0])
    torch.testing.assert_close(transformer(None, audio)[1], isolated[1])
    assert transformer(video, None)[1] is None and transformer(None, audio)[0] is None
    joint = transformer(video, audio)
    assert not torch.allclose(joint[0], isolated[0], atol=1e-2)
    assert not torch.allclose(joint[1], isolated[1], atol=1e-2)


def test_a_network_of_one_stream_equals_that_stream_of_the_joint_one(
    tiny_config: TransformerConfig, randomised: Build, modalities: Inputs
):
    joint = randomised(tiny_config)
    video, audio = modalities(tiny_config)
    for config, index in (
        (replace(tiny_config, has_audio=False), 0),
        (replace(tiny_config, has_video=False), 1),
    ):
        alone = Transformer(config).requires_grad_(False)
        state = {name: joint.state_dict()[name] for name in alone.state_dict()}
        alone.load_state_dict(state)
        inputs = (video, None) if index == 0 else (None, audio)
        torch.testing.assert_close(alone(*inputs)[index], joint(*inputs)[index])


def test_a_shared_timestep_may_be_given_once_for_all_tokens(
    tiny_config: TransformerConfig, randomised: Build, modalities: Inputs
):
    transformer = randomised(tiny_config)
    video, audio = modalities(tiny_config)
    once = [replace(m, timesteps=m.timesteps[:, :1]) for m in (video, audio)]
    for got, want in zip(transformer(*once), transformer(video, audio), strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_a_disabled_modality_is_read_as_it_came_in(
    tiny_config: TransformerConfig, randomised: Build, modalities: Inputs
):
    """Its own text must not reach the other stream, since its blocks do not run."""
    transformer = randomised(tiny_config)
    video, audio = modalities(tiny_config)
    frozen = replace(audio, enabled=False)
    other_text = replace(frozen, context=audio.context + 1)
    with_frozen = transformer(video, frozen)
    torch.testing.assert_close(transformer(video, other_text)[0], with_frozen[0])
    torch.testing.assert_close(transformer(video, other_text)[1], with_frozen[1])
    other_sound = replace(frozen, latent=audio.latent + 1)
    assert not torch.allclose(transformer(video, other_sound)[0], with_frozen[0], atol=1e-3)


def test_samples_of_a_batch_do_not_see_each_other_nor_their_perturbations(
    tiny_config: TransformerConfig, randomised: Build, modalities: Inputs
):
    transformer = randomised(tiny_config)
    video, audio = modalities(tiny_config)
    perturbed = {"SKIP_VIDEO_SELF_ATTN": (1,), "SKIP_V2A_CROSS_ATTN": None}
    plain = transformer(video, audio)
    mixed = transformer(video, audio, Perturbations(({}, perturbed)))
    full = transformer(video, audio, Perturbations((perturbed, perturbed)))
    for i in (0, 1):
        torch.testing.assert_close(mixed[i][0], plain[i][0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(mixed[i][1], full[i][1], atol=1e-5, rtol=1e-5)
        assert not torch.allclose(full[i][1], plain[i][1], atol=1e-3)


def test_naming_every_block_is_the_same_as_naming_none(
    tiny_config: TransformerConfig, randomised: Build, modalities: Inputs
):
    transformer = randomised(tiny_config)
    video, audio = modalities(tiny_config)
    for kind in ("SKIP_VIDEO_SELF_ATTN", "SKIP_AUDIO_SELF_ATTN", "SKIP_A2V_CROSS_ATTN"):
        listed, every = (
            transformer(video, audio, Perturbations(({kind: blocks},) * 2))
            for blocks in (range(tiny_config.num_layers), None)
        )
        torch.testing.assert_close(listed, every, atol=0, rtol=0)


def test_skipping_every_self_attention_leaves_tokens_without_a_way_to_each_other(
    tiny_config: TransformerConfig, randomised: Build, modalities: Inputs
):
    transformer = randomised(tiny_config)
    video, _ = modalities(tiny_config)
    skipped = Perturbations(({"SKIP_VIDEO_SELF_ATTN": None},) * 2)
    first = replace(
        video,
        latent=video.latent[:, :1],
        timesteps=video.timesteps[:, :1],
        positions=video.positions[:, :, :1],
    )
    alone = transformer(first, None)[0]
    torch.testing.assert_close(
        transformer(video, None, skipped)[0][:, :1], alone, atol=1e-5, rtol=1e-5
    )


def test_zero_weights_hide_tokens_and_unit_weights_change_nothing(
    tiny_config: TransformerConfig, randomised: Build, modalities: Inputs
):
    transformer = randomised(tiny_config)
    video, _ = modalities(tiny_config)
    plain = transformer(video, None)[0]
    ones = replace(video, attention_mask=torch.ones(2, 12, 12))
    torch.testing.assert_close(transformer(ones, None)[0], plain, atol=1e-5, rtol=1e-5)

    hidden = torch.ones(1, 1, 12)
    hidden[..., 9:] = 0
    masked = transformer(replace(video, attention_mask=hidden), None)[0][:, :9]
    short = replace(
        video,
        latent=video.latent[:, :9],
        timesteps=video.timesteps[:, :9],
        positions=video.positions[:, :, :9],
    )
    torch.testing.assert_close(masked, transformer(short, None)[0], atol=1e-5, rtol=1e-5)


def test_masked_text_is_as_good_as_no_text(
    tiny_config: TransformerConfig, randomised: Build, modalities: Inputs
):
    transformer = randomised(tiny_config)
    video, _ = modalities(tiny_config)
    mask = torch.tensor([[1, 1, 1, 0]] * 2)
    masked = transformer(replace(video, context_mask=mask), None)[0]
    short = transformer(replace(video, context=video.context[:, :3]), None)[0]
    torch.testing.assert_close(masked, short, atol=1e-5, rtol=1e-5)


def test_attention_weights_scale_what_a_key_contributes():
    bias = attention_weight_bias(torch.tensor([[[1.0, 0.5, 0.0]]]), torch.bfloat16)
    assert bias is not None and bias.shape == (1, 1, 1, 3)
    assert bias.isfinite().all()
    torch.testing.assert_close(
        torch.softmax(bias.float(), dim=-1).flatten(),
        torch.tensor([2 / 3, 1 / 3, 0.0]),
        atol=2e-3,
        rtol=0,
    )


def test_the_marker_moves_marked_tokens_only_where_the_model_has_one(
    tiny_config: TransformerConfig, randomised: Build, modalities: Inputs
):
    marker = torch.zeros(2, 12, 1)
    marker[:, 3] = 1
    for has_embedding in (False, True):
        config = replace(tiny_config, use_keyframes_abs_pos_embedding=has_embedding)
        transformer = randomised(config)
        video, _ = modalities(config)
        moved = transformer.embed_video(replace(video, keyframe_marker=marker))
        difference = (moved - transformer.embed_video(video)).abs().amax(dim=(0, 2))
        assert difference.nonzero().flatten().tolist() == ([3] if has_embedding else [])


def test_the_gate_between_modalities_follows_the_other_ones_sigma(
    tiny_config: TransformerConfig, randomised: Build, modalities: Inputs
):
    """With the other's tokens and timesteps unchanged, only the gate can carry its sigma."""
    transformer = randomised(replace(tiny_config, use_prompt_adaln_single=False))
    video, audio = modalities(tiny_config)
    other_sigma = replace(audio, sigma=audio.sigma / 2)
    plain, changed = transformer(video, audio), transformer(video, other_sigma)
    assert not torch.allclose(plain[0], changed[0], atol=1e-4)
    skipped = Perturbations(({"SKIP_A2V_CROSS_ATTN": None},) * 2)
    torch.testing.assert_close(
        transformer(video, audio, skipped)[0], transformer(video, other_sigma, skipped)[0]
    )


def test_the_clean_estimate_is_taken_in_float32():
    latent = torch.tensor([[[1.0]]], dtype=torch.bfloat16)
    velocity = torch.tensor([[[1.0]]], dtype=torch.bfloat16)
    timesteps = torch.tensor([[[0.999]]])  # bfloat16 would round it to 1
    denoised = denoised_from_velocity(latent, velocity, timesteps)
    assert denoised.dtype == torch.bfloat16
    torch.testing.assert_close(denoised.float().item(), 0.001, atol=1e-5, rtol=0)


def test_a_half_precision_network_takes_float32_inputs(
    tiny_config: TransformerConfig, randomised: Build, modalities: Inputs
):
    transformer = randomised(tiny_config)
    video, audio = modalities(tiny_config)
    exact = transformer(video, audio)
    for got, want in zip(transformer.bfloat16()(video, audio), exact, strict=True):
        assert got.dtype == torch.bfloat16
        assert (got - want).norm() / want.norm() < 0.05


def test_uniform_perturbations_need_no_tensor():
    perturbations = Perturbations(
        (
            {"SKIP_VIDEO_SELF_ATTN": (0,)},
            {"SKIP_VIDEO_SELF_ATTN": (0,), "SKIP_A2V_CROSS_ATTN": None},
        )
    )
    first, second = keep_per_block(perturbations, 2, torch.device("cpu"))
    assert first.video_self is False and second.video_self is True
    assert isinstance(first.audio_to_video, torch.Tensor)
    assert first.audio_to_video.flatten().tolist() == [True, False]
    assert first.audio_to_video is second.audio_to_video


def test_a_block_compiles_without_graph_breaks(randomised: Build, modalities: Inputs):
    config = TransformerConfig(
        num_attention_heads=2,
        attention_head_dim=8,
        audio_num_attention_heads=2,
        audio_attention_head_dim=4,
        num_layers=1,
        cross_attention_dim=16,
        audio_cross_attention_dim=8,
        apply_gated_attention=True,
        cross_attention_adaln=True,
    )
    transformer = randomised(config)
    video, audio = modalities(config)
    mixed = Perturbations(({}, {"SKIP_VIDEO_SELF_ATTN": None, "SKIP_A2V_CROSS_ATTN": None}))
    want = transformer(video, audio, mixed)
    transformer.transformer_blocks[0].compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(transformer(video, audio, mixed), want)


def test_training_starts_near_zero_and_reaches_every_parameter(
    tiny_config: TransformerConfig, modalities: Inputs
):
    transformer = Transformer(replace(tiny_config, use_keyframes_abs_pos_embedding=True))
    init_weights(transformer, torch.Generator().manual_seed(0))
    video, audio = modalities(tiny_config)
    video = replace(video, keyframe_marker=torch.ones(2, 12, 1))
    velocities = transformer(video, audio)
    assert all(v.abs().max() < 0.1 for v in velocities)
    sum((v - 1).square().mean() for v in velocities).backward()
    without = [name for name, p in transformer.named_parameters() if p.grad is None]
    assert not without
    idle = [name for name, p in transformer.named_parameters() if not p.grad.abs().max() > 0]
    assert not idle


def test_a_few_steps_of_training_fit_a_batch(tiny_config: TransformerConfig, modalities: Inputs):
    transformer = Transformer(tiny_config)
    init_weights(transformer, torch.Generator().manual_seed(0))
    video, audio = modalities(tiny_config)
    targets = [torch.sin(3 * m.latent.flip(1)) for m in (video, audio)]
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        outputs = transformer(video, audio)
        loss = sum(
            torch.nn.functional.mse_loss(v, t) for v, t in zip(outputs, targets, strict=True)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 3


def test_a_config_survives_its_metadata(tiny_config: TransformerConfig):
    for config in (
        tiny_config,
        replace(tiny_config, has_video=False),
        replace(tiny_config, rope_type="interleaved", frequencies_precision=None, ff_bias=False),
    ):
        assert TransformerConfig.from_metadata(config.to_metadata()) == config


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("dropout", 0.1),
        ("attention_bias", False),
        ("activation_fn", "silu"),
        ("qk_norm", "layer_norm"),
        ("share_ff", True),
        ("num_vector_embeds", 12),
        ("use_middle_indices_grid", False),
        ("rope_type", "spiral"),
        ("frequencies_precision", "float16"),
        ("audio_num_attention_heads", 4),
        ("cross_attention_dim", 33),
        ("positional_embedding_max_pos", [20]),
        ("caption_proj_before_connector", False),
    ],
)
def test_an_unsupported_value_is_refused_with_its_key(
    tiny_config: TransformerConfig, key: str, value: object
):
    section = tiny_config.to_metadata() | {key: value}
    with pytest.raises(CheckpointError, match=key):
        TransformerConfig.from_metadata(section)


def test_text_that_is_half_projected_is_refused():
    section = {"caption_channels": 12, "caption_proj_before_connector": True}
    with pytest.raises(CheckpointError, match="caption_projection_first_linear"):
        TransformerConfig.from_metadata(section)
    with pytest.raises(CheckpointError, match="caption_channels"):
        TransformerConfig.from_metadata({})


def test_calls_that_cannot_work_say_why(
    tiny_config: TransformerConfig, randomised: Build, modalities: Inputs
):
    video, audio = modalities(tiny_config)
    transformer = randomised(tiny_config)
    with pytest.raises(InputError, match="both None"):
        transformer(None, None)
    with pytest.raises(InputError, match="1 samples"):
        transformer(video, audio, Perturbations(({},)))
    with pytest.raises(InputError, match="without video"):
        randomised(replace(tiny_config, has_video=False))(video, audio)
    with pytest.raises(InputError, match="SKIP_VIDEO_SELF_ATTN"):
        Perturbations(({"SKIP_EVERYTHING": None},))  # type: ignore[dict-item]
