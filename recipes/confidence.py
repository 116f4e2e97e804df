"""How sure a measured mean is: intervals over examples, pass@k, and paired differences.

Examples are what is drawn at random from the task; the responses to one example are not independent of each other, and nothing here
treats them so. All intervals are of 95%. Nothing draws at random without a fixed seed: equal outcomes give equal numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from scipy.special import stdtrit

LEVEL = 0.95
"""Coverage of every interval."""
_Z = NormalDist().inv_cdf(0.5 + LEVEL / 2)
_NUM_RESAMPLES = 10_000
_MOST_EXACT = 14
"""Differences that are not 0 up to which the sign-flip test counts all sign patterns, 16,384."""
_CHUNK = 4_000_000
"""Random numbers held at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A mean over examples and its interval: `Estimate(mean=0.5, low=0.237, high=0.763, num_examples=10)`."""

    mean: float
    low: float
    high: float
    """The interval is [low, high]; both infinite where one example alone says nothing of the spread."""
    num_examples: int

    @property
    def half_width(self) -> float:
        """The larger of the two distances from the mean to an end of the interval."""
        return max(self.mean - self.low, self.high - self.mean)


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """A mean of paired differences, its interval, and the p value of no difference."""

    mean: float
    low: float
    high: float
    """The interval is [low, high]; both infinite where one example alone says nothing of the spread."""
    p_value: float
    """Two-sided, not corrected for several tasks."""
    num_examples: int
    num_better: int
    """Examples with a positive difference."""
    num_worse: int


def pass_at(num_right: int, num_responses: int, *, k: int) -> float:
    """Returns the chance that k of the responses, chosen without looking, hold a right one: 1 - C(n - c, k) / C(n, k).

    Unbiased for k draws (arXiv:2107.03374, eq. 1). Where fewer than k responses could be judged, all of them are taken.
    """
    if k < 1 or num_responses < 1 or not 0 <= num_right <= num_responses:
        raise ValueError(f"pass@{k} of {num_right} right among {num_responses} responses: k, responses >= 1, right between 0 and responses")
    drawn = min(k, num_responses)
    return 1.0 - math.comb(num_responses - num_right, drawn) / math.comb(num_responses, drawn)


def estimate_mean(sums: Sequence[float], counts: Sequence[int], *, max_trials: float | None) -> Estimate:
    """Returns the mean over all responses and its interval; `sums[i]` is the sum over the `counts[i]` responses to example i.

    The error is that of a ratio of means over examples, whose residuals are sum - count x mean (Cochran, Sampling Techniques, 1977, 6.2).
    `max_trials`: every response has a value between 0 and 1, and together they are at most so many independent trials. Then it is Wilson's
    score interval with as many as the error tells of, p (1 - p) / error^2, and no fewer than there are examples: with one response an
    example just as many. It has a width at 0 and at 1 as well. None: the values are other numbers, and it is Student's t interval.
    """
    if not sums:
        raise ValueError("the mean of no examples: leave out what has none")
    num_examples, num_responses = len(sums), sum(counts)
    mean = math.fsum(sums) / num_responses
    squares = math.fsum((value - count * mean) ** 2 for value, count in zip(sums, counts, strict=True))
    if max_trials is None:
        if num_examples == 1:
            return Estimate(mean=mean, low=-math.inf, high=math.inf, num_examples=1)
        error = math.sqrt(squares * num_examples / (num_examples - 1)) / num_responses
        reach = float(stdtrit(num_examples - 1, 0.5 + LEVEL / 2)) * error
        return Estimate(mean=mean, low=mean - reach, high=mean + reach, num_examples=num_examples)
    if 0 < mean < 1:
        num_trials = min(max(mean * (1 - mean) * num_responses**2 / squares, num_examples), max_trials) if squares else max_trials
    else:
        num_trials = num_examples
    low, high = wilson(mean, num_trials)
    return Estimate(mean=mean, low=low, high=high, num_examples=num_examples)


def wilson(share: float, num_trials: float) -> tuple[float, float]:
    """Returns Wilson's score interval of a share of that many independent trials (J. Am. Stat. Assoc. 22, 1927)."""
    scale = 1 + _Z**2 / num_trials
    centre = (share + _Z**2 / (2 * num_trials)) / scale
    reach = _Z * math.sqrt(share * (1 - share) / num_trials + _Z**2 / (4 * num_trials**2)) / scale
    return min(share, max(0.0, centre - reach)), max(share, min(1.0, centre + reach))


def mean_of_estimates(estimates: Sequence[Estimate]) -> Estimate:
    """Returns the mean of independent means, each counted once however many examples it has: the macro average of tasks.

    Its interval adds the squared distances to the ends of theirs (Zou and Donner, Statistics in Medicine 27, 2008).
    """
    mean, low, high = _combined([(one.mean, one.low, one.high) for one in estimates])
    return Estimate(mean=mean, low=low, high=high, num_examples=sum(one.num_examples for one in estimates))


def paired_difference(differences: Sequence[float]) -> Difference:
    """Returns the mean of paired differences, one an example, with a bootstrap interval and the p value of a sign-flip test.

    The interval holds the middle 95% of the means of 10,000 resamples of the examples. The p value is the share of sign patterns whose
    mean is at least as far from 0: all of them up to 14 differences that are not 0, else (1 + hits) / (1 + 10,000) of random ones. With
    one response an example it is the exact sign test.
    """
    if not differences:
        raise ValueError("the mean of no differences: leave out what has none")
    count = len(differences)
    low, high = _bootstrap_interval(differences) if count > 1 else (-math.inf, math.inf)
    return Difference(
        mean=math.fsum(differences) / count,
        low=low,
        high=high,
        p_value=sign_flip_p_value(differences),
        num_examples=count,
        num_better=sum(value > 0 for value in differences),
        num_worse=sum(value < 0 for value in differences),
    )


def mean_of_differences(by_task: Sequence[Sequence[float]]) -> Difference:
    """Returns the paired difference of the macro average: each task counts once, however many examples it has."""
    tasks = [paired_difference(differences) for differences in by_task]
    mean, low, high = _combined([(one.mean, one.low, one.high) for one in tasks])
    weighted = [value / len(differences) for differences in by_task for value in differences]
    return Difference(
        mean=mean,
        low=low,
        high=high,
        p_value=sign_flip_p_value(weighted),
        num_examples=len(weighted),
        num_better=sum(one.num_better for one in tasks),
        num_worse=sum(one.num_worse for one in tasks),
    )


def sign_flip_p_value(differences: Sequence[float]) -> float:
    """Returns the two-sided p value of differences whose signs would be tosses of a coin if there were none."""
    moved = np.array(sorted(value for value in differences if value), dtype=np.float64)
    if not moved.size:
        return 1.0
    # A pattern that gives the same sum in another order of adding must count.
    far = abs(math.fsum(moved)) - 1e-9 * float(np.abs(moved).sum())
    if moved.size <= _MOST_EXACT:
        patterns = (np.arange(2**moved.size)[:, None] >> np.arange(moved.size)) & 1
        return float(np.mean(np.abs((2 * patterns - 1) @ moved) >= far))
    rng = np.random.default_rng(0)
    hits, left = 0, _NUM_RESAMPLES
    while left:
        drawn = min(left, max(1, _CHUNK // moved.size))
        signs = 2 * rng.integers(0, 2, size=(drawn, moved.size), dtype=np.int8) - 1
        hits += int(np.sum(np.abs(signs @ moved) >= far))
        left -= drawn
    return (1 + hits) / (1 + _NUM_RESAMPLES)


def _bootstrap_interval(values: Sequence[float]) -> tuple[float, float]:
    distinct, counts = np.unique(np.array(values, dtype=np.float64), return_counts=True)
    rng = np.random.default_rng(0)
    count, means = len(values), []
    left = _NUM_RESAMPLES
    while left:
        drawn = min(left, max(1, _CHUNK // distinct.size))
        means.append(rng.multinomial(count, counts / count, size=drawn) @ distinct / count)
        left -= drawn
    low, high = np.quantile(np.concatenate(means), [0.5 - LEVEL / 2, 0.5 + LEVEL / 2])
    return float(low), float(high)


def _combined(means: Sequence[tuple[float, float, float]]) -> tuple[float, float, float]:
    if not means:
        raise ValueError("the mean of no tasks: leave out what has none")
    count = len(means)
    mean = math.fsum(one for one, _, _ in means) / count
    below = math.sqrt(math.fsum((one - low) ** 2 for one, low, _ in means)) / count
    above = math.sqrt(math.fsum((high - one) ** 2 for one, _, high in means)) / count
    return mean, mean - below, mean + above
