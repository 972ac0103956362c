# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""E.T. Bench: 12 tasks in four groups, under the published protocols and under `clean`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from .clean_protocol import (
    align_predictions,
    event_captions,
    evidence_calibration,
    headline,
    identity,
    mean_of,
    score_row,
)
from .dense_metrics import matched_caption_scores, prepare_captions, score_video
from .etbench_tasks import PUBLISHED_TASKS, Sample, Scored, Tools, option_counts
from .metrics import ETBENCH_THRESHOLDS, Events, detection_scores, harmonic_mean
from .parsing import (
    RULES,
    Parsed,
    Rules,
    parse_structured,
    parse_text,
    prediction_text,
)
from .text_metrics import CAPTION_METRICS, CaptionScorer, SentenceSimilarity


GROUPS = {
    "referring": ("rar", "eca", "rvq"),
    "grounding": ("tvg", "epm", "tal", "evs", "vhd"),
    "captioning": ("dvc", "slc"),
    "complex": ("tem", "gvq"),
}
TASKS = tuple(task for tasks in GROUPS.values() for task in tasks)
HEADLINES = {
    **dict.fromkeys(GROUPS["referring"], "Acc"),
    **dict.fromkeys(GROUPS["grounding"] + GROUPS["captioning"], "F1"),
    **dict.fromkeys(GROUPS["complex"], "mRec"),
}


def _dense(samples: list[Sample], tools: Tools) -> Scored:
    """dvc and slc: keyed by video (a later row overwrites), failed rows dropped, detection scaled by their share."""
    scored: dict[str, int] = {row["video"]: n for n, (row, parsed) in enumerate(samples) if not parsed.reason}
    truth = {n: Events(samples[n].row["spans"], samples[n].row["captions"]) for n in scored.values()}
    guess = {n: Events(samples[n].parsed.windows, samples[n].parsed.captions) for n in scored.values()}
    prepare_captions(tools.scorer, [*truth.values(), *guess.values()])
    results = {n: score_video(guess[n], [truth[n]], ETBENCH_THRESHOLDS, tools.scorer) for n in scored.values()}
    rows: list[dict[str, Any]] = [{"score": 0.0 if parsed.reason else None} for _, parsed in samples]
    for n, result in results.items():
        rows[n] = {"score": float(harmonic_mean(result.precision, result.recall).mean()), **result.captions}
    scale, none = len(scored) / len(samples), np.zeros((1, len(ETBENCH_THRESHOLDS)))
    rates = {"": [(result.precision, result.recall) for result in results.values()]}
    if tools.rules.evidence:
        evidence = [detection_scores(samples[n].parsed.evidence, [truth[n].spans], ETBENCH_THRESHOLDS) for n in results]
        rates["_evi"] = evidence
    metrics: dict[str, float] = {}
    for suffix, pairs in rates.items():
        precision = np.mean([pair[0] for pair in pairs] or none, axis=0) * scale
        recall = np.mean([pair[1] for pair in pairs] or none, axis=0) * scale
        f1 = harmonic_mean(precision, recall)
        metrics |= {f"F1{suffix}@{t}": float(rate) for t, rate in zip(ETBENCH_THRESHOLDS, f1, strict=True)}
        metrics[f"F1{suffix}"] = float(f1.mean())
    for name in tools.scorer.metrics if tools.scorer else ():
        metrics[name] = float(np.mean([result.captions[name] for result in results.values()] or [0.0]))
    return metrics, rows


def _read(rows: Sequence[Mapping[str, Any]], texts: Sequence[str | None], protocol: str) -> list[Sample]:
    """Reads the predictions of one task and source."""
    task, samples = rows[0]["task"], []
    for row, text, count in zip(rows, texts, option_counts(task, rows), strict=True):
        if text is None:
            parsed = Parsed(reason="no prediction")
        elif count is None:
            parsed = Parsed(reason=f"crash of the published script: {len(row['options'])} options")
        else:
            parsed = parse_text(task, text, protocol, count)
        samples.append(Sample(row, parsed))
    return samples


def _published_group(samples: list[Sample], tools: Tools) -> Scored:
    """Metrics of one task and source, with Total and Failed, rounded as published."""
    metrics, rows = PUBLISHED_TASKS.get(samples[0].row["task"], _dense)(samples, tools)
    for (_, parsed), row in zip(samples, rows, strict=True):
        row["reason"] = row.get("reason") or parsed.reason
    failed = sum(row["reason"] is not None for row in rows)
    rounded = {name: value if "within" in name else round(value, 5) for name, value in metrics.items()}
    return {"Total": len(samples), "Failed": failed, **rounded}, rows


def _clean_group(samples: list[Sample], predictions: Sequence, tools: Tools) -> Scored:
    """Metrics of one task and source under `clean`."""
    task, rows = samples[0].row["task"], []
    for row, parsed in samples:
        rows.append(score_row(task, row, parsed))
    metrics: dict[str, float] = {}
    if task in GROUPS["captioning"]:
        truth = [Events(row["spans"], row["captions"]) for row, _ in samples]
        guess = [event_captions(p, parsed) for p, (_, parsed) in zip(predictions, samples, strict=True)]
        prepare_captions(tools.scorer, [*truth, *guess])
        if tools.scorer:
            scores = matched_caption_scores(guess, truth, ETBENCH_THRESHOLDS, tools.scorer)
            for n, result in enumerate(rows):
                result |= {name: float(values[n]) for name, values in scores.items()}
    for key in dict.fromkeys(key for result in rows for key in result):
        metrics[key] = mean_of(rows, key)
    metrics = {HEADLINES[task] if key == "score" else key: value for key, value in metrics.items() if value is not None}
    if "iou" in metrics:
        metrics["mIoU"] = metrics.pop("iou")
        iou = np.array([result["iou"] for result in rows])
        metrics |= {f"R1@{t}": float((iou >= t).mean()) for t in ETBENCH_THRESHOLDS}
    failed = sum(parsed.reason is not None for _, parsed in samples)
    for (_, parsed), result in zip(samples, rows, strict=True):
        result["reason"] = parsed.reason
    return {"Total": len(samples), "Failed": failed, **metrics}, rows


def _summarise(groups: Mapping[str, Mapping[str, dict[str, float]]]) -> dict[str, Any]:
    """Means over the sources of each task, and over the tasks of each group."""
    tasks: dict[str, Any] = {}
    for task, sources in groups.items():
        names = dict.fromkeys(name for metrics in sources.values() for name in metrics)
        mean = {
            name: round(float(np.mean([metrics[name] for metrics in sources.values() if name in metrics])), 5)
            for name in names
            if name not in ("Total", "Failed")
        }
        counts = {name: sum(metrics[name] for metrics in sources.values()) for name in ("Total", "Failed")}
        tasks[task] = {"sources": dict(sources), "mean": {**counts, **mean}}
    overall: dict[str, float] = {}
    for task in (task for task in TASKS if task in tasks):
        mean = tasks[task]["mean"]
        if task in GROUPS["captioning"]:
            overall |= {f"{task.upper()}-{short}": mean[name] for short, name in _CAPTION_PARTS if name in mean}
        else:
            overall[task.upper()] = mean[HEADLINES[task]]
    merged: dict[str, float] = {}
    for group, members in GROUPS.items():
        for short in ("F1", "Sim") if group == "captioning" else ("",):
            keys = [f"{task.upper()}-{short}" if short else task.upper() for task in members]
            values = [overall[key] for key in keys if key in overall]
            if values:
                merged[f"{group}-{short}" if short else group] = round(float(np.mean(values)), 5)
    missing = [task for task in TASKS if task not in tasks]
    return {"tasks": tasks, "overall": overall, "merged": merged, **({"missing_tasks": missing} if missing else {})}


_CAPTION_PARTS = (("F1", "F1"), ("Sim", "SentSim"))


def _tools(protocol: str, tasks: set[str], captions: bool, similarity: bool, scorer: CaptionScorer | None) -> Tools:
    rules = RULES.get(protocol, Rules())
    wanted = captions and bool(tasks & set(GROUPS["captioning"]))
    choices = protocol != "clean" and bool(tasks & {*GROUPS["referring"], "gvq"})
    shared = scorer.similarity if scorer and scorer.similarity else None
    embedder = (shared or SentenceSimilarity()) if similarity and choices else None
    if wanted and scorer is None:
        names = CAPTION_METRICS if similarity else CAPTION_METRICS[:-1]
        scorer = CaptionScorer(names, embedder)
    return Tools(rules, scorer if wanted else None, embedder, [])


def score(
    rows: Sequence[Mapping[str, Any]],
    predictions: Sequence | Mapping[str, Any],
    protocol: str = "clean",
    captions: bool = True,
    similarity: bool = True,
    scorer: CaptionScorer | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Scores predictions on E.T. Bench.

    Args:
        rows (`Sequence[Mapping]`):
            Rows of [`~d2vlm_hf.evaluation.benchmarks.load_annotations`], in the order of the annotation file (under
            `d2vlm` the order decides some figures).
        predictions (`Sequence` or `Mapping`):
            One per row, or by row id: the model's whole output as text, or the pipeline's dict. `clean` needs dicts.
        protocol (`str`, *optional*, defaults to `"clean"`):
            `"clean"`, `"etbench"`, `"d2vlm"`, or a variant in [`~d2vlm_hf.evaluation.parsing.RULES`].
        captions (`bool`, *optional*, defaults to `True`):
            Whether captions of dvc and slc are scored.
        similarity (`bool`, *optional*, defaults to `True`):
            Whether sentence similarity is computed, for captions and for answers without a letter.
        scorer (`CaptionScorer`, *optional*):
            Scorer to reuse; starting one takes seconds.

    Returns:
        `tuple[dict, list[dict]]`: the summary and one result per row. The summary has `tasks` (metrics of each source
        and their mean), `overall` (the headline of each task), `merged` (means of the four groups), `failed`,
        `reasons` (why, counted), `skipped` (what could not be computed, and why) and, under `clean`, `intervals` and
        the `calibration` of evidence scores. Metrics are fractions; the published protocols round to 5 places.

    Raises:
        ValueError: If the protocol or a task is unknown, there are no rows, or predictions do not fit the rows.
    """
    if protocol != "clean" and protocol not in RULES:
        raise ValueError(f"protocol is {protocol!r}, which is not defined; use one of {['clean', *RULES]}.")
    unknown = sorted({str(row["task"]) for row in rows} - set(TASKS))
    if unknown or not rows:
        raise ValueError(
            f"rows has {len(rows)} rows, of the unknown tasks {unknown}; pass rows whose task is one of {list(TASKS)}."
        )
    aligned = align_predictions(rows, predictions)
    tools = _tools(protocol, {row["task"] for row in rows}, captions, similarity, scorer)
    grouped: dict[str, dict[str, list[int]]] = {}
    for n, row in enumerate(rows):
        grouped.setdefault(row["task"], {}).setdefault(row["source"], []).append(n)
    results: list[dict[str, Any]] = [{} for _ in rows]
    parsed: list[Parsed] = [Parsed()] * len(rows)
    metrics: dict[str, dict[str, dict[str, float]]] = {}
    for task, sources in grouped.items():
        for source, members in sources.items():
            own, given = [rows[n] for n in members], [aligned[n] for n in members]
            if protocol == "clean":
                samples = [Sample(r, parse_structured(p, r.get("options"))) for r, p in zip(own, given, strict=True)]
                scored, per_row = _clean_group(samples, given, tools)
            else:
                samples = _read(own, [prediction_text(prediction) for prediction in given], protocol)
                scored, per_row = _published_group(samples, tools)
            metrics.setdefault(task, {})[source] = scored
            for n, sample, result in zip(members, samples, per_row, strict=True):
                parsed[n] = replace(sample.parsed)
                results[n] = {**identity(rows[n]), "failed": result["reason"] is not None, **result}
    return _finish(protocol, metrics, results, rows, parsed, tools, similarity, captions), results


def _finish(
    protocol: str,
    metrics: Mapping[str, Mapping[str, dict[str, float]]],
    results: list[dict[str, Any]],
    rows: Sequence[Mapping[str, Any]],
    parsed: Sequence[Parsed],
    tools: Tools,
    similarity: bool,
    captions: bool,
) -> dict[str, Any]:
    """Puts the summary together."""
    reasons = Counter(result["reason"] for result in results if result["reason"])
    skipped = dict(tools.scorer.skipped) if tools.scorer else {}
    if not captions:
        skipped["captions"] = "not asked for"
    if tools.unresolved:
        why = tools.similarity.reason if tools.similarity else "not asked for"
        skipped["option similarity"] = f"{why}; {len(tools.unresolved)} answers without a letter count as wrong"
    summary: dict[str, Any] = {
        "benchmark": "etbench",
        "protocol": protocol,
        "unit": "fraction",
        "total": len(results),
        "failed": sum(result["failed"] for result in results),
        "reasons": dict(reasons.most_common()),
        "skipped": skipped,
        **_summarise(metrics),
    }
    if protocol == "clean":
        summary["intervals"] = {
            group: headline([result for result in results if result["task"] in tasks], strata=("task", "source"))
            for group, tasks in GROUPS.items()
            if any(result["task"] in tasks for result in results)
        }
        spanned = [n for n, row in enumerate(rows) if row["task"] not in GROUPS["referring"]]
        summary["calibration"] = evidence_calibration([parsed[n] for n in spanned], [rows[n]["spans"] for n in spanned])
    return summary


__all__ = ["GROUPS", "HEADLINES", "TASKS", "score"]
