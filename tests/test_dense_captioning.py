# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""YouCook2 and ActivityNet Captions: golden values of the published scripts, and the `clean` protocol."""

import pytest
from evaluation_helpers import mismatches, needs_java, reference, shared_scorer

from d2vlm_hf.evaluation import text_metrics
from d2vlm_hf.evaluation.dense_captioning import score
from d2vlm_hf.evaluation.dense_metrics import caption_pairs
from d2vlm_hf.evaluation.metrics import Events
from d2vlm_hf.evaluation.text_metrics import FILLER


YOUCOOK2_NAMES = {
    "CIDER": "CIDEr",
    "Precision_Mean": "Precision",
    "Recall_Mean": "Recall",
    "F1_Score": "F1",
    "SODA_c_2": "SODA_c",
    "Para_CIDER": "Para_CIDEr",
}
ACTIVITYNET_NAMES = {"soda_c": "SODA_c", "Rouge-L": "ROUGE_L"}
OTHER_SPLIT = "SODA_c_1"  # the published script prints -1 for a split that it does not score


def row(key, spans, captions, **extra):
    identity = {"id": key, "task": "dvc", "source": "s", "video": key}
    return {**identity, "spans": spans, "captions": captions, **extra}


def predicted_events(run):
    if "samples" in run:
        return {sample["video"].split("/")[-1]: sample["a"] for sample in run["samples"]}
    return {
        video: Events([item["timestamp"] for item in items], [item["caption"] for item in items])
        for video, items in run["pred"].items()
    }


def renamed(wanted, names):
    return {names.get(key, key): value for key, value in wanted.items() if key not in (OTHER_SPLIT, "key")}


def printed_values(lines, means):
    """The figures that the script prints, in percent with one decimal, but `n_preds`."""
    split = [line.rsplit(" ", 1) for line in lines]
    known = {key: float(value) for key, value in split if key in means or key.startswith("Para_")}
    return {
        YOUCOOK2_NAMES.get(key, key): value / (1 if key == "n_preds" else 100)
        for key, value in known.items()
        if key != OTHER_SPLIT
    }


@needs_java
def test_every_golden_youcook2_value_is_met():
    faults, compared = [], 0
    data = reference("youcook2.json")
    for run in data["runs"]:
        rows = [row(item["image_id"], item["segments"], item["pure_cap"].split(". ")) for item in run["gt"]]
        summary, per_row = score(rows, predicted_events(run), "d2vlm", "youcook2", scorer=shared_scorer())
        means = renamed(run["result"]["means"], YOUCOOK2_NAMES)
        videos = [renamed(video, YOUCOOK2_NAMES) for video in run["result"]["per_video"]]
        printed = printed_values(run["result"]["printed"], run["result"]["means"])
        faults += mismatches(means, summary, run["name"], tolerance=1e-9)
        faults += mismatches(videos, per_row, run["name"], tolerance=1e-9)
        digit = 0.0005 + 1e-9  # half of the last printed digit
        faults += mismatches(printed, summary, f"{run['name']}/printed", tolerance=digit, loose={"n_preds": 0.05})
        assert run["result"]["means"][OTHER_SPLIT] == -1.0
        compared += len(means) + sum(len(video) for video in videos) + len(printed)
    for case in data["conversion_raises"]:
        summary, _ = score(rows[:1], [case["a"]], "d2vlm", captions=False)
        faults += [] if summary["failed"] == 1 else [case["a"]]
        compared += 1
    assert not faults, "\n".join(faults)
    assert compared == 661


@needs_java
def test_every_golden_activitynet_value_is_met():
    data, faults = reference("activitynet_dvc.json"), []
    for name, files in (("metrics_ref1", 1), ("metrics_ref1_and_ref2", 2)):
        rows = []
        for video in data["ids"]:
            entries = [data[f"ground_truth_{n + 1}"][video] for n in range(files)]
            annotators = {
                "annotations": [entry["timestamps"] for entry in entries],
                "annotation_captions": [entry["sentences"] for entry in entries],
            }
            rows.append(row(video, entries[0]["timestamps"], entries[0]["sentences"], **annotators))
        given = {
            video: Events([item["timestamp"] for item in items], [item["sentence"] for item in items])
            for video, items in data["submission"]["results"].items()
        }
        summary, _ = score(rows, given, "d2vlm", "activitynet_captions", scorer=shared_scorer())
        wanted = renamed(data[name], ACTIVITYNET_NAMES)
        assert len(wanted) == 23
        faults += mismatches(wanted, summary, name, tolerance=1e-9)
    assert not faults, "\n".join(faults)


TRUTH = row("a", [[0, 10], [20, 30]], ["cut the bread", "fry the egg"])


def test_captions_without_partner_meet_the_filler():
    guess, truth = Events([[0, 10], [50, 60]], ["x", "y"]), Events(TRUTH["spans"], TRUTH["captions"])
    assert caption_pairs(guess, [truth], 0.5) == [(["cut the bread"], "x"), ([FILLER], "y")]
    twice = caption_pairs(guess, [truth, truth], 0.5)
    assert twice[:2] == [(["cut the bread"], "x")] * 2


def test_youcook2_detection_sorts_windows_and_averages_videos():
    other = row("b", [[0, 10]], ["rest the dough"])
    given = {"a": "9 - 8 </evi>10 - 0 seconds, cut the bread."}
    summary, per_row = score([TRUTH, other], given, "d2vlm", captions=False)
    assert (per_row[0]["Precision"], per_row[0]["Recall"], per_row[0]["F1"]) == (1.0, 0.5, pytest.approx(2 / 3))
    assert summary["F1"] == pytest.approx(1 / 3)  # the missing video scores 0
    assert summary["reasons"] == {"no prediction": 1}
    assert summary["skipped"] == {"captions": "not asked for"}


@needs_java
def test_from_the_eleventh_event_on_published_soda_mixes_captions():
    spans = [[10.0 * n, 10.0 * n + 5] for n in range(11)]
    captions = [f"step number {n} of the recipe, word {chr(97 + n) * 4}" for n in range(11)]
    ours, theirs = row("a", spans, captions), Events(spans, captions)
    summary, _ = score([ours], [theirs], "d2vlm", scorer=shared_scorer())
    assert summary["F1"] == pytest.approx(1.0)
    assert summary["SODA_c"] < 0.9
    shorter, _ = score(
        [row("a", spans[:10], captions[:10])], [Events(spans[:10], captions[:10])], "d2vlm", scorer=shared_scorer()
    )
    assert shorter["SODA_c"] == pytest.approx(1.0)


def said(*events, **extra):
    evidence = [{"start": float(start), "end": float(end), "score": 0.9} for start, end, _ in events]
    return {"answer": "", "evidence": evidence, "captions": [caption for _, _, caption in events], **extra}


@needs_java
def test_clean_captions_are_matched_one_to_one():
    good = said((20, 30, "Fry the egg."), (0, 10, "Cut the bread."))  # in any order
    summary, per_row = score([TRUTH], [good], scorer=shared_scorer())
    assert per_row[0]["F1"] == per_row[0]["METEOR"] == 1.0
    assert summary["SODA_c"] == pytest.approx(1.0)
    assert summary["intervals"]["METEOR"]["value"] == 1.0
    repeated = said((0, 10, "Cut the bread."), (0, 10, "Cut the bread."), (20, 30, "Fry the egg."))
    twice, _ = score([TRUTH], [repeated], scorer=shared_scorer())
    assert twice["METEOR"] == pytest.approx(2 / 2.5)  # an event said twice costs
    assert "Bleu_1" not in twice
    missing, _ = score([TRUTH, TRUTH | {"id": "b", "video": "b"}], {"a": good}, scorer=shared_scorer())
    assert missing["METEOR"] == 0.5


@needs_java
def test_clean_counts_annotators_alike():
    other = {"annotations": [TRUTH["spans"], [[0, 10]]], "annotation_captions": [TRUTH["captions"], ["rest it"]]}
    summary, _ = score(
        [TRUTH | other],
        [said((0, 10, "cut the bread"), (20, 30, "fry the egg"))],
        benchmark="activitynet_captions",
        scorer=shared_scorer(),
    )
    assert summary["F1"] == pytest.approx((1.0 + 2 / 3) / 2)
    assert summary["METEOR"] == pytest.approx((1.0 + 0.0) / 2)
    assert summary["calibration"]["count"] == 2


def test_captions_may_be_clauses_of_the_answer():
    answer = "First he cuts the bread at 0 - 10, then he fries at 20 - 30."
    places = [answer.index("0 - 10"), answer.index("20 - 30")]
    references = [
        {"start": 20.0, "end": 30.0, "char_start": places[1], "char_end": places[1] + 7},
        {"start": 0.0, "end": 10.0, "char_start": places[0], "char_end": places[0] + 6},
    ]
    prediction = {"answer": answer, "evidence": [], "references": references}
    summary, per_row = score([TRUTH], [prediction], captions=False)
    assert (per_row[0]["F1"], per_row[0]["F1_answer"], per_row[0]["agreement"]) == (0.0, 1.0, 0.0)
    assert summary["F1@0.5"] == 0.0


def test_without_java_detection_is_still_scored(monkeypatch):
    monkeypatch.setattr(text_metrics.shutil, "which", lambda name: None)
    summary, _ = score([TRUTH], ["</evi>0 - 10 seconds, cut the bread."], "d2vlm")
    assert summary["F1"] == pytest.approx(2 / 3)
    assert set(summary["skipped"]) == {"Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "METEOR", "ROUGE_L", "CIDEr", "SODA_c"}
    assert "SODA_c" not in summary


def test_bad_input():
    with pytest.raises(ValueError, match="protocol is 'x', which is not defined"):
        score([TRUTH], [None], "x")
    with pytest.raises(ValueError, match="which has no dense captions; use one of"):
        score([TRUTH], [None], benchmark="tacos")
    with pytest.raises(ValueError, match="rows is empty, so there is nothing to score"):
        score([], [])
