# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""Charades-STA, TACoS and QVHighlights: golden values of the published scripts, and the `clean` protocol."""

import re

import pytest
from evaluation_helpers import count_values, mismatches, reference

from d2vlm_hf.evaluation.moment_retrieval import charades_recall, score, score_charades, score_qvhighlights


def row(key, spans, **extra):
    return {"id": str(key), "task": "tvg", "source": "s", "video": f"{key}.mp4", "spans": spans, **extra}


def spans(*windows):
    return [{"start": float(s), "end": float(e), "score": score} for s, e, score in windows]


def said(*windows, **extra):
    return {"answer": "x", "evidence": spans(*windows), **extra}


def printed_scores(text):
    """The figures in a score file of the Charades script, as fractions under our names."""
    found = dict(re.findall(r"(IOU 0\.\d|mIOU): ([\d.]+)", text))
    values = {f"R1@{key[4:]}": float(value) / 100 for key, value in found.items() if key != "mIOU"}
    return values | {"mIoU": float(found["mIOU"])}


def test_every_golden_charades_value_is_met():
    data = reference("charades.json")
    rows = [row(sample["idx"], [sample["tgt"]]) for sample in data["samples"]]
    summary, per_row = score_charades(rows, [sample["a"] for sample in data["samples"]], "d2vlm")
    wanted = printed_scores(data["evaluation"]["score_file"])
    faults, compared = mismatches(wanted, summary, "samples", tolerance=1e-9), count_values(wanted)
    converted = {key: item["timestamp"] for key, item in data["converted"].items()}
    truth = {str(sample["idx"]): sample["tgt"] for sample in data["samples"]}
    iou = charades_recall(converted, truth)["iou"]
    faults += mismatches([iou[r["id"]] for r in per_row], [r["iou"] for r in per_row], "converted", tolerance=1e-12)
    compared += len(iou)
    for case in data["special"]:
        predicted = {int(k): v["timestamp"] if isinstance(v, dict) else None for k, v in case["converted"].items()}
        result = charades_recall(predicted, {item["id"]: item["timestamp"] for item in case["gt"]})
        if case["evaluation"]["score_file"] is None:  # the script divides by zero
            faults += mismatches({"mIoU": 0.0, "R1@0.3": 0.0}, result, case["case"])
            compared += 1
        else:
            wanted = printed_scores(case["evaluation"]["score_file"])
            faults += mismatches(wanted, result, case["case"], tolerance=1e-9)
            compared += count_values(wanted)
    for case in data["conversion_raises"]:
        summary, _ = score_charades([row(0, [[1, 2]])], [case["a"]], "d2vlm")
        faults += [] if summary["failed"] == 1 else [case["case"]]
        compared += 1
    assert not faults, "\n".join(faults)
    assert compared == 101


def test_the_denominator_of_the_charades_script():
    truth = {0: [0, 10], 1: [5, 15], 2: [2, 4]}
    half = charades_recall({0: [0, 10], 1: [5, 10]}, truth)
    assert (half["R1@0.5"], half["R1@0.7"], half["mIoU"], half["count"]) == (1.0, 0.5, 0.75, 2)
    assert charades_recall({0: [0, 10], 1: None, 2: [3, 5]}, truth)["R1@0.5"] == 0.5  # not counted
    assert charades_recall({0: [0, 10], 1: [], 2: [3, 5]}, truth)["R1@0.5"] == pytest.approx(1 / 3)
    assert charades_recall({0: [0, 10], 9: [5, 10]}, truth)["R1@0.5"] == 0.5  # counted without truth
    assert charades_recall({0: [3, 3]}, {0: [3, 3]})["mIoU"] == 0.0
    assert charades_recall({}, truth)["mIoU"] == 0.0


def test_charades_under_each_protocol():
    rows = [row(0, [[0, 10]]), row(1, [[0, 10]]), row(2, [[0, 10]])]
    texts = ["0 - 6 </evi>0 - 4, 0 - 10", "0 - 10 </evi>I do not know", None]
    d2vlm, per_row = score_charades(rows, texts, "d2vlm")
    assert (d2vlm["R1@0.3"], d2vlm["mIoU"], d2vlm["count"]) == (1.0, 0.7, 2)  # evidence stands in, None is not counted
    assert [r["iou"] for r in per_row] == [0.4, 1.0, 0.0]
    etbench, _ = score_charades(rows, texts, "etbench")
    assert (etbench["R1@0.3"], etbench["failed"]) == (pytest.approx(1 / 3), 2)
    assert etbench["reasons"] == {"no window in the answer": 1, "no prediction": 1}
    no_evidence, _ = score_charades(rows[:1], ["</evi>0 - 10"], "d2vlm")
    assert no_evidence["reasons"] == {"crash of the published script: no evidence window": 1}
    assert no_evidence["R1@0.3"] == 0.0


def test_published_spans_are_scored_as_published():
    turned = row(0, [[7, 8]], published_spans=[[8, 7]])
    assert score_charades([turned], ["7 - 8 </evi>7 - 8"], "d2vlm")[0]["mIoU"] == 0.0
    assert score_charades([turned], [said((7, 8, 0.9))])[0]["mIoU"] == 1.0


def test_clean_charades_takes_the_surest_span():
    rows = [row(0, [[0, 10]]), row(1, [[0, 10]]), row(2, [[0, 10]])]
    references = [{"start": 0.0, "end": 5.0, "char_start": 0, "char_end": 1}]
    given = [said((0, 10, 0.2), (0, 5, 0.9), references=references), said((0, 10, 0.5)), None]
    summary, per_row = score(rows, given)
    assert [r["iou"] for r in per_row] == [0.5, 1.0, 0.0]
    assert (summary["R1@0.3"], summary["R1@0.7"]) == pytest.approx((2 / 3, 1 / 3))
    assert (summary["mIoU"], summary["mIoU_answer"], summary["agreement"]) == pytest.approx((0.5, 0.5, 0.5))
    assert summary["reasons"] == {"no prediction": 1}
    interval = summary["intervals"]["R1@0.7"]
    assert interval["value"] == pytest.approx(1 / 3)
    assert interval["low"] <= interval["value"] <= interval["high"]
    assert (summary["calibration"]["count"], summary["calibration"]["auc"]) == (3, None)  # IoU 0.5 is right


def test_tacos_has_its_own_thresholds():
    summary, _ = score([row(0, [[0, 10]])], [said((0, 2, 0.5))], benchmark="tacos")
    assert (summary["R1@0.1"], summary["R1@0.3"]) == (1.0, 0.0)


def query(key, windows, clips, saliency):
    return row(key, windows, duration=150.0, relevant_clip_ids=clips, saliency_scores=saliency)


QUERIES = [
    query(1, [[0, 10]], [0, 1, 2], [[4, 4, 4], [4, 3, 2], [1, 0, 0]]),
    query(2, [[10, 14], [40, 60]], [5, 6], [[2, 2, 2], [4, 4, 4]]),
]
LONG = query(3, [[20, 70]], [10], [[3, 3, 3]])


def submitted(key, *windows, best=0):
    saliency = [0.0] * 75
    saliency[best] = 1.0
    return {"qid": int(key), "pred_relevant_windows": [list(w) for w in windows], "pred_saliency_scores": saliency}


def test_every_golden_qvhighlights_value_is_met():
    """Cases whose inputs are given; the others need the benchmark's own files, which stay outside."""
    faults, compared = [], 0
    for case in reference("qvhighlights.json")["cases"]:
        if "gt" not in case:
            continue
        keys = ("duration", "relevant_clip_ids", "saliency_scores")
        rows = [row(g["qid"], g["relevant_windows"], **{k: g[k] for k in keys}) for g in case["gt"]]
        summary, _ = score_qvhighlights(rows, case["pred"], "d2vlm")
        if "_raises" in case["metrics"]:
            faults += [] if summary["failed"] or summary["skipped"] else [case["name"]]
            compared += 1
        else:
            faults += mismatches(case["metrics"], summary, case["name"], tolerance=1e-9)
            compared += count_values(case["metrics"])
    assert not faults, "\n".join(faults)
    assert compared == 314


def test_published_qvhighlights_takes_the_first_window():
    given = [submitted(1, (50, 60, 0.1), (0, 10, 0.9)), submitted(2, (40, 60, 0.9), (10, 14, 0.3), best=6)]
    published, per_row = score_qvhighlights(QUERIES, given, "d2vlm")
    assert published["full"]["MR-R1"]["0.5"] == 50.0
    assert published["brief"]["MR-full-mAP"] == 100.0
    assert published["HL-min-VeryGood"] == {"HL-mAP": 91.89, "HL-Hit1": 100.0}
    assert published["skipped"] == {"MR-long": "no true window is longer than 30 s and at most 150 s"}
    assert [r["iou"] for r in per_row] == [0.0, 1.0]
    clean, _ = score_qvhighlights(QUERIES, given, "clean")
    assert clean["full"]["MR-R1"]["0.5"] == 100.0
    assert clean["intervals"]["R1@0.5"]["value"] == 1.0


def test_only_windows_of_the_length_range_are_true():
    given = [submitted(1, (0, 10, 0.9)), submitted(2, (40, 60, 0.9)), submitted(3, (20, 70, 0.9))]
    summary, _ = score([*QUERIES, LONG], given, "etbench", "qvhighlights")
    assert summary["brief"]["MR-short-mAP"] == 50.0  # of the two queries with a short window
    assert summary["brief"]["MR-middle-mAP"] == summary["brief"]["MR-long-mAP"] == 100.0


def test_missing_and_extra_queries_are_counted():
    summary, per_row = score_qvhighlights(QUERIES, [submitted(1, (0, 10, 0.9)), submitted(7, (0, 1, 0.1))], "d2vlm")
    assert (summary["failed"], summary["extra_predictions"]) == (1, 1)
    assert summary["full"]["MR-R1"]["0.5"] == 50.0
    assert per_row[1]["reason"] == "no prediction"
    empty, _ = score_qvhighlights(QUERIES, [submitted(1, (0, 10, 0.9)), submitted(2)], "d2vlm")
    assert empty["reasons"] == {"an empty list of windows": 1}


def test_qvhighlights_from_texts_and_pipeline_results():
    texts, _ = score_qvhighlights(QUERIES, ["0 - 9 </evi>0 - 10", "40 - 60"], "etbench")
    assert texts["full"]["MR-R1"]["0.5"] == 100.0
    assert "HL" in texts["skipped"]
    curves = {"times": [0.0, 2.0, 4.0, 12.0], "curves": [[0.1, 0.2, 0.1, 0.3], [0.9, 0.0, 0.1, 0.2]]}
    found, per_row = score_qvhighlights(QUERIES, [said((0, 10, 0.9), **curves), said((40, 60, 0.9), **curves)])
    assert found["HL-min-Fair"]["HL-Hit1"] == 50.0
    assert per_row[0]["HL-VeryGood"] == pytest.approx((5 / 6 + 1 + 1) / 3)  # one annotator has a second clip
    both, _ = score_qvhighlights(QUERIES, [{"qid": q, "pred_saliency_scores": [1.0, 0.5]} for q in (1, 2)])
    assert set(both["brief"]) == {f"HL-min-{n}-{m}" for n in ("Fair", "Good", "VeryGood") for m in ("mAP", "Hit1")}


def test_bad_input():
    with pytest.raises(ValueError, match="protocol is 'x', which is not defined"):
        score(QUERIES, [None, None], "x")
    with pytest.raises(ValueError, match="which has no thresholds here; use one of"):
        score(QUERIES, [None, None], benchmark="didemo")
    for benchmark in ("charades_sta", "qvhighlights"):
        with pytest.raises(ValueError, match="rows is empty, so there is nothing to score"):
            score([], [], benchmark=benchmark)
