# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""What an evaluation tells: its headline figures, tables, the entries of a model card, and two systems compared."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from huggingface_hub.repocard_data import eval_results_to_model_index

from ..hub.card_data import Result
from ..hub.measured import BLIND_NAMES, describe_settings, results_of_evaluation
from .clean_protocol import headline
from .etbench import HEADLINES
from .statistics import paired_difference


# Name of a task for people; E.T. Bench's own names.
TASK_NAMES = {
    "rar": "Referred action recognition",
    "eca": "Event-caption alignment",
    "rvq": "Referred video question answering",
    "tvg": "Temporal video grounding",
    "epm": "Episodic memory",
    "tal": "Temporal action localization",
    "evs": "Extractive video summarization",
    "vhd": "Video highlight detection",
    "dvc": "Dense video captioning",
    "slc": "Step localization and captioning",
    "tem": "Temporal event matching",
    "gvq": "Grounded video question answering",
}
BENCHMARK_NAMES = {
    "shapes": "Shapes",
    "etbench": "E.T. Bench",
    "charades_sta": "Charades-STA",
    "qvhighlights": "QVHighlights",
    "tacos": "TACoS",
    "youcook2": "YouCook2",
    "activitynet_captions": "ActivityNet Captions",
    "mvbench": "MVBench",
    "video_mme": "Video-MME",
}
_TASK_OF_BENCHMARK = {
    **dict.fromkeys(("charades_sta", "qvhighlights", "tacos"), "tvg"),
    **dict.fromkeys(("youcook2", "activitynet_captions"), "dvc"),
    **dict.fromkeys(("mvbench", "video_mme"), "Multiple choice"),
}
# metric -> the figure of the rows whose mean it is, where that has another name
_ROW_KEYS = {"mIoU": "iou", "MR-full-mAP": "score", "MR-full-R1@0.5": "R1@0.5", "MR-full-R1@0.7": "R1@0.7"}
_FLAT = ("R1@0.1", "R1@0.3", "R1@0.5", "R1@0.7", "mIoU", "F1", "CIDEr", "METEOR", "SODA_c", "Acc", "mean")
_NO_FIGURES = {"id", "task", "source", "video", "difficulty", "attribute", "absent", "failed", "reason", "answered"}


class Headline(NamedTuple):
    """A headline figure in percent, with the ends of its 95 % interval where the figure is a mean of rows."""

    task: str
    metric: str
    value: float
    low: float | None = None
    high: float | None = None


def _percent(task: str, metric: str, figure: Any, interval: Mapping[str, Any] | None, unit: float) -> Headline:
    """A figure times `unit`; the interval is that of the same figure, or none."""
    if isinstance(figure, Mapping):
        figure, interval = figure["value"], figure
    if interval is None or abs(100 * interval["value"] - unit * figure) > 0.006:  # published figures are rounded
        return Headline(task, metric, unit * figure)
    return Headline(task, metric, unit * figure, 100 * interval["low"], 100 * interval["high"])


def _shapes(metrics: Mapping[str, Any]) -> list[Headline]:
    """The first figure of each task, which is its headline; events that do not occur; the mean of the tasks."""
    found = [(task, *next(iter(figures.items()))) for task, figures in metrics["tasks"].items() if figures]
    found += [("absent events", "no evidence", metrics["absent"]), ("all", "mean", metrics["mean"])]
    return [_percent(task, metric, figure, None, 100) for task, metric, figure in found if figure]


def _etbench(metrics: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[Headline]:
    """The figures of the tasks and of the four groups; under `clean` each with its interval."""
    found = []
    for name, value in metrics["overall"].items():
        task, _, part = name.lower().partition("-")
        members = [row for row in rows if row["task"] == task]
        key = "SentSim" if part == "sim" else "score"
        interval = headline(members, key, ("source",)) if metrics["protocol"] == "clean" else None
        found.append(_percent(task, "Sim" if part == "sim" else HEADLINES[task], value, interval, 100))
    for name, value in metrics["merged"].items():
        group, _, part = name.partition("-")
        interval = None if part == "Sim" else (metrics.get("intervals") or {}).get(group)
        found.append(_percent(f"mean of {group}", part or "score", value, interval, 100))
    return found


def headlines(result: Mapping[str, Any]) -> list[Headline]:
    """The figures by which a benchmark is known.

    Args:
        result (`Mapping`):
            What [`~d2vlm_hf.evaluation.run.evaluate`] returns.

    Returns:
        `list[Headline]`: in percent. Figures of the `clean` protocol have 95 % intervals; those of the published
        protocols are not always means of rows, and have one only where they are.
    """
    metrics, benchmark = result["metrics"], result["benchmark"]
    if benchmark == "shapes":
        return _shapes(metrics)
    if benchmark == "etbench":
        return _etbench(metrics, result["rows"])
    unit = 1 if metrics["unit"] == "percent" else 100
    flat = metrics["brief"] if benchmark == "qvhighlights" else {k: metrics[k] for k in _FLAT if k in metrics}
    task, intervals = _TASK_OF_BENCHMARK[benchmark], metrics.get("intervals") or {}
    return [
        _percent(task, metric, value, intervals.get(_ROW_KEYS.get(metric, metric)), unit)
        for metric, value in flat.items()
        if value is not None
    ]


# ---- tables ----------------------------------------------------------------------------------------------------------


def parts_of(results: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The model's result and those of the blind controls, by name."""
    return {name: part for name, part in results.items() if isinstance(part, Mapping) and "metrics" in part}


def _flat(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Numbers of a nested summary by path; an interval's value stands for it."""
    flat: dict[str, float] = {}
    for key, value in metrics.items():
        if isinstance(value, Mapping) and "value" in value and isinstance(value["value"], int | float):
            flat[f"{prefix}{key}"] = float(value["value"])
        elif isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}/")
        elif isinstance(value, int | float | np.number) and not isinstance(value, bool):
            flat[f"{prefix}{key}"] = float(value)
    return flat


def table(results: Mapping[str, Any]) -> str:
    """A Markdown table: one line a metric, one column for the model and for each blind control."""
    columns = {name: _flat(part["metrics"]) for name, part in parts_of(results).items()}
    names = list(dict.fromkeys(key for flat in columns.values() for key in flat))
    lines = ["| metric | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name in names:
        cells = [f"{flat[name]:.3f}" if name in flat else "" for flat in columns.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


# ---- cards -----------------------------------------------------------------------------------------------------------


def _dataset_of(settings: Mapping[str, Any]) -> tuple[str, str | None]:
    """Name and split of what was evaluated on."""
    name = BENCHMARK_NAMES[settings["benchmark"]]
    if made := settings.get("shapes"):
        return f"{name} ({made.get('difficulty', 'middle')})", made.get("split", "train")
    own = settings.get("dataset") if settings["benchmark"] == "shapes" else None  # else it is the benchmark's own file
    return own or name, settings.get("dataset_split")


def card_results(results: Mapping[str, Any]) -> list[Result]:
    """The figures of an evaluation as entries of a model card: those that our cards list, or the headlines.

    Args:
        results (`Mapping`):
            What [`~d2vlm_hf.evaluation.run.run_evaluation`] returns and writes to `results.json`.

    Returns:
        `list[Result]`: one per figure, in percent, with its interval and the blind controls' values, for
        `ModelCardInfo(results=...)`.
    """
    settings, parts = results["settings"], parts_of(results)
    dataset, split = _dataset_of(settings)
    known = {"dataset": dataset, "split": split}
    if "/" in dataset:
        known["dataset_name"] = BENCHMARK_NAMES[settings["benchmark"]]
    if settings["benchmark"] == "shapes":
        return results_of_evaluation(results, **known)
    found = {name: {figure[:2]: figure.value for figure in headlines(part)} for name, part in parts.items()}
    return [
        Result(
            task=TASK_NAMES.get(figure.task, figure.task[:1].upper() + figure.task[1:]),
            metric=figure.metric,
            value=figure.value,
            interval=None if figure.low is None else (figure.low, figure.high),
            blind={BLIND_NAMES.get(n, n): v[figure[:2]] for n, v in found.items() if n != "model" and figure[:2] in v},
            protocol=settings["protocol"],
            settings=describe_settings(settings),
            **known,
        )
        for figure in headlines(parts["model"])
    ]


def card_metadata(results: Mapping[str, Any]) -> dict[str, Any]:
    """The `model-index` of a model card's metadata.

    Args:
        results (`Mapping`):
            As in [`card_results`].

    Returns:
        `dict`: `{"model-index": [...]}`, as `huggingface_hub.metadata_update` takes it.
    """
    name = results["settings"].get("model") or Path(results["settings"]["predictions"][0]).stem
    return {"model-index": eval_results_to_model_index(name, [r.to_eval_result() for r in card_results(results)])}


# ---- comparison ------------------------------------------------------------------------------------------------------


def _scored_rows(path: str | os.PathLike, key: str) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """An evaluation's result, and its rows that have a figure, by id."""
    try:
        model = json.loads(Path(path).read_text(encoding="utf-8"))["model"]
        return model, {str(row["id"]): row for row in model["rows"] if row.get(key) is not None}
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} holds no results of an evaluation ({error!r}). Give the results.json that `d2vlm evaluate` wrote."
        ) from error


def _comparison(name: str, metric: str, pairs: Sequence[tuple[Mapping, Mapping]], by_task: bool, seed: int) -> str:
    """One line of the table, of rows that both have the figure."""
    tasks = np.array([str(first.get("task")) if by_task else "" for first, _ in pairs])
    videos = [first.get("video", first["id"]) for first, _ in pairs]
    values = np.array([[float(row[metric]) for row in pair] for pair in pairs])  # (N, 2)
    means = np.mean([values[tasks == task].mean(axis=0) for task in np.unique(tasks)], axis=0)
    result = paired_difference(values[:, 1], values[:, 0], tasks.tolist(), videos, seed=seed)
    return (
        f"| {name} | {metric} | {len(pairs)} | {means[0]:.3f} | {means[1]:.3f} | {result.difference:+.3f} "
        f"| [{result.low:+.3f}, {result.high:+.3f}] | {result.p_value:.3f} "
        f"| {result.wins} | {result.losses} | {result.ties} |"
    )


def compare(first: str | os.PathLike, second: str | os.PathLike, key: str = "score", seed: int = 0) -> str:
    """A paired comparison of two results on the same rows, as a Markdown table.

    Args:
        first, second (`str`):
            `results.json` of two runs; the difference is the second minus the first.
        key (`str`, *optional*, defaults to `"score"`):
            The figure that every row has.
        seed (`int`, *optional*, defaults to 0):
            Seed of the bootstrap.

    Returns:
        `str`: a line for the mean of the tasks, then for every figure of each task: both means, their difference with
        its 95 % interval and two-sided p-value (questions on one video redrawn together), and the rows that the second
        won, lost and tied.

    Raises:
        ValueError: If a file holds no results, or the two have other rows, or another benchmark or protocol.
    """
    (ours, a), (theirs, b) = _scored_rows(first, key), _scored_rows(second, key)
    for name in ("benchmark", "protocol"):
        if ours.get(name) != theirs.get(name):
            raise ValueError(
                f"{first} has {name} {ours.get(name)!r} and {second} {theirs.get(name)!r}: figures compare under one "
                "only. Evaluate both alike."
            )
    if not a or set(a) != set(b):
        raise ValueError(
            f"{first} and {second} share {len(set(a) & set(b))} of {len(a)} and {len(b)} scored rows: a paired "
            "comparison needs the same rows. Evaluate both on the same data."
        )
    columns = ["task", "figure", "rows", "first", "second", "difference", "95 %", "p", "wins", "losses", "ties"]
    lines = [f"first: {first}", f"second: {second}", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    pairs = [(row, b[row_id]) for row_id, row in a.items()]
    lines.append(_comparison("mean of tasks", key, pairs, by_task=True, seed=seed))
    for task in sorted({str(row.get("task")) for row in a.values()}):
        members = [pair for pair in pairs if str(pair[0].get("task")) == task]
        for figure in _figures_of(members, key):
            both = [pair for pair in members if all(_is_number(row.get(figure)) for row in pair)]
            lines.append(_comparison(task, figure, both, by_task=False, seed=seed))
    return "\n".join(lines)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _figures_of(pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]], key: str) -> list[str]:
    """Names of the figures that some row has in both results, the main one first."""
    names = dict.fromkeys([key, *(name for row, _ in pairs for name in row if name not in _NO_FIGURES)])
    return [name for name in names if any(_is_number(a.get(name)) and _is_number(b.get(name)) for a, b in pairs)]


__all__ = [
    "BENCHMARK_NAMES",
    "TASK_NAMES",
    "Headline",
    "card_metadata",
    "card_results",
    "compare",
    "headlines",
    "parts_of",
    "table",
]
