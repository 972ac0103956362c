# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""Metrics on spans, against published values, closed forms and slow plain-Python oracles."""

import itertools

import numpy as np
import pytest
from evaluation_helpers import count_values, golden, mismatches

from d2vlm_hf.evaluation.metrics import (
    coverage,
    coverage_f1,
    coverage_iou,
    detection_average_precision,
    detection_scores,
    grid_cells,
    harmonic_mean,
    hull_iou,
    match_events,
    merge_spans,
    published_iof,
    published_iou,
    ranking_average_precision,
    recall_rate,
    soda,
)


RNG = np.random.default_rng(3)


def random_spans(count, top=40):
    starts = RNG.integers(0, top, count)
    return np.stack([starts, starts + RNG.integers(1, 10, count)], axis=1).astype(float)


def test_every_golden_iou_is_met():
    faults, compared = [], 0
    for case in golden("nncore_temporal_iou.json")["cases"]:
        found = {
            "iou": published_iou(case["a"], case["b"]).tolist(),
            "iof": published_iof(case["a"], case["b"]).tolist(),
        }
        wanted = {name: case[name] for name in found}
        faults += mismatches(wanted, found, case["name"], tolerance=0.0)
        compared += count_values(wanted)
    assert not faults, "\n".join(faults)
    assert compared == 88


def test_thresholds_are_met_in_the_precision_of_the_scorer():
    single = published_iou([[0, 10]], [[0, 1], [0, 3], [0, 5], [0, 7]])[0]
    double = published_iou([[0, 10]], [[0, 1], [0, 3], [0, 5], [0, 7]], np.float64)[0]
    assert (single >= np.array([0.1, 0.3, 0.5, 0.7])).tolist() == [True, True, True, False]
    assert (double >= np.array([0.1, 0.3, 0.5, 0.7])).tolist() == [True, True, True, True]


def test_windows_that_are_no_spans():
    assert np.isnan(published_iou([[10, 0]], [[0, 10]])).all()
    assert published_iou([[0, float("inf")]], [[0, 10]]).tolist() == [[0.0]]
    assert published_iou([[0, 1e300]], [[0, 10]]).tolist() == [[0.0]]
    assert published_iou([], [[0, 10]]).shape == (0, 1)
    assert hull_iou([[5, 5]], [[5, 5]]).tolist() == [[0.0]]
    assert hull_iou([[0, 1]], [[3, 4]]).tolist() == [[0.0]]


def test_detection_of_events_is_strict_and_takes_the_best_annotator():
    windows, truth = [[0, 10], [20, 30]], [[0, 5], [20, 29], [50, 60]]
    precision, recall = detection_scores(windows, [truth], [0.3, 0.5, 0.7])
    assert precision.tolist() == [1.0, 0.5, 0.5]  # 0.5 exactly does not exceed 0.5
    assert recall == pytest.approx([2 / 3, 1 / 3, 1 / 3])
    best, _ = detection_scores(windows, [truth, [[0, 10], [20, 30]]], [0.9])
    assert best.tolist() == [1.0]
    assert detection_scores([], [truth], [0.3])[0].tolist() == [0.0]


def test_harmonic_mean_of_nothing():
    assert harmonic_mean([0.0, 0.5], [0.0, 1.0]) == pytest.approx([0.0, 2 / 3])


def slow_average_precision(windows, scores, truth, threshold):
    """Greedy matching by falling score, then the area under the interpolated curve, step by step."""
    taken, hits = set(), []
    for place in sorted(range(len(windows)), key=lambda n: -scores[n]):
        start, end = windows[place]
        best = None
        for k, (low, high) in enumerate(truth):
            shared = max(0.0, min(end, high) - max(start, low))
            iou = shared / (end - start + high - low - shared)
            if k not in taken and iou >= threshold and (best is None or iou >= best[0]):
                best = (iou, k)
        hits.append(best is not None)
        taken |= {best[1]} if best else set()
    area, found = 0.0, 0
    for rank, hit in enumerate(hits):
        found += hit
        if hit:
            later = [sum(hits[: n + 1]) / (n + 1) for n in range(rank, len(hits))]
            area += max(later) / len(truth)
    return area


def test_average_precision_against_a_plain_loop():
    for _ in range(60):
        windows, truth = random_spans(RNG.integers(1, 12)), random_spans(RNG.integers(1, 5))
        scores = np.round(RNG.random(len(windows)), 1)
        expected = [slow_average_precision(windows, scores, truth, t) for t in (0.3, 0.5, 0.7)]
        assert detection_average_precision(windows, scores, truth, (0.3, 0.5, 0.7)) == pytest.approx(expected)
    assert detection_average_precision([], [], [[0, 1]], (0.5,)).tolist() == [0.0]


def test_average_precision_of_a_ranking():
    assert ranking_average_precision([True, False, True], [0.9, 0.5, 0.4]) == pytest.approx((1 + 2 / 3) / 2)
    assert ranking_average_precision([True, False, False, False], [0.5] * 4) == 0.25  # all enter together
    # at 0.9 one of one, at 0.1 three of four: the mean of both, although two results enter at the second
    assert ranking_average_precision([True, True, True, False], [0.9, 0.1, 0.1, 0.1]) == (1 + 0.75) / 2
    assert ranking_average_precision([False, False], [0.1, 0.2]) == 0.0
    assert ranking_average_precision([True, True], [0.1, 0.2]) == 1.0


def test_cells_of_a_grid():
    assert np.flatnonzero(grid_cells([[0.5, 2.5], [1.5, 4.5]])).tolist() == [0, 1, 2, 3]  # half to even
    assert grid_cells([[-4, 2], [998.7, 5000]]).nonzero()[0].tolist() == [0, 1, 999]
    assert not grid_cells([[0.1, 0.4]]).any()
    with pytest.raises(OverflowError, match="cannot convert float infinity"):
        grid_cells([[0, float("inf")]])


def covered_seconds(spans):
    return {second for start, end in spans for second in range(int(start), int(end))}


def test_coverage_against_counted_seconds():
    for _ in range(60):
        a, b = random_spans(RNG.integers(0, 6)), random_spans(RNG.integers(0, 6))
        seconds = covered_seconds(a), covered_seconds(b)
        both, either = len(seconds[0] & seconds[1]), len(seconds[0] | seconds[1])
        assert coverage(a, b) == pytest.approx((len(seconds[0]), len(seconds[1]), both))
        assert coverage_iou(a, b) == pytest.approx(both / either if either else 1.0)
        total = len(seconds[0]) + len(seconds[1])
        assert coverage_f1(a, b) == pytest.approx(2 * both / total if total else 1.0)


def test_spans_without_length():
    assert merge_spans([[3, 4], [1, 2], [2, 2.5]]).tolist() == [[1, 2.5], [3, 4]]
    assert merge_spans([[0, 9], [1, 2], [3, 4]]).tolist() == [[0, 9]]
    assert coverage_iou([[5, 5]], [[5, 5]]) == 1.0
    assert coverage_iou([[5, 5]], [[6, 6]]) == 0.0
    assert coverage_iou([[5, 5]], []) == coverage_f1([[5, 5]], []) == 0.0


def test_events_are_matched_one_to_one_the_best_first():
    pairs = match_events([[0, 10], [1, 10], [50, 60]], [[0, 10], [2, 10]])
    assert pairs == [(0, 0, 1.0), (1, 1, pytest.approx(8 / 9))]
    assert match_events([], [[0, 1]]) == []


def slow_soda(similarity):
    """The best increasing chain of pairs, by trying all of them."""
    rows, columns = similarity.shape
    return max(
        sum(similarity[p, k] for p, k in zip(chosen, partners, strict=True))
        for size in range(min(rows, columns) + 1)
        for chosen in itertools.combinations(range(rows), size)
        for partners in itertools.combinations(range(columns), size)
    )


def test_soda_against_all_chains():
    for _ in range(20):
        similarity = RNG.random((RNG.integers(1, 6), RNG.integers(1, 6)))
        precision, recall, f1 = soda(similarity)
        best = slow_soda(similarity)
        assert (precision, recall) == pytest.approx((best / len(similarity), best / similarity.shape[1]))
        assert f1 == pytest.approx(2 * best / sum(similarity.shape))
    assert soda(np.zeros((0, 3))) == (0.0, 0.0, 0.0)


def test_recall_rate():
    assert recall_rate(0.5, (0.1, 0.3, 0.5, 0.7)) == 0.75
    assert recall_rate(float("nan"), (0.1, 0.3)) == 0.0
