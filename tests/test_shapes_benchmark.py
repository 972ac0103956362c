# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""Scores on rows of the shapes world."""

import json

import pytest

from d2vlm_hf.data.schema import EVIDENCE_TOKEN
from d2vlm_hf.data.shapes import make_rows
from d2vlm_hf.data.shapes_world import make_scene
from d2vlm_hf.evaluation.shapes_benchmark import TASKS, constant_predictions, event_phrase, score


def row(task, key=0, attribute="", **columns):
    source = "/".join(["shapes", "easy", *([attribute] if attribute else [])])
    defaults = {"spans": [], "options": [], "correct_option": -1, "captions": [], "annotations": []}
    return {"id": f"{task}-{key}", "task": task, "source": source, "video": f"{task}{key}.mp4", **defaults, **columns}


def said(answer, *windows, **extra):
    evidence = [{"start": float(s), "end": float(e), "score": score} for s, e, score in windows]
    return {"answer": answer, "evidence": evidence, **extra}


def value(figure):
    assert figure["low"] <= figure["value"] <= figure["high"]
    return figure["value"]


def perfect(row):
    """What a system that is always right would return for a row of the shapes world."""
    answer, references = row["answer"], []
    for start, end in row["spans"]:
        place = answer.index(EVIDENCE_TOKEN)
        text = f"{start:.1f}s - {end:.1f}s"
        answer = answer.replace(EVIDENCE_TOKEN, text, 1)
        references.append({"start": start, "end": end, "char_start": place, "char_end": place + len(text)})
    return {
        "answer": answer,
        "evidence": [{"start": s, "end": e, "score": 1.0} for s, e in row["spans"]],
        "references": references,
    }


@pytest.mark.parametrize("difficulty", ["easy", "hard"])
def test_perfect_predictions_score_1(difficulty):
    rows = [r for index in range(40) for r in make_rows(make_scene(difficulty, "test", index, 0), 6)]
    summary, per_row = score(rows, [perfect(r) for r in rows])
    assert set(summary["tasks"]) == set(TASKS)
    figures = {(task, key): value(figure) for task in TASKS for key, figure in summary["tasks"][task].items()}
    chance = [figures.pop((task, "chance")) for task in ("gvq", "rar")]
    assert all(0.2 < guess < 0.5 for guess in chance)
    assert figures == pytest.approx(dict.fromkeys(figures, 1.0))
    for name in ("mean", "absent", "agreement"):
        assert summary[name]["value"] == 1.0, name
    assert (summary["missed"]["value"], summary["failed"]) == (0.0, 0)
    assert {figure["value"] for figure in summary["attributes"].values()} == {1.0}
    assert (summary["calibration"]["ece"], list(summary["difficulties"])) == (0.0, [difficulty])
    assert {r["score"] for r in per_row} == {1.0}
    json.dumps(summary)


def test_grounding_takes_the_surest_span():
    rows = [row("tvg", 0, spans=[[0, 10]]), row("tvg", 1, spans=[[0, 10]])]
    summary, _ = score(rows, [said("x", (0, 6, 0.9), (0, 10, 0.1)), said("x")])
    figures = summary["tasks"]["tvg"]
    assert [value(figures[f"R1@{t}"]) for t in (0.3, 0.5, 0.7)] == [0.5, 0.5, 0.0]
    assert (value(figures["R1"]), value(figures["IoU"])) == pytest.approx((1 / 3, 0.3))
    assert value(summary["missed"]) == 0.5
    assert figures["IoU"]["rows"] == 2


def test_events_that_do_not_occur_are_scored_apart():
    rows = [row("tvg", 0), row("tal", 1), row("tal", 2, spans=[[0, 4], [6, 9]]), row("tvg", 3)]
    summary, per_row = score(rows, [said("never"), said("x", (1, 2, 0.9)), said("x", (0, 4, 0.9)), None])
    assert value(summary["absent"]) == pytest.approx(1 / 3)  # a missing prediction is no answer
    assert (summary["absent"]["rows"], summary["tasks"]["tal"]["F1"]["rows"]) == (3, 1)
    assert value(summary["tasks"]["tal"]["F1"]) == pytest.approx(2 / 3)
    assert summary["tasks"]["tvg"] == {}
    assert [r["absent"] for r in per_row] == [True, True, False, True]
    assert summary["reasons"] == {"no prediction": 1}


def test_captions_of_matched_events():
    truth = row("dvc", spans=[[0, 4], [6, 9]], captions=["the red circle moves left", "the blue star flashes"])
    captions = ["Then the red circle goes to the left.", "the blue star blinks", "the star flashes"]
    windows = [(0, 4, 0.9), (6, 9, 0.8), (20, 22, 0.7)]
    summary, _ = score([truth], [said("x", *windows, captions=captions)])
    figures = summary["tasks"]["dvc"]
    assert value(figures["event_F1"]) == pytest.approx(0.8)
    assert value(figures["caption_F1"]) == pytest.approx(1 / 2.5)  # "goes to the left" is none of the world's phrases
    shared = 2 * 3 / (4 + 5)  # red, circle, left; articles do not count
    assert value(figures["caption_token_F1"]) == pytest.approx((shared + 1) / 2.5)


@pytest.mark.parametrize(
    ("text", "phrase"),
    [
        ("Then the red circle goes left.", "the red circle moves left"),
        ("First, the red circle moves to the left", "the red circle moves left"),
        ("finally, and then a star shows up!", "a star appears"),
        ("the blue ring becomes small", "the blue ring becomes small"),
        ("", ""),
    ],
)
def test_phrases_of_events(text, phrase):
    assert event_phrase(text) == phrase


def test_choices_by_attribute():
    options = {"options": ["red", "green", "blue", "cyan"], "correct_option": 1}
    rows = [
        row("gvq", 0, "colour", spans=[[0, 10]], **options),
        row("gvq", 1, "count", **options),
        row("rar", 2, "colour", **options),
    ]
    summary, per_row = score(rows, [said("(B) green, at x", (0, 5, 0.9)), said("(A) red"), said("I do not know")])
    assert value(summary["tasks"]["gvq"]["accuracy"]) == 0.5
    assert value(summary["tasks"]["gvq"]["evidence_IoU"]) == 0.5
    assert summary["tasks"]["gvq"]["evidence_IoU"]["rows"] == 1
    assert {name: value(figure) for name, figure in summary["attributes"].items()} == {"colour": 0.5, "count": 0.0}
    assert summary["reasons"] == {"no option in the answer": 1}
    assert value(summary["mean"]) == pytest.approx((0.5 + 0.0) / 2)
    assert per_row[0]["attribute"] == "colour"


def test_constant_answers_are_the_best_that_look_at_nothing():
    options = {"options": ["left", "right", "top"], "duration": 40.0}
    rows = [
        row("tvg", 0, spans=[[5, 10]], duration=20.0),
        row("tvg", 1, spans=[[10, 20]], duration=40.0),
        row("rar", 2, "position", correct_option=2, **options),
        row("rar", 3, "position", correct_option=2, **options),
        row("rar", 4, "position", correct_option=0, **options),
    ]
    summary, _ = score(rows, constant_predictions(rows))
    assert value(summary["tasks"]["tvg"]["IoU"]) == pytest.approx(1)
    assert value(summary["tasks"]["rar"]["accuracy"]) == pytest.approx(2 / 3)
    assert value(summary["tasks"]["rar"]["chance"]) == pytest.approx(1 / 3)
    assert value(summary["attributes_chance"]["position"]) == pytest.approx(1 / 3)


def test_rows_with_embedded_videos_keep_no_bytes():
    embedded = row("tvg", spans=[[0, 1]], video={"path": None, "bytes": b"x" * 99})
    named = row("tvg", 1, spans=[[0, 1]], video={"path": "a.mp4", "bytes": None})
    _, per_row = score([embedded, named], [said("x"), said("x")])
    assert [r["video"] for r in per_row] == ["tvg-0", "a.mp4"]


def test_agreement_of_evidence_and_answer():
    references = [{"start": 0.0, "end": 5.0, "char_start": 0, "char_end": 1}]
    summary, _ = score([row("tvg", spans=[[0, 10]])], [said("x", (0, 10, 0.9), references=references)])
    assert value(summary["agreement"]) == 0.5
    assert summary["calibration"]["bins"][0]["accuracy"] == 1.0


def test_the_same_seed_gives_the_same_summary():
    rows = [row("tvg", n, spans=[[0, 10]]) for n in range(20)]
    given = [said("x", (0, n, 0.9)) for n in range(20)]
    assert score(rows, given, seed=1) == score(rows, given, seed=1)
    assert score(rows, given, seed=1)[0]["tasks"] != score(rows, given, seed=2)[0]["tasks"]


def test_bad_input():
    with pytest.raises(ValueError, match="rows of shapes are scored on spans only; use 'clean'"):
        score([row("tvg")], [None], "d2vlm")
    with pytest.raises(ValueError, match="that shapes do not have; use some of"):
        score([row("epm")], [None])
    with pytest.raises(ValueError, match="rows has 0 rows"):
        score([], [])
