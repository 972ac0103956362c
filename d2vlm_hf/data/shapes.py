# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""The embedded world of moving shapes: videos with exact annotations, as many as wanted, the same for the same seed.

    rows = load_rows(generate(ShapesConfig(difficulty="middle", split="test", num_videos=100), "shapes-test"))

`shapes_world.py` decides what happens, `shapes_render.py` draws and encodes it, `shapes_tasks.py` asks about it in the
words of `shapes_language.py`; this file makes rows and files of all that, and the blind controls.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from ..model.spans_d2vlm import temporal_iou
from .schema import make_row
from .shapes_render import DEFAULT_SIZE, contact_sheet, object_states, render_frames, write_frames, write_video
from .shapes_tasks import ABSENT_SHARE, ASKERS, GROUNDING_TASKS, THINNED
from .shapes_world import DIFFICULTIES, FILE_FPS, HELD_OUT_PAIRS, SPLITS, Scene, make_scene, scene_rng


TASK_WEIGHTS = {"tvg": 0.3, "tal": 0.2, "dvc": 0.15, "gvq": 0.2, "rar": 0.15}
# kinds of a task with more weight than the others: not every scene has such a question
KIND_WEIGHTS = {"gvq/motion": 3.0, "gvq/order": 2.0, "gvq/count": 2.0, "rar/motion": 2.0, "rar/position": 1.5}
# asked at a row's first try or not at all: where other kinds fail depends on how often something happens, and a count
# that took their place would favour some answers
FIRST_TRY_KINDS = ("gvq/count",)
CHOICE_TASKS = ("gvq", "rar")
ROWS_FILE, CONFIG_FILE, VIDEO_FOLDER = "rows.jsonl", "config.json", "videos"
TRIES_PER_TASK, TRIES_PER_ROW = 8, 32
ROW_STREAM = 1  # random numbers of a scene's rows, apart from those of the scene
SPAN_GRID = 21  # places at which the best constant span may start and end


@dataclass(frozen=True)
class ShapesConfig:
    """What to generate.

    Args:
        difficulty (`str`, *optional*, defaults to `"middle"`):
            `"easy"`, `"middle"` or `"hard"`, see `DIFFICULTIES`.
        split (`str`, *optional*, defaults to `"train"`):
            `"train"`, `"validation"`, `"test"` or `"heldout"` (colour x shape pairs that no other split has).
        num_videos (`int`, *optional*, defaults to 100):
            Number of videos.
        rows_per_video (`int`, *optional*, defaults to 4):
            Rows asked about each; fewer where a video holds fewer different questions.
        task_weights (`Mapping[str, float]`, *optional*):
            Share of each task (`"tvg"`, `"gvq"`) or kind of a task (`"rar/position"`).
        seed (`int`, *optional*, defaults to 0):
            Seed of the whole data set.
        size (`int`, *optional*, defaults to 128):
            Height and width of the files in pixels, an even number.
        file_fps (`int`, *optional*, defaults to 8):
            Frames per second of the files, a multiple of 8, so that every event begins and ends on a frame.
        start_index (`int`, *optional*, defaults to 0):
            Index of the first video in its split.
        absent_share (`float`, *optional*, defaults to 0.1):
            Share of tvg and tal questions about an event that does not occur.
    """

    difficulty: str = "middle"
    split: str = "train"
    num_videos: int = 100
    rows_per_video: int = 4
    task_weights: Mapping[str, float] = field(default_factory=lambda: dict(TASK_WEIGHTS))
    seed: int = 0
    size: int = DEFAULT_SIZE
    file_fps: int = FILE_FPS
    start_index: int = 0
    absent_share: float = ABSENT_SHARE

    def __post_init__(self) -> None:
        scene_rng(self.difficulty, self.split, self.start_index, self.seed)  # raises for what it cannot take
        _kind_weights(self.task_weights)
        if self.num_videos < 1 or self.rows_per_video < 1:
            raise ValueError(
                f"num_videos={self.num_videos} and rows_per_video={self.rows_per_video} leave nothing to generate. "
                "Use 1 or more of each."
            )
        if not 0 <= self.absent_share <= 1:
            raise ValueError(
                f"absent_share={self.absent_share} is no share of the questions. Use a number between 0 and 1."
            )
        if self.file_fps < 1 or self.file_fps % FILE_FPS:
            raise ValueError(
                f"file_fps={self.file_fps} would put events between two frames: they lie on a grid of 1/{FILE_FPS} s. "
                f"Use a multiple of {FILE_FPS}."
            )

    def scene(self, index: int) -> Scene:
        """Return the scene of an index."""
        return replace(make_scene(self.difficulty, self.split, index, self.seed), file_fps=self.file_fps)

    @property
    def indices(self) -> range:
        """Indices of its scenes."""
        return range(self.start_index, self.start_index + self.num_videos)


def _kind_weights(weights: Mapping[str, float]) -> dict[str, float]:
    """Spread the weight of a task over its kinds of questions; the weights returned sum to 1."""
    kinds = dict.fromkeys(ASKERS, 0.0)
    for name, weight in weights.items():
        named = [kind for kind in ASKERS if name in (kind, kind.split("/")[0])]
        if not named or not weight >= 0:
            raise ValueError(
                f"task_weights has {name!r}: {weight!r}, which is no task with a weight of 0 or more. "
                f"Use some of {sorted({kind.split('/')[0] for kind in ASKERS} | set(ASKERS))}."
            )
        shares = [KIND_WEIGHTS.get(kind, 1.0) for kind in named]
        for kind, share in zip(named, shares, strict=True):
            kinds[kind] += weight * share / sum(shares)
    total = sum(kinds.values())
    if not 0 < total < float("inf"):
        raise ValueError(
            f"task_weights={dict(weights)} sum to {total}: no task can be drawn. Give one a weight above 0."
        )
    return {kind: weight / total for kind, weight in kinds.items()}


def make_rows(
    scene: Scene,
    count: int = 4,
    task_weights: Mapping[str, float] | None = None,
    video: str | None = None,
    absent_share: float = ABSENT_SHARE,
) -> list[dict[str, Any]]:
    """Ask questions about a scene.

    Args:
        scene (`Scene`):
            The scene.
        count (`int`, *optional*, defaults to 4):
            How many rows at most; fewer where the scene holds fewer different questions.
        task_weights (`Mapping[str, float]`, *optional*):
            As in [`ShapesConfig`].
        video (`str`, *optional*):
            What stands in the column `video`, by default the path that [`generate`] writes to.
        absent_share (`float`, *optional*, defaults to 0.1):
            Share of the grounding questions that ask for something that does not occur.

    Returns:
        `list[dict]`: Rows of the schema, always the same for the same arguments. The column `source` is
        `"shapes/<difficulty>"`, and for multiple choice `"shapes/<difficulty>/<attribute>"`, the attribute tested.

    Raises:
        ValueError: If a weight is negative or names no task.
    """
    weights = _kind_weights(TASK_WEIGHTS if task_weights is None else task_weights)
    rng = scene_rng(scene.difficulty, scene.split, scene.index, scene.seed, ROW_STREAM)
    rows, asked = [], set()
    for _ in range(count):
        found = _ask_something_new(scene, rng, weights, asked, absent_share)
        if found is None:
            continue
        kind, columns = found
        task, _, attribute = kind.partition("/")
        row = make_row(
            id=f"{scene.name}-{len(rows)}",
            video=f"{VIDEO_FOLDER}/{scene.name}.mp4" if video is None else video,
            duration=scene.duration,
            task=task,
            source="/".join(["shapes", scene.difficulty, *([attribute] if attribute else [])]),
            **columns,
        )
        rows.append(row)
    return rows


def _ask_something_new(
    scene: Scene, rng: np.random.Generator, weights: Mapping[str, float], asked: set, absent_share: float
) -> tuple[str, dict[str, Any]] | None:
    """Draw questions until one is new, and return its kind and columns; note it in `asked`."""
    kinds, chances = list(weights), np.array(list(weights.values()))
    tasks = np.array([kind.partition("/")[0] for kind in kinds])
    for attempt in range(TRIES_PER_ROW):
        if attempt % TRIES_PER_TASK == 0:  # a task is tried several times, so that the shares of the tasks hold
            of_task = chances * (tasks == rng.choice(tasks, p=chances))
        kind = kinds[rng.choice(len(kinds), p=of_task / of_task.sum())]
        share = {"absent_share": absent_share} if kind in GROUNDING_TASKS else {}
        asking = None if attempt and kind in FIRST_TRY_KINDS else ASKERS[kind](scene, rng, **share)
        if asking is None:
            continue
        if asking is THINNED:
            return None
        keys = {(kind, asking.about), asking.columns["question"]}  # the same in other words is not new
        if not keys & asked:
            asked |= keys
            return kind, asking.columns
    return None


def iterate(config: ShapesConfig) -> Iterator[tuple[Scene, list[dict[str, Any]]]]:
    """Yield every scene of a configuration with its rows, without writing anything."""
    for index in config.indices:
        scene = config.scene(index)
        yield scene, make_rows(scene, config.rows_per_video, config.task_weights, absent_share=config.absent_share)


def _write_missing(folder: Path, config: ShapesConfig, index: int) -> None:
    scene = config.scene(index)
    path = folder / VIDEO_FOLDER / f"{scene.name}.mp4"
    if not path.exists():
        write_video(scene, path, size=config.size)


def generate(config: ShapesConfig, folder: str | os.PathLike, num_proc: int = 1, progress: bool = True) -> Path:
    """Write videos, rows and the configuration into a folder.

    A killed run is continued by the same call: videos already there are kept, half-written files never look complete,
    and the rows come last. The bytes do not depend on how often it was interrupted or on `num_proc`.

    Args:
        config (`ShapesConfig`):
            What to generate.
        folder (`str` or `os.PathLike`):
            Where; made if missing. It may hold an earlier, shorter run of the same configuration.
        num_proc (`int`, *optional*, defaults to 1):
            Processes. Above 1 they are spawned, so a script needs its `if __name__ == "__main__":`.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.

    Returns:
        `Path`: The folder, with `videos/*.mp4`, `rows.jsonl` and `config.json`.

    Raises:
        ValueError: If the folder holds data of another configuration.
    """
    folder = Path(folder)
    (folder / VIDEO_FOLDER).mkdir(parents=True, exist_ok=True)
    _check_config(folder, config)
    bar = tqdm(total=config.num_videos, desc=f"shapes {config.difficulty} {config.split}", disable=not progress)
    with bar:
        if num_proc == 1:
            for index in config.indices:
                _write_missing(folder, config, index)
                bar.update()
        else:
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(num_proc, mp_context=context) as pool:
                for _ in pool.map(partial(_write_missing, folder, config), config.indices, chunksize=8):
                    bar.update()
    lines = [json.dumps(row) for _, rows in iterate(config) for row in rows]
    _write_text(folder / ROWS_FILE, "\n".join(lines) + "\n")
    return folder


def _check_config(folder: Path, config: ShapesConfig) -> None:
    """Refuse a folder of another configuration, and write down this one."""
    path = folder / CONFIG_FILE
    wanted = {**asdict(config), "task_weights": dict(config.task_weights)}
    if path.exists():
        held = json.loads(path.read_text(encoding="utf-8"))
        differing = [name for name in wanted if name != "num_videos" and held.get(name) != wanted[name]]
        if differing:
            seen = {name: held.get(name) for name in differing}
            raise ValueError(
                f"{folder} holds shapes of another configuration: {seen} instead of "
                f"{ {name: wanted[name] for name in differing} }. Generate into another folder, or delete this one."
            )
    _write_text(path, json.dumps(wanted, indent=2) + "\n")


def _write_text(path: Path, text: str) -> None:
    partial_path = path.with_name(f".{path.name}.{os.getpid()}.part")
    partial_path.write_text(text, encoding="utf-8")
    os.replace(partial_path, path)


def load_rows(folder: str | os.PathLike) -> list[dict[str, Any]]:
    """Read the rows that [`generate`] wrote, with the paths of the videos made usable from anywhere.

    Args:
        folder (`str` or `os.PathLike`):
            The folder.

    Returns:
        `list[dict]`: Rows of the schema.

    Raises:
        ValueError: If the folder holds no complete data set.
    """
    path = Path(folder) / ROWS_FILE
    if not path.is_file():
        raise ValueError(
            f"{folder} has no {ROWS_FILE}: nothing was generated there, or the run was interrupted. "
            "Run generate(...) with this folder; it continues where it stopped."
        )
    with path.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [{**row, "video": str(Path(folder).resolve() / row["video"])} for row in rows]


def blind_controls(
    rows: Sequence[Mapping[str, Any]], seed: int = 0, folder: str | os.PathLike | None = None
) -> dict[str, list[dict[str, Any]]]:
    """Make the controls that show how much can be answered without looking.

    Args:
        rows (`Sequence[Mapping]`):
            Rows of the schema with their videos as paths.
        seed (`int`, *optional*, defaults to 0):
            Seed of the swap.
        folder (`str` or `os.PathLike`, *optional*):
            Where to write black videos of the same lengths; without it that control is left out.

    Returns:
        `dict[str, list[dict]]`: `"swapped"`, the same rows with another row's video of the same or the nearest length,
        and `"black"`, the same rows with black videos. Everything else of a row stays, the right answer included.

    Raises:
        ValueError: If all rows have the same video, so that nothing can be swapped.
    """
    lengths = {row["video"]: row["duration"] for row in rows}
    if len(lengths) < 2:
        raise ValueError(f"Videos cannot be swapped between rows of {len(lengths)} video. Give rows of two or more.")
    # a queue of all videos, ordered by length and at random within one: everybody gets the next one's, which is as long
    # or longer, so that moments given in a question lie inside; the last gets that of the one before
    order = np.random.default_rng(seed).permutation(len(lengths))
    names = [list(lengths)[place] for place in order]
    names.sort(key=lengths.__getitem__)
    following = dict(zip(names, [*names[1:], names[-2]], strict=True))
    controls = {"swapped": [{**row, "video": following[row["video"]]} for row in rows]}
    if folder is not None:
        black = {seconds: Path(folder) / f"black-{seconds:g}s.mp4" for seconds in sorted(set(lengths.values()))}
        for seconds, path in black.items():
            if not path.exists():
                frames = np.zeros((max(1, round(seconds * FILE_FPS)), DEFAULT_SIZE, DEFAULT_SIZE, 3), np.uint8)
                write_frames(frames, FILE_FPS, path)
        controls["black"] = [{**row, "video": str(black[row["duration"]])} for row in rows]
    return controls


def best_constant_span(rows: Sequence[Mapping[str, Any]]) -> tuple[float, float, float]:
    """Find the one span, in shares of the video's length, that fits rows best without looking.

    Args:
        rows (`Sequence[Mapping]`):
            Rows of the schema; those with exactly one span count.

    Returns:
        `tuple[float, float, float]`: Start and end in shares of the duration, and the mean temporal IoU.

    Raises:
        ValueError: If no row has exactly one span.
    """
    spans = np.array([np.array(row["spans"][0]) / row["duration"] for row in rows if len(row["spans"]) == 1])
    if not len(spans):
        raise ValueError(f"None of {len(rows)} rows has exactly one span, so none fits best. Give rows of task 'tvg'.")
    places = np.linspace(0, 1, SPAN_GRID)
    first, second = np.triu_indices(SPAN_GRID, 1)
    candidates = np.column_stack([places[first], places[second]])
    scores = temporal_iou(candidates, spans).mean(1)
    best = int(scores.argmax())
    return float(candidates[best, 0]), float(candidates[best, 1]), float(scores[best])


__all__ = [
    "CHOICE_TASKS",
    "DIFFICULTIES",
    "HELD_OUT_PAIRS",
    "SPLITS",
    "TASK_WEIGHTS",
    "Scene",
    "ShapesConfig",
    "best_constant_span",
    "blind_controls",
    "contact_sheet",
    "generate",
    "iterate",
    "load_rows",
    "make_rows",
    "make_scene",
    "object_states",
    "render_frames",
    "write_frames",
    "write_video",
]
