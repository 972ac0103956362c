# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""How the published E.T. Bench scorers score each task but dense captioning, their oddities included.

Each function takes the samples of one task and source, in order, and gives their metrics (fractions, not rounded) and
one result per sample. What differs between the protocols is said where it differs; `parsing.Rules` names them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from .metrics import (
    ETBENCH_THRESHOLDS,
    all_annotators,
    grid_cells,
    harmonic_mean,
    published_iou,
    recall_rate,
)
from .parsing import LETTERS, Parsed, Rules
from .text_metrics import CaptionScorer, SentenceSimilarity


OPTION_COUNTS = (4, 5)
_LIMITS = np.array(ETBENCH_THRESHOLDS)


class Sample(NamedTuple):
    row: Mapping[str, Any]
    parsed: Parsed


class Tools(NamedTuple):
    """What scoring needs beside the rows."""

    rules: Rules
    scorer: CaptionScorer | None
    similarity: SentenceSimilarity | None
    unresolved: list[str]


Scored = tuple[dict[str, float], list[dict[str, Any]]]


def _mean_rates(iou: Sequence[float], name: str, mean: str, suffix: str = "") -> dict[str, float]:
    """Share of samples that reach each threshold, the mean of these shares, and the mean IoU (NaN if any is NaN)."""
    values = np.asarray(iou, np.float64)
    hits = (values[:, None] >= _LIMITS).mean(axis=0)
    rates = {f"{name}{suffix}@{t}": float(hit) for t, hit in zip(ETBENCH_THRESHOLDS, hits, strict=True)}
    return {f"mIoU{suffix}": float(values.mean()), **rates, f"{mean}{suffix}": float(hits.mean())}


def _retrieval(samples: list[Sample], tools: Tools, name: str, mean: str, single: bool) -> Scored:
    """tvg, epm and tem: the best (or the first) window against the best true one."""

    def iou(windows: Sequence, truth: Sequence) -> float:
        return float(published_iou(windows[:1] if single else windows, truth).max())

    rows, evidence = [], []
    for row, parsed in samples:
        value = 0.0 if parsed.reason else iou(parsed.windows, row["spans"])
        result: dict[str, Any] = {"iou": value, "score": recall_rate(value, ETBENCH_THRESHOLDS)}
        if tools.rules.evidence:
            evidence.append(0.0 if parsed.reason else iou(parsed.evidence or parsed.windows, row["spans"]))
            result["iou_evidence"] = evidence[-1]
        rows.append(result)
    metrics = _mean_rates([row["iou"] for row in rows], name, mean)
    if tools.rules.evidence:
        metrics |= _mean_rates(evidence, name, mean, "_evi")
    return metrics, rows


def _tvg(samples: list[Sample], tools: Tools) -> Scored:
    return _retrieval(samples, tools, "F1", "F1", single=not tools.rules.evidence)


def _tem(samples: list[Sample], tools: Tools) -> Scored:
    return _retrieval(samples, tools, "R", "mRec", single=True)


def _set_rates(windows: Sequence, truth: Sequence) -> np.ndarray:
    """F1 of sets of windows at each threshold: 0 where no pair reaches it."""
    iou = published_iou(windows, truth)
    precision = (iou.max(axis=1)[:, None] >= _LIMITS).mean(axis=0)
    recall = (iou.max(axis=0)[:, None] >= _LIMITS).mean(axis=0)
    return harmonic_mean(precision, recall) * (iou.max() >= _LIMITS)


def _tal(samples: list[Sample], tools: Tools) -> Scored:
    """tal. Evidence only counts where the answer reaches the threshold; where it then misses, the published sum of
    all earlier samples is set to 0 (`d2vlm`), so that its figure depends on the order of the samples."""
    rows, evidence = [], np.zeros(len(_LIMITS))
    for row, parsed in samples:
        if parsed.reason:
            rows.append({"f1": np.zeros(len(_LIMITS)), "score": 0.0})
            continue
        f1 = _set_rates(parsed.windows, row["spans"])
        rows.append({"f1": f1, "score": float(f1.mean())})
        own = _set_rates(parsed.evidence or parsed.windows, row["spans"])
        evidence = np.where(f1 > 0, np.where(own > 0, evidence + own, 0.0), evidence)
    totals = {"": np.sum([row.pop("f1") for row in rows], axis=0)}
    if tools.rules.evidence:
        totals["_evi"] = evidence
    metrics: dict[str, float] = {}
    for suffix, total in totals.items():
        rates = total / len(samples)
        metrics |= {f"F1{suffix}@{t}": float(rate) for t, rate in zip(ETBENCH_THRESHOLDS, rates, strict=True)}
        metrics[f"F1{suffix}"] = float(rates.mean())
    return metrics, rows


def _without_infinite(windows: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Drops windows that never end, as the published script does: the window after a dropped one is not looked at."""
    kept, dropped = [], False
    for window in windows:
        dropped = not dropped and math.isinf(window[1])
        if not dropped:
            kept.append(window)
    return kept


def _evs(samples: list[Sample], tools: Tools) -> Scored:
    """evs, on a grid of seconds; failed samples are left out of the mean. Under `d2vlm` the evidence is drawn into the
    same map as the answer, so that both figures are those of their union."""
    rows = []
    for row, parsed in samples:
        if parsed.reason:
            rows.append({"score": None})
            continue
        windows = _without_infinite(parsed.windows) if tools.rules.evidence else parsed.windows
        try:
            cells, truth = grid_cells([*windows, *parsed.evidence]), grid_cells(row["spans"])
        except OverflowError as error:
            rows.append({"score": None, "reason": f"crash of the published script: {error}"})
            continue
        shared = float((cells & truth).sum())
        rows.append({"score": float(harmonic_mean(shared / max(1, cells.sum()), shared / max(1, truth.sum())))})
    f1 = float(np.mean([row["score"] for row in rows if row["score"] is not None] or [0.0]))
    return {"F1": f1, **({"F1_evi": f1} if tools.rules.evidence else {})}, rows


def _vhd(samples: list[Sample], tools: Tools) -> Scored:
    """vhd: the middle of the first window lies in any annotator's window."""
    rows = []
    for row, parsed in samples:
        result = {"score": 0.0, "evidence": 0.0}
        if not parsed.reason:
            for key, windows in (("score", parsed.windows), ("evidence", parsed.evidence or parsed.windows)):
                middle = sum(windows[0]) / 2
                result[key] = float(any(start <= middle <= end for start, end in all_annotators(row)))
        rows.append(result)
    metrics = {"F1": float(np.mean([row["score"] for row in rows]))}
    if tools.rules.evidence:
        metrics["F1_evi"] = float(np.mean([row["evidence"] for row in rows]))
    return metrics, rows


def _similar_option(sample: Sample, tools: Tools) -> int | None:
    """The option whose text is most like the answer's; `None` where there is no model."""
    if tools.similarity is None or tools.similarity.reason:
        tools.unresolved.append(str(sample.row["id"]))
        return None
    texts = [f"({letter}) {option}" for letter, option in zip(LETTERS, sample.row["options"], strict=False)]
    return tools.similarity.best_option(sample.parsed.text, texts)


def _chosen(sample: Sample, tools: Tools, second_chance: bool) -> tuple[int | None, bool]:
    """The option that counts, and whether a letter named it. With a second chance only the right letter counts."""
    options, right = sample.parsed.options, sample.row["correct_option"]
    if second_chance:
        options = tuple(option for option in options if option == right)
    return (options[0], True) if options else (_similar_option(sample, tools), False)


def _matched_ratios(total: int, matched: int, right: int, names: Sequence[str]) -> dict[str, float]:
    return dict(zip(names, (matched, matched / total, right / (matched + 1e-7)), strict=True))


def _choice(samples: list[Sample], tools: Tools) -> Scored:
    """rar, eca and rvq. Answers without a letter count in Failed even where the similar option is right."""
    rows, matched, right = [], 0, 0
    for sample in samples:
        row, parsed = sample
        if parsed.reason:
            rows.append({"score": 0.0})
            continue
        option, named = _chosen(sample, tools, tools.rules.second_chance)
        hit = option == row["correct_option"]
        matched, right = matched + named, right + (named and hit)
        failed = not (named if tools.rules.evidence else parsed.lettered)
        rows.append({"score": float(hit), "option": option, "reason": "no letter in the answer" if failed else None})
    metrics = {"Acc": float(np.mean([row["score"] for row in rows]))}
    if tools.rules.evidence:
        names = ("Matched_count", "matched_ratio", "correct_ratio_within_matched")
        metrics |= _matched_ratios(len(samples), matched, right, names)
    return metrics, rows


def _gvq(samples: list[Sample], tools: Tools) -> Scored:
    """gvq: the window counts only where the option is right."""
    rows, matched, right = [], 0, 0
    for sample in samples:
        row, parsed = sample
        result: dict[str, Any] = {"iou": 0.0, "iou_evidence": 0.0, "accuracy": 0.0}
        rows.append(result)
        if parsed.reason:
            continue
        option, named = _chosen(sample, tools, second_chance=False)
        hit = option == row["correct_option"]
        if hit and parsed.window_reason:
            result["reason"] = parsed.window_reason
            if "crash" in parsed.window_reason:
                continue
        matched, right = matched + named, right + (named and hit)
        result["accuracy"] = float(hit)
        if hit and not parsed.window_reason:
            result["iou"] = float(published_iou(parsed.windows[:1], row["spans"]).max())
            result["iou_evidence"] = float(published_iou(parsed.evidence[:1] or [(0.0, 0.0)], row["spans"]).max())
    metrics = _mean_rates([row["iou"] for row in rows], "R", "mRec")
    metrics["Acc"] = float(np.mean([row["accuracy"] for row in rows]))
    if tools.rules.evidence:
        metrics |= _mean_rates([row["iou_evidence"] for row in rows], "R", "mRec", "_evi")
        names = ("Matched count", "Matched ratio", "correct ratio within matched")
        metrics |= _matched_ratios(len(samples), matched, right, names) | {"correct count within matched": right}
    for row in rows:
        row["score"] = recall_rate(row["iou"], ETBENCH_THRESHOLDS)
    return metrics, rows


def option_counts(task: str, rows: Sequence[Mapping[str, Any]]) -> list[int | None]:
    """Number of options that each row is read with, `None` where the published script stops."""
    counts = [len(row.get("options") or ()) for row in rows]
    if task not in ("rar", "eca", "rvq"):
        return [count if count in OPTION_COUNTS or task != "gvq" else None for count in counts]
    first = next((n for n, count in enumerate(counts) if count in OPTION_COUNTS), len(counts))
    return [None] * first + [counts[first]] * (len(counts) - first) if first < len(counts) else [None] * first


PUBLISHED_TASKS: dict[str, Callable[[list[Sample], Tools], Scored]] = {
    **dict.fromkeys(("rar", "eca", "rvq"), _choice),
    **dict.fromkeys(("tvg", "epm"), _tvg),
    **{"tal": _tal, "evs": _evs, "vhd": _vhd, "tem": _tem, "gvq": _gvq},
}


__all__ = ["OPTION_COUNTS", "PUBLISHED_TASKS", "Sample", "Scored", "Tools", "option_counts"]
