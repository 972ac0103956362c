# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""Bootstrap intervals, paired comparisons and calibration, against closed forms and slow plain-Python oracles."""

import math

import numpy as np
import pytest

from d2vlm_hf.evaluation.statistics import (
    area_under_curve,
    bootstrap_interval,
    calibration,
    paired_difference,
)


RNG = np.random.default_rng(7)


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution():
    values = RNG.normal(0.5, 0.1, 2000)
    interval = bootstrap_interval(values, resamples=4000)
    width = 2 * 1.96 * values.std() / math.sqrt(len(values))
    assert interval.value == pytest.approx(values.mean())
    assert interval.high - interval.low == pytest.approx(width, rel=0.08)
    assert interval.low < interval.value < interval.high


def test_the_same_seed_gives_the_same_interval():
    values = RNG.random(50)
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)
    assert bootstrap_interval(values, seed=3) != bootstrap_interval(values, seed=4)


def test_equal_values_have_no_spread():
    assert bootstrap_interval([0.25] * 9) == (0.25, 0.25, 0.25)


def test_intervals_cover_the_truth_as_often_as_they_say():
    covered = 0
    for seed in range(200):
        draws = np.random.default_rng(seed).random(40) < 0.4
        interval = bootstrap_interval(draws, resamples=400, confidence=0.9, seed=seed)
        covered += interval.low <= 0.4 <= interval.high
    assert 165 <= covered <= 195  # 90 % of 200, and 3 standard deviations


def test_strata_count_alike_whatever_their_size():
    values, strata = [1.0] * 30 + [0.0, 0.5], ["a"] * 30 + ["b"] * 2
    assert bootstrap_interval(values, strata).value == pytest.approx((1.0 + 0.25) / 2)


def test_nested_strata_share_the_weight_of_their_task():
    strata = [("a", "x"), ("a", "y"), ("a", "y"), ("b", "x")]
    assert bootstrap_interval([1.0, 0.0, 0.0, 0.8], strata).value == pytest.approx(((1.0 + 0.0) / 2 + 0.8) / 2)


def test_rows_of_one_cluster_are_redrawn_together():
    values, clusters = np.repeat([0.0, 1.0] * 10, 20), np.repeat(np.arange(20), 20)
    wide, narrow = bootstrap_interval(values, clusters=clusters), bootstrap_interval(values)
    assert wide.value == narrow.value == 0.5
    assert wide.high - wide.low > 3 * (narrow.high - narrow.low)


def test_clusters_of_unequal_size_weigh_by_their_rows():
    interval = bootstrap_interval([1.0, 1.0, 1.0, 0.0], clusters=["a", "a", "a", "b"], resamples=500)
    assert interval.value == 0.75
    assert (interval.low, interval.high) == (0.0, 1.0)


def test_a_paired_difference_counts_wins_and_losses():
    result = paired_difference([1.0, 0.5, 0.2, 0.2], [0.0, 0.5, 0.3, 0.1])
    assert (result.wins, result.losses, result.ties) == (2, 1, 1)
    assert result.difference == pytest.approx(0.25)
    swapped = paired_difference([0.0, 0.5, 0.3, 0.1], [1.0, 0.5, 0.2, 0.2])
    assert swapped.difference == pytest.approx(-result.difference)
    assert (swapped.low, swapped.high) == pytest.approx((-result.high, -result.low))


def test_pairing_sees_a_difference_that_two_intervals_do_not():
    hard = RNG.random(300)
    ours, theirs = hard + 0.02 + RNG.normal(0, 0.02, 300), hard + RNG.normal(0, 0.02, 300)
    result = paired_difference(ours, theirs)
    assert result.low > 0
    assert result.p_value < 0.01
    assert bootstrap_interval(ours).low < bootstrap_interval(theirs).high


def test_equal_systems_do_not_differ():
    values = RNG.random(20)
    result = paired_difference(values, values)
    assert result[:3] == (0.0, 0.0, 0.0)
    assert (result.ties, result.p_value) == (20, 1.0)


def test_a_p_value_is_never_0():
    result = paired_difference([1.0] * 10, [0.0] * 10, resamples=999)
    assert result.p_value == pytest.approx(2 / 1000)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"values": []}, "pass one value per row"),
        ({"values": [[0.1]]}, "pass one value per row"),
        ({"values": [0.1, float("nan")]}, r"values\[1\] is nan: a mean of it says nothing"),
        ({"values": [0.1], "strata": ["a", "b"]}, "strata has 2 entries for 1 rows; pass one per row"),
        ({"values": [0.1], "clusters": []}, "clusters has 0 entries for 1 rows"),
        ({"values": [0.1], "resamples": 0}, "resamples is 0, which gives no interval"),
        ({"values": [0.1], "confidence": 1.0}, "confidence is 1.0, which is no share between 0 and 1"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(**arguments)


def test_systems_with_different_rows_are_not_compared():
    with pytest.raises(ValueError, match="rows are compared in pairs; score both on the same"):
        paired_difference([0.1, 0.2], [0.1])


def test_area_under_the_curve_is_the_share_of_ordered_pairs():
    scores, right = np.round(RNG.random(60), 1), RNG.random(60) < 0.4
    pairs = [1.0 if good > bad else 0.5 if good == bad else 0.0 for good in scores[right] for bad in scores[~right]]
    assert area_under_curve(scores, right) == pytest.approx(sum(pairs) / len(pairs))
    assert area_under_curve([0.1, 0.9], [False, True]) == 1.0
    assert area_under_curve([0.5, 0.5], [False, True]) == 0.5
    assert area_under_curve([0.5], [True]) is None


def test_calibration_against_a_plain_loop():
    scores, right = RNG.random(200), RNG.random(200) < 0.5
    result, error = calibration(scores, right, bins=5), 0.0
    for place in range(5):
        inside = [n for n, score in enumerate(scores) if place / 5 <= score < (place + 1) / 5]
        mean, share = np.mean(scores[inside]), np.mean(right[inside])
        entry = result["bins"][place]
        assert (entry["low"], entry["high"], entry["count"]) == (place / 5, (place + 1) / 5, len(inside))
        assert (entry["score"], entry["accuracy"]) == pytest.approx((mean, share))
        error += len(inside) * abs(mean - share) / 200
    assert result["ece"] == pytest.approx(error)
    assert result["auc"] == area_under_curve(scores, right)


def test_calibration_at_the_ends():
    perfect = calibration([1.0, 1.0, 0.0], [True, True, False])
    assert (perfect["ece"], perfect["auc"], perfect["count"]) == (0.0, 1.0, 3)
    assert [entry["count"] for entry in perfect["bins"]] == [1, 2]
    assert calibration([], []) == {"count": 0, "bins": [], "ece": None, "auc": None}


def test_scores_that_are_no_probabilities():
    with pytest.raises(ValueError, match=r"scores\[1\] is 1.2, which is no probability"):
        calibration([0.5, 1.2], [True, False])
    with pytest.raises(ValueError, match="pass one of each per result"):
        calibration([0.5], [True, False])
