# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""Metrics on spans in seconds, as pure functions of numpy arrays.

`model/spans_d2vlm.py` has the metrics of this package's own protocol, which refuse malformed spans. The functions here
are of two kinds: those that published scorers need, which take windows as a model wrote them (reversed, infinite) and
keep the arithmetic that decides borderline cases, and those on sets of spans, rankings and their agreement.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..model.spans_d2vlm import temporal_iou


ETBENCH_THRESHOLDS = (0.1, 0.3, 0.5, 0.7)
GRID_CELLS = 1000  # seconds of video that the 1-second grid of E.T. Bench's evs covers
HULL_EPSILON = 1e-8


class Events(NamedTuple):
    """Events of one video: `spans` (K, 2) in seconds, and one caption each."""

    spans: Sequence[Sequence[float]]
    captions: Sequence[str]


def _windows(windows: Sequence, dtype: type = np.float64) -> np.ndarray:
    """Pairs of seconds as `(K, 2)`; no window at all gives `(0, 2)`."""
    with np.errstate(over="ignore"):
        return np.asarray(windows, dtype=dtype).reshape(-1, 2)


def _overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Shared seconds of every window of `a` with every window of `b`, `(N, M)`, at least 0."""
    shared = np.minimum(a[:, None, 1], b[None, :, 1]) - np.maximum(a[:, None, 0], b[None, :, 0])
    return np.maximum(shared, shared.dtype.type(0))


def published_iou(a: Sequence, b: Sequence, dtype: type = np.float32) -> np.ndarray:
    """Temporal IoU as published scorers compute it: nothing is sorted, and 0 / 0 is NaN.

    In float32 an IoU of 0.7 is 0.69999999 and misses the threshold 0.7, while 0.3 is 0.30000001 and meets 0.3; compare
    the returned values as float64.

    Args:
        a (`(N, 2)` floats):
            Windows in seconds, as written by a model: possibly reversed or infinite.
        b (`(M, 2)` floats):
            Windows in seconds.
        dtype (`type`, *optional*, defaults to `np.float32`):
            Precision of the arithmetic.

    Returns:
        `np.ndarray` of shape `(N, M)`, float64 values of `dtype` precision.
    """
    a, b = _windows(a, dtype), _windows(b, dtype)
    with np.errstate(all="ignore"):
        shared = _overlap(a, b)
        lengths = (a[:, 1] - a[:, 0])[:, None] + (b[:, 1] - b[:, 0])[None]
        return (shared / (lengths - shared)).astype(np.float64)


def published_iof(a: Sequence, b: Sequence, dtype: type = np.float32) -> np.ndarray:
    """Shared seconds over the length of the window of `a`, in the arithmetic of [`published_iou`].

    Args:
        a (`(N, 2)` floats):
            Windows in seconds, the foreground.
        b (`(M, 2)` floats):
            Windows in seconds.
        dtype (`type`, *optional*, defaults to `np.float32`):
            Precision of the arithmetic.

    Returns:
        `np.ndarray` of shape `(N, M)`, float64 values of `dtype` precision.
    """
    a, b = _windows(a, dtype), _windows(b, dtype)
    with np.errstate(all="ignore"):
        return (_overlap(a, b) / (a[:, 1] - a[:, 0])[:, None]).astype(np.float64)


def hull_iou(a: Sequence, b: Sequence) -> np.ndarray:
    """IoU of the dense-captioning scorers: shared / (min(hull, sum of the lengths) + 1e-8), in float64.

    Args:
        a (`(N, 2)` floats):
            Windows in seconds.
        b (`(M, 2)` floats):
            Windows in seconds.

    Returns:
        `np.ndarray` of shape `(N, M)`, float64.
    """
    a, b = _windows(a), _windows(b)
    with np.errstate(all="ignore"):
        hull = np.maximum(a[:, None, 1], b[None, :, 1]) - np.minimum(a[:, None, 0], b[None, :, 0])
        lengths = (a[:, 1] - a[:, 0])[:, None] + (b[:, 1] - b[:, 0])[None]
        return _overlap(a, b) / (np.minimum(hull, lengths) + HULL_EPSILON)


def detection_scores(
    windows: Sequence, references: Sequence[Sequence], thresholds: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """Precision and recall of one video's event windows, as dense captioning is scored (IoU > threshold).

    Args:
        windows (`(P, 2)` floats):
            Predicted windows in seconds; P may be 0.
        references (sequence of `(K, 2)` floats):
            True windows of each annotator; of several annotators the best precision and the best recall count.
        thresholds (`Sequence[float]`):
            T thresholds, which an IoU must exceed.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: precision `(T,)` and recall `(T,)`.
    """
    limits = np.asarray(thresholds, dtype=np.float64)
    precision, recall = np.zeros(len(limits)), np.zeros(len(limits))
    for truth in references:
        hit = hull_iou(windows, truth)[..., None] > limits  # (P, K, T)
        if hit.size:
            precision = np.maximum(precision, hit.any(axis=1).mean(axis=0))
            recall = np.maximum(recall, hit.any(axis=0).mean(axis=0))
    return precision, recall


def harmonic_mean(precision: np.ndarray | float, recall: np.ndarray | float) -> np.ndarray:
    """F1 of precision and recall, elementwise; 0 where both are 0.

    Args:
        precision (array-like of floats):
            Precision between 0 and 1.
        recall (array-like of floats):
            Recall between 0 and 1, of the same shape.

    Returns:
        `np.ndarray`: F1, of the same shape.
    """
    precision, recall = np.asarray(precision, np.float64), np.asarray(recall, np.float64)
    both = precision + recall
    return np.divide(2 * precision * recall, both, out=np.zeros_like(both), where=both > 0)


def interpolated_average_precision(precision: np.ndarray, recall: np.ndarray) -> float:
    """Area under the precision-recall curve, each precision raised to the best one at a higher recall.

    Args:
        precision (`(N,)` floats):
            Precision after each further result.
        recall (`(N,)` floats):
            Recall after each further result, not falling.

    Returns:
        `float`: average precision between 0 and 1.
    """
    envelope = np.maximum.accumulate(np.append(precision, 0.0)[::-1])[::-1][:-1]
    return float(np.sum(np.diff(recall, prepend=0.0) * envelope))


def detection_average_precision(
    windows: Sequence, scores: Sequence[float], truth: Sequence, thresholds: Sequence[float]
) -> np.ndarray:
    """Average precision of scored windows against the true windows of one query (ActivityNet's definition).

    Windows are visited by falling score, equal scores in the order given; each takes the true window of the highest
    IoU that reaches the threshold and is not taken yet, or else is a false positive. The curve is interpolated.

    Args:
        windows (`(P, 2)` floats):
            Predicted windows in seconds.
        scores (`(P,)` floats):
            Their scores.
        truth (`(K, 2)` floats):
            True windows in seconds, K >= 1.
        thresholds (`Sequence[float]`):
            T IoU thresholds, which an IoU must reach.

    Returns:
        `np.ndarray` of shape `(T,)`: average precision at each threshold; 0 without predictions.
    """
    windows, truth, limits = _windows(windows), _windows(truth), np.asarray(thresholds, np.float64)
    order = np.argsort(-np.asarray(scores, np.float64), kind="stable")
    iou = np.nan_to_num(published_iou(windows[order], truth, np.float64))  # (P, K)
    free = np.ones((len(limits), len(truth)), dtype=bool)
    hits = np.zeros((len(limits), len(windows)))
    rows = np.arange(len(limits))
    for p, row in enumerate(iou):
        usable = np.where(free & (row >= limits[:, None]), row, -1.0)  # (T, K)
        best = len(truth) - 1 - usable[:, ::-1].argmax(axis=1)  # of equal IoUs the later one, as published
        hits[:, p] = usable[rows, best] >= 0
        free[rows, best] &= hits[:, p] == 0
    found = hits.cumsum(axis=1)
    ranks = np.arange(1, len(windows) + 1)
    return np.array([interpolated_average_precision(f / ranks, f / len(truth)) for f in found])


def ranking_average_precision(relevant: Sequence[bool], scores: Sequence[float]) -> float:
    """Interpolated average precision of a ranking, as highlight detection is scored.

    Results of equal score enter together; the mean is over the scores at which a relevant result enters, however many
    do (the published definition, which differs from the area under the curve only where scores are equal).

    Args:
        relevant (`(N,)` booleans):
            Whether each result is relevant.
        scores (`(N,)` floats):
            Score of each result.

    Returns:
        `float`: 0 if nothing is relevant, 1 if everything is.
    """
    relevant, scores = np.asarray(relevant, dtype=bool), np.asarray(scores, dtype=np.float64)
    if not relevant.any():
        return 0.0
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)  # last result of each score
    found = relevant[order].cumsum()[last]
    envelope = np.maximum.accumulate((found / (last + 1))[::-1])[::-1]
    return float(envelope[np.diff(found, prepend=0) > 0].mean())


def grid_cells(windows: Sequence) -> np.ndarray:
    """Which of the 1,000 one-second cells of a video any window covers (E.T. Bench's evs).

    Args:
        windows (`(K, 2)` floats):
            Windows in seconds; start and end are rounded half to even.

    Returns:
        `np.ndarray` of shape `(1000,)`, bool.

    Raises:
        OverflowError: If a window is infinite, as in the published scorers.
    """
    cells = np.zeros(GRID_CELLS, dtype=bool)
    for start, end in windows:
        cells[max(0, round(start)) : round(end)] = True
    return cells


def merge_spans(spans: Sequence) -> np.ndarray:
    """Joins overlapping and touching spans.

    Args:
        spans (`(K, 2)` floats):
            Spans in seconds, start <= end, in any order.

    Returns:
        `np.ndarray` of shape `(J, 2)`, float64: disjoint spans in rising order that cover the same time.
    """
    spans = _windows(spans)
    if not len(spans):
        return spans
    spans = spans[np.lexsort((spans[:, 1], spans[:, 0]))]
    reach = np.maximum.accumulate(spans[:, 1])
    first = np.append(True, spans[1:, 0] > reach[:-1])
    last = np.append(np.flatnonzero(first)[1:] - 1, len(spans) - 1)
    return np.stack([spans[first, 0], reach[last]], axis=1)


def coverage(a: Sequence, b: Sequence) -> tuple[float, float, float]:
    """Seconds that two sets of spans cover.

    Args:
        a (`(N, 2)` floats):
            Spans in seconds, in any order, possibly overlapping.
        b (`(M, 2)` floats):
            Spans in seconds.

    Returns:
        `tuple[float, float, float]`: seconds covered by `a`, by `b`, and by both.
    """
    a, b = merge_spans(a), merge_spans(b)
    shared = float(_overlap(a, b).sum())
    return float((a[:, 1] - a[:, 0]).sum()), float((b[:, 1] - b[:, 0]).sum()), shared


def coverage_iou(a: Sequence, b: Sequence) -> float:
    """IoU of the time covered by two sets of spans: how far evidence and answer agree.

    Args:
        a (`(N, 2)` floats):
            Spans in seconds; N may be 0.
        b (`(M, 2)` floats):
            Spans in seconds; M may be 0.

    Returns:
        `float` between 0 and 1: 1 if both are empty, 0 if only one is. Where neither covers any time, 1 if they are
        the same instants and 0 otherwise.
    """
    a, b = merge_spans(a), merge_spans(b)
    length_a, length_b, shared = coverage(a, b)
    union = length_a + length_b - shared
    return shared / union if union > 0 else float(np.array_equal(a, b))


def coverage_f1(predicted: Sequence, truth: Sequence) -> float:
    """F1 of the time covered by predicted spans (video summaries), without any grid.

    Args:
        predicted (`(P, 2)` floats):
            Predicted spans in seconds; P may be 0.
        truth (`(K, 2)` floats):
            True spans in seconds; K may be 0.

    Returns:
        `float` between 0 and 1; 1 if both are empty.
    """
    length, wanted, shared = coverage(predicted, truth)
    if length + wanted == 0:
        return float(len(_windows(predicted)) == len(_windows(truth)) == 0)
    return 2 * shared / (length + wanted)


def recall_rate(iou: float, thresholds: Sequence[float]) -> float:
    """Share of thresholds that an IoU reaches.

    Args:
        iou (`float`):
            An IoU.
        thresholds (`Sequence[float]`):
            IoU thresholds.

    Returns:
        `float` between 0 and 1.
    """
    return float(np.mean([iou >= threshold for threshold in thresholds]))


def all_annotators(row: Mapping[str, Any]) -> list[Sequence[float]]:
    """Every true span of any annotator.

    Args:
        row (`Mapping`):
            A row with `spans` and `annotations`.

    Returns:
        `list`: spans in seconds.
    """
    return [span for annotator in row.get("annotations") or [row["spans"]] for span in annotator]


def match_events(predicted: Sequence, truth: Sequence) -> list[tuple[int, int, float]]:
    """Pairs predicted with true events one to one, the pairs of highest IoU first.

    Args:
        predicted (`(P, 2)` floats):
            Predicted spans in seconds.
        truth (`(K, 2)` floats):
            True spans in seconds.

    Returns:
        `list[tuple[int, int, float]]`: (predicted index, true index, IoU) of each pair with any overlap; of equal IoUs
        the earlier pair is taken.
    """
    iou, pairs = temporal_iou(predicted, truth), []
    while iou.size and iou.max() > 0:
        p, k = np.unravel_index(int(iou.argmax()), iou.shape)
        pairs.append((int(p), int(k), float(iou[p, k])))
        iou[p, :], iou[:, k] = -1.0, -1.0
    return pairs


def soda(similarity: np.ndarray) -> tuple[float, float, float]:
    """Story-oriented score of a video's captions: the best one-to-one matching that keeps the order of events.

    Args:
        similarity (`(P, K)` floats):
            Score of each predicted event with each true event, both in order of time; for SODA_c METEOR times IoU.

    Returns:
        `tuple[float, float, float]`: precision (best sum / P), recall (best sum / K) and their F1; 0 without events.
    """
    similarity = np.asarray(similarity, np.float64)
    rows, columns = similarity.shape
    best = np.zeros(columns + 1)
    for row in similarity:
        step = np.maximum(best[1:], best[:-1] + row)
        best[1:] = np.maximum.accumulate(step)
    total = best[-1]
    precision, recall = total / max(1, rows), total / max(1, columns)
    return float(precision), float(recall), float(harmonic_mean(precision, recall))


__all__ = [
    "ETBENCH_THRESHOLDS",
    "Events",
    "all_annotators",
    "coverage",
    "coverage_f1",
    "coverage_iou",
    "detection_average_precision",
    "detection_scores",
    "grid_cells",
    "harmonic_mean",
    "hull_iou",
    "interpolated_average_precision",
    "match_events",
    "merge_spans",
    "published_iof",
    "published_iou",
    "ranking_average_precision",
    "recall_rate",
    "soda",
]
