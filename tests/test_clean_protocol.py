# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""What the `clean` protocol measures on any benchmark."""

import pytest

from d2vlm_hf.evaluation.clean_protocol import (
    align_predictions,
    event_captions,
    evidence_calibration,
    headline,
    identity,
    mean_of,
    score_row,
    top_iou,
)
from d2vlm_hf.evaluation.parsing import parse_structured


def parsed(*windows):
    return parse_structured({"answer": "", "evidence": [{"start": s, "end": e, "score": p} for s, e, p in windows]})


def test_predictions_are_put_beside_their_rows():
    rows = [{"id": "a"}, {"id": "b"}]
    assert align_predictions(rows, {"b": 1, "c": 2}) == [None, 1]
    assert align_predictions(rows, [3, 4]) == [3, 4]
    with pytest.raises(ValueError, match="There are 1 predictions for 2 rows"):
        align_predictions(rows, [3])


def test_the_surest_span_is_scored():
    assert top_iou(parsed((0, 10, 0.2), (0, 5, 0.9)).evidence, [[0, 10], [50, 60]]) == 0.5
    assert top_iou([], [[0, 10]]) == 0.0


def test_calibration_of_evidence():
    predictions = [parsed((0, 10, 0.95), (20, 30, 0.35)), parsed(), parsed((0, 4, 0.25))]
    result = evidence_calibration(predictions, [[[0, 9]], [[0, 1]], []])
    assert (result["count"], result["auc"]) == (3, 1.0)
    assert result["ece"] == pytest.approx((0.05 + 0.35 + 0.25) / 3)


def test_scores_that_are_no_probabilities_are_ranked_only():
    result = evidence_calibration([parsed((0, 10, 3.5), (20, 30, -1.0))], [[[0, 9]]])
    assert (result["ece"], result["auc"]) == (None, 1.0)
    assert "only their order says anything" in result["skipped"]


def test_captions_are_clauses_of_the_answer():
    answer = "Then a dog barks at 1s - 2s, and a cat runs at 5s - 6s. It rains."
    references = []
    for text, start, end in (("5s - 6s", 5.0, 6.0), ("1s - 2s", 1.0, 2.0)):
        place = answer.index(text)
        references.append({"start": start, "end": end, "char_start": place, "char_end": place + len(text)})
    prediction = {"answer": answer, "evidence": [], "references": references}
    events = event_captions(prediction, parse_structured(prediction))
    assert events.spans == [(1.0, 2.0), (5.0, 6.0)]
    assert [caption.lower().removeprefix("then ") for caption in events.captions] == ["a dog barks", "a cat runs"]
    assert event_captions(None, parse_structured(None)) == ([], [])


def test_the_headline_is_a_mean_over_videos_with_its_interval():
    rows = [{"id": str(n), "video": str(n // 5), "task": "ab"[n % 2], "score": float(n < 10)} for n in range(20)]
    figure = headline([*rows, {"id": "x", "video": "x", "task": "a", "score": None}])
    assert (figure["value"], figure["rows"]) == (0.5, 20)
    assert figure["low"] < 0.5 < figure["high"]
    assert headline(rows, strata=("task",))["value"] == pytest.approx(0.5)
    assert headline([], "score") is None
    assert (mean_of(rows, "score"), mean_of(rows, "iou")) == (0.5, None)


def test_identity_of_a_row():
    row = {"id": 1, "task": "tvg", "source": "s", "video": {"path": None, "bytes": b"x"}, "spans": []}
    assert identity(row) == {"id": 1, "task": "tvg", "source": "s", "video": "1"}
    assert identity(row | {"video": "a.mp4"})["video"] == "a.mp4"


def test_an_event_that_does_not_occur():
    row = {"spans": [], "annotations": []}
    assert score_row("tal", row, parsed())["score"] == 1.0
    assert score_row("tal", row, parsed((0, 1, 0.9)))["score"] == 0.0
    assert score_row("vhd", row, parsed((0, 1, 0.9)))["score"] == 0.0
    assert score_row("evs", row, parsed())["score"] == 1.0
