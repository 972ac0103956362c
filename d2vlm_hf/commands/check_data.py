# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""`d2vlm check-data`: every fault of a data file, including what keeps it from being read at all."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..data.schema import RowFault, validate_rows
from ..data.sources import complete_row, load_rows, read_text_rows, resolve_video


NO_PREFERENCE = "the column is missing, so this is no preference row. Make such rows with `d2vlm make-preferences`."


def check_data(
    path: str, preference: bool = False, root: str | None = None, videos: bool = True
) -> tuple[int, list[RowFault]]:
    """List the faults of a file or folder of rows.

    Args:
        path (`str`):
            `.jsonl`, `.json`, `.parquet`, a folder of shapes, or a data set as `datasets` saves it.
        preference (`bool`, *optional*, defaults to `False`):
            Whether every row must be a preference row.
        root (`str`, *optional*):
            Folder that relative paths of videos start from, by default that of the file.
        videos (`bool`, *optional*, defaults to `True`):
            Whether the files of videos must exist.

    Returns:
        `(int, list[RowFault])`: Number of rows, and their faults in order.

    Raises:
        ValueError: If there is no such file, or nothing in it.
    """
    source = Path(path)
    if (source / "rows.jsonl").is_file():
        source = source / "rows.jsonl"
    if not source.exists():
        raise ValueError(f"{path} does not exist: no rows are there to be checked. Check the path.")
    faults: list[RowFault] = []  # those that are not about what a row says
    text = source.suffix in (".jsonl", ".json")
    if text:
        rows, broken = read_text_rows(source)
        faults += broken
    else:
        rows = load_rows(str(source), video_root=root)
    base = Path(root) if root is not None else source if source.is_dir() else source.parent
    count = 0

    def counted() -> Iterator[Any]:  # one row at a time, since rows may hold whole videos
        nonlocal count
        for index, row in enumerate(rows):
            count += 1
            if preference and isinstance(row, Mapping) and "rejected" not in row:
                faults.append(RowFault(f"Row {index}", "rejected", "missing", NO_PREFERENCE))
            row = _locate(index, row, base, faults)
            yield _complete(index, row, source, faults) if text else row

    found = validate_rows(counted(), check_file=videos)
    if not count and not faults:
        raise ValueError(f"{path} holds no rows: there is nothing to check. Name a file with rows.")
    return count, faults + found


def _locate(index: int, row: Any, base: Path, faults: list[RowFault]) -> Any:
    """The row with a path of its video that can be looked up; a path that leads out of the root is a fault."""
    video = row.get("video") if isinstance(row, Mapping) else None
    if not isinstance(video, str) or not video.strip():
        return row
    try:
        return {**row, "video": resolve_video(video, base)}
    except ValueError as error:
        faults.append(RowFault(f"Row {index}", "video", repr(video), str(error)))
        return row


def _complete(index: int, row: Any, source: Path, faults: list[RowFault]) -> Any:
    """The row with the columns that may be left out; a video that does not tell its duration is a fault."""
    try:
        return complete_row(row, index, source.stem)
    except ValueError as error:
        faults.append(RowFault(f"Row {index}", "duration", "missing", str(error)))
        return complete_row({**row, "duration": 1e9}, index, source.stem)  # for the sake of its other faults


__all__ = ["check_data"]
