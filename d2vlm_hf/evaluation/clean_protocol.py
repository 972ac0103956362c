# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""The `clean` protocol: what is measured on structured predictions, whatever the benchmark.

Every row counts, no prediction costs a crash, and the order of a prediction does not matter: where one span is asked
for, the surest evidence span is taken; where a set is asked for, all are. Evidence and the answer's own references are
scored apart, and their agreement is the IoU of the time that they cover.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..data.clauses import EVIDENCE, split_clauses, without_evidence
from ..model.spans_d2vlm import set_f1, temporal_iou
from .metrics import ETBENCH_THRESHOLDS, Events, all_annotators, coverage_f1, coverage_iou, recall_rate
from .parsing import Parsed
from .statistics import area_under_curve, bootstrap_interval, calibration


CORRECT_IOU = 0.5  # an evidence span counts as right from this IoU on, for calibration

RowScore = Callable[[Sequence[Sequence[float]]], float]


def align_predictions(rows: Sequence[Mapping[str, Any]], predictions: Sequence | Mapping[str, Any]) -> list[Any]:
    """Puts predictions in the order of the rows.

    Args:
        rows (`Sequence[Mapping]`):
            Rows with an `id` each.
        predictions (`Sequence` or `Mapping`):
            One prediction per row in the same order, or a mapping from row id to prediction.

    Returns:
        `list`: one prediction per row; `None` where there is none.

    Raises:
        ValueError: If a sequence has another length than the rows.
    """
    if isinstance(predictions, Mapping):
        return [predictions.get(row["id"]) for row in rows]
    if len(predictions) != len(rows):
        raise ValueError(
            f"There are {len(predictions)} predictions for {len(rows)} rows; pass one per row, "
            "or a mapping from row id to prediction (missing ones count as failed)."
        )
    return list(predictions)


def identity(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a row's result is known by.

    Args:
        row (`Mapping`):
            A row of the schema.

    Returns:
        `dict`: its `id`, `task` and `source`, and `video` as the file's name (the row's id where the file is embedded
        without a name).
    """
    video = row["video"].get("path") if isinstance(row["video"], Mapping) else row["video"]
    named = {key: row[key] for key in ("id", "task", "source")}
    return named | {"video": str(video) if isinstance(video, str | os.PathLike) else str(row["id"])}


def top_iou(spans: Sequence[Sequence[float]], truth: Sequence[Sequence[float]]) -> float:
    """IoU of the first (surest) span with the best true one.

    Args:
        spans (`(P, 2)` floats):
            Predicted spans in seconds, the surest first; P may be 0.
        truth (`(K, 2)` floats):
            True spans in seconds.

    Returns:
        `float` between 0 and 1; 0 if nothing was predicted.
    """
    return float(temporal_iou(list(spans)[:1], truth).max(initial=0.0))


def both_parts(parsed: Parsed, measure: RowScore) -> dict[str, float]:
    """A measure of the evidence and, where the answer's references are known, of those too.

    Args:
        parsed (`Parsed`):
            A structured prediction.
        measure (`Callable`):
            Spans in seconds -> score.

    Returns:
        `dict[str, float]`: `evidence`, and with references `answer` and `agreement` (IoU of the time covered).
    """
    scores = {"evidence": float(measure(parsed.evidence))}
    if parsed.references:
        scores["answer"] = float(measure(parsed.windows))
        scores["agreement"] = coverage_iou(parsed.evidence, parsed.windows)
    return scores


def mean_of(per_row: Sequence[Mapping[str, Any]], key: str) -> float | None:
    """Mean of a score over the rows that have it.

    Args:
        per_row (`Sequence[Mapping]`):
            Results of rows.
        key (`str`):
            Name of the score.

    Returns:
        `float`, or `None` if no row has it.
    """
    values = [row[key] for row in per_row if row.get(key) is not None]
    return float(np.mean(values)) if values else None


def headline(
    per_row: Sequence[Mapping[str, Any]], key: str = "score", strata: Sequence[str] = (), seed: int = 0
) -> dict[str, Any] | None:
    """Mean of a score with its bootstrap interval.

    Args:
        per_row (`Sequence[Mapping]`):
            Results of rows, with a `video` each; those without the score are left out.
        key (`str`, *optional*, defaults to `"score"`):
            Name of the score.
        strata (`Sequence[str]`, *optional*):
            Names of the entries whose groups are averaged with equal weight, nested (e.g. `("task", "source")`).
        seed (`int`, *optional*, defaults to 0):
            Seed of the resampling.

    Returns:
        `dict`: `value`, `low`, `high` and `rows`, or `None` if no row has the score. Questions on one video are
        redrawn together.
    """
    rows = [row for row in per_row if row.get(key) is not None]
    if not rows:
        return None
    groups = [tuple(row[name] for name in strata) for row in rows] if strata else None
    interval = bootstrap_interval([row[key] for row in rows], groups, [row["video"] for row in rows], seed=seed)
    return {**interval._asdict(), "rows": len(rows)}


def evidence_calibration(parsed: Sequence[Parsed], truth: Sequence[Sequence[Sequence[float]]]) -> dict[str, Any]:
    """Whether the scores of evidence spans say how often they are right (IoU of at least 0.5 with a true span).

    Args:
        parsed (`Sequence[Parsed]`):
            Structured predictions.
        truth (sequence of `(K, 2)` floats):
            True spans of each row in seconds; K may be 0.

    Returns:
        `dict`: as [`~d2vlm_hf.evaluation.statistics.calibration`]; of scores that are no probabilities only `auc`, with
        the reason under `skipped`.
    """
    scores = [score for prediction in parsed for score in prediction.scores]
    right = [
        iou >= CORRECT_IOU
        for prediction, target in zip(parsed, truth, strict=True)
        for iou in temporal_iou(prediction.evidence, target).max(axis=1, initial=0.0)
    ]
    if all(0 <= score <= 1 for score in scores):
        return calibration(scores, right)
    reason = "some scores lie outside [0, 1], so only their order says anything"
    return {"count": len(scores), "bins": [], "ece": None, "auc": area_under_curve(scores, right), "skipped": reason}


def event_captions(prediction: Mapping[str, Any] | None, parsed: Parsed) -> Events:
    """The captioned events of a structured prediction.

    They are its `captions`, one per evidence span, where it has them. Else every reference in the answer is an event,
    and its caption is the clause of the answer that it stands in, without the reference itself.

    Args:
        prediction (`Mapping`, *optional*):
            The pipeline's dict.
        parsed (`Parsed`):
            The same prediction, parsed.

    Returns:
        `Events`: in order of time; without captions if the answer says nothing of an event.
    """
    if parsed.captions:
        pairs = list(zip(parsed.evidence, parsed.captions, strict=True))
    else:
        references = sorted((prediction or {}).get("references") or [], key=lambda item: item["char_start"])
        answer, marked, last = parsed.text, "", 0
        for item in references:
            marked += answer[last : item["char_start"]] + EVIDENCE
            last = item["char_end"]
        clauses = split_clauses(marked + answer[last:]) if references else []
        captions = {event: without_evidence(clause.body) for clause in clauses for event in clause.events}
        pairs = [((float(item["start"]), float(item["end"])), captions[n]) for n, item in enumerate(references)]
    pairs.sort(key=lambda pair: pair[0])
    return Events([span for span, _ in pairs], [caption for _, caption in pairs])


def _highlight(spans: Sequence[Sequence[float]], row: Mapping[str, Any]) -> float:
    """Whether the middle of the first span lies in a true span of any annotator."""
    middles = [(start + end) / 2 for start, end in list(spans)[:1]]
    return float(any(start <= middle <= end for middle in middles for start, end in all_annotators(row)))


def score_row(
    task: str, row: Mapping[str, Any], parsed: Parsed, thresholds: Sequence[float] = ETBENCH_THRESHOLDS
) -> dict[str, float]:
    """Scores a structured prediction of one row; captions apart.

    Args:
        task (`str`):
            E.T. Bench task name.
        row (`Mapping`):
            A row of the schema.
        parsed (`Parsed`):
            Its prediction.
        thresholds (`Sequence[float]`, *optional*):
            IoU thresholds.

    Returns:
        `dict[str, float]`: `score`, the task's headline of the evidence, averaged over thresholds: for rar, eca and rvq
        whether the option is right; for tvg, epm and tem whether the surest span reaches the threshold, with its `iou`;
        for gvq both at once, with `Acc`; for vhd whether its middle lies in a highlight; for evs the F1 of the time
        covered; else the F1 of the sets of spans. Where the answer's references are known, the same for them
        (`iou_answer` or `F1_answer`) and their `agreement` with the evidence.
    """
    right = float(bool(parsed.options) and parsed.options[0] == row.get("correct_option"))
    if task in ("rar", "eca", "rvq"):
        return {"score": right}
    truth = row["spans"]
    if task in ("tvg", "epm", "tem", "gvq"):
        parts = both_parts(parsed, lambda spans: top_iou(spans, truth))
        rate = recall_rate(parts["evidence"], thresholds)
        result = {"score": rate, "iou": parts["evidence"]}
        if task == "gvq":
            result |= {"score": rate * right, "Acc": right}
        if "answer" in parts:
            result |= {"iou_answer": parts["answer"], "agreement": parts["agreement"]}
        return result
    measures: dict[str, RowScore] = {
        "vhd": lambda spans: _highlight(spans, row),
        "evs": lambda spans: coverage_f1(spans, truth),
    }
    parts = both_parts(
        parsed, measures.get(task, lambda spans: float(np.mean(list(set_f1([spans], [truth], thresholds).values()))))
    )
    result = {"score": parts["evidence"]}
    if "answer" in parts:
        result |= {"F1_answer": parts["answer"], "agreement": parts["agreement"]}
    return result


__all__ = [
    "CORRECT_IOU",
    "align_predictions",
    "both_parts",
    "event_captions",
    "evidence_calibration",
    "headline",
    "identity",
    "mean_of",
    "score_row",
    "top_iou",
]
