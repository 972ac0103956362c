# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""Where training rows come from: files, folders, Hub data sets, or the shapes world rendered on the way."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from ..model.video_processing_d2vlm import sample_video
from .schema import COLUMNS, RowFault, make_row, validate_row
from .shapes import make_rows, make_scene, render_frames
from .shapes_tasks import ABSENT_SHARE


WRITTEN = {"video", "question", "answer", "spans"}
"""The columns that somebody must write; the others of a row in a text file are filled in."""
STAGE_OPTIONS = {"until", "difficulty", "task_weights", "fps", "rows_per_video", "absent_share"}


class RenderedShapes(Dataset):
    """Shapes videos rendered on the fly, never twice the same: item i is scene i of its split and its questions.

    Items are `{"rows": [...]}` with `video` = `{"frames": (T, size, size, 3) uint8, "timestamps": (T,) seconds}` in
    each row; rows about one video share the object.

    Args:
        length (`int`): Number of scenes.
        size (`int`): Height and width that the model sees, in pixels.
        fps (`float`): Frames per second that the model sees.
        rows_per_video (`int`): Questions about each scene.
        stages (`list[dict]`, *optional*): A curriculum by position: `until` (share of the length), `difficulty`, and
            if wanted `task_weights`, `absent_share`, `fps` and `rows_per_video`. Default: the middle difficulty.
        split (`str`), seed (`int`): As in `ShapesConfig`.
    """

    ordered = True  # the trainer must not shuffle a curriculum

    def __init__(
        self,
        length: int,
        size: int = 48,
        fps: float = 2.0,
        rows_per_video: int = 4,
        stages: Sequence[Mapping[str, Any]] = ({"until": 1.0, "difficulty": "middle"},),
        split: str = "train",
        seed: int = 0,
    ):
        ends = [stage["until"] for stage in stages]
        if ends != sorted(ends) or not ends or ends[-1] != 1.0:
            raise ValueError(
                f"the stages end at {ends}: each ends later than the one before, the last at 1.0 (shares of the "
                "training). Mend `until`."
            )
        unknown = {key for stage in stages for key in stage} - STAGE_OPTIONS
        if unknown:
            raise ValueError(f"the stages have unknown options {sorted(unknown)}. Use some of {sorted(STAGE_OPTIONS)}.")
        self.length, self.size, self.fps, self.rows_per_video = length, size, fps, rows_per_video
        self.stages, self.split, self.seed = list(stages), split, seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.length:
            raise IndexError(index)
        stage = next(s for s in self.stages if index < s["until"] * self.length or s["until"] == 1.0)
        scene = make_scene(stage["difficulty"], self.split, index, self.seed)
        count = stage.get("rows_per_video", self.rows_per_video)
        absent_share = stage.get("absent_share", ABSENT_SHARE)
        rows = make_rows(scene, count, stage.get("task_weights"), "rendered", absent_share)
        times = np.arange(0, scene.duration, 1 / stage.get("fps", self.fps))
        video = {"frames": render_frames(scene, times, self.size), "timestamps": times}
        return {"rows": [{**row, "video": video} for row in rows]}


def shapes_corpus(scenes: int = 400, seed: int = 0) -> Iterator[str]:
    """Questions and answers of the shapes world, to learn a tokenizer from."""
    for difficulty in ("easy", "middle", "hard"):
        for index in range(scenes):
            for row in make_rows(make_scene(difficulty, "train", index, seed), 8):
                yield row["question"]
                yield row["answer"]


def load_rows(path: str, split: str = "train", video_root: str | None = None, validate: bool = True):
    """Rows of the schema from a file, a folder or the Hub; what a row of a text file leaves out is filled in.

    Args:
        path (`str`): `.jsonl`, `.json`, `.parquet`; a folder of shapes or a saved data set; or a Hub id.
        split (`str`): Split of a folder or Hub data set.
        video_root (`str`, *optional*): Folder that relative paths in `video` start from; default: the file's own.
        validate (`bool`): Check every row of a text file first.

    Returns:
        A list of rows, or a `datasets.Dataset` with undecoded videos.

    Raises:
        ValueError: no rows, a broken row (naming row, column and value), or a video outside of its root.
    """
    source = Path(path)
    if source.suffix in (".jsonl", ".json") or (source / "rows.jsonl").is_file():
        file = source if source.is_file() or source.suffix else source / "rows.jsonl"
        return _text_rows(file, Path(video_root) if video_root else file.parent, validate)
    from datasets import Video, load_dataset, load_from_disk

    if source.suffix == ".parquet":
        rows = load_dataset("parquet", data_files=str(source), split="train")
    elif (source / "state.json").is_file():
        rows = load_from_disk(str(source))
    else:
        rows = load_dataset(path, split=split)
    return rows.cast_column("video", Video(decode=False)) if "video" in rows.features else rows


def _text_rows(file: Path, root: Path, validate: bool) -> list[dict[str, Any]]:
    if not file.is_file():
        raise ValueError(f"{file} does not exist: it should hold the rows. Check the path.")
    rows, faults = read_text_rows(file)
    for fault in faults:
        raise ValueError(f"{fault.row}, value {fault.value}: {fault.message}")
    if not rows:
        raise ValueError(f"{file} is empty: there is nothing to train or evaluate on. Give a file with rows.")
    for index, row in enumerate(rows):
        if isinstance(row, Mapping) and "video" in row:
            row = {**row, "video": resolve_video(row["video"], root)}
        rows[index] = complete_row(row, index, file.stem)
        if validate:
            validate_row(rows[index], index, str(file))
    return rows


def read_text_rows(file: Path) -> tuple[list[Any], list[RowFault]]:
    """The rows of a `.json` or `.jsonl` file, and a fault for each place that is no JSON."""
    text = file.read_text(encoding="utf-8")
    whole = file.suffix == ".json"
    rows: list[Any] = []
    faults: list[RowFault] = []
    for number, line in enumerate([text] if whole else text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            read = json.loads(line)
        except json.JSONDecodeError as error:
            place = f"line {error.lineno}" if whole else f"line {number}"
            message = f"is no JSON ({error.msg} at character {error.pos}). Mend or remove it."
            faults.append(RowFault(f"{file.name}, {place}", "*", repr(line[:60]), message))
            continue
        rows += read if whole and isinstance(read, list) else [read]
    return rows, faults


def complete_row(row: Any, index: int, name: str) -> Any:
    """A row that somebody has written by hand, with the columns that it leaves out.

    `video`, `question`, `answer` and `spans` make a row. The duration is the video's, the `id` tells its place.

    Args:
        row (`Any`): As it was read; what is no mapping, and preference rows, come back as they are.
        index (`int`), name (`str`): Its place, and the name of its file.

    Raises:
        ValueError: If the row has no duration and its video cannot be read.
    """
    if not isinstance(row, Mapping) or "rejected" in row:
        return row
    absent = [column for column in COLUMNS if column not in row and column not in WRITTEN]
    filled = make_row(id=f"{name}-{index}")
    row = {**{column: filled[column] for column in absent if column != "duration"}, **row}
    if "duration" in absent and isinstance(row.get("video"), str):
        try:
            row["duration"] = sample_video(row["video"], max_frames=1).duration
        except ValueError as error:
            raise ValueError(f"{name}, row {index} has no duration, and its video does not tell it: {error}") from error
    return row


def resolve_video(video: Any, root: Path) -> Any:
    """An absolute path for a relative one, which must stay inside of its root.

    Raises:
        ValueError: a path that leads out of the root.
    """
    if not isinstance(video, str) or "://" in video or Path(video).is_absolute():
        return video
    path = (root / video).resolve()
    if not path.is_relative_to(root.resolve()):
        raise ValueError(
            f"the video path {video!r} leads out of {root}: rows may name files inside it only. Mend the row."
        )
    return str(path)


__all__ = ["RenderedShapes", "complete_row", "load_rows", "read_text_rows", "resolve_video", "shapes_corpus"]
