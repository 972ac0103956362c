# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""Dense captioning: YouCook2 and ActivityNet Captions (event F1, CIDEr, METEOR, ROUGE-L, BLEU, SODA_c)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..model.spans_d2vlm import set_f1
from .clean_protocol import (
    align_predictions,
    event_captions,
    evidence_calibration,
    headline,
    identity,
    mean_of,
    score_row,
)
from .dense_metrics import matched_caption_scores, prepare_captions, score_video, soda_c
from .metrics import Events, harmonic_mean
from .parsing import RULES, Parsed, parse_structured, parse_text, prediction_text
from .text_metrics import CAPTION_METRICS, CaptionScorer


THRESHOLDS = (0.3, 0.5, 0.7, 0.9)
BENCHMARKS = ("youcook2", "activitynet_captions")
_NO_EVENTS = Events([], [])


def _references(row: Mapping[str, Any]) -> list[Events]:
    """The events of each annotator."""
    if row.get("annotation_captions"):
        return [Events(s, c) for s, c in zip(row["annotations"], row["annotation_captions"], strict=True)]
    return [Events(row["spans"], row["captions"])]


def _published_references(row: Mapping[str, Any], benchmark: str) -> list[Events]:
    """As the published scripts see them: YouCook2's captions travel as one paragraph, cut at every `. `."""
    references = _references(row)
    if benchmark != "youcook2":
        return references
    captions = ". ".join(references[0].captions).split(". ")
    count = min(len(captions), len(references[0].spans))
    return [Events(references[0].spans[:count], captions[:count])]


def _read_events(prediction: Any, protocol: str) -> tuple[Events | None, Parsed]:
    """Predicted events under a published protocol; `None` where there is no prediction at all."""
    if isinstance(prediction, Events):
        return prediction, Parsed()
    text = prediction_text(prediction)
    if text is None:
        return None, Parsed(reason="no prediction")
    parsed = parse_text("dvc", text, protocol)
    return Events(parsed.windows, parsed.captions), parsed


def _soda(guess: Events, references: Sequence[Events], scorer: CaptionScorer, youcook2: bool) -> float:
    """SODA_c, mean over annotators. The published YouCook2 script orders captions by their index as text
    (0, 1, 10, 2, ...), so that from the eleventh event on they no longer stand beside their windows."""
    if youcook2:
        order = sorted(range(len(guess.captions)), key=str)
        return soda_c(guess, references[0], scorer, order)[2]
    ranked = sorted(range(len(guess.spans)), key=lambda n: guess.spans[n][0])
    guess = Events([guess.spans[n] for n in ranked], [guess.captions[n] for n in ranked])
    return float(np.mean([soda_c(guess, truth, scorer)[2] for truth in references]))


def _paragraph(text: str) -> str:
    return re.sub(r"[\d.]", "", text)


def _paragraph_scores(
    guesses: Sequence[Events | None], references: Sequence[Events], scorer: CaptionScorer
) -> dict[str, float]:
    """CIDEr and METEOR of whole paragraphs. The present predictions meet the first references, as published."""
    present = [" ".join(guess.captions) for guess in guesses if guess is not None]
    truth = [". ".join(target.captions) for target in references]
    pairs = [([_paragraph(target)], _paragraph(own)) for own, target in zip(present, truth, strict=False)]
    scores = scorer.score(pairs)
    return {f"Para_{name}": scores[name] for name in ("CIDEr", "METEOR") if name in scores}


def _published_video(
    guess: Events | None, references: Sequence[Events], scorer: CaptionScorer | None, benchmark: str
) -> dict[str, Any]:
    """Scores of one video; a video without prediction scores 0."""
    events = guess or _NO_EVENTS
    if benchmark == "youcook2":
        events = Events([sorted(span) for span in events.spans], events.captions)
    result = score_video(events, references, THRESHOLDS, scorer)
    row: dict[str, Any] = {
        f"{name}@{t}": float(value)
        for name, values in (("Precision", result.precision), ("Recall", result.recall))
        for t, value in zip(THRESHOLDS, values, strict=True)
    }
    row |= {"Precision": float(result.precision.mean()), "Recall": float(result.recall.mean())}
    row["F1"] = float(harmonic_mean(row["Precision"], row["Recall"]))
    row |= {**result.captions, "n_preds": float(len(events.spans))}
    if scorer is not None and "METEOR" in scorer.metrics:
        row["SODA_c"] = _soda(events, references, scorer, benchmark == "youcook2")
    return row


def _score_published(
    rows: Sequence[Mapping[str, Any]],
    aligned: Sequence,
    protocol: str,
    benchmark: str,
    scorer: CaptionScorer | None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    read = [_read_events(prediction, protocol) for prediction in aligned]
    references = [_published_references(row, benchmark) for row in rows]
    prepare_captions(scorer, [guess for guess, _ in read if guess] + [events for r in references for events in r])
    per_row = [
        _published_video(guess, truth, scorer, benchmark) for (guess, _), truth in zip(read, references, strict=True)
    ]
    summary = {key: mean_of(per_row, key) for key in per_row[0]}
    if benchmark == "youcook2" and scorer is not None:
        summary |= _paragraph_scores([guess for guess, _ in read], [truth[0] for truth in references], scorer)
    if benchmark == "activitynet_captions":
        for t in THRESHOLDS:
            summary[f"F1@{t}"] = float(harmonic_mean(summary[f"Precision@{t}"], summary[f"Recall@{t}"]))
        summary["F1"] = float(np.mean([summary[f"F1@{t}"] for t in THRESHOLDS]))
    for row, (_, parsed) in zip(per_row, read, strict=True):
        row["reason"] = parsed.reason
    return summary, per_row


def _score_clean(
    rows: Sequence[Mapping[str, Any]], aligned: Sequence, scorer: CaptionScorer | None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    parsed = [parse_structured(prediction) for prediction in aligned]
    guesses = [event_captions(p, own) for p, own in zip(aligned, parsed, strict=True)]
    references = [_references(row) for row in rows]
    per_row: list[dict[str, Any]] = []
    for row, own, truth in zip(rows, parsed, references, strict=True):
        # Against each annotator apart, then averaged: no annotator is picked after the fact.
        each = [score_row("dvc", {**row, "spans": events.spans}, own, THRESHOLDS) for events in truth]
        mean = {key: mean_of(each, key) for key in each[0]}
        rates = [set_f1([own.evidence], [events.spans], THRESHOLDS) for events in truth]
        per_row.append(
            {"F1": mean.pop("score"), **{f"F1@{t}": float(np.mean([rate[t] for rate in rates])) for t in THRESHOLDS}}
            | mean
        )
    if scorer is not None:
        prepare_captions(scorer, [*guesses, *(events for truth in references for events in truth)])
        _add_captions(per_row, guesses, references, scorer)
    for row, own in zip(per_row, parsed, strict=True):
        row["reason"] = own.reason
    keys = dict.fromkeys(key for row in per_row for key in row if key != "reason")
    summary: dict[str, Any] = {key: mean_of(per_row, key) for key in keys}
    truth = [[span for events in annotators for span in events.spans] for annotators in references]
    summary["calibration"] = evidence_calibration(parsed, truth)
    return summary, per_row


def _add_captions(
    per_row: list[dict[str, Any]], guesses: Sequence[Events], references: Sequence[Sequence[Events]], scorer: Any
) -> None:
    """Adds caption scores and SODA_c to the rows, averaged over their annotators."""
    owner = [n for n, truth in enumerate(references) for _ in truth]
    flat = [events for truth in references for events in truth]
    size = np.bincount(owner, minlength=len(per_row))
    scores = matched_caption_scores([guesses[n] for n in owner], flat, THRESHOLDS, scorer)
    if "METEOR" in scorer.metrics:
        scores["SODA_c"] = np.array(
            [soda_c(guesses[n], events, scorer)[2] for n, events in zip(owner, flat, strict=True)]
        )
    for name, values in scores.items():
        mean = np.bincount(owner, weights=values, minlength=len(per_row)) / size
        for row, value in zip(per_row, mean, strict=True):
            row[name] = float(value)


def score(
    rows: Sequence[Mapping[str, Any]],
    predictions: Sequence | Mapping[str, Any],
    protocol: str = "clean",
    benchmark: str = "youcook2",
    captions: bool = True,
    similarity: bool = False,
    scorer: CaptionScorer | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Scores dense captioning.

    Args:
        rows (`Sequence[Mapping]`):
            Rows of [`~d2vlm_hf.evaluation.benchmarks.load_annotations`], one per video.
        predictions (`Sequence` or `Mapping`):
            One per row, or by row id: texts, the pipeline's dicts, or, under a published protocol, `Events`. `clean`
            needs dicts.
        protocol (`str`, *optional*, defaults to `"clean"`):
            Under `"etbench"` and `"d2vlm"` captions are paired as the published scripts do, and rows without prediction
            score 0. Under `"clean"` event F1 is that of the evidence, events are matched one to one, and each
            annotator counts alike.
        benchmark (`str`, *optional*, defaults to `"youcook2"`):
            `"youcook2"` or `"activitynet_captions"`.
        captions (`bool`, *optional*, defaults to `True`):
            Whether captions are scored.
        similarity (`bool`, *optional*, defaults to `False`):
            Whether sentence similarity is scored too, which the published scripts of these benchmarks do not.
        scorer (`CaptionScorer`, *optional*):
            Scorer to reuse; starting one takes seconds.

    Returns:
        `tuple[dict, list[dict]]`: the summary (fractions; YouCook2's F1 is the mean of the videos' F1, ActivityNet's
        that of mean precision and recall, as published) with `failed`, `reasons` and `skipped`, and one result per row.

    Raises:
        ValueError: If the protocol or benchmark is unknown, there are no rows, or the predictions do not fit the rows.
    """
    if protocol != "clean" and protocol not in RULES:
        raise ValueError(f"protocol is {protocol!r}, which is not defined; use one of {['clean', *RULES]}.")
    if benchmark not in BENCHMARKS:
        raise ValueError(f"benchmark is {benchmark!r}, which has no dense captions; use one of {list(BENCHMARKS)}.")
    if not rows:
        raise ValueError("rows is empty, so there is nothing to score; pass the rows of an annotation file.")
    aligned = align_predictions(rows, predictions)
    if captions and scorer is None:
        scorer = CaptionScorer(CAPTION_METRICS if similarity else CAPTION_METRICS[:-1])
    scorer = scorer if captions else None
    if protocol == "clean":
        summary, per_row = _score_clean(rows, aligned, scorer)
    else:
        summary, per_row = _score_published(rows, aligned, protocol, benchmark, scorer)
    skipped = dict(scorer.skipped) if scorer else {"captions": "not asked for"}
    if "METEOR" in skipped:
        skipped["SODA_c"] = f"built on METEOR, which {skipped['METEOR']}"
    per_row = [
        {**identity(row), "score": result["F1"], **result, "failed": result["reason"] is not None}
        for row, result in zip(rows, per_row, strict=True)
    ]
    header = {"benchmark": benchmark, "protocol": protocol, "unit": "fraction", "total": len(rows)}
    reasons = Counter(row["reason"] for row in per_row if row["reason"])
    counts = {"failed": sum(reasons.values()), "reasons": dict(reasons.most_common()), "skipped": skipped}
    if protocol == "clean":
        counts["intervals"] = {key: headline(per_row, key) for key in ("F1", "METEOR", "CIDEr", "SODA_c")}
    return {**header, **summary, **counts}, per_row


__all__ = ["BENCHMARKS", "THRESHOLDS", "score"]
