"""Two sets of clips of the same prompts, compared figure by figure with bootstrap intervals."""

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from aiprod_core.errors import InputError
from aiprod_trainer.evaluation.scores import Row

FEWEST = 3  # pairs below which no interval is given


class Difference(NamedTuple):
    """Means of A and B over the prompts that both have a figure for, and B - A with its interval.

    `is_clear` where the interval leaves out 0.
    """

    name: str
    a: float
    b: float
    difference: float
    low: float
    high: float
    pairs: int

    @property
    def is_clear(self) -> bool:
        return self.low > 0 or self.high < 0


def compare_rows(
    a: Sequence[Row], b: Sequence[Row], *, confidence: float = 0.95, seed: int = 0
) -> list[Difference]:
    """Differences of every figure that three prompts or more have in both. Raises InputError when
    the clips were not made from the same prompts."""
    if [row.prompt for row in a] != [row.prompt for row in b]:
        raise InputError("the two sides were not made from the same prompts in the same order.")
    figures = [(one.figures(), other.figures()) for one, other in zip(a, b, strict=True)]
    names = dict.fromkeys(name for one, _ in figures for name in one)
    found = []
    for name in names:
        pairs = np.array(
            [(one[name], other[name]) for one, other in figures if name in one and name in other]
        )
        if len(pairs) >= FEWEST:
            found.append(_difference(name, pairs, confidence, seed))
    return found


def _difference(name: str, pairs: np.ndarray, confidence: float, seed: int) -> Difference:
    """Resamples the prompts, each with both of its clips (Efron & Tibshirani 1993, BCa)."""
    steps = pairs[:, 1] - pairs[:, 0]
    low = high = float(steps.mean())
    if np.ptp(steps) > 0:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # BCa of a nearly constant sample says nan
            interval = stats.bootstrap(
                (steps,),
                np.mean,
                n_resamples=4000,
                confidence_level=confidence,
                method="BCa",
                rng=np.random.default_rng(seed),
            ).confidence_interval
        low, high = float(interval.low), float(interval.high)
    a, b = pairs.mean(axis=0)
    return Difference(name, float(a), float(b), float(steps.mean()), low, high, len(pairs))
