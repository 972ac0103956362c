# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""E.T. Bench under every protocol: golden values of the published scripts, rules that show only on groups of samples,
and the `clean` protocol."""

import json
import random
import time

import pytest
from evaluation_helpers import (
    count_values,
    golden,
    mismatches,
    needs_java,
    needs_similarity,
    shared_scorer,
    shared_similarity,
)

from d2vlm_hf.evaluation.benchmarks import etbench_row
from d2vlm_hf.evaluation.etbench import GROUPS, TASKS, score
from d2vlm_hf.evaluation.parsing import parse_text
from d2vlm_hf.evaluation.text_metrics import CAPTION_METRICS, FILLER, CaptionScorer


DATA = golden("etbench.json")
SAMPLES = [entry for group in ("samples", "crashing") for entry in DATA[group]]
SCRIPTS = {
    "d2vlm": "d2vlm",
    "d2vlm_looser": "d2vlm_looser",
    "etchat": "etbench_whole",
    "etchat_strict": "etbench_strict",
    "etchat_on_text_after_last_delimiter": "etbench",
}
TEXT_METRICS = set(CAPTION_METRICS)
SIMILARITY_TOLERANCE = 0.05


def run(samples, protocol, predictions=None, **options):
    rows = [etbench_row({**sample, "idx": n}) for n, sample in enumerate(samples)]
    predictions = [sample["a"] for sample in samples] if predictions is None else predictions
    return score(rows, predictions, protocol, **options)


def metrics_of(summary, task, source=None):
    sources = summary["tasks"][task]["sources"]
    return sources[source] if source else next(iter(sources.values()))


def compare(entry, script, scorer, **options):
    """Faults of one sample under one script, and how many values were compared."""
    sample, wanted = entry["sample"], entry["single"][script]
    summary, per_row = run([sample], SCRIPTS[script], scorer=scorer, **options)
    found, path = metrics_of(summary, sample["task"]), f"{entry['case']}/{script}"
    if "_raises" in wanted:
        crashed = found["Failed"] == 1 and "crash of the published script" in per_row[0]["reason"]
        return ([] if crashed else [f"{path}: {found}"]), 1
    faults = mismatches(wanted, found, path, loose={"SentSim": SIMILARITY_TOLERANCE})
    return faults + [f"{path}: {key} is not published" for key in set(found) - set(wanted)], count_values(wanted)


@needs_java
def test_every_golden_value_is_met():
    needs_similarity()
    said = [text for entry in SAMPLES for text in entry["sample"].get("g", [])]
    dense = [entry["sample"] for entry in SAMPLES if entry["sample"]["task"] in GROUPS["captioning"]]
    for protocol in SCRIPTS.values():
        said += [text for sample in dense for text in parse_text(sample["task"], sample["a"], protocol).captions]
    shared_scorer().prepare([*said, FILLER])  # one run of the tokenizer instead of one per sample
    results = [compare(entry, script, shared_scorer()) for entry in SAMPLES for script in entry["single"]]
    faults = [fault for found, _ in results for fault in found]
    assert not faults, "\n".join(faults)
    assert sum(compared for _, compared in results) == 2185


def test_golden_values_without_java_and_model():
    """What neither captions nor similarity touch is met in under a second, and what is missing is named."""
    start, faults, compared = time.perf_counter(), [], 0
    for entry in SAMPLES:
        sample = entry["sample"]
        for script in entry["single"]:
            wanted = {k: v for k, v in entry["single"][script].items() if k not in TEXT_METRICS}
            if "_raises" in wanted:
                continue
            summary, _ = run([sample], SCRIPTS[script], captions=False, similarity=False)
            assert sample["task"] not in GROUPS["captioning"] or summary["skipped"] == {"captions": "not asked for"}
            if "option similarity" in summary["skipped"]:
                assert "1 answers without a letter count as wrong" in summary["skipped"]["option similarity"]
                continue
            faults += mismatches(wanted, metrics_of(summary, sample["task"]), f"{entry['case']}/{script}")
            compared += len(wanted)
    assert not faults, "\n".join(faults)
    assert compared > 1700
    assert time.perf_counter() - start < 5  # 0.3 s on a free core


def test_the_benchmark_at_its_full_size_takes_seconds():
    samples = [dict(SAMPLES[n % len(SAMPLES)]["sample"], video=str(n)) for n in range(7289)]
    for protocol in ("d2vlm", "etbench"):
        start = time.perf_counter()
        summary, per_row = run(samples, protocol, captions=False, similarity=False)
        assert time.perf_counter() - start < 30
        assert len(per_row) == summary["total"] == 7289


def sample(task, answer, **extra):
    defaults = {"task": task, "source": "s", "video": extra.pop("video", "v"), "q": "", "a": answer, "duration": 60.0}
    return defaults | extra


def test_failed_samples_are_counted_with_their_reasons():
    good, bad = sample("tvg", "1 - 2 </evi>1 - 2", tgt=[1, 2]), sample("tvg", "1 - 2", tgt=[1, 2])
    summary, per_row = run([good, bad, bad], "d2vlm")
    assert (summary["total"], summary["failed"], summary["reasons"]) == (3, 2, {"no </evi>": 2})
    assert metrics_of(summary, "tvg")["mIoU"] == 0.33333
    assert [row["failed"] for row in per_row] == [False, True, True]
    assert per_row[0] | {"id": "0", "iou": 1.0, "score": 0.75 + 0.25, "reason": None} == per_row[0]
    missing, _ = run([good, bad], "d2vlm", predictions={"0": good["a"]})
    assert missing["reasons"] == {"no prediction": 1}


def test_evidence_of_tal_wipes_what_came_before_it():
    hit = sample("tal", "1 - 2 </evi>1 - 2", tgt=[[1, 2]])
    wiping = sample("tal", "8 - 9 </evi>1 - 2", tgt=[[1, 2]])
    answer_misses = sample("tal", "1 - 2 </evi>8 - 9", tgt=[[1, 2]])
    first, _ = run([wiping, hit], "d2vlm")
    last, _ = run([hit, wiping, answer_misses], "d2vlm")
    assert (metrics_of(first, "tal")["F1"], metrics_of(first, "tal")["F1_evi"]) == (1.0, 0.5)
    assert (metrics_of(last, "tal")["F1"], metrics_of(last, "tal")["F1_evi"]) == (0.66667, 0.0)


def test_evs_leaves_failed_samples_out_of_its_mean():
    samples = [sample("evs", "</evi>0 - 10", tgt=[[0, 10]]), sample("evs", "none", tgt=[[0, 10]])]
    assert metrics_of(run(samples, "d2vlm")[0], "evs") == {"Total": 2, "Failed": 1, "F1": 1.0, "F1_evi": 1.0}
    endless = f"</evi>0 - 1{'0' * 400}, 0 - 10, 50 - 60"
    infinite, _ = run([sample("evs", endless, tgt=[[0, 10]])], "d2vlm")
    assert metrics_of(infinite, "evs")["F1"] == 0.66667  # the endless window is dropped
    crashed, _ = run([sample("evs", endless, tgt=[[0, 10]])], "etbench")
    assert crashed["reasons"] == {"crash of the published script: cannot convert float infinity to integer": 1}


def test_a_later_sample_of_a_video_overwrites_the_earlier_one():
    one = sample("dvc", "</evi>1 - 9 seconds, cut the bread.", tgt=[[1, 9]], g=["cut the bread"])
    two = sample("dvc", "</evi>20 - 30 seconds, cut the bread.", tgt=[[1, 9]], g=["cut the bread"])
    failed = sample("dvc", "nothing", tgt=[[1, 9]], g=["cut the bread"], video="w")
    for samples, f1 in (([one, two], 0.0), ([two, one], 0.5), ([two, one, failed], 0.33333)):
        summary, per_row = run(samples, "d2vlm", captions=False)
        assert metrics_of(summary, "dvc")["F1"] == f1  # scaled by the share of videos that were scored
        assert per_row[0]["score"] is None


def test_options_are_counted_on_the_first_sample():
    options = ["a cat", "a dog", "a cow", "a pig"]
    four, five = sample("rar", "</evi>(E)", o=options, p=0), sample("rar", "</evi>(E)", o=[*options, "an ox"], p=4)
    three = sample("rar", "</evi>(A)", o=options[:3], p=0)
    letters = run([five, four], "d2vlm", similarity=False)[1]
    assert [row.get("option") for row in letters] == [4, 4]
    assert run([four, five], "d2vlm", similarity=False)[0]["failed"] == 2  # no letter E among four options
    summary, _ = run([three, four | {"a": "</evi>(A)"}], "d2vlm", similarity=False)
    assert summary["reasons"] == {"crash of the published script: 3 options": 1}
    assert metrics_of(summary, "rar")["Acc"] == 0.5


def test_second_chances():
    needs_similarity()
    scorer = CaptionScorer(["SentSim"], shared_similarity())
    options = ["The man cooks an egg.", "A child runs.", "Two dogs play with a rope.", "The car stops."]
    wrong_letter = sample("eca", "</evi>(B) Two dogs play with a rope.", o=options, p=2)
    expected = {"d2vlm": (0.0, 0), "d2vlm_looser": (1.0, 1), "etbench": (1.0, 0), "etbench_strict": (0.0, 0)}
    for protocol, (accuracy, failed) in expected.items():
        metrics = metrics_of(run([wrong_letter], protocol, scorer=scorer)[0], "eca")
        assert (metrics["Acc"], metrics["Failed"]) == (accuracy, failed), protocol


def test_means_over_sources_tasks_and_groups():
    samples = [
        sample("tvg", "</evi>1 - 2", tgt=[1, 2], source="a"),
        sample("tvg", "</evi>8 - 9", tgt=[1, 2], source="b"),
        sample("tvg", "</evi>8 - 9", tgt=[1, 2], source="b"),
        sample("epm", "</evi>1 - 2", tgt=[1, 2]),
        sample("tem", "</evi>1 - 2", tgt=[[1, 2]]),
        sample("dvc", "</evi>1 - 9 seconds, cut the bread.", tgt=[[1, 9]], g=["cut the bread"]),
    ]
    summary, _ = run(samples, "d2vlm", captions=False)
    assert summary["tasks"]["tvg"]["mean"]["F1"] == 0.5  # mean of sources, not of samples
    assert summary["tasks"]["tvg"]["mean"]["Total"] == 3
    assert summary["overall"] == {"TVG": 0.5, "EPM": 1.0, "DVC-F1": 1.0, "TEM": 1.0}
    assert summary["merged"] == {"grounding": 0.75, "captioning-F1": 1.0, "complex": 1.0}
    assert set(summary["missing_tasks"]) == set(TASKS) - {"tvg", "epm", "dvc", "tem"}


def spans(*pairs, score=0.9):
    return [{"start": float(start), "end": float(end), "score": score} for start, end in pairs]


def said(answer, evidence=(), **extra):
    return {"answer": answer, "evidence": list(evidence), **extra}


OPTIONS = ["a cat", "a dog", "a cow", "a pig"]
CLEAN = [
    (sample("tvg", "", tgt=[0, 10]), said("x", spans((0, 7), score=0.9) + spans((0, 10), score=0.8)), 1.0),
    (sample("tvg", "", tgt=[0, 10]), said("x", spans((0, 10), score=0.8) + spans((0, 5), score=0.9)), 0.75),
    (sample("epm", "", tgt=[0, 10]), None, 0.0),
    (sample("tal", "", tgt=[[0, 4], [6, 9]]), said("x", spans((0, 4))), 2 / 3),
    (sample("evs", "", tgt=[[0, 4.5]]), said("x", spans((0, 3), (1, 9))), 2 * 4.5 / 13.5),
    (sample("vhd", "", tgt=[[[0, 4]], [[7, 9]]]), said("x", spans((6, 9))), 1.0),
    (sample("tem", "", tgt=[[0, 4], [6, 9]]), said("x", spans((6, 9))), 1.0),
    (sample("rar", "", o=OPTIONS, p=1), said("(B) a dog"), 1.0),
    (sample("eca", "", o=OPTIONS, p=1), said("a dog"), 1.0),
    (sample("rvq", "", o=OPTIONS, p=1), said("A dog barks"), 0.0),
    (sample("gvq", "", o=OPTIONS, p=1, tgt=[0, 10]), said("(B)", spans((0, 10))), 1.0),
    (sample("gvq", "", o=OPTIONS, p=1, tgt=[0, 10]), said("(A)", spans((0, 10))), 0.0),
    (sample("dvc", "", tgt=[[0, 4], [6, 9]], g=["a b", "c d"]), said("x", spans((0, 4), (20, 30))), 0.5),
]


def test_clean_scores_of_rows():
    _, per_row = run([entry for entry, _, _ in CLEAN], "clean", [p for _, p, _ in CLEAN], captions=False)
    assert [row["score"] for row in per_row] == pytest.approx([value for _, _, value in CLEAN])
    assert [row["failed"] for row in per_row].count(True) == 1


def test_the_clean_summary():
    summary, _ = run([entry for entry, _, _ in CLEAN], "clean", [p for _, p, _ in CLEAN], captions=False)
    assert summary["overall"]["TVG"] == 0.875
    assert summary["tasks"]["tvg"]["mean"]["R1@0.7"] == 0.5
    assert summary["tasks"]["gvq"]["mean"]["Acc"] == 0.5
    assert summary["failed"] == 1
    for group, interval in summary["intervals"].items():
        merged = summary["merged"]["captioning-F1" if group == "captioning" else group]
        assert interval["value"] == pytest.approx(merged, abs=1e-5)
        assert interval["low"] <= interval["value"] <= interval["high"]
    assert summary["calibration"]["count"] == 13
    json.dumps(summary)


def test_clean_does_not_depend_on_order():
    order = list(range(len(CLEAN)))
    random.Random(1).shuffle(order)
    straight, _ = run([entry for entry, _, _ in CLEAN], "clean", [p for _, p, _ in CLEAN], captions=False)
    shuffled, _ = run(
        [CLEAN[n][0] for n in order],
        "clean",
        [CLEAN[n][1] and {**CLEAN[n][1], "evidence": CLEAN[n][1]["evidence"][::-1]} for n in order],
        captions=False,
    )
    assert shuffled["overall"] == straight["overall"]
    assert shuffled["merged"] == pytest.approx(straight["merged"])


def test_evidence_and_answer_are_scored_apart():
    references = [{"start": 0.0, "end": 5.0, "char_start": 0, "char_end": 1}]
    prediction = said("x", spans((0, 10)), references=references)
    summary, per_row = run([sample("tvg", "", tgt=[0, 10])], "clean", [prediction])
    assert (per_row[0]["iou"], per_row[0]["iou_answer"], per_row[0]["agreement"]) == (1.0, 0.5, 0.5)
    assert summary["tasks"]["tvg"]["mean"]["iou_answer"] == 0.5
    _, per_row = run([sample("tal", "", tgt=[[0, 10]])], "clean", [prediction])
    assert (per_row[0]["score"], per_row[0]["F1_answer"]) == (1.0, 0.75)


@needs_java
def test_clean_captions_need_no_filler():
    rows = [sample("dvc", "", tgt=[[0, 4], [6, 9]], g=["the man cuts the bread", "he eats"])]
    captions = ["The man cuts the bread.", "a car drives"]
    hit = said("x", spans((0, 4), (20, 30)), captions=captions)
    summary, per_row = run(rows, "clean", [hit], scorer=shared_scorer())
    assert per_row[0]["METEOR"] == pytest.approx(0.5)  # one of two events said, on each side
    assert summary["tasks"]["dvc"]["mean"]["ROUGE_L"] == 0.5
    answer = "The man cuts the bread at 0 - 4. Then a car drives at 20 - 30."
    places = [answer.index("0 - 4"), answer.index("20 - 30")]
    references = [
        {"start": 0.0, "end": 4.0, "char_start": places[0], "char_end": places[0] + 5},
        {"start": 20.0, "end": 30.0, "char_start": places[1], "char_end": places[1] + 7},
    ]
    spoken = said(answer, spans((0, 4), (20, 30)), references=references)
    _, from_text = run(rows, "clean", [spoken], scorer=shared_scorer())
    assert from_text[0]["METEOR"] == pytest.approx(0.5)


def test_protocols_differ_on_the_same_predictions():
    rows = [sample("evs", "", tgt=[[0, 10]]), sample("tvg", "", tgt=[0, 10])]
    answer = "It is 0.0 - 10.0."
    given = [said(answer, spans((100, 110))), said(answer, spans((0, 5)))]
    found = {p: run(rows, p, given)[0]["overall"] for p in ("clean", "etbench", "d2vlm")}
    assert found["d2vlm"] == {"TVG": 1.0, "EVS": 0.66667}  # evidence is drawn into the answer's map
    assert found["etbench"] == {"TVG": 1.0, "EVS": 1.0}
    assert found["clean"] == {"TVG": 0.75, "EVS": 0.0}  # evidence is what is scored


def test_bad_input():
    with pytest.raises(ValueError, match="protocol is 'strict', which is not defined; use one of"):
        run([sample("tvg", "", tgt=[0, 1])], "strict")
    with pytest.raises(ValueError, match="pass rows whose task is one of"):
        run([sample("vqa", "", tgt=[0, 1])], "d2vlm")
    with pytest.raises(ValueError, match="rows has 0 rows"):
        score([], [], "d2vlm")
    with pytest.raises(ValueError, match="the protocol 'clean' reads no text"):
        run([sample("tvg", "1 - 2", tgt=[0, 1])], "clean")
