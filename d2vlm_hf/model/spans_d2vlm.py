# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""Temporal spans: seconds at every border, frame indices only inside, and the metrics on spans.

A span is `(start, end)` in seconds with `start <= end`. Frame spans are inclusive index pairs into `times`, the true
presentation times of a video's sampled frames; nothing here assumes a constant frame rate.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


# Containers round their duration to a clock of their own, so a span may end this many seconds after the stated one.
DURATION_TOLERANCE = 0.05


class Span(NamedTuple):
    """A moment of a video, in seconds from its start."""

    start: float
    end: float


def _as_spans(spans: np.ndarray | Sequence[Sequence[float]], name: str = "spans") -> np.ndarray:
    """Turns pairs of seconds into a `(K, 2)` float64 array; no span at all gives `(0, 2)`."""
    try:
        array = np.asarray(spans, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} is {spans!r}, which is not pairs of numbers; pass [[start, end], ...].") from error
    if array.size == 0:
        return np.zeros((0, 2))
    if array.ndim != 2 or array.shape[1] != 2:
        raise ValueError(f"{name} has shape {array.shape} where (K, 2) is needed; pass [[start, end], ...] in seconds.")
    finite = np.isfinite(array).all(axis=1)
    if not finite.all():
        k = int(np.argmin(finite))
        raise ValueError(f"{name}[{k}] is {array[k].tolist()}: a NaN or infinite time is no moment; drop or mend it.")
    ordered = array[:, 0] <= array[:, 1]
    if not ordered.all():
        k = int(np.argmin(ordered))
        raise ValueError(f"{name}[{k}] is {array[k].tolist()}: it ends before it starts; swap the two times.")
    return array


def _as_times(times: np.ndarray | Sequence[float]) -> np.ndarray:
    """Turns frame times into a `(T,)` float64 array with at least one entry, in rising order."""
    array = np.asarray(times, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"times has shape {array.shape} where (T,) with T >= 1 is needed; pass one time per frame.")
    if not np.isfinite(array).all() or (np.diff(array) < 0).any():
        raise ValueError("times holds a NaN or falls from one frame to the next; pass finite times in rising order.")
    return array


def validate_spans(spans: np.ndarray | Sequence[Sequence[float]], duration: float | None = None) -> np.ndarray:
    """Checks spans given by a user or a data set.

    Args:
        spans (`(K, 2)` floats):
            Start and end of each span in seconds; K may be 0.
        duration (`float`, *optional*):
            Length of the video in seconds. A span may end up to `DURATION_TOLERANCE` after it.

    Returns:
        `np.ndarray` of shape `(K, 2)`, float64: the spans, in the order given.

    Raises:
        ValueError: If a span is no pair of finite numbers, ends before it starts, starts before 0 or ends after
            `duration`, or if `duration` is not a positive number.
    """
    array = _as_spans(spans)
    if (array < 0).any():
        k = int(np.argmax((array < 0).any(axis=1)))
        raise ValueError(f"spans[{k}] is {array[k].tolist()}: it starts before the video does; times begin at 0.")
    if duration is None:
        return array
    if not (np.isfinite(duration) and duration > 0):
        raise ValueError(f"duration is {duration}, which is not a positive number of seconds; pass the video's length.")
    late = array[:, 1] > duration + DURATION_TOLERANCE
    if late.any():
        k = int(np.argmax(late))
        raise ValueError(
            f"spans[{k}] is {array[k].tolist()}: it ends after the video, which is {duration} s long; "
            "clip it to the duration or check that it belongs to this video."
        )
    return array


def temporal_iou(a: np.ndarray | Sequence[Sequence[float]], b: np.ndarray | Sequence[Sequence[float]]) -> np.ndarray:
    """Intersection over union of every span of `a` with every span of `b`.

    Two spans without length have no union to divide by: they score 1 if they are the same instant and 0 otherwise.

    Args:
        a (`(N, 2)` floats):
            Spans in seconds.
        b (`(M, 2)` floats):
            Spans in seconds.

    Returns:
        `np.ndarray` of shape `(N, M)`, float64, between 0 and 1.

    Raises:
        ValueError: If a span is no pair of finite numbers or ends before it starts.
    """
    a, b = _as_spans(a, "a")[:, None], _as_spans(b, "b")[None]  # (N, 1, 2), (1, M, 2)
    shared = np.minimum(a[..., 1], b[..., 1]) - np.maximum(a[..., 0], b[..., 0])
    shared = np.maximum(shared, 0.0)  # (N, M)
    union = (a[..., 1] - a[..., 0]) + (b[..., 1] - b[..., 0]) - shared  # (N, M)
    same_instant = (a == b).all(axis=-1).astype(np.float64)
    return np.divide(shared, union, out=same_instant, where=union > 0)


def spans_to_frames(spans: np.ndarray | Sequence[Sequence[float]], times: np.ndarray | Sequence[float]) -> np.ndarray:
    """Frames nearest to the start and to the end of each span; of two equally near, the earlier.

    Args:
        spans (`(K, 2)` floats):
            Spans in seconds.
        times (`(T,)` floats):
            Presentation times of the sampled frames in seconds, in rising order.

    Returns:
        `np.ndarray` of shape `(K, 2)`, int64: first and last frame of each span, inclusive.

    Raises:
        ValueError: If a span or the times are malformed.
    """
    spans, times = _as_spans(spans), _as_times(times)
    right = np.searchsorted(times, spans).clip(0, len(times) - 1)  # (K, 2), first frame not before the time
    left = np.maximum(right - 1, 0)
    return np.where(np.abs(spans - times[left]) <= np.abs(times[right] - spans), left, right).astype(np.int64)


def frames_to_spans(
    frames: np.ndarray | Sequence[Sequence[int]], times: np.ndarray | Sequence[float], period: float
) -> list[Span]:
    """Spans in seconds, from the time of the first frame to that of the last.

    A span of one frame would have no length, so it lasts one frame period. Turned back and forth by
    `spans_to_frames`, a span therefore moves by at most half a period at either end, and the end of a one-frame span
    by at most one and a half.

    Args:
        frames (`(K, 2)` integers):
            First and last frame of each span, inclusive.
        times (`(T,)` floats):
            Presentation times of the sampled frames in seconds, in rising order.
        period (`float`):
            Seconds from one sampled frame to the next.

    Returns:
        `list[Span]`: K spans in seconds.

    Raises:
        ValueError: If a frame lies outside the video, a span ends before it starts, or the period is not positive.
    """
    times, array = _as_times(times), np.asarray(frames, dtype=np.int64).reshape(-1, 2)
    if not (np.isfinite(period) and period > 0):
        raise ValueError(f"period is {period}, which is not a positive number of seconds; pass 1 / fps.")
    faulty = (array[:, 0] < 0) | (array[:, 1] >= len(times)) | (array[:, 0] > array[:, 1])
    if faulty.any():
        k = int(np.argmax(faulty))
        raise ValueError(
            f"frames[{k}] is {array[k].tolist()}, which is no span of a video of {len(times)} frames; "
            f"pass first <= last, both between 0 and {len(times) - 1} (leave out the padding of -1)."
        )
    start, end = times[array[:, 0]], times[array[:, 1]]
    end = np.where(array[:, 0] == array[:, 1], start + period, end)
    return [Span(s, e) for s, e in zip(start.tolist(), end.tolist(), strict=True)]


def _paired_iou(pred: Sequence, truth: Sequence) -> np.ndarray:
    """IoU of each row's one predicted span with the best of its true spans, `(N,)`; 0 where nothing was predicted."""
    if len(pred) != len(truth) or len(pred) == 0:
        raise ValueError(f"pred has {len(pred)} rows and truth {len(truth)}; pass one entry per row, at least one row.")
    result = np.zeros(len(pred))
    for n, (guess, target) in enumerate(zip(pred, truth, strict=True)):
        guess, target = (
            _as_spans(np.zeros((0, 2)) if row is None else np.atleast_2d(np.asarray(row, np.float64)), f"{name}[{n}]")
            for name, row in (("pred", guess), ("truth", target))
        )
        if len(guess) > 1:
            raise ValueError(f"pred[{n}] has {len(guess)} spans where the single best one is scored; pass only that.")
        if len(target) == 0:
            raise ValueError(f"truth[{n}] has no span, so recall means nothing there; score absent events apart.")
        result[n] = temporal_iou(guess, target).max(initial=0.0)
    return result


def recall_at_iou(pred: Sequence, truth: Sequence, thresholds: Sequence[float] = (0.3, 0.5, 0.7)) -> dict[float, float]:
    """Recall of the one best prediction per row (R1@IoU): the share of rows whose IoU reaches each threshold.

    Args:
        pred (sequence of N rows):
            One span in seconds per row, as `(2,)` or `(1, 2)`; `None` or an empty list where nothing was predicted,
            which counts as a miss.
        truth (sequence of N rows):
            The true span `(2,)` or spans `(K, 2)` of each row in seconds; of several, the one met best counts.
        thresholds (`Sequence[float]`, *optional*, defaults to `(0.3, 0.5, 0.7)`):
            IoU thresholds; an IoU equal to the threshold is a hit.

    Returns:
        `dict[float, float]`: threshold -> recall between 0 and 1, over all N rows.

    Raises:
        ValueError: If the rows do not match, a row has no true span, or more than one prediction.
    """
    iou = _paired_iou(pred, truth)
    return {float(threshold): float((iou >= threshold).mean()) for threshold in thresholds}


def mean_iou(pred: Sequence, truth: Sequence) -> float:
    """Mean IoU of the one best prediction per row; rows without prediction count as 0.

    Args:
        pred (sequence of N rows):
            One span in seconds per row, or nothing, as in `recall_at_iou`.
        truth (sequence of N rows):
            The true span or spans of each row in seconds.

    Returns:
        `float` between 0 and 1.

    Raises:
        ValueError: As `recall_at_iou`.
    """
    return float(_paired_iou(pred, truth).mean())


def set_f1(
    pred_sets: Sequence, truth_sets: Sequence, thresholds: Sequence[float] = (0.1, 0.3, 0.5, 0.7)
) -> dict[float, float]:
    """F1 between the sets of predicted and true spans of each row, averaged over the rows.

    Matching is by any match, as temporal action localization and dense captioning are scored: at each threshold,
    precision is the share of predictions that reach it with some true span, recall the share of true spans reached by
    some prediction. It is no assignment: two predictions of one event are both right. A row without true spans scores
    1 when nothing was predicted and 0 otherwise; a row without predictions scores 0 when there was something to find.

    Args:
        pred_sets (sequence of N arrays `(P, 2)`):
            Predicted spans of each row in seconds; P may be 0.
        truth_sets (sequence of N arrays `(K, 2)`):
            True spans of each row in seconds; K may be 0.
        thresholds (`Sequence[float]`, *optional*, defaults to `(0.1, 0.3, 0.5, 0.7)`):
            IoU thresholds; an IoU equal to the threshold is a hit.

    Returns:
        `dict[float, float]`: threshold -> mean F1 between 0 and 1; their mean is the benchmark's F1.

    Raises:
        ValueError: If the numbers of rows differ, there are no rows, or a span is malformed.
    """
    if len(pred_sets) != len(truth_sets) or len(pred_sets) == 0:
        raise ValueError(
            f"pred_sets has {len(pred_sets)} rows and truth_sets {len(truth_sets)}; "
            "pass one set of spans per row, at least one row."
        )
    limits = np.asarray(thresholds, dtype=np.float64)
    total = np.zeros(len(limits))
    for n, (pred, truth) in enumerate(zip(pred_sets, truth_sets, strict=True)):
        pred, truth = _as_spans(pred, f"pred_sets[{n}]"), _as_spans(truth, f"truth_sets[{n}]")
        if len(pred) == 0 or len(truth) == 0:
            total += float(len(pred) == len(truth))
            continue
        hit = temporal_iou(pred, truth)[..., None] >= limits  # (P, K, thresholds)
        precision, recall = hit.any(axis=1).mean(axis=0), hit.any(axis=0).mean(axis=0)
        both = precision + recall
        total += np.divide(2 * precision * recall, both, out=np.zeros_like(both), where=both > 0)
    return {float(limit): float(value) for limit, value in zip(limits, total / len(pred_sets), strict=True)}


__all__ = [
    "DURATION_TOLERANCE",
    "Span",
    "frames_to_spans",
    "mean_iou",
    "recall_at_iou",
    "set_f1",
    "spans_to_frames",
    "temporal_iou",
    "validate_spans",
]
