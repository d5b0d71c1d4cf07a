"""Guidance: what is added to the conditional estimate, and the denoiser that asks for all of it.

    guided = c + (cfg - 1)(c - u) + stg (c - p) + (modality - 1)(c - m)

on clean estimates in float32, per modality: c with the prompt, u with the negative prompt, p with
some self-attention skipped (STG, arXiv:2411.18664), m with the modalities deaf to each other. The
passes go through the model as one batch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from aiprod_core.errors import InputError
from aiprod_core.model.transformer import PerturbationKind, Perturbations, denoised_from_velocity
from aiprod_core.types import AV, LatentState, Modality

T = TypeVar("T")
DELTA_DIMS = (1, 2)  # tokens and channels: everything but the batch

# ----------------------------------------------------------------------------------------- formulas


def cfg_delta(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (Ho & Salimans, arXiv:2207.12598)."""
    return (cond - uncond) * (scale - 1)


def cfg_star_delta(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """CFG-Zero* (arXiv:2503.18886): `uncond` is first scaled to lie as near to `cond` as it can."""
    fit = _dot(cond, uncond) / (_dot(uncond, uncond) + 1e-8)
    return (cond - uncond * fit) * (scale - 1)


def stg_delta(cond: Tensor, perturbed: Tensor, scale: float) -> Tensor:
    return (cond - perturbed) * scale


def apg_delta(
    cond: Tensor,
    uncond: Tensor,
    scale: float,
    *,
    eta: float = 1.0,  # weight of the part along `cond`, which saturates; 1 is CFG
    norm_threshold: float = 0.0,  # longest difference per sample; 0 = any
) -> Tensor:
    """Adaptive projected guidance (Sadat et al. 2024, arXiv:2410.02416)."""
    return _project(cond - uncond, cond, eta, norm_threshold) * (scale - 1)


class MomentumAPG:
    """APG on a running sum of the differences: diff <- diff + momentum x last. One per run.

    Its scale counts from 0, not from 1: it is the whole weight of the difference.
    """

    def __init__(
        self, *, eta: float = 1.0, norm_threshold: float = 0.0, momentum: float = 0.0
    ) -> None:
        self.eta = eta
        self.norm_threshold = norm_threshold
        self.momentum = momentum
        self._running: Tensor | None = None

    def __call__(self, cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
        difference = cond - uncond
        if self._running is not None:
            difference = difference + self._running * self.momentum
        self._running = difference
        return _project(difference, cond, self.eta, self.norm_threshold) * scale


def _project(difference: Tensor, cond: Tensor, eta: float, norm_threshold: float) -> Tensor:
    if norm_threshold > 0:
        norm = _dot(difference, difference).sqrt()
        difference = difference * (norm_threshold / norm.clamp(min=1e-12)).clamp(max=1)
    parallel = cond * (_dot(difference, cond) / _dot(cond, cond).clamp(min=1e-12))
    return difference - parallel + parallel * eta


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(dim=DELTA_DIMS, keepdim=True)  # (B, 1, 1)


# ----------------------------------------------------------------------------------------- settings


@dataclass(frozen=True)
class Guidance:
    """Guidance of one modality; the defaults guide nothing."""

    cfg_scale: float = 1.0  # 1 = off
    stg_scale: float = 0.0  # 0 = off
    stg_blocks: tuple[int, ...] = ()  # whose self-attention the perturbed pass skips
    rescale: float = 0.0  # 0 to 1: how far to bring the deviation back to the conditional one
    modality_scale: float = 1.0  # 1 = off
    skip_step: int = 0  # k: only every (k+1)-th step runs, the others reuse the last estimate
    interval: tuple[float, float] = (0.0, 1.0)  # sigmas outside are not guided
    delta: Callable[[Tensor, Tensor, float], Tensor] = cfg_delta  # form of the text term

    def at(self, sigma: float) -> "Guidance":
        """The settings at a noise level: unguided outside the interval."""
        if self.interval[0] <= sigma <= self.interval[1]:
            return self
        return replace(self, cfg_scale=1.0, stg_scale=0.0, modality_scale=1.0)

    def skips(self, step: int) -> bool:
        return step % (self.skip_step + 1) != 0


def guide(
    guidance: Guidance,
    cond: Tensor,
    uncond: Tensor | None = None,
    perturbed: Tensor | None = None,
    isolated: Tensor | None = None,
) -> Tensor:
    """The guided estimate (B, N, C). A term whose scale is off does not look at its tensor."""
    guided = cond
    if guidance.cfg_scale != 1 and uncond is not None:
        guided = guided + guidance.delta(cond, uncond, guidance.cfg_scale)
    if guidance.stg_scale != 0 and perturbed is not None:
        guided = guided + stg_delta(cond, perturbed, guidance.stg_scale)
    if guidance.modality_scale != 1 and isolated is not None:
        guided = guided + cfg_delta(cond, isolated, guidance.modality_scale)
    if guidance.rescale != 0 and guided is not cond:
        # Over the whole tensor, batch included, as the published models were tuned with.
        factor = cond.std() / guided.std()
        guided = guided * (guidance.rescale * factor + 1 - guidance.rescale)
    return guided


def binned(table: Mapping[float, T], sigma: float) -> T:
    """The entry of the smallest key that is not below sigma; above all keys, the largest's."""
    not_below = [key for key in table if key >= sigma]
    return table[min(not_below) if not_below else max(table)]


# ----------------------------------------------------------------------------------------- denoiser


@dataclass(frozen=True)
class GuidedModality:
    """One modality of a run: its tokens and conditions, its text, how it is guided.

    context, negative_context (B, S, D) of one shape; context_mask, negative_context_mask (B, S) or
    None; without a negative one, the passes of the other modality's negative prompt use `context`.
    `guidance` may be a table from sigma (see `binned`). A frozen modality is shown to the other as
    it is: sigma 0. Published pipelines give it no guidance and no negative context.
    """

    state: LatentState
    context: Tensor
    negative_context: Tensor | None = None
    guidance: Guidance | Mapping[float, Guidance] = Guidance()
    context_mask: Tensor | None = None
    negative_context_mask: Tensor | None = None
    is_frozen: bool = False

    def __post_init__(self) -> None:
        negative = self.negative_context
        if negative is not None and negative.shape != self.context.shape:
            raise InputError(
                f"the negative prompt's context is {list(negative.shape)}, the prompt's "
                f"{list(self.context.shape)}; pad both to one length"
            )

    def guidance_at(self, sigma: float) -> Guidance:
        table = self.guidance
        return (table if isinstance(table, Guidance) else binned(table, sigma)).at(sigma)


class Model(Protocol):
    """What `Transformer` is to the denoiser: modalities in, velocities out."""

    def __call__(
        self,
        video: Modality | None,
        audio: Modality | None,
        perturbations: Perturbations | None = None,
    ) -> tuple[Tensor | None, Tensor | None]: ...


class GuidedDenoiser:
    """`denoise(x, sigma)` for the samplers: the guided clean estimate, (B, N, C) per modality.

    Remembers the last estimates, for `skip_step`: make one per run. The estimates are not blended
    with the conditions yet; samplers do that.

    Adaptive guidance (Castillo et al. 2023, arXiv:2312.12487): once the velocity of a pass points
    as the conditional one does, to a cosine of `min_cosine` in every modality, it has nothing to
    add, and from the next step on the pass is not run.
    """

    def __init__(
        self,
        transformer: Model,
        sigmas: Tensor,  # the run's schedule, by which steps are counted
        video: GuidedModality | None,
        audio: GuidedModality | None,
        *,
        max_batch_size: int | None = None,  # samples a model call; None = all passes in one
        min_cosine: float = 1.0,  # adaptive guidance; 1 = every pass at every step
    ) -> None:
        self.transformer = transformer
        self.levels: list[float] = sigmas.tolist()
        self.modalities = {
            name: modality
            for name, modality in (("video", video), ("audio", audio))
            if modality is not None
        }
        self.max_batch_size = max_batch_size
        self.min_cosine = min_cosine
        self._agreed: set[str] = set()  # passes that have come to say what the conditional says
        self._last: dict[str, tuple[Tensor, Tensor]] = {}  # modality: denoised, uncond
        self._at_sigma_1: dict[tuple[str, ...], Modality] = {}  # by modality and passes

    def __call__(self, x: AV, sigma: float) -> AV:
        return self._estimates(x, sigma, wants_uncond=False)[0]

    def with_uncond(self, x: AV, sigma: float) -> tuple[AV, AV]:
        """The guided and the unconditional estimate, for `euler_cfg_pp`."""
        return self._estimates(x, sigma, wants_uncond=True)

    def _estimates(self, x: AV, sigma: float, wants_uncond: bool) -> tuple[AV, AV]:
        # Stages within a step lie below its sigma, so they count as the same step. The slack is for
        # sigmas that did not come out of the float32 table.
        step = max(0, sum(level > sigma - 1e-6 for level in self.levels) - 1)
        guidance = {name: m.guidance_at(sigma) for name, m in self.modalities.items()}
        running = [
            name
            for name in self.modalities
            if not (guidance[name].skips(step) and name in self._last)
        ]
        if running:
            passes = self._passes([guidance[name] for name in running], wants_uncond)
            estimates = self._run(x, sigma, passes, guidance, running)
            for name in running:
                of_pass = dict(zip(passes, estimates[name], strict=True))
                denoised = guide(guidance[name], **of_pass)
                self._last[name] = denoised, of_pass.get("uncond", of_pass["cond"])
            if self.min_cosine < 1:
                self._agreed |= self._agreeing(x, passes, estimates)
        return (
            AV(**{name: self._last[name][0] for name in self.modalities}),
            AV(**{name: self._last[name][1] for name in self.modalities}),
        )

    def _passes(self, guidance: Sequence[Guidance], wants_uncond: bool) -> list[str]:
        passes = ["cond"]
        if wants_uncond or any(g.cfg_scale != 1 for g in guidance):
            passes.append("uncond")
        if any(g.stg_scale != 0 for g in guidance):
            passes.append("perturbed")
        if len(self.modalities) == 2 and any(g.modality_scale != 1 for g in guidance):
            passes.append("isolated")
        return [name for name in passes if name not in self._agreed]

    def _agreeing(
        self, x: AV, passes: list[str], estimates: Mapping[str, list[Tensor]]
    ) -> set[str]:
        """Passes whose difference from x points as the conditional one in every modality."""
        lowest = dict.fromkeys(passes[1:], 1.0)
        for name, (cond, *others) in estimates.items():
            latent = getattr(x, name)
            direction = (latent - cond).flatten().float()
            for pass_name, other in zip(passes[1:], others, strict=True):
                cosine = torch.cosine_similarity(direction, (latent - other).flatten().float(), 0)
                lowest[pass_name] = min(lowest[pass_name], float(cosine))
        return {name for name, cosine in lowest.items() if cosine >= self.min_cosine}

    def _run(
        self,
        x: AV,
        sigma: float,
        passes: list[str],
        guidance: Mapping[str, Guidance],
        running: list[str],
    ) -> dict[str, list[Tensor]]:
        """Each running modality's clean estimates, one a pass."""
        batch = next(iter(self.modalities.values())).state.latent.shape[0]
        per_call = len(passes)
        if self.max_batch_size is not None:
            per_call = max(1, self.max_batch_size // batch)
        estimates: dict[str, list[Tensor]] = {name: [] for name in running}
        for start in range(0, len(passes), per_call):
            group = passes[start : start + per_call]
            inputs = {
                name: self._input(name, x, sigma, group, name in running)
                for name in self.modalities
            }
            samples = tuple(
                _perturbation(name, guidance, running) for name in group for _ in range(batch)
            )
            perturbations = Perturbations(samples) if any(samples) else None
            velocities = self.transformer(inputs.get("video"), inputs.get("audio"), perturbations)
            for name, velocity in zip(("video", "audio"), velocities, strict=True):
                if name in running and velocity is not None:
                    given = inputs[name]
                    denoised = denoised_from_velocity(given.latent, velocity, given.timesteps)
                    estimates[name] += denoised.chunk(len(group))
        return estimates

    def _input(
        self, name: str, x: AV, sigma: float, group: list[str], is_running: bool
    ) -> Modality:
        modality = self.modalities[name]
        latent = x.video if name == "video" else x.audio
        if latent is None:
            raise InputError(f"the run has {name}, but the noisy latent has none")
        sigma = 0.0 if modality.is_frozen else sigma
        constant = self._at_sigma_1.get((name, *group))
        if constant is None:
            constant = self._at_sigma_1[name, *group] = _at_sigma_1(modality, group)
        return replace(
            constant,
            latent=torch.cat([latent] * len(group)),
            sigma=constant.sigma * sigma,
            timesteps=constant.timesteps * sigma,
            enabled=is_running,
        )


def _at_sigma_1(modality: GuidedModality, group: Sequence[str]) -> Modality:
    """What a group of passes is given, all but the noisy latent, at sigma 1.

    Made once: every step has the very same positions and texts, so that what follows from them can
    be kept too (`constants.computed_once`).
    """
    state = modality.state
    passes = len(group)

    def shared(tensor: Tensor | None) -> Tensor | None:
        # A batch of one serves all passes.
        return tensor if tensor is None or len(tensor) == 1 else torch.cat([tensor] * passes)

    def chosen(positive: Tensor | None, negative: Tensor | None) -> Tensor | None:
        if positive is None:
            return None
        negative = positive if negative is None else negative
        parts = [negative if name == "uncond" else positive for name in group]
        return parts[0] if passes == 1 else torch.cat(parts)

    mask = state.denoise_mask.float()
    if bool((mask == mask[:, :1]).all()):
        mask = mask[:, :1]  # all tokens share a noise level: one row of modulation instead of N
    positions = shared(state.positions)
    context = chosen(modality.context, modality.negative_context)
    assert positions is not None and context is not None
    return Modality(
        latent=state.latent,
        sigma=mask.new_ones(passes * len(mask)),
        timesteps=torch.cat([mask] * passes),
        positions=positions,
        context=context,
        context_mask=chosen(modality.context_mask, modality.negative_context_mask),
        attention_mask=shared(state.attention_mask),
        keyframe_marker=shared(state.keyframe_marker),
    )


def _perturbation(
    pass_name: str, guidance: Mapping[str, Guidance], running: Sequence[str]
) -> dict[PerturbationKind, Sequence[int] | None]:
    """What a pass switches off: some self-attention, or all attention between the modalities."""
    if pass_name == "isolated":
        return {"SKIP_A2V_CROSS_ATTN": None, "SKIP_V2A_CROSS_ATTN": None}
    skipped: dict[PerturbationKind, Sequence[int] | None] = {}
    if pass_name == "perturbed":
        if "video" in running and guidance["video"].stg_scale != 0:
            skipped["SKIP_VIDEO_SELF_ATTN"] = guidance["video"].stg_blocks
        if "audio" in running and guidance["audio"].stg_scale != 0:
            skipped["SKIP_AUDIO_SELF_ATTN"] = guidance["audio"].stg_blocks
    return skipped
