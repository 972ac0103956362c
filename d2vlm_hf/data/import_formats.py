# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""What all importers share: reading large JSON files piece by piece, paths of videos, and filters."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any, Literal, NamedTuple


_CHUNK = 1 << 16


class Dropped(NamedTuple):
    """A record that gives no row, and why; the reason is one of a few texts, fit for counting."""

    reason: str


@dataclass(frozen=True)
class ImportFilter:
    """Which rows of an annotation file are kept, and what is mended. The defaults are those of the paper's training.

    Args:
        min_duration (`float`, *optional*, defaults to 5.0):
            Shortest video in seconds.
        max_duration (`float`, *optional*, defaults to 350.0):
            Longest video in seconds.
        max_words (`int`, *optional*, defaults to 200):
            Most words of question and answer together.
        reversed_spans (`str`, *optional*, defaults to `"drop"`):
            What to do with a span that ends before it starts: `"drop"` its row, or `"swap"` the two times.
        overshoot (`float`, *optional*, defaults to 1.0):
            Seconds by which a span may end after the video, or start before it; it is clipped. Beyond that the row is
            dropped.
        point_seconds (`float`, *optional*, defaults to 1.0):
            Length given to a single time, or to a span without length.
        require_video (`bool`, *optional*):
            Whether to drop rows whose video file is missing; by default if a `video_root` is given.
    """

    min_duration: float = 5.0
    max_duration: float = 350.0
    max_words: int = 200
    reversed_spans: Literal["drop", "swap"] = "drop"
    overshoot: float = 1.0
    point_seconds: float = 1.0
    require_video: bool | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.min_duration <= self.max_duration:
            raise ValueError(
                f"min_duration is {self.min_duration} and max_duration {self.max_duration}: no video can be that long. "
                "Pass 0 <= min_duration <= max_duration, in seconds."
            )
        if self.reversed_spans not in ("drop", "swap"):
            raise ValueError(f"reversed_spans is {self.reversed_spans!r}, which is unknown. Use 'drop' or 'swap'.")
        if self.point_seconds <= 0 or self.overshoot < 0:
            raise ValueError(
                f"point_seconds is {self.point_seconds} and overshoot {self.overshoot}: a length in seconds must be "
                "positive, and a tolerance at least 0. Change them."
            )

    def mend(self, spans: Iterable[Sequence[float]], duration: float) -> list[list[float]] | Dropped:
        """Brings spans into the video.

        Args:
            spans (`(K, 2)` floats): Seconds.
            duration (`float`): Of the video in seconds.

        Returns:
            `list` or `Dropped`: the spans, or why they cannot be used.
        """
        mended = []
        for start, end in spans:
            if not (math.isfinite(start) and math.isfinite(end)):
                return Dropped("time is not a number")
            if end < start:
                if self.reversed_spans == "drop":
                    return Dropped("span ends before it starts")
                start, end = end, start
            if start < -self.overshoot or end > duration + self.overshoot or start > duration or end < 0:
                return Dropped("span lies outside the video")
            start, end = max(start, 0.0), min(end, duration)
            if start == end:
                end = min(start + self.point_seconds, duration)
                start = min(start, max(end - self.point_seconds, 0.0))
            mended.append([float(start), float(end)])
        return mended


def resolve_video(name: str, root: str | None) -> str:
    """Path of a video that an annotation names.

    Links are not followed: a folder of links into a video store is as good as the videos.

    Args:
        name (`str`):
            Relative path as the annotation gives it.
        root (`str`, *optional*):
            Folder of the videos.

    Returns:
        `str`: the path under `root`, or the normalised relative path.

    Raises:
        ValueError: If the path leads out of the root.
    """
    path = os.path.normpath(name.replace("\\", "/"))
    if os.path.isabs(path) or path == ".." or path.startswith("../") or path[1:2] == ":":
        raise ValueError(
            f"Video path {name!r} leads out of its root {root or '.'!r}: an annotation may only name files below it. "
            "Correct the annotation file, or do not trust it."
        )
    return path if root is None else os.path.join(root, path)


def open_text(path: str | os.PathLike) -> IO[str]:
    """Opens an annotation file for reading as UTF-8.

    Args:
        path (`str` or `PathLike`): The file.

    Raises:
        ValueError: If it is not there.
    """
    if not os.path.isfile(path):
        raise ValueError(f"Annotation file {os.fspath(path)!r} does not exist: nothing to import. Correct the path.")
    return open(path, encoding="utf-8-sig")


class _JsonReader:
    """Reads one JSON value after another from a file, with a buffer not much longer than one value."""

    def __init__(self, file: IO[str], path: str):
        self._file, self._path, self._decoder = file, path, json.JSONDecoder()
        self._buffer, self._at, self._past = "", 0, 0

    def _fill(self, size: int) -> bool:
        more = self._file.read(size)
        self._past += self._at
        self._buffer, self._at = self._buffer[self._at :] + more, 0
        return bool(more)

    def peek(self) -> str:
        """The next character that is not white space, `""` at the end."""
        while True:
            while self._at < len(self._buffer):
                if not self._buffer[self._at].isspace():
                    return self._buffer[self._at]
                self._at += 1
            if not self._fill(_CHUNK):
                return ""

    def take(self, allowed: str) -> str:
        """Consumes one of the allowed characters."""
        character = self.peek()
        if not character or character not in allowed:
            raise self._error(f"{character!r} where one of {list(allowed)} should stand")
        self._at += 1
        return character

    def value(self) -> Any:
        """Consumes a whole value."""
        self.peek()
        size = _CHUNK
        while True:
            try:
                value, end = self._decoder.raw_decode(self._buffer, self._at)
            except json.JSONDecodeError as error:
                if not self._fill(size):
                    raise self._error(error.msg) from error
            else:
                if end < len(self._buffer) or not self._fill(size):  # a number may go on in the next piece
                    self._at = end if end < len(self._buffer) else len(self._buffer)
                    return value
            size *= 2

    def _error(self, what: str) -> ValueError:
        place = self._past + self._at
        return ValueError(
            f"{self._path!r} is not valid JSON at character {place}: {what}. Check that the file is complete, and that "
            "this is the importer for its format."
        )


def stream_json(path: str | os.PathLike) -> Iterator[tuple[str | int, Any]]:
    """Reads the items of a JSON array or object one by one.

    Args:
        path (`str` or `PathLike`): The file.

    Returns:
        iterator of (index or key, value).

    Raises:
        ValueError: If the file is missing or is not a JSON array or object.
    """
    with open_text(path) as file:
        reader = _JsonReader(file, os.fspath(path))
        keyed = reader.take("[{") == "{"
        closing, index = "}" if keyed else "]", 0
        while reader.peek() != closing:
            if index:
                reader.take(",")
            key: str | int = index
            if keyed:
                key = reader.value()
                reader.take(":")
            yield key, reader.value()
            index += 1
            if reader.peek() not in (",", closing):
                reader.take("," + closing)


def is_pairs(value: Any) -> bool:
    """Whether a value is a list of pairs of numbers."""
    return isinstance(value, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(time, (int, float)) for time in pair)
        for pair in value
    )


def is_mapping_of(value: Any, *names: str) -> bool:
    """Whether a value is a mapping that has the named keys."""
    return isinstance(value, Mapping) and all(name in value for name in names)


__all__ = [
    "Dropped",
    "ImportFilter",
    "is_mapping_of",
    "is_pairs",
    "open_text",
    "resolve_video",
    "stream_json",
]
