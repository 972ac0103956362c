# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""Multiple-choice benchmarks without spans: MVBench and Video-MME letters."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .clean_protocol import align_predictions, headline, identity
from .parsing import DELIMITER, LETTERS, RULES, parse_structured, prediction_text


BENCHMARKS = ("mvbench", "video_mme")
_VIDEO_MME_LEADS = (
    "The best answer is",
    "The correct answer is",
    "The answer is",
    "The answer",
    "The best option is",
    "The correct option is",
    "Best answer:",
    "Best option:",
    "Answer:",
    "Option:",
)


def mvbench_correct(prediction: str, truth: str) -> bool:
    """MVBench's check: the first words of both, compared by substring.

    An empty first word, as after a leading space, is a substring of anything and counts as right.

    Args:
        prediction (`str`):
            The model's output; `</evi>` is taken out of it.
        truth (`str`):
            The right option with its letter, e.g. `"(A) cat."`.

    Returns:
        `bool`.
    """
    guess = prediction.replace(DELIMITER, "").lower().split(" ")[0]
    target = truth.lower().split(" ")[0]
    return guess.replace(".", "") in target or target in guess


def video_mme_letter(answer: str) -> str:
    """Video-MME's letter: the first A, B, C or D before the first full stop, after stock phrases are taken out.

    Args:
        answer (`str`):
            The model's output.

    Returns:
        `str`: the letter, or `""` if there is none.
    """
    text = answer.partition(".")[0]
    for lead in _VIDEO_MME_LEADS:
        text = text.replace(lead, "")
    found = re.search(r"[ABCD]", text)
    return found.group() if found else ""


def _published_row(row: Mapping[str, Any], text: str | None, protocol: str, benchmark: str) -> dict[str, Any]:
    """Whether one answer is right; `answered` says whether Video-MME counts it."""
    if text is None:
        return {"score": 0.0, "answered": False, "reason": "no prediction"}
    if not RULES[protocol].evidence and not RULES[protocol].whole_text:
        text = text.rpartition(DELIMITER)[2].strip()
    right = int(row["correct_option"])
    if benchmark == "mvbench":
        hit = mvbench_correct(text, f"({LETTERS[right]}) {row['options'][right]}")
        return {"score": float(hit), "answered": True, "reason": None}
    letter = video_mme_letter(text)
    reason = None if letter else "no letter in the answer"
    return {"score": float(letter == LETTERS[right]), "answered": bool(letter), "reason": reason}


def _clean_row(row: Mapping[str, Any], prediction: Any) -> dict[str, Any]:
    parsed = parse_structured(prediction, row["options"])
    reason = parsed.reason or (None if parsed.options else "no option in the answer")
    hit = bool(parsed.options) and parsed.options[0] == row["correct_option"]
    return {"score": float(hit), "answered": bool(parsed.options), "reason": reason}


def score(
    rows: Sequence[Mapping[str, Any]],
    predictions: Sequence | Mapping[str, Any],
    protocol: str = "clean",
    benchmark: str = "mvbench",
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Scores multiple-choice answers.

    Args:
        rows (`Sequence[Mapping]`):
            Rows of [`~d2vlm_hf.evaluation.benchmarks.load_annotations`].
        predictions (`Sequence` or `Mapping`):
            One per row, or by row id: texts, or the pipeline's dicts. `clean` needs dicts.
        protocol (`str`, *optional*, defaults to `"clean"`):
            Under `"clean"` an answer that names no option is wrong. Under `"d2vlm"` the published checks read the whole
            output, under `"etbench"` the text after the last `</evi>`.
        benchmark (`str`, *optional*, defaults to `"mvbench"`):
            `"mvbench"` or `"video_mme"`.

    Returns:
        `tuple[dict, list[dict]]`: the summary and one result per row. `Acc` is over all rows, `Acc_answered` over those
        with a letter (what Video-MME publishes), `mean` that of the sources (what MVBench publishes); `sources` has
        each one's accuracy.

    Raises:
        ValueError: If the protocol or benchmark is unknown, there are no rows, or the predictions do not fit the rows.
    """
    if protocol != "clean" and protocol not in RULES:
        raise ValueError(f"protocol is {protocol!r}, which is not defined; use one of {['clean', *RULES]}.")
    if benchmark not in BENCHMARKS:
        raise ValueError(f"benchmark is {benchmark!r}, which has no letters; use one of {list(BENCHMARKS)}.")
    if not rows:
        raise ValueError("rows is empty, so there is nothing to score; pass the rows of an annotation file.")
    per_row = []
    for row, prediction in zip(rows, align_predictions(rows, predictions), strict=True):
        if protocol == "clean":
            result = _clean_row(row, prediction)
        else:
            result = _published_row(row, prediction_text(prediction), protocol, benchmark)
        per_row.append({**identity(row), **result, "failed": result["reason"] is not None})
    sources: dict[str, list[float]] = {}
    for row in per_row:
        sources.setdefault(row["source"], []).append(row["score"])
    answered = [row["score"] for row in per_row if row["answered"]]
    accuracy = {source: float(np.mean(values)) for source, values in sources.items()}
    reasons = Counter(row["reason"] for row in per_row if row["reason"])
    summary = {
        "benchmark": benchmark,
        "protocol": protocol,
        "unit": "fraction",
        "total": len(rows),
        "failed": sum(reasons.values()),
        "reasons": dict(reasons.most_common()),
        "Acc": float(np.mean([row["score"] for row in per_row])),
        "Acc_answered": float(np.mean(answered)) if answered else 0.0,
        "mean": float(np.mean(list(accuracy.values()))),
        "sources": accuracy,
    }
    if protocol == "clean":
        summary["intervals"] = {"Acc": headline(per_row), "mean": headline(per_row, strata=("source",))}
    return summary, per_row


__all__ = ["BENCHMARKS", "mvbench_correct", "score", "video_mme_letter"]
