# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""Moment retrieval: Charades-STA and TACoS (R1@IoU, mIoU), QVHighlights (R1, mAP, highlights)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .clean_protocol import align_predictions, evidence_calibration, headline, identity, mean_of, score_row
from .metrics import detection_average_precision, published_iou, ranking_average_precision
from .parsing import RULES, Parsed, parse_structured, parse_text, prediction_text


THRESHOLDS = {"charades_sta": (0.3, 0.5, 0.7), "tacos": (0.1, 0.3, 0.5, 0.7)}
MAP_THRESHOLDS = tuple(round(0.5 + 0.05 * n, 2) for n in range(10))
LENGTH_RANGES = {"full": (0, 150), "short": (0, 10), "middle": (10, 30), "long": (30, 150)}  # seconds, (low, high]
SALIENCY_LEVELS = {"Fair": 2, "Good": 3, "VeryGood": 4}
MAX_WINDOWS = 10  # windows of a query that count for mAP
CLIP_SECONDS = 2.0


def _check_protocol(protocol: str) -> None:
    if protocol != "clean" and protocol not in RULES:
        raise ValueError(f"protocol is {protocol!r}, which is not defined; use one of {['clean', *RULES]}.")


def _reasons(per_row: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Counts of failed rows, and of the reasons."""
    reasons = Counter(row["reason"] for row in per_row if row["reason"])
    return {"failed": sum(row["failed"] for row in per_row), "reasons": dict(reasons.most_common())}


def charades_recall(
    predicted: Mapping[Any, Sequence[float] | None],
    truth: Mapping[Any, Sequence[float]],
    thresholds: Sequence[float] = THRESHOLDS["charades_sta"],
) -> dict[str, Any]:
    """R1 and mIoU of the Charades-STA script that the D2VLM authors use, its denominator included.

    The denominator is the number of predictions that hold a window, also of ids without truth. A failed prediction
    (`None`) is scored as the window [0, 0] but not counted; an empty one is counted and scores 0. Windows are not
    sorted. Where the script divides by zero, the item scores 0.

    Args:
        predicted (`Mapping`):
            id -> window `(2,)` in seconds, an empty one, or `None`. A true id that is absent here does not count.
        truth (`Mapping`):
            id -> true window `(2,)` in seconds.
        thresholds (`Sequence[float]`, *optional*):
            IoU thresholds, which an IoU must reach.

    Returns:
        `dict`: `R1@t` and `mIoU` as fractions, `count` (the denominator), `iou` (id -> IoU).
    """
    iou: dict[Any, float] = {}
    for key, (start, end) in truth.items():
        if key not in predicted:
            continue
        window = (0.0, 0.0) if predicted[key] is None else predicted[key]
        if not len(window):
            iou[key] = 0.0
            continue
        shared = max(min(window[1], end) - max(window[0], start), 0.0)
        hull = max(window[1], end) - min(window[0], start)
        iou[key] = shared / hull if hull else 0.0
    count = sum(window is not None for window in predicted.values())
    values = np.array(list(iou.values()))
    rates = {f"R1@{t}": float((values >= t).sum() / max(1, count)) for t in thresholds}
    return {**rates, "mIoU": float(values.sum() / max(1, count)), "count": count, "iou": iou}


def _published_moment(text: str | None, truth: Sequence[float], protocol: str) -> tuple[Parsed, list[float], float]:
    """A read prediction, its first window (empty if none counts) and its IoU with the truth."""
    parsed = Parsed(reason="no prediction") if text is None else parse_text("tvg", text, protocol)
    windows: Sequence = parsed.windows
    if RULES[protocol].evidence and not windows and parsed.evidence and "crash" not in str(parsed.reason):
        windows, parsed = parsed.evidence, Parsed(evidence=parsed.evidence)  # the conversion takes the evidence
    elif RULES[protocol].evidence and windows and not parsed.evidence:
        windows, parsed = (), Parsed(reason="crash of the published script: no evidence window")
    if not windows:
        return parsed, [], 0.0
    iou = float(published_iou(windows[:1], [truth], np.float64)[0, 0])
    return parsed, list(windows[0]), 0.0 if math.isnan(iou) else iou


def score_charades(
    rows: Sequence[Mapping[str, Any]],
    predictions: Sequence | Mapping[str, Any],
    protocol: str = "clean",
    benchmark: str = "charades_sta",
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Scores moment retrieval with one true span per query: Charades-STA and TACoS.

    Args:
        rows (`Sequence[Mapping]`):
            Rows of [`~d2vlm_hf.evaluation.benchmarks.load_annotations`].
        predictions (`Sequence` or `Mapping`):
            One per row, or by row id: texts, or the pipeline's dicts. `clean` needs dicts.
        protocol (`str`, *optional*, defaults to `"clean"`):
            `"clean"` takes the surest evidence span. `"etbench"` takes the first window of the answer. `"d2vlm"` is the
            authors' pipeline: evidence stands in for an answer without window, and rows without prediction do not
            count. Under the others the denominator is the number of rows.
        benchmark (`str`, *optional*, defaults to `"charades_sta"`):
            `"charades_sta"` or `"tacos"`; sets the thresholds.

    Returns:
        `tuple[dict, list[dict]]`: the summary (`R1@t`, `mIoU` as fractions; `failed`, `reasons`; under `clean` also
        `intervals`, `calibration`, `mIoU_answer` and `agreement`) and one result per row.

    Raises:
        ValueError: If the protocol or benchmark is unknown or the predictions do not fit the rows.
    """
    _check_protocol(protocol)
    if benchmark not in THRESHOLDS:
        raise ValueError(f"benchmark is {benchmark!r}, which has no thresholds here; use one of {list(THRESHOLDS)}.")
    limits, aligned = THRESHOLDS[benchmark], align_predictions(rows, predictions)
    if not rows:
        raise ValueError("rows is empty, so there is nothing to score; pass the rows of an annotation file.")
    summary: dict[str, Any] = {"benchmark": benchmark, "protocol": protocol, "unit": "fraction", "total": len(rows)}
    if protocol == "clean":
        parsed = [parse_structured(prediction) for prediction in aligned]
        per_row = [score_row("tvg", row, own, limits) for row, own in zip(rows, parsed, strict=True)]
        summary |= {f"R1@{t}": float(np.mean([row["iou"] >= t for row in per_row])) for t in limits}
        summary |= {"mIoU": mean_of(per_row, "iou"), "mIoU_answer": mean_of(per_row, "iou_answer")}
        summary["agreement"] = mean_of(per_row, "agreement")
        summary["calibration"] = evidence_calibration(parsed, [row["spans"] for row in rows])
    else:
        truth = [row.get("published_spans", row["spans"])[0] for row in rows]
        read = [_published_moment(prediction_text(p), t, protocol) for p, t in zip(aligned, truth, strict=True)]
        parsed = [own for own, _, _ in read]
        ious = [iou for _, _, iou in read]
        if protocol.startswith("d2vlm"):
            windows = {
                row["id"]: window for row, (_, window, _), p in zip(rows, read, aligned, strict=True) if p is not None
            }
            result = charades_recall(windows, {row["id"]: t for row, t in zip(rows, truth, strict=True)}, limits)
            ious = [result["iou"].get(row["id"], 0.0) for row in rows]
            summary |= {key: value for key, value in result.items() if key != "iou"}
        else:
            summary |= {f"R1@{t}": float(np.mean([iou >= t for iou in ious])) for t in limits}
            summary["mIoU"] = float(np.mean(ious))
        per_row = [{"iou": iou, "score": float(np.mean([iou >= t for t in limits]))} for iou in ious]
    per_row = [
        {**identity(row), **result, "failed": own.reason is not None, "reason": own.reason}
        for row, result, own in zip(rows, per_row, parsed, strict=True)
    ]
    summary |= _reasons(per_row)
    if protocol == "clean":
        hits = [{**row, **{f"R1@{t}": float(row["iou"] >= t) for t in limits}} for row in per_row]
        summary["intervals"] = {key: headline(hits, key) for key in [*(f"R1@{t}" for t in limits), "iou"]}
    return summary, per_row


def _query_windows(
    prediction: Any, protocol: str
) -> tuple[list[tuple[float, float]], list[float], list[float], str | None]:
    """Windows, their scores and clip saliencies of one query's prediction, and why there is none."""
    if isinstance(prediction, Mapping) and {"pred_relevant_windows", "pred_saliency_scores"} & set(prediction):
        raw = prediction.get("pred_relevant_windows", ())
        windows = [(float(window[0]), float(window[1])) for window in raw]
        scores = [float(window[2]) if len(window) > 2 else 1.0 for window in raw]
        if protocol == "clean":
            order = sorted(range(len(windows)), key=lambda n: (-scores[n], windows[n]))
            windows, scores = [windows[n] for n in order], [scores[n] for n in order]
        reason = None if windows or "pred_relevant_windows" not in prediction else "an empty list of windows"
        return windows, scores, list(prediction.get("pred_saliency_scores") or []), reason
    if protocol == "clean" or (isinstance(prediction, Mapping) and "text" not in prediction):
        parsed = parse_structured(prediction)
        return list(parsed.evidence), list(parsed.scores), _saliency(prediction), parsed.reason
    text = prediction_text(prediction)
    parsed = Parsed(reason="no prediction") if text is None else parse_text("tvg", text, protocol)
    return list(parsed.windows), [1.0] * len(parsed.windows), [], parsed.reason


def _saliency(prediction: Mapping[str, Any] | None) -> list[float]:
    """Mean over the pipeline's curves in each 2-second clip, where curves were returned."""
    if not prediction or not prediction.get("curves"):
        return []
    times = np.asarray(prediction["times"], np.float64)
    height = np.asarray(prediction["curves"], np.float64).max(axis=0)  # (T,), the best evidence token of each frame
    clip = (times // CLIP_SECONDS).astype(np.int64)
    count = np.bincount(clip)
    return np.divide(np.bincount(clip, weights=height), count, out=np.zeros(len(count)), where=count > 0).tolist()


def _first_iou(windows: Sequence, truth: Sequence) -> float:
    """IoU of the first window with the best true one, shared time over hull as in the published script."""
    shared = hull = np.zeros(0)
    if windows:
        (start, end), spans = windows[0], np.asarray(truth, np.float64)
        shared = np.maximum(np.minimum(spans[:, 1], end) - np.maximum(spans[:, 0], start), 0.0)
        hull = np.maximum(spans[:, 1], end) - np.minimum(spans[:, 0], start)
    return float(np.divide(shared, hull, out=np.zeros_like(shared), where=hull > 0).max(initial=0.0))


def _retrieval_of_range(
    rows: Sequence[Mapping[str, Any]], read: Sequence[tuple], low: float, high: float
) -> dict[str, dict[str, float]] | None:
    """MR-mAP and MR-R1 at each threshold for the true windows of one range of lengths; `None` if there are none."""
    precision, recall = [], []
    for row, (windows, scores, _, _) in zip(rows, read, strict=True):
        truth = [(start, end) for start, end in row["spans"] if low < end - start <= high or (low, high) == (0, 150)]
        if not truth:
            continue
        precision.append(
            detection_average_precision(windows[:MAX_WINDOWS], scores[:MAX_WINDOWS], truth, MAP_THRESHOLDS)
        )
        recall.append(_first_iou(windows, truth) >= np.array(MAP_THRESHOLDS))
    if not precision:
        return None
    mean = np.mean(precision, axis=0) * 100
    table = {str(t): round(float(value), 2) for t, value in zip(MAP_THRESHOLDS, mean, strict=True)}
    table["average"] = round(float(mean.mean()), 2)
    rates = np.mean(recall, axis=0) * 100
    return {
        "MR-mAP": table,
        "MR-R1": {str(t): round(float(value), 2) for t, value in zip(MAP_THRESHOLDS, rates, strict=True)},
    }


def _highlights(row: Mapping[str, Any], saliency: Sequence[float]) -> dict[str, tuple[float, float]]:
    """Average precision (mean over annotators) and Hit@1 of one query at each level of saliency."""
    clips = int(row["duration"] / CLIP_SECONDS)
    truth = np.zeros((clips, 3))
    truth[np.asarray(row["relevant_clip_ids"], np.int64)] = row["saliency_scores"]
    scores = np.zeros(clips)
    given = min(clips, len(saliency))
    scores[:given] = saliency[:given]
    best = int(np.argmax(saliency)) if len(saliency) else 0
    result = {}
    for name, level in SALIENCY_LEVELS.items():
        relevant = truth >= level
        precision = float(np.mean([ranking_average_precision(column, scores) for column in relevant.T]))
        result[name] = (precision, float(best < clips and relevant[best].any()))
    return result


def score_qvhighlights(
    rows: Sequence[Mapping[str, Any]], predictions: Sequence | Mapping[str, Any], protocol: str = "clean"
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Scores QVHighlights: moment retrieval and highlight detection, in percent with 2 decimals as published.

    Args:
        rows (`Sequence[Mapping]`):
            Rows of [`~d2vlm_hf.evaluation.benchmarks.load_annotations`], one per query.
        predictions (`Sequence` or `Mapping`):
            One per row, by row id, or with a `qid` each: `{"pred_relevant_windows": [[start, end, score]],
            "pred_saliency_scores": [one per 2 s]}` as submitted to the benchmark (either key may be missing), the
            pipeline's dict (its `curves`, where returned, give the saliency), or, under a published protocol, a text.
        protocol (`str`, *optional*, defaults to `"clean"`):
            Under `"clean"` windows are sorted by score first; under the others R1 takes the first one listed.

    Returns:
        `tuple[dict, list[dict]]`: the summary has the published tables (`brief`; `full`, `long`, `middle`, `short`
        with MR-mAP and MR-R1; `HL-min-*`), and `failed`, `reasons`, `skipped`, `extra_predictions`. Where the published
        script stops (a missing query, an empty list, no true window of a length range), the query counts as failed or
        the range is left out by name.

    Raises:
        ValueError: If the protocol is unknown, there are no rows, or the predictions do not fit the rows.
    """
    _check_protocol(protocol)
    if not rows:
        raise ValueError("rows is empty, so there is nothing to score; pass the rows of an annotation file.")
    if not isinstance(predictions, Mapping) and all(isinstance(p, Mapping) and "qid" in p for p in predictions):
        predictions = {str(prediction["qid"]): prediction for prediction in predictions}
    aligned = align_predictions(rows, predictions)
    read = [_query_windows(prediction, protocol) for prediction in aligned]
    summary: dict[str, Any] = {
        "benchmark": "qvhighlights",
        "protocol": protocol,
        "unit": "percent",
        "total": len(rows),
        "brief": {},
        "skipped": {},
        "extra_predictions": 0,
    }
    if isinstance(predictions, Mapping):
        summary["extra_predictions"] = len(set(predictions) - {row["id"] for row in rows})
    brief, highlights = summary["brief"], [{} for _ in rows]
    if any(windows for windows, _, _, _ in read):
        for name, (low, high) in LENGTH_RANGES.items():
            table = _retrieval_of_range(rows, read, low, high)
            if table is None:
                summary["skipped"][f"MR-{name}"] = f"no true window is longer than {low} s and at most {high} s"
                continue
            summary[name] = table
            brief[f"MR-{name}-mAP"] = table["MR-mAP"]["average"]
            if name == "full":
                brief |= {f"MR-full-R1@{t}": table["MR-R1"][t] for t in ("0.5", "0.7")}
                brief |= {f"MR-full-mAP@{t}": table["MR-mAP"][t] for t in ("0.5", "0.75")}
    if any(saliency for _, _, saliency, _ in read) and all("saliency_scores" in row for row in rows):
        highlights = [_highlights(row, saliency) for row, (_, _, saliency, _) in zip(rows, read, strict=True)]
        for name in SALIENCY_LEVELS:
            precision, hit = np.mean([values[name] for values in highlights], axis=0) * 100
            table = {"HL-mAP": round(float(precision), 2), "HL-Hit1": round(float(hit), 2)}
            summary[f"HL-min-{name}"] = table
            brief |= {f"HL-min-{name}-mAP": table["HL-mAP"], f"HL-min-{name}-Hit1": table["HL-Hit1"]}
    else:
        summary["skipped"]["HL"] = "no saliency scores in the predictions or in the annotations"
    per_row = []
    for row, (windows, scores, _, reason), levels in zip(rows, read, highlights, strict=True):
        precision = detection_average_precision(
            windows[:MAX_WINDOWS], scores[:MAX_WINDOWS], row["spans"], MAP_THRESHOLDS
        )
        result = {"iou": _first_iou(windows, row["spans"]), "score": float(precision.mean())}
        result |= {f"HL-{name}": values[0] for name, values in levels.items()}
        per_row.append({**identity(row), **result, "failed": reason is not None, "reason": reason})
    summary |= _reasons(per_row)
    if protocol == "clean":
        hits = [{**row, "R1@0.5": float(row["iou"] >= 0.5), "R1@0.7": float(row["iou"] >= 0.7)} for row in per_row]
        summary["intervals"] = {key: headline(hits, key) for key in ("score", "iou", "R1@0.5", "R1@0.7")}
    return summary, per_row


def score(
    rows: Sequence[Mapping[str, Any]],
    predictions: Sequence | Mapping[str, Any],
    protocol: str = "clean",
    benchmark: str = "charades_sta",
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Scores a moment-retrieval benchmark.

    Args:
        rows (`Sequence[Mapping]`):
            Rows of the benchmark.
        predictions (`Sequence` or `Mapping`):
            One per row, or by row id.
        protocol (`str`, *optional*, defaults to `"clean"`):
            `"clean"`, `"etbench"` or `"d2vlm"`.
        benchmark (`str`, *optional*, defaults to `"charades_sta"`):
            `"charades_sta"`, `"tacos"` or `"qvhighlights"`.

    Returns:
        `tuple[dict, list[dict]]`: as [`score_charades`] or [`score_qvhighlights`].

    Raises:
        ValueError: As [`score_charades`] or [`score_qvhighlights`].
    """
    if benchmark == "qvhighlights":
        return score_qvhighlights(rows, predictions, protocol)
    return score_charades(rows, predictions, protocol, benchmark)


__all__ = [
    "LENGTH_RANGES",
    "MAP_THRESHOLDS",
    "SALIENCY_LEVELS",
    "THRESHOLDS",
    "charades_recall",
    "score",
    "score_charades",
    "score_qvhighlights",
]
