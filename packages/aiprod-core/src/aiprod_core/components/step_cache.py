"""Step caching: steps whose estimate is forecast from earlier ones instead of computed.

Along a fine schedule the velocity v(sigma) = (x - denoised) / sigma of the guided model changes
slowly, so the last computed velocities foretell the next ones (TaylorSeer, Liu et al. 2025,
arXiv:2503.06923; here of the model's output, by a polynomial through unequally spaced points). A
forecast step costs nothing: neither the model nor its guidance runs.

Which steps to skip is not fixed. As TeaCache does (Liu et al. 2024, arXiv:2411.19108), a skipped
step adds to a running error, and the model runs again once that would pass a tolerance. The error
is not fitted to one network but measured on the way: whenever the model runs, what would have been
forecast is compared with what it says, and the order that would have done best is used next. An
error of the velocity moves x by the length of the step, so it counts by that length: the many short
steps near pure noise are cheap to skip, the few long ones at the end are not.

Works with every sampler, above guidance, batching, tiles and offload; few-step schedules leave it
next to nothing to skip.
"""

from dataclasses import dataclass

from torch import Tensor

from aiprod_core.components.samplers import Denoise
from aiprod_core.types import AV


@dataclass(frozen=True)
class CachePolicy:
    """How far forecasts are trusted."""

    tolerance: float  # error of x, over |v|, that the skipped steps in a row may add up to
    max_skipped: int  # in a row
    order: int = 1  # of the polynomial, at most; real velocities are too rough for more
    warmup: int = 4  # first evaluations that are always computed


POLICIES = {
    "safe": CachePolicy(tolerance=0.0025, max_skipped=3),
    "fast": CachePolicy(tolerance=0.008, max_skipped=4),
}


class StepCache:
    """`denoise` for the samplers that computes some estimates and forecasts the others.

    One per run. `computed` and `skipped` count evaluations. The last level of the schedule is
    always computed: nothing after it would mend an error.
    """

    def __init__(self, denoise: Denoise, sigmas: Tensor, policy: CachePolicy) -> None:
        self.denoise = denoise
        self.policy = policy
        self.levels: list[float] = sigmas.tolist()
        self.computed = 0
        self.skipped = 0
        self._points: list[tuple[float, AV]] = []  # (sigma, velocity), the newest first
        self._order = 0  # that would have foretold the newest best
        self._error = 0.0  # relative, of that forecast
        self._reach = 1.0  # how far in sigma it was foretold
        self._accumulated = 0.0
        self._skipped_in_row = 0

    def __call__(self, x: AV, sigma: float) -> AV:
        if self._can_skip(sigma):
            self.skipped += 1
            return x - forecast(self._points[: self._order + 1], sigma) * sigma
        denoised = self.denoise(x, sigma)
        self.computed += 1
        self._remember(sigma, (x - denoised) / sigma)
        return denoised

    def _can_skip(self, sigma: float) -> bool:
        policy = self.policy
        # The slack is for sigmas that did not come out of the float32 table.
        below = [level for level in self.levels if level < sigma - 1e-6]
        if (
            self.computed < max(policy.warmup, 2)
            or self._skipped_in_row >= policy.max_skipped
            or not any(level > 0 for level in below)
        ):
            return False
        farther = max(1.0, abs(sigma - self._points[0][0]) / self._reach)
        accumulated = self._accumulated + self._error * farther * (sigma - max(below))
        if accumulated > policy.tolerance:
            return False
        self._accumulated = accumulated
        self._skipped_in_row += 1
        return True

    def _remember(self, sigma: float, velocity: AV) -> None:
        self._points = [point for point in self._points if point[0] != sigma]
        if self._points:
            errors = [
                relative_error(forecast(self._points[: order + 1], sigma), velocity)
                for order in range(min(self.policy.order + 1, len(self._points)))
            ]
            self._error = min(errors)
            self._order = errors.index(self._error)
            self._reach = abs(sigma - self._points[0][0])
        self._points = [(sigma, velocity), *self._points][: self.policy.order + 1]
        self._accumulated, self._skipped_in_row = 0.0, 0


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
