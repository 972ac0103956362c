# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""MVBench and Video-MME letters."""

import pytest
from evaluation_helpers import golden

from d2vlm_hf.evaluation.multiple_choice import mvbench_correct, score, video_mme_letter


DATA = golden("multiple_choice.json")


def test_every_golden_letter_is_met():
    mvbench = [case for case in DATA["mvbench"] if mvbench_correct(case["pred"], case["gt"]) is not case["correct"]]
    video_mme = [case for case in DATA["videomme"] if video_mme_letter(case["answer"]) != case["letter"]]
    assert (mvbench, video_mme) == ([], [])
    assert (len(DATA["mvbench"]), len(DATA["videomme"])) == (14, 18)


def row(key, right, source="mvbench/a"):
    options = ["a cat", "a dog", "a cow", "a pig"]
    return {
        "id": str(key),
        "task": "rvq",
        "source": source,
        "video": "v",
        "options": options,
        "correct_option": right,
        "spans": [],
    }


def test_mvbench_averages_its_sources():
    rows = [row(0, 0), row(1, 0), row(2, 1, "mvbench/b")]
    summary, _ = score(rows, ["</evi>(A) a cat", "</evi>(C)", "</evi>(B) a dog"], "d2vlm")
    assert summary["Acc"] == pytest.approx(2 / 3)
    assert (summary["mean"], summary["sources"]) == (0.75, {"mvbench/a": 0.5, "mvbench/b": 1.0})


def test_a_leading_space_is_right_under_the_published_check_only():
    given = {"answer": " (B) a dog", "evidence": []}
    assert score([row(0, 0)], [given], "d2vlm")[0]["Acc"] == 1.0
    assert score([row(0, 0)], [given], "etbench")[0]["Acc"] == 0.0
    assert score([row(0, 0)], [given])[0]["Acc"] == 0.0


def test_video_mme_publishes_accuracy_over_answered():
    rows = [row(0, 0), row(1, 1), row(2, 2)]
    summary, per_row = score(rows, ["A", "none", None], "etbench", "video_mme")
    assert (summary["Acc"], summary["Acc_answered"]) == (pytest.approx(1 / 3), 1.0)
    assert summary["reasons"] == {"no letter in the answer": 1, "no prediction": 1}
    assert [r["answered"] for r in per_row] == [True, False, False]
    assert score(rows, [None] * 3, "etbench", "video_mme")[0]["Acc_answered"] == 0.0


def test_evidence_before_the_delimiter_hides_the_letter_under_d2vlm():
    given = ["12.0 - 14.0 </evi>(B) x"]
    assert score([row(0, 1)], given, "d2vlm", "video_mme")[0]["Acc"] == 0.0
    assert score([row(0, 1)], given, "etbench", "video_mme")[0]["Acc"] == 1.0


def test_clean_answers():
    rows = [row(n, 1) for n in range(4)]
    given = [{"answer": text, "evidence": []} for text in ("(B)", "a dog", "A dog runs", "")]
    summary, _ = score(rows, given)
    assert (summary["Acc"], summary["Acc_answered"]) == (0.5, 1.0)
    assert summary["reasons"] == {"no option in the answer": 2}
    assert summary["intervals"]["Acc"]["value"] == 0.5


def test_bad_input():
    with pytest.raises(ValueError, match="protocol is 'x', which is not defined"):
        score([row(0, 0)], [None], "x")
    with pytest.raises(ValueError, match="which has no letters; use one of"):
        score([row(0, 0)], [None], benchmark="tacos")
    with pytest.raises(ValueError, match="rows is empty, so there is nothing to score"):
        score([], [])
