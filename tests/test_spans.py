# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""Spans: closed forms, slow plain-Python oracles beside the vectorized code, and what malformed spans get."""

import re

import numpy as np
import pytest

from d2vlm_hf.model.spans_d2vlm import (
    Span,
    frames_to_spans,
    mean_iou,
    recall_at_iou,
    set_f1,
    spans_to_frames,
    temporal_iou,
    validate_spans,
)


# Slow oracles: one pair, one frame, one row at a time, straight from the definitions.
def oracle_iou(a, b):
    shared = max(0.0, min(a[1], b[1]) - max(a[0], b[0]))
    union = (a[1] - a[0]) + (b[1] - b[0]) - shared
    if union == 0:
        return 1.0 if a[0] == b[0] else 0.0
    return shared / union


def oracle_nearest(second, times):
    best = 0
    for index, time in enumerate(times):
        if abs(time - second) < abs(times[best] - second):
            best = index
    return best


def oracle_f1(pred, truth, threshold):
    if not pred or not truth:
        return 1.0 if len(pred) == len(truth) else 0.0
    precision = sum(any(oracle_iou(p, t) >= threshold for t in truth) for p in pred) / len(pred)
    recall = sum(any(oracle_iou(p, t) >= threshold for p in pred) for t in truth) / len(truth)
    return 0.0 if precision + recall == 0 else 2 * precision * recall / (precision + recall)


def random_spans(rng, count, duration=30.0):
    """Spans on a coarse grid, so that equal, touching and zero-length ones occur too."""
    return np.sort(rng.integers(0, 40, size=(count, 2)) * (duration / 40), axis=1)


def random_times(rng, irregular):
    """Times of 1 to 60 frames and the longest gap between two of them, in seconds."""
    count, fps = int(rng.integers(1, 60)), float(rng.choice([0.3, 1, 2, 7, 23.976, 25, 29.97, 60]))
    gaps = rng.uniform(0.2, 1.8, count) / fps if irregular else np.full(count, 1 / fps)
    return np.concatenate([[0.0], np.cumsum(gaps)[:-1]]), 1 / fps, float(gaps.max())


def test_temporal_iou_closed_forms():
    a = [[0, 10], [5, 5], [2, 4]]
    b = [[0, 10], [5, 15], [20, 30], [10, 12], [5, 5], [6, 6]]
    expected = [[1, 5 / 15, 0, 0, 0, 0], [0, 0, 0, 0, 1, 0], [0.2, 0, 0, 0, 0, 0]]
    iou = temporal_iou(a, b)
    assert iou.dtype == np.float64
    np.testing.assert_array_equal(iou, expected)


def test_temporal_iou_equals_the_oracle_and_is_symmetric():
    rng = np.random.default_rng(0)
    for _ in range(50):
        a, b = random_spans(rng, rng.integers(0, 7)), random_spans(rng, rng.integers(0, 7))
        expected = np.array([[oracle_iou(x, y) for y in b] for x in a]).reshape(len(a), len(b))
        np.testing.assert_allclose(temporal_iou(a, b), expected, rtol=0, atol=1e-12)
        np.testing.assert_array_equal(temporal_iou(a, b), temporal_iou(b, a).T)


def test_temporal_iou_of_nothing_has_the_right_shape():
    assert temporal_iou([], [[0, 1], [1, 2]]).shape == (0, 2)
    assert temporal_iou([[0, 1]], []).shape == (1, 0)


def test_spans_to_frames_takes_the_nearest_frame_and_of_two_the_earlier():
    times = [0.0, 1.0, 2.0, 3.0, 4.0]
    frames = spans_to_frames([[0.4, 0.6], [0.5, 1.5], [2, 3], [3.9, 99.0]], times)
    assert frames.dtype == np.int64
    np.testing.assert_array_equal(frames, [[0, 1], [0, 1], [2, 3], [4, 4]])
    assert spans_to_frames([], times).shape == (0, 2)


def test_spans_to_frames_at_a_frame_rate_other_than_one():
    # 2 frames a second: second 3 is frame 6; a package that took seconds for indices would say 3.
    np.testing.assert_array_equal(spans_to_frames([[3.0, 5.0]], np.arange(20) / 2), [[6, 10]])


@pytest.mark.parametrize("irregular", [False, True])
def test_spans_to_frames_equals_the_oracle(irregular):
    rng = np.random.default_rng(1)
    for _ in range(50):
        times, _, _ = random_times(rng, irregular)
        spans = np.sort(rng.uniform(0, times[-1] + 1, size=(5, 2)), axis=1)
        expected = [[oracle_nearest(x, times) for x in span] for span in spans]
        np.testing.assert_array_equal(spans_to_frames(spans, times), expected)


def test_frames_to_spans_closed_forms():
    times = [0.0, 0.5, 1.0, 1.75]
    spans = frames_to_spans([[0, 3], [1, 2], [2, 2]], times, period=0.5)
    assert spans == [Span(0.0, 1.75), Span(0.5, 1.0), Span(1.0, 1.5)]
    assert spans[2].end - spans[2].start == 0.5  # one frame lasts one period
    assert frames_to_spans([], times, period=0.5) == []


@pytest.mark.parametrize("irregular", [False, True])
def test_seconds_to_frames_to_seconds_within_one_frame(irregular):
    rng = np.random.default_rng(2)
    for _ in range(300):
        times, period, gap = random_times(rng, irregular)
        spans = np.sort(rng.uniform(0, times[-1] + period, size=(4, 2)), axis=1)  # up to the end of the last frame
        frames = spans_to_frames(spans, times)
        back = np.array(frames_to_spans(frames, times, period))
        one_frame = frames[:, 0] == frames[:, 1]
        limit = max(gap, period) + 1e-9
        assert np.abs(back - spans)[~one_frame].max(initial=0) <= limit
        assert np.abs(back - spans)[one_frame, 0].max(initial=0) <= limit
        # a one-frame span is given one period of length, wherever in that frame's time it ended
        assert np.abs(back - spans)[one_frame, 1].max(initial=0) <= 1.5 * limit
        # and once on the grid, the first frame stays put
        np.testing.assert_array_equal(spans_to_frames(back, times)[:, 0], frames[:, 0])


def test_recall_and_mean_iou_closed_forms():
    pred = [[0, 10], [0, 5], None, [[20, 30]], []]
    truth = [[0, 10], [0, 10], [0, 10], [[0, 1], [24, 30]], [[3, 4]]]
    # IoU per row: 1, 0.5, 0, the better of 0 and 0.6, 0; an IoU equal to the threshold is a hit
    assert recall_at_iou(pred, truth) == {0.3: 0.6, 0.5: 0.6, 0.7: 0.2}
    assert mean_iou(pred, truth) == pytest.approx((1 + 0.5 + 0.6) / 5)


def test_recall_and_mean_iou_equal_the_oracle():
    rng = np.random.default_rng(3)
    pred = random_spans(rng, 40)
    truth = [random_spans(rng, rng.integers(1, 4)) for _ in pred]
    iou = [max(oracle_iou(p, t) for t in spans) for p, spans in zip(pred, truth, strict=True)]
    for threshold, recall in recall_at_iou(pred, truth, thresholds=(0.2, 0.55)).items():
        assert recall == pytest.approx(sum(x >= threshold for x in iou) / len(iou))
    assert mean_iou(pred, truth) == pytest.approx(sum(iou) / len(iou))


def test_set_f1_closed_forms():
    # nothing to find and nothing found; found where there is nothing; nothing found; two guesses at one event; half
    pred = [[], [[0, 1]], [], [[0, 10], [0, 9]], [[0, 10]]]
    truth = [[], [], [[0, 1]], [[0, 10]], [[0, 10], [20, 30]]]
    assert set_f1(pred[:1], truth[:1]) == {0.1: 1.0, 0.3: 1.0, 0.5: 1.0, 0.7: 1.0}
    assert set_f1(pred[1:2], truth[1:2], (0.5,)) == {0.5: 0.0}
    assert set_f1(pred[2:3], truth[2:3], (0.5,)) == {0.5: 0.0}
    assert set_f1(pred[3:4], truth[3:4], (0.5, 0.95)) == {0.5: 1.0, 0.95: pytest.approx(2 * 0.5 / 1.5)}
    assert set_f1(pred[4:5], truth[4:5], (0.5,)) == {0.5: pytest.approx(2 * 0.5 / 1.5)}
    assert set_f1(pred, truth, (0.5,)) == {0.5: pytest.approx((1 + 0 + 0 + 1 + 2 / 3) / 5)}


def test_set_f1_equals_the_oracle_and_ignores_the_order():
    rng = np.random.default_rng(4)
    pred = [random_spans(rng, rng.integers(0, 5)).tolist() for _ in range(60)]
    truth = [random_spans(rng, rng.integers(0, 5)).tolist() for _ in range(60)]
    result = set_f1(pred, truth)
    for threshold, value in result.items():
        rows = [oracle_f1(p, t, threshold) for p, t in zip(pred, truth, strict=True)]
        assert value == pytest.approx(sum(rows) / len(rows))
    assert set_f1([spans[::-1] for spans in pred], truth) == pytest.approx(result)


def test_validate_spans_gives_back_what_is_right():
    spans = validate_spans([(0, 2.5), (1, 1), (8, 10.04)], duration=10.0)  # containers round their duration
    assert spans.dtype == np.float64
    assert spans.tolist() == [[0, 2.5], [1, 1], [8, 10.04]]
    assert validate_spans([]).shape == (0, 2)


@pytest.mark.parametrize(
    ("spans", "duration", "message"),
    [
        ([[0, 1], [5, 2]], None, "spans[1] is [5.0, 2.0]: it ends before it starts; swap the two times."),
        ([[0, float("nan")]], None, "a NaN or infinite time is no moment; drop or mend it."),
        ([[0, float("inf")]], None, "a NaN or infinite time is no moment; drop or mend it."),
        ([[-1, 2]], None, "spans[0] is [-1.0, 2.0]: it starts before the video does; times begin at 0."),
        ([[0, 10.06]], 10.0, "it ends after the video, which is 10.0 s long; clip it to the duration"),
        ([[0, 1]], float("nan"), "duration is nan, which is not a positive number of seconds"),
        ([[0, 1]], 0.0, "duration is 0.0, which is not a positive number of seconds"),
        ([0, 1], None, "spans has shape (2,) where (K, 2) is needed; pass [[start, end], ...] in seconds."),
        ([[0, 1, 2]], None, "spans has shape (1, 3) where (K, 2) is needed"),
        ([[0, 1], [2]], None, "which is not pairs of numbers; pass [[start, end], ...]."),
        ([["a", "b"]], None, "which is not pairs of numbers; pass [[start, end], ...]."),
    ],
)
def test_validate_spans_says_what_is_wrong(spans, duration, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        validate_spans(spans, duration)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: temporal_iou([[2, 1]], [[0, 1]]), "a[0] is [2.0, 1.0]: it ends before it starts"),
        (lambda: spans_to_frames([[0, 1]], []), "times has shape (0,) where (T,) with T >= 1 is needed"),
        (lambda: spans_to_frames([[0, 1]], [0, 2, 1]), "times holds a NaN or falls from one frame to the next"),
        (lambda: frames_to_spans([[0, 0]], [0.0, float("nan")], 1), "times holds a NaN or falls"),
        (lambda: frames_to_spans([[0, 0]], [0.0], 0), "period is 0, which is not a positive number of seconds"),
        (lambda: frames_to_spans([[0, 1], [-1, -1]], [0, 1], 1), "frames[1] is [-1, -1], which is no span of a video"),
        (lambda: frames_to_spans([[0, 2]], [0, 1], 1), "which is no span of a video of 2 frames; pass first <= last"),
        (lambda: frames_to_spans([[1, 0]], [0, 1], 1), "frames[0] is [1, 0], which is no span of a video"),
        (lambda: recall_at_iou([[0, 1]], []), "pred has 1 rows and truth 0; pass one entry per row"),
        (lambda: mean_iou([], []), "pred has 0 rows and truth 0"),
        (lambda: mean_iou([[[0, 1], [2, 3]]], [[0, 1]]), "pred[0] has 2 spans where the single best one is scored"),
        (lambda: mean_iou([[0, 1]], [[]]), "truth[0] has no span, so recall means nothing there"),
        (lambda: set_f1([], []), "pred_sets has 0 rows and truth_sets 0; pass one set of spans per row"),
        (lambda: set_f1([[[3, 1]]], [[[0, 1]]]), "pred_sets[0][0] is [3.0, 1.0]: it ends before it starts"),
    ],
)
def test_malformed_input_is_refused(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
