# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""Measured numbers as cards tell them: from the `results.json` of an evaluation, and from the log of a training run."""

from collections.abc import Mapping, Sequence
from typing import Any

from .card_data import Result


BLIND_NAMES = {"swapped": "videos swapped", "black": "black frames", "constant": "one answer for all"}
# what a card lists of the shapes benchmark: path in the metrics -> task, named as in E.T. Bench, and metric
SHAPES_FIGURES = {
    "tasks/tvg/IoU": ("Temporal video grounding", "mIoU"),
    "tasks/tvg/R1@0.5": ("Temporal video grounding", "R1@0.5"),
    "tasks/tvg/R1@0.7": ("Temporal video grounding", "R1@0.7"),
    "tasks/tal/F1": ("Temporal action localization", "F1"),
    "tasks/dvc/event_F1": ("Dense video captioning", "event F1"),
    "tasks/dvc/caption_F1": ("Dense video captioning", "caption F1"),
    "tasks/gvq/accuracy": ("Grounded video question answering", "accuracy"),
    "tasks/gvq/evidence_IoU": ("Grounded video question answering", "evidence IoU"),
    "tasks/rar/accuracy": ("Referred action recognition", "accuracy"),
    "absent": ("Events that do not occur", "answered without evidence"),
}
# what a card lists of a training run: name in its log -> metric
LOGGED_FIGURES = {
    "eval_grounding/miou": "mIoU, true answer given",
    "eval_generated/miou": "mIoU, answer generated",
    "eval_generated/f1": "F1, answer generated",
}


def summarise(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what an evaluation says about single rows.

    Args:
        evaluation (`Mapping`): The content of `results.json`.

    Returns:
        `dict`: The same without `rows`, small enough to be kept beside a card.

    Raises:
        ValueError: If it is no result of an evaluation.
    """
    if not isinstance(evaluation, Mapping) or "metrics" not in evaluation.get("model", ()):
        raise ValueError("these are no results of an evaluation: there is no model/metrics. Give its results.json.")
    return {
        name: {key: value for key, value in part.items() if key != "rows"} if isinstance(part, Mapping) else part
        for name, part in evaluation.items()
    }


def results_of_evaluation(
    evaluation: Mapping[str, Any],
    dataset: str,
    *,
    dataset_name: str | None = None,
    split: str | None = None,
    dataset_revision: str | None = None,
    figures: Mapping[str, Sequence[str]] | None = None,
) -> list[Result]:
    """Read the results of a card from those of an evaluation.

    Args:
        evaluation (`Mapping`): The content of `results.json`, whole or from [`summarise`].
        dataset (`str`): Hub id of what it was measured on, or its name if it is not on the Hub.
        dataset_name (`str`, *optional*): Name for people.
        split (`str`, *optional*): Split that was measured.
        dataset_revision (`str`, *optional*): Commit of the data set.
        figures (`Mapping[str, Sequence[str]]`, *optional*): Path of each figure in the metrics, such as
            "tasks/tvg/IoU", and the task and metric that the card names it by. By default those of the shapes
            benchmark that the evaluation has.

    Returns:
        `list[Result]`: Fractions in per cent, with the interval and the blind controls that the evaluation has.

    Raises:
        ValueError: If it is no result of an evaluation, or lacks a figure that was named.
    """
    parts = summarise(evaluation)
    metrics = {name: part["metrics"] for name, part in parts.items() if isinstance(part, Mapping) and "metrics" in part}
    model = metrics.pop("model")
    chosen = SHAPES_FIGURES if figures is None else figures
    found = {path: _figure(model, path) for path in chosen}
    if missing := [path for path, figure in found.items() if figure is None and figures is not None]:
        raise ValueError(f"the evaluation has no figure {missing[0]!r}. Name paths of its metrics: {_paths(model)}.")

    def shown(value: float) -> float:  # counts stay counts
        return 100.0 * value if model.get("unit") == "fraction" and isinstance(value, float) else value

    results = []
    for path, figure in found.items():
        if figure is None:
            continue
        blind = {name: _figure(other, path) for name, other in metrics.items()}
        results.append(
            Result(
                *chosen[path],
                value=shown(figure["value"]),
                dataset=dataset,
                dataset_name=dataset_name,
                split=split,
                dataset_revision=dataset_revision,
                interval=(shown(figure["low"]), shown(figure["high"])) if "low" in figure else None,
                blind={BLIND_NAMES.get(name, name): shown(value["value"]) for name, value in blind.items() if value},
                protocol=model.get("protocol") or parts["settings"].get("protocol"),
                settings=describe_settings(parts["settings"]),
            )
        )
    return results


def results_of_log(log_history: Sequence[Mapping[str, Any]], dataset: str) -> list[Result]:
    """Read the last figures that a training run has measured on its evaluation rows.

    Args:
        log_history (`Sequence[Mapping]`): `trainer.state.log_history`.
        dataset (`str`): Hub id of the evaluation rows, or what to call them.

    Returns:
        `list[Result]`: Those that were measured, in per cent.
    """
    last = {name: log[name] for log in log_history for name in LOGGED_FIGURES if name in log}
    return [
        Result("Grounding", metric, 100.0 * last[name], dataset, settings="last evaluation of the run")
        for name, metric in LOGGED_FIGURES.items()
        if name in last
    ]


def describe_settings(settings: Mapping[str, Any]) -> str | None:
    """Say what decided the predictions.

    Args:
        settings (`Mapping`): `settings` of an evaluation.

    Returns:
        `str`: Such as "greedy, 2 fps", or None if nothing is known.
    """
    if "generate_kwargs" not in settings:
        return None
    decoding = settings["generate_kwargs"] or {}
    told = ["greedy" if not decoding.get("do_sample") else f"sampled at temperature {decoding.get('temperature', 1.0)}"]
    if settings.get("fps"):
        told.append(f"{settings['fps']:g} fps")
    if settings.get("prompt") not in (None, "default"):
        told.append(f"prompt {settings['prompt']}")
    return ", ".join(told)


def _figure(metrics: Mapping[str, Any], path: str) -> dict[str, float] | None:
    """Find a figure: a number, or one with its interval."""
    found: Any = metrics
    for name in path.split("/"):
        found = found.get(name) if isinstance(found, Mapping) else None
    if isinstance(found, int | float):
        return {"value": found}
    return found if isinstance(found, Mapping) and "value" in found else None


def _paths(metrics: Mapping[str, Any], before: str = "") -> str:
    """Name the figures there are."""
    paths = []
    for name, value in metrics.items():
        if _figure(metrics, name):
            paths.append(f"{before}{name}")
        elif isinstance(value, Mapping):
            paths.append(_paths(value, f"{before}{name}/"))
    return ", ".join(filter(None, paths))


__all__ = [
    "BLIND_NAMES",
    "LOGGED_FIGURES",
    "SHAPES_FIGURES",
    "describe_settings",
    "results_of_evaluation",
    "results_of_log",
    "summarise",
]
