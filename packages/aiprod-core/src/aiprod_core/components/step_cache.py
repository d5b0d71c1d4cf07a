"""Step caching: steps whose estimate is forecast from earlier ones instead of computed.

Along a fine schedule the velocity v(sigma) = (x - denoised) / sigma of the guided model changes
slowly, so a polynomial through the last computed velocities foretells the next ones (TaylorSeer,
Liu et al. 2025, arXiv:2503.06923; here of the model's output, in Newton's form, so that steps need
not be equally long). A forecast step costs nothing: neither the model nor its guidance runs.

Which steps to skip is not fixed. As TeaCache does (Liu et al. 2024, arXiv:2411.19108), a skipped
step adds to a running error, and the model runs again once that would pass a tolerance. The error
of a forecast is not fitted to one network but measured on the way: whenever the model runs, what
would have been forecast is compared with what it says, and an error at one distance from the last
computed point stands for errors at others by the order of the polynomial.

Works with every sampler, above guidance, batching, tiles and offload; few-step schedules leave it
nothing to skip.
"""

from dataclasses import dataclass

from torch import Tensor

from aiprod_core.components.samplers import Denoise
from aiprod_core.types import AV


@dataclass(frozen=True)
class CachePolicy:
    """How far forecasts are trusted."""

    tolerance: float  # relative error that skipped steps may add up to between computed ones
    max_skipped: int  # in a row
    order: int = 2  # of the polynomial, at most
    warmup: int = 4  # first evaluations that are always computed: there the layout is decided


POLICIES = {
    "safe": CachePolicy(tolerance=0.015, max_skipped=2),
    "fast": CachePolicy(tolerance=0.06, max_skipped=4),
}


class StepCache:
    """`denoise` for the samplers that computes some estimates and forecasts the others.

    One per run. `computed` and `skipped` count evaluations. The last level of the schedule is
    always computed: nothing after it would mend an error.
    """

    def __init__(self, denoise: Denoise, sigmas: Tensor, policy: CachePolicy) -> None:
        self.denoise = denoise
        self.policy = policy
        self.last_level = min(level for level in sigmas.tolist() if level > 0)
        self.computed = 0
        self.skipped = 0
        self._points: list[tuple[float, AV]] = []  # (sigma, velocity), the newest first
        self._error_rate: float | None = None  # relative error of a forecast at distance 1
        self._accumulated = 0.0
        self._skipped_in_row = 0

    def __call__(self, x: AV, sigma: float) -> AV:
        if self._can_skip(sigma):
            self.skipped += 1
            return x - forecast(self._points, sigma) * sigma
        denoised = self.denoise(x, sigma)
        self.computed += 1
        self._remember(sigma, (x - denoised) / sigma)
        return denoised

    def _can_skip(self, sigma: float) -> bool:
        policy = self.policy
        if (
            self.computed < policy.warmup
            or self._error_rate is None
            or sigma <= self.last_level * (1 + 1e-6)
            or self._skipped_in_row >= policy.max_skipped
        ):
            return False
        error = self._accumulated + self._error_rate * self._distance(sigma)
        if error > policy.tolerance:
            return False
        self._accumulated = error
        self._skipped_in_row += 1
        return True

    def _remember(self, sigma: float, velocity: AV) -> None:
        self._points = [point for point in self._points if point[0] != sigma]
        if self._points:
            error = relative_error(forecast(self._points, sigma), velocity)
            self._error_rate = error / self._distance(sigma)
        self._points = [(sigma, velocity), *self._points][: self.policy.order + 1]
        self._accumulated, self._skipped_in_row = 0.0, 0

    def _distance(self, sigma: float) -> float:
        """How hard a forecast at `sigma` is: the product in the error term of the polynomial."""
        product = 1.0
        for at, _ in self._points:
            product *= abs(sigma - at)
        return product


def forecast(points: list[tuple[float, AV]], sigma: float) -> AV:
    """The polynomial through (sigma_i, v_i) at `sigma`, by Lagrange's formula."""
    total: AV | None = None
    for i, (at, value) in enumerate(points):
        weight = 1.0
        for j, (other, _) in enumerate(points):
            if j != i:
                weight *= (sigma - other) / (at - other)
        total = value * weight if total is None else total + value * weight
    assert total is not None
    return total


def relative_error(estimate: AV, truth: AV) -> float:
    """|estimate - truth| / |truth| of the modality where it is larger."""
    ratios = truth.map(lambda t, e: (e - t).norm() / t.norm().clamp(min=1e-12), estimate)
    return max(float(ratio) for ratio in (ratios.video, ratios.audio) if ratio is not None)
