# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""How sure a figure is: bootstrap intervals, paired comparisons, and the calibration of evidence scores."""

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np


_CHUNK = 2_000_000  # resampled entries held in memory at once


class Interval(NamedTuple):
    """A mean with its bootstrap interval."""

    value: float
    low: float
    high: float


class PairedDifference(NamedTuple):
    """A system's mean minus another's on the same rows: interval, row counts, and the share of resamples against it."""

    difference: float
    low: float
    high: float
    wins: int
    losses: int
    ties: int
    p_value: float


def _checked(values: Sequence[float], name: str) -> np.ndarray:
    """One finite number per row, at least one row."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"{name} has shape {array.shape} where (N,) with N >= 1 is needed; pass one value per row.")
    if not np.isfinite(array).all():
        n = int(np.argmin(np.isfinite(array)))
        raise ValueError(f"{name}[{n}] is {array[n]}: a mean of it says nothing; score that row or leave it out.")
    return array


def _labels(labels: Sequence[Hashable] | None, count: int, name: str) -> np.ndarray:
    """Labels as numbers from 0; without labels every row is alike."""
    if labels is None:
        return np.zeros(count, dtype=np.int64)
    if len(labels) != count:
        raise ValueError(f"{name} has {len(labels)} entries for {count} rows; pass one per row.")
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(label, len(numbers)) for label in labels])


def _nested_weights(strata: Sequence[Hashable] | None, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Stratum of each row, and each stratum's weight: the parts of a nested group share its weight alike."""
    numbers = _labels(strata, count, "strata")
    if strata is None:
        return numbers, np.ones(1)
    paths = list(dict.fromkeys(label if isinstance(label, tuple) else (label,) for label in strata))
    weights = np.ones(len(paths))
    for n, path in enumerate(paths):
        for depth in range(len(path)):
            weights[n] /= len({other[: depth + 1] for other in paths if other[:depth] == path[:depth]})
    return numbers, weights


def _resampled_means(
    values: np.ndarray, strata: np.ndarray, weights: np.ndarray, clusters: np.ndarray, resamples: int, seed: int
) -> np.ndarray:
    """Means of bootstrap resamples `(resamples,)`: over strata, by weight, of the mean of redrawn clusters of rows."""
    rng, total = np.random.default_rng(seed), np.zeros(resamples)
    for stratum, weight in enumerate(weights):
        members = strata == stratum
        _, group = np.unique(clusters[members], return_inverse=True)
        sums, sizes = np.bincount(group, weights=values[members]), np.bincount(group)
        for start in range(0, resamples, step := max(1, _CHUNK // len(sums))):
            drawn = rng.integers(0, len(sums), (min(step, resamples - start), len(sums)))
            total[start : start + step] += weight * sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    return total


def _checked_options(resamples: int, confidence: float) -> None:
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}, which gives no interval; pass at least 1, better 1000.")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}, which is no share between 0 and 1; pass for example 0.95.")


def _mean(values: np.ndarray, strata: np.ndarray, weights: np.ndarray) -> float:
    return float(np.sum(weights * np.bincount(strata, weights=values) / np.bincount(strata)))


def bootstrap_interval(
    values: Sequence[float],
    strata: Sequence[Hashable] | None = None,
    clusters: Sequence[Hashable] | None = None,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Mean of per-row scores with its percentile bootstrap interval.

    Args:
        values (`(N,)` floats):
            One score per row.
        strata (`Sequence[Hashable]`, *optional*):
            Group of each row, for a mean of group means (a benchmark's mean over tasks); groups are redrawn apart.
            Tuples are nested groups: with (task, source) every task counts alike, and every source within its task.
        clusters (`Sequence[Hashable]`, *optional*):
            What is redrawn as one, for rows that are not independent (questions on one video). By default each row.
        resamples (`int`, *optional*, defaults to 2000):
            Number of resamples.
        confidence (`float`, *optional*, defaults to 0.95):
            Share of resamples inside the interval.
        seed (`int`, *optional*, defaults to 0):
            Seed of the draws; the same seed gives the same interval.

    Returns:
        `Interval`: the mean, and the interval's two ends.

    Raises:
        ValueError: If there are no rows, a score is not finite, or labels, `resamples` or `confidence` do not fit.
    """
    array = _checked(values, "values")
    _checked_options(resamples, confidence)
    groups, weights = _nested_weights(strata, len(array))
    redrawn = np.arange(len(array)) if clusters is None else _labels(clusters, len(array), "clusters")
    means = _resampled_means(array, groups, weights, redrawn, resamples, seed)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(_mean(array, groups, weights), float(low), float(high))


def paired_difference(
    ours: Sequence[float],
    theirs: Sequence[float],
    strata: Sequence[Hashable] | None = None,
    clusters: Sequence[Hashable] | None = None,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> PairedDifference:
    """Compares two systems on the same rows.

    Args:
        ours (`(N,)` floats):
            Score of the first system on each row.
        theirs (`(N,)` floats):
            Score of the second system on the same rows, in the same order.
        strata (`Sequence[Hashable]`, *optional*):
            As in [`bootstrap_interval`].
        clusters (`Sequence[Hashable]`, *optional*):
            As in [`bootstrap_interval`].
        resamples (`int`, *optional*, defaults to 2000):
            Number of resamples of rows.
        confidence (`float`, *optional*, defaults to 0.95):
            Share of resamples inside the interval.
        seed (`int`, *optional*, defaults to 0):
            Seed of the draws.

    Returns:
        `PairedDifference`: mean of `ours - theirs` with its interval, rows won, lost and tied by the first system, and
        a two-sided p-value: twice the share of resamples whose difference has the other sign or is 0 (one resample
        added to either side, so never 0), at most 1.

    Raises:
        ValueError: If the systems' rows differ in number, or as in [`bootstrap_interval`].
    """
    first, second = _checked(ours, "ours"), _checked(theirs, "theirs")
    if len(first) != len(second):
        raise ValueError(
            f"ours has {len(first)} rows and theirs {len(second)}: rows are compared in pairs; score both on the same."
        )
    delta = first - second
    _checked_options(resamples, confidence)
    groups, weights = _nested_weights(strata, len(delta))
    redrawn = np.arange(len(delta)) if clusters is None else _labels(clusters, len(delta), "clusters")
    means = _resampled_means(delta, groups, weights, redrawn, resamples, seed)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    against = min(int((means <= 0).sum()), int((means >= 0).sum()))
    return PairedDifference(
        difference=_mean(delta, groups, weights),
        low=float(low),
        high=float(high),
        wins=int((delta > 0).sum()),
        losses=int((delta < 0).sum()),
        ties=int((delta == 0).sum()),
        p_value=min(1.0, 2 * (against + 1) / (resamples + 1)),
    )


def area_under_curve(scores: Sequence[float], correct: Sequence[bool]) -> float | None:
    """Probability that a correct result scores above a wrong one (area under the ROC curve); equal scores count half.

    Args:
        scores (`(N,)` floats):
            Score of each result.
        correct (`(N,)` booleans):
            Whether each result is right.

    Returns:
        `float` between 0 and 1, or `None` if all results are right or all wrong.
    """
    scores, correct = np.asarray(scores, np.float64), np.asarray(correct, bool)
    good, bad = scores[correct], np.sort(scores[~correct])
    if not len(good) or not len(bad):
        return None
    below = np.searchsorted(bad, good, side="left") + np.searchsorted(bad, good, side="right")
    return float(below.mean() / (2 * len(bad)))


def calibration(scores: Sequence[float], correct: Sequence[bool], bins: int = 10) -> dict[str, Any]:
    """How well scores between 0 and 1 say how often a result is right.

    Args:
        scores (`(N,)` floats):
            Score of each result between 0 and 1, e.g. of each evidence span.
        correct (`(N,)` booleans):
            Whether each result is right, e.g. whether the span's IoU with the truth reaches 0.5.
        bins (`int`, *optional*, defaults to 10):
            Number of equally wide bins.

    Returns:
        `dict`: `count`; `bins`, one `{"low", "high", "count", "score", "accuracy"}` per bin that holds a result, with
        the bin's mean score and its share of right results; `ece`, the expected calibration error (mean over results
        of the gap between the two in their bin); `auc` as in [`area_under_curve`]. Without results `ece` is `None`.

    Raises:
        ValueError: If a score lies outside [0, 1], or the lengths differ.
    """
    scores, correct = np.asarray(scores, np.float64), np.asarray(correct, bool)
    if scores.shape != correct.shape or scores.ndim != 1:
        raise ValueError(f"scores has shape {scores.shape} and correct {correct.shape}; pass one of each per result.")
    outside = ~((scores >= 0) & (scores <= 1))
    if outside.any():
        n = int(np.argmax(outside))
        raise ValueError(f"scores[{n}] is {scores[n]}, which is no probability; pass scores between 0 and 1.")
    place = np.minimum((scores * bins).astype(np.int64), bins - 1)
    count = np.bincount(place, minlength=bins)
    filled = np.flatnonzero(count)
    score = np.bincount(place, weights=scores, minlength=bins)[filled] / count[filled]
    accuracy = np.bincount(place, weights=correct, minlength=bins)[filled] / count[filled]
    table = [
        {"low": b / bins, "high": (b + 1) / bins, "count": int(count[b]), "score": float(s), "accuracy": float(a)}
        for b, s, a in zip(filled.tolist(), score, accuracy, strict=True)
    ]
    error = float(np.sum(count[filled] * np.abs(score - accuracy)) / len(scores)) if len(scores) else None
    return {"count": len(scores), "bins": table, "ece": error, "auc": area_under_curve(scores, correct)}


__all__ = [
    "Interval",
    "PairedDifference",
    "area_under_curve",
    "bootstrap_interval",
    "calibration",
    "paired_difference",
]
