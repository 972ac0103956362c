# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""The figures of an evaluation: R1 over the IoU threshold, bars with intervals, IoU histogram, example timelines."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data.schema import EVIDENCE_TOKEN
from ..figures import METADATA, PALETTE, timeline
from ..model.video_processing_d2vlm import sample_video
from .statistics import bootstrap_interval


if TYPE_CHECKING:
    from matplotlib.axes import Axes

logger = logging.getLogger(__name__)

INK, FAINT, GRID = "#1a1a1a", "#6b6b6b", "#e6e6e6"
CONTROLS = ("#6b6b6b", "#b0b0b0")  # blind controls stay in the background
DPI, SMALL = 120, 8.5
THRESHOLDS = np.round(np.arange(0.05, 1.001, 0.05), 2)
MARKED = (0.3, 0.5, 0.7)  # thresholds whose recall is written out
RESAMPLES = 500  # a band needs no third digit
BAR, BAR_GAP = 0.2, 0.16  # inches
STRIP_FRAMES, STRIP_HEIGHT = 16, 120


@contextmanager
def _axes(path: Path, width: float, height: float) -> Iterator["Axes"]:
    """Plain axes, written to a file at the end; the same file for the same figures, whatever the reader's style."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        figure = Figure((width, height), dpi=DPI, facecolor="white", layout="constrained")
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#bbbbbb")
        axes.tick_params(length=3, color="#bbbbbb", labelsize=SMALL, labelcolor=INK)
        axes.set_axisbelow(True)
        yield axes
        figure.savefig(path, metadata=METADATA[path.suffix])


def _labels(axes: "Axes", x: str, y: str, title: str) -> None:
    axes.set_xlabel(x, fontsize=SMALL + 1, color=INK)
    axes.set_ylabel(y, fontsize=SMALL + 1, color=INK)
    axes.set_title(title, fontsize=SMALL + 2, color=INK, loc="left")


def ious_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[np.ndarray, list[str]]]:
    """IoU of the first span, and the video, of each row of the tasks that ask for one span.

    Args:
        rows (`Sequence[Mapping]`):
            Results of rows.

    Returns:
        `dict[str, tuple]`: task -> IoU `(N,)` and N videos.
    """
    found: dict[str, tuple[list[float], list[str]]] = {}
    for row in rows:
        value = row.get("IoU", row.get("iou"))
        if value is not None:
            values, videos = found.setdefault(str(row["task"]), ([], []))
            values.append(float(value))
            videos.append(str(row["video"]))
    return {task: (np.array(values), videos) for task, (values, videos) in found.items()}


def _series(parts: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str, str, np.ndarray, list[str]]]:
    """Lines to draw: name, colour, dashes, IoU, videos. One task with its controls, or the model's tasks together."""
    found = {name: ious_of(part["rows"]) for name, part in parts.items()}
    tasks = list(found.get("model", ()))
    if len(tasks) == 1:
        styles = {"model": (PALETTE[0], "-")}
        controls = [name for name in parts if name != "model"]
        styles |= {name: (CONTROLS[n % 2], ("--", ":")[n % 2]) for n, name in enumerate(controls)}
        named = {name: name if name == "model" else f"{name} videos" for name in parts}
        return [(named[name], *styles[name], *found[name][tasks[0]]) for name in parts if tasks[0] in found[name]]
    colours = {task: PALETTE[n % len(PALETTE)] for n, task in enumerate(tasks)}
    return [(task, colours[task], "-", *found["model"][task]) for task in tasks]


def draw_recall(parts: Mapping[str, Mapping[str, Any]], path: Path) -> bool:
    """R1 over the IoU threshold: the share of rows whose first span reaches it, with a 95 % band.

    Args:
        parts (`Mapping`):
            The model's result and those of the blind controls.
        path (`Path`):
            The picture.

    Returns:
        `bool`: whether there was anything to draw.
    """
    series = _series(parts)
    if not series:
        return False
    with _axes(path, 6.0, 3.8) as axes:
        for n, (name, colour, dashes, ious, videos) in enumerate(series):
            intervals = [
                bootstrap_interval((ious >= t).astype(float), clusters=videos, resamples=RESAMPLES) for t in THRESHOLDS
            ]
            value, low, high = 100 * np.array(intervals).T
            if dashes == "-":
                axes.fill_between(THRESHOLDS, low, high, color=colour, alpha=0.15, linewidth=0)
            axes.plot(THRESHOLDS, value, dashes, color=colour, linewidth=1.8, label=f"{name} (n = {len(ious)})")
            for t in MARKED if n == 0 else ():
                height = float(value[np.argmin(np.abs(THRESHOLDS - t))])
                axes.plot([t], [height], "o", color=colour, markersize=4.5)
                axes.annotate(
                    f"{height:.1f}", (t, height), (5, 5), textcoords="offset points", fontsize=SMALL, color=INK
                )
        axes.set(xlim=(0, 1.0), ylim=(0, 105), xticks=np.arange(0, 1.01, 0.1), yticks=range(0, 101, 20))
        axes.grid(color=GRID, linewidth=0.8)
        axes.legend(frameon=False, fontsize=SMALL, loc="upper right")
        _labels(axes, "IoU threshold", "R1 (%)", "Rows whose first span reaches the threshold")
    return True


def draw_histogram(parts: Mapping[str, Mapping[str, Any]], path: Path) -> bool:
    """How the IoU of the first span is spread; no overlap at all has a bar of its own.

    Args:
        parts (`Mapping`):
            The model's result and those of the blind controls.
        path (`Path`):
            The picture.

    Returns:
        `bool`: whether there was anything to draw.
    """
    series = _series(parts)
    if not series:
        return False
    edges = np.concatenate([[0.0], THRESHOLDS])
    with _axes(path, 6.0, 3.4) as axes:
        for name, colour, dashes, ious, _ in series:
            place = np.where(ious <= 0, 0, np.minimum(np.searchsorted(edges, ious, side="right"), len(edges) - 1))
            share = 100 * np.bincount(place, minlength=len(edges)) / len(ious)  # (21,): none, then 20 bins
            label = f"{name} (mean {ious.mean():.2f}, n = {len(ious)})"
            bins = np.concatenate([[-0.1, -0.05], edges])
            heights = np.concatenate([share[:1], [np.nan], share[1:]])
            if name == series[0][0]:
                axes.stairs(heights, bins, fill=True, color=colour, alpha=0.75, label=label)
            else:
                axes.stairs(heights, bins, color=colour, linestyle=dashes, linewidth=1.5, label=label)
        axes.set_xticks([-0.075, *np.arange(0, 1.01, 0.1)], ["none", *(f"{t:.1f}" for t in np.arange(0, 1.01, 0.1))])
        axes.set(xlim=(-0.115, 1.01), ylim=(0, None))
        axes.grid(axis="y", color=GRID, linewidth=0.8)
        axes.legend(frameon=False, fontsize=SMALL, loc="best")
        _labels(axes, "IoU of the first span with the best true one", "rows (%)", "How close the first span comes")
    return True


def draw_headlines(figures: Mapping[str, Sequence[Sequence]], path: Path) -> bool:
    """Bars of the headline figures with their intervals, the blind controls below each.

    Args:
        figures (`Mapping[str, Sequence]`):
            `"model"` and each control -> `(task, metric, value, low, high)` in percent.
        path (`Path`):
            The picture.

    Returns:
        `bool`: whether there was anything to draw.
    """
    model, names = list(figures.get("model", ())), list(figures)
    if not model:
        return False
    step = BAR_GAP + BAR * len(names)
    highest = max(100.0, *(bar[4] or bar[2] for bars in figures.values() for bar in bars))
    with _axes(path, 7.0, 0.9 + step * len(model)) as axes:
        for n, name in enumerate(names):
            colour = PALETTE[0] if name == "model" else CONTROLS[(n - 1) % 2]
            own = {tuple(bar[:2]): bar for bar in figures[name]}
            for k, bar in ((k, own[tuple(bar[:2])]) for k, bar in enumerate(model) if tuple(bar[:2]) in own):
                _bar(axes, k * step + n * BAR, bar, colour, highest)
            axes.barh([0], [0], 0, color=colour, label=name if name == "model" else f"{name} videos")
        middles = [k * step + (len(names) - 1) * BAR / 2 for k in range(len(model))]
        axes.set_yticks(middles, [f"{task}  {metric}" for task, metric, *_ in model])
        axes.set(xlim=(0, 1.12 * highest), ylim=(len(model) * step - BAR, -BAR))
        axes.set_xticks(np.arange(0, highest + 1, 20 if highest <= 120 else 50))
        axes.grid(axis="x", color=GRID, linewidth=0.8)
        axes.tick_params(axis="y", length=0)
        if len(names) > 1:
            axes.figure.legend(frameon=False, fontsize=SMALL, loc="outside lower right", ncols=len(names))
        _labels(axes, "%", "", "Headline figures" + (", with 95 % intervals" if model[0][3] is not None else ""))
    return True


def _bar(axes: "Axes", y: float, bar: Sequence, colour: str, highest: float) -> None:
    """A bar, its interval, and its value behind both."""
    _, _, value, low, high = bar
    axes.barh([y], [value], 0.85 * BAR, color=colour)
    if low is not None:
        axes.plot([low, high], [y, y], color=INK, linewidth=1.1, solid_capstyle="butt")
        for end in (low, high):
            axes.plot([end, end], [y - 0.05, y + 0.05], color=INK, linewidth=1.1)
    at = max(value, high or 0.0) + 0.01 * highest
    axes.text(at, y, f"{value:.1f}", fontsize=SMALL - 1, color=INK, va="center_baseline")


# ---- examples --------------------------------------------------------------------------------------------------------


def choose_examples(
    results: Sequence[Mapping[str, Any]],
    rows: Sequence[Mapping[str, Any]],
    count: int,
    best: bool,
    taken: Sequence[int] = (),
) -> list[int]:
    """Places of the best or worst rows: of different tasks and videos as far as there are, richer ones first.

    Args:
        results (`Sequence[Mapping]`):
            Results of the rows, with a `score` each.
        rows (`Sequence[Mapping]`):
            The rows, in the same order.
        count (`int`):
            How many.
        best (`bool`):
            The best, or the worst.
        taken (`Sequence[int]`, *optional*):
            Places that are shown already.

    Returns:
        `list[int]`: at most `count` places, the same for the same results; rows without true spans are left out.
    """
    able = [n for n, row in enumerate(rows) if row["spans"] and n not in taken and results[n].get("score") is not None]
    able.sort(key=lambda n: (-results[n]["score"] if best else results[n]["score"], -min(len(rows[n]["spans"]), 3), n))
    chosen: list[int] = []
    for fresh in ({"task", "video"}, {"video"}, set()):
        for n in able:
            seen = any(results[n][name] == results[other][name] for other in chosen for name in fresh)
            if len(chosen) < count and n not in chosen and not seen:
                chosen.append(n)
    return chosen


def _drawable(prediction: Any, row: Mapping[str, Any]) -> dict[str, Any] | None:
    """A prediction as `figures.timeline` takes it; `None` if it is a text."""
    if not isinstance(prediction, Mapping) or prediction.get("evidence") is None:
        return None
    evidence = [
        {**item, "score": 1.0 if item.get("score") is None else item["score"]} for item in prediction["evidence"]
    ]
    references = [item for item in prediction.get("references") or [] if "char_start" in item and "evidence" in item]
    duration = float(prediction.get("duration") or row.get("duration") or 0.0)
    last = max([duration, *(span[1] for span in row["spans"]), *(item["end"] for item in evidence)])
    parts = {"answer": str(prediction.get("answer") or ""), "evidence": evidence, "references": references}
    kept = {key: prediction[key] for key in ("times", "curves") if prediction.get("curves")}
    return {**parts, **kept, "duration": duration or last}


def _frames(video: Any, duration: float) -> tuple[np.ndarray | None, Any]:
    """A few small frames and their times; none where the video cannot be read, as with another system's predictions."""

    def shrink(frames):
        step = max(1, frames.shape[-2] // STRIP_HEIGHT)
        return frames[..., ::step, ::step]

    try:
        strip = sample_video(video, fps=STRIP_FRAMES / duration, frame_transform=shrink)
    except ValueError as error:
        logger.info("no frames in the picture of %s: %s", video, error)
        return None, None
    return strip.frames.numpy(), strip.times


def _question(row: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """The question with its given moments as times, after task and score."""
    text = row["question"]
    for start, end in row.get("question_spans") or []:
        text = text.replace(EVIDENCE_TOKEN, f"{start:.1f}s - {end:.1f}s", 1)
    return f"[{row['task']}, score {result['score']:.2f}] {text}"


def draw_examples(
    results: Sequence[Mapping[str, Any]],
    rows: Sequence[Mapping[str, Any]],
    predictions: Mapping[str, Any],
    folder: Path,
    count: int = 3,
) -> list[Path]:
    """Timelines of the best and the worst answers.

    Args:
        results (`Sequence[Mapping]`):
            Results of the rows.
        rows (`Sequence[Mapping]`):
            The rows, in the same order.
        predictions (`Mapping`):
            Predictions by row id; only the pipeline's dicts can be drawn.
        folder (`Path`):
            Where to write `best-1.png`, ..., `worst-1.png`, ...
        count (`int`, *optional*, defaults to 3):
            How many of each.

    Returns:
        `list[Path]`: the pictures.
    """
    if not all("score" in result for result in results):
        return []
    paths: list[Path] = []
    shown: list[int] = []
    for name in ("best", "worst"):
        places = choose_examples(results, rows, count, best=name == "best", taken=shown)
        shown += places
        for number, place in enumerate(places, 1):
            row = rows[place]
            drawable = _drawable(predictions.get(str(row["id"])), row)
            if drawable is None:
                continue
            frames, times = _frames(row["video"], drawable["duration"])
            paths.append(folder / f"{name}-{number}.png")
            question = _question(row, results[place])
            timeline(drawable, frames, times, question=question, truth=row["spans"], path=paths[-1])
    return paths


def draw_figures(
    folder: Path,
    parts: Mapping[str, Mapping[str, Any]],
    headlines: Mapping[str, Sequence[Sequence]],
    rows: Sequence[Mapping[str, Any]],
    predictions: Mapping[str, Any],
    examples: int = 3,
) -> list[Path]:
    """Write every figure of an evaluation that it has the numbers for.

    Args:
        folder (`Path`):
            Where to write `recall.png`, `headlines.png`, `iou.png`, and the examples.
        parts (`Mapping`):
            The model's result and those of the blind controls.
        headlines (`Mapping`):
            As in [`draw_headlines`].
        rows (`Sequence[Mapping]`):
            The rows that the model was asked.
        predictions (`Mapping`):
            The model's predictions by row id.
        examples (`int`, *optional*, defaults to 3):
            How many of the best and of the worst answers.

    Returns:
        `list[Path]`: the pictures.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {
        "headlines.png": lambda path: draw_headlines(headlines, path),
        "recall.png": lambda path: draw_recall(parts, path),
        "iou.png": lambda path: draw_histogram(parts, path),
    }
    paths = [folder / name for name, draw in drawn.items() if draw(folder / name)]
    return paths + draw_examples(parts["model"]["rows"], rows, predictions, folder, examples)


__all__ = [
    "choose_examples",
    "draw_examples",
    "draw_figures",
    "draw_headlines",
    "draw_histogram",
    "draw_recall",
    "ious_of",
]
