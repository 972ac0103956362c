# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""The shapes benchmark: rows of `data/shapes.py` (tasks tvg, tal, dvc, gvq, rar), with an interval for every figure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..data.shapes import best_constant_span
from ..data.shapes_language import LETTERS, VERBS
from ..model.spans_d2vlm import set_f1
from .clean_protocol import (
    align_predictions,
    event_captions,
    evidence_calibration,
    headline,
    identity,
    score_row,
    top_iou,
)
from .metrics import coverage_iou, match_events, recall_rate
from .parsing import Parsed, parse_structured
from .text_metrics import exact_match, token_f1


TASKS = ("tvg", "tal", "dvc", "gvq", "rar")
RECALL_THRESHOLDS = (0.3, 0.5, 0.7)
SET_THRESHOLDS = (0.1, 0.3, 0.5, 0.7)
EVENT_IOU = 0.5  # a predicted event and its caption belong to the true event that they meet this far
# figures of the rows that have them: name in the summary -> key of the row
_ABSENT_KEY = "no_evidence"

_LEAD = re.compile(r"^\W*(?:(?:first|then|next|finally|and|later|afterwards)\b\W*)+", re.I)
_PHRASES = sorted(
    ((form, forms[0][0]) for forms in VERBS.values() for form, _ in forms), key=lambda pair: -len(pair[0])
)


def event_phrase(text: str) -> str:
    """An event's description without connectives, and with the plain wording of its verb.

    Args:
        text (`str`):
            E.g. `"Then the red circle goes left."`.

    Returns:
        `str`: e.g. `"the red circle moves left"`.
    """
    phrase = " ".join(_LEAD.sub("", text).lower().split()).strip(" .,;:!?")
    for form, plain in _PHRASES:
        if phrase.endswith(f" {form}"):
            return phrase.removesuffix(form) + plain
    return phrase


def _score_tvg(row: Mapping[str, Any], parsed: Parsed, prediction: Any) -> dict[str, float]:
    iou = top_iou(parsed.evidence, row["spans"])
    hits = {f"R1@{t}": float(iou >= t) for t in RECALL_THRESHOLDS}
    return {"R1": recall_rate(iou, RECALL_THRESHOLDS), **hits, "IoU": iou}


def _score_tal(row: Mapping[str, Any], parsed: Parsed, prediction: Any) -> dict[str, float]:
    rates = set_f1([parsed.evidence], [row["spans"]], SET_THRESHOLDS)
    return {"F1": float(np.mean(list(rates.values()))), **{f"F1@{t}": rate for t, rate in rates.items()}}


def _score_dvc(row: Mapping[str, Any], parsed: Parsed, prediction: Any) -> dict[str, float]:
    """Event F1 of the evidence; captions of the matched events, summed over the mean number of events."""
    events = event_captions(prediction, parsed)
    pairs = [(p, k) for p, k, iou in match_events(events.spans, row["spans"]) if iou >= EVENT_IOU]
    phrases = [(event_phrase(events.captions[p]), event_phrase(row["captions"][k])) for p, k in pairs]
    size = (len(events.spans) + len(row["spans"])) / 2
    scores = {"event_F1": score_row("dvc", row, parsed, SET_THRESHOLDS)["score"]}
    for name, measure in (("caption_F1", exact_match), ("caption_token_F1", token_f1)):
        scores[name] = sum(float(measure(guess, truth)) for guess, truth in phrases) / size if size else 1.0
    return scores


def _score_choice(row: Mapping[str, Any], parsed: Parsed, prediction: Any) -> dict[str, float]:
    right = bool(parsed.options) and parsed.options[0] == row["correct_option"]
    scores = {"accuracy": float(right), "chance": 1 / len(row["options"])}
    if row["task"] == "gvq" and row["spans"]:
        scores["evidence_IoU"] = coverage_iou(parsed.evidence, row["spans"])
    return scores


_SCORERS: dict[str, Callable[[Mapping[str, Any], Parsed, Any], dict[str, float]]] = {
    "tvg": _score_tvg,
    "tal": _score_tal,
    "dvc": _score_dvc,
    "gvq": _score_choice,
    "rar": _score_choice,
}
# the one score of a row, for comparisons of systems
_HEADLINES = {"tvg": "R1", "tal": "F1", "dvc": "event_F1", "gvq": "accuracy", "rar": "accuracy"}


def _score_one(row: Mapping[str, Any], prediction: Any) -> tuple[dict[str, Any], Parsed]:
    """Result of one row. An event that does not occur is met by no evidence, and by nothing else."""
    task, parsed = row["task"], parse_structured(prediction, row.get("options") or ())
    parts = [*row["source"].split("/"), "", ""]
    result: dict[str, Any] = identity(row)
    result |= {"difficulty": parts[1], "attribute": parts[2], "absent": task in ("tvg", "tal") and not row["spans"]}
    reason = parsed.reason
    if result["absent"]:
        result[_ABSENT_KEY] = result["score"] = float(reason is None and not parsed.evidence)
    else:
        scores = _SCORERS[task](row, parsed, prediction)
        result |= {**scores, "score": scores[_HEADLINES[task]]}
        if task in ("tvg", "tal"):
            result["missed"] = float(not parsed.evidence)
    if task in ("gvq", "rar") and reason is None and not parsed.options:
        reason = "no option in the answer"
    if parsed.references and task != "rar":
        result["agreement"] = coverage_iou(parsed.evidence, parsed.windows)
    return {**result, "failed": reason is not None, "reason": reason}, parsed


def _figures(per_row: Sequence[Mapping[str, Any]], keys: Sequence[str], seed: int) -> dict[str, Any]:
    figures = {key: headline(per_row, key, seed=seed) for key in keys}
    return {key: figure for key, figure in figures.items() if figure is not None}


def score(
    rows: Sequence[Mapping[str, Any]],
    predictions: Sequence | Mapping[str, Any],
    protocol: str = "clean",
    seed: int = 0,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Scores predictions on rows of the shapes world.

    Args:
        rows (`Sequence[Mapping]`):
            Rows of the schema with the tasks tvg, tal, dvc, gvq, rar; `source` is `shapes/<difficulty>[/<attribute>]`.
        predictions (`Sequence` or `Mapping`):
            The pipeline's dict per row, in order or by row id; a missing one scores 0.
        protocol (`str`, *optional*, defaults to `"clean"`):
            Only `"clean"`.
        seed (`int`, *optional*, defaults to 0):
            Seed of the bootstrap intervals.

    Returns:
        `tuple[dict, list[dict]]`: the summary and one result per row. Every figure of the summary is a dict of `value`,
        `low`, `high` (95 % interval, questions on one video redrawn together) and `rows`:
        `tasks` — tvg: R1@{0.3, 0.5, 0.7}, their mean `R1`, and `IoU`, over rows whose event occurs; tal: set F1@{0.1,
        0.3, 0.5, 0.7} and their mean; dvc: `event_F1`, and `caption_F1` (exact phrases) and `caption_token_F1` of
        events met at IoU 0.5; gvq and rar: `accuracy` and `chance`, gvq also `evidence_IoU`;
        `absent` — share of rows on events that do not occur that were answered without evidence; `missed` — share of
        the others answered without; `attributes` — accuracy per attribute asked for, and `attributes_chance` that of a
        letter drawn blindly; `difficulties` — headline of each task per difficulty; `agreement` of evidence and answer;
        and the `calibration` of evidence scores.

    Raises:
        ValueError: If the protocol is another, there are no rows, a task is none of the benchmark's, or predictions
            are malformed.
    """
    if protocol != "clean":
        raise ValueError(f"protocol is {protocol!r}: rows of shapes are scored on spans only; use 'clean'.")
    unknown = sorted({str(row["task"]) for row in rows} - set(TASKS))
    if unknown or not rows:
        raise ValueError(
            f"rows has {len(rows)} rows, with the tasks {unknown} that shapes do not have; use some of {list(TASKS)}."
        )
    scored = [_score_one(row, p) for row, p in zip(rows, align_predictions(rows, predictions), strict=True)]
    per_row, parsed = [result for result, _ in scored], [own for _, own in scored]
    tasks = {}
    for task in (task for task in TASKS if any(row["task"] == task for row in per_row)):
        members = [row for row in per_row if row["task"] == task and not row["absent"]]
        tasks[task] = _figures(members, [key for row in members[:1] for key in _columns(row)], seed)
        if task == "gvq":
            tasks[task] |= _figures(members, ["evidence_IoU"], seed)
    reasons = Counter(row["reason"] for row in per_row if row["reason"])
    spanned = [n for n, row in enumerate(rows) if row["task"] != "rar" and not per_row[n]["absent"]]
    difficulties = dict.fromkeys(row["difficulty"] for row in per_row)
    attributes = {row["attribute"]: _where(per_row, attribute=row["attribute"]) for row in per_row if row["attribute"]}
    summary: dict[str, Any] = {
        "benchmark": "shapes",
        "protocol": protocol,
        "unit": "fraction",
        "total": len(rows),
        "failed": sum(reasons.values()),
        "reasons": dict(reasons.most_common()),
        "tasks": tasks,
        "mean": headline(per_row, strata=("task",), seed=seed),
        "absent": headline(per_row, _ABSENT_KEY, seed=seed),
        "missed": headline(per_row, "missed", seed=seed),
        "agreement": headline(per_row, "agreement", seed=seed),
        "attributes": {name: headline(_where(per_row, attribute=name), seed=seed) for name in attributes},
        "attributes_chance": {
            name: headline(_where(per_row, attribute=name), "chance", seed=seed) for name in attributes
        },
        "difficulties": {
            name: {task: headline(_where(per_row, difficulty=name, task=task), seed=seed) for task in tasks}
            for name in difficulties
        },
        "calibration": evidence_calibration([parsed[n] for n in spanned], [rows[n]["spans"] for n in spanned]),
    }
    return summary, per_row


def constant_predictions(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The best answers that look at nothing: one span for every row, and the letter that is right most often.

    Args:
        rows (`Sequence[Mapping]`):
            The rows that will be scored: both are chosen with their truth known, so no blind guess is better.

    Returns:
        `dict[str, dict]`: by row id, what the pipeline would give.

    Raises:
        ValueError: If no row has exactly one span.
    """
    start, end, _ = best_constant_span(rows)
    right = Counter(row["correct_option"] for row in rows if row.get("options"))
    letter = f"({LETTERS[right.most_common(1)[0][0]]})" if right else ""
    return {
        str(row["id"]): {
            "answer": letter if row.get("options") else "",
            "evidence": [{"start": start * row["duration"], "end": end * row["duration"], "score": 1.0}],
        }
        for row in rows
    }


def _columns(row: Mapping[str, Any]) -> list[str]:
    """Names of a row's figures, the headline and what is reported elsewhere left out."""
    apart = {"id", "task", "source", "video", "difficulty", "attribute", "absent", "failed", "reason"}
    return [key for key in row if key not in apart | {"score", "missed", "agreement", _ABSENT_KEY}]


def _where(rows: Sequence[Mapping[str, Any]], **wanted: str) -> list[Mapping[str, Any]]:
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


__all__ = ["EVENT_IOU", "RECALL_THRESHOLDS", "SET_THRESHOLDS", "TASKS", "constant_predictions", "event_phrase", "score"]
