# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""Records of moment retrieval and captioning files: Charades-STA, QVHighlights, ActivityNet Captions, YouCook2, TACoS.

Each reader yields the columns of a row, or [`Dropped`] with the reason; `importers.py` turns them into rows.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .clauses import EVIDENCE
from .import_formats import Dropped, is_mapping_of, is_pairs, open_text, stream_json


Record = dict[str, Any] | Dropped

_CHARADES_LINE = re.compile(r"^(\S+) (-?\d+(?:\.\d+)?) (-?\d+(?:\.\d+)?)##(.*\S)\s*$")


@dataclass(frozen=True)
class Wording:
    """How questions, answers and video files are written.

    Args:
        question (`str`): Template with `{query}` or `{Query}` (capitalised), or a fixed text.
        answer (`str`): Template with `{evidence}` once, and possibly `{query}` or `{Query}`.
        video_name (`str`): Template with `{id}`.
    """

    question: str
    answer: str
    video_name: str

    def __post_init__(self) -> None:
        for name, allowed in _FIELDS.items():
            template = getattr(self, name)
            try:
                template.format(**dict.fromkeys(allowed, ""))
            except (KeyError, IndexError, ValueError) as error:
                fields = ", ".join(f"{{{field}}}" for field in allowed)
                raise ValueError(
                    f"{name} is {template!r}, which cannot be filled in ({error!r}): only {fields} are known. "
                    "Write other braces twice."
                ) from error
        if self.answer.count("{evidence}") != 1:
            raise ValueError(f"answer is {self.answer!r}: the times belong into it. Write {{evidence}} in it once.")


_FIELDS = {"question": ("query", "Query"), "answer": ("query", "Query", "evidence"), "video_name": ("id",)}


def _moments(query: str, count: int, wording: Wording) -> dict[str, str]:
    """Question and answer of a moment retrieval row."""
    query = query.strip()
    values = {"query": query.rstrip(" ."), "Query": (query[:1].upper() + query[1:]).rstrip(" .")}
    tokens = [EVIDENCE] * count
    evidence = tokens[0] if count == 1 else f"{', '.join(tokens[:-1])} and {tokens[-1]}"
    return {"question": wording.question.format(**values), "answer": wording.answer.format(**values, evidence=evidence)}


def read_durations(source: Mapping[str, float] | str | os.PathLike | None) -> Mapping[str, float]:
    """Durations by video id.

    Args:
        source (mapping or path, *optional*): A mapping, a JSON file of one, or a CSV file with `id` and `length`.

    Raises:
        ValueError: If the CSV file has no such columns.
    """
    if source is None or isinstance(source, Mapping):
        return source or {}
    with open_text(source) as file:
        if os.fspath(source).endswith(".json"):
            return json.load(file)
        rows = csv.DictReader(file)
        if not {"id", "length"} <= set(rows.fieldnames or ()):
            raise ValueError(
                f"{os.fspath(source)!r} has the columns {rows.fieldnames}: durations are looked up in 'id' and "
                "'length'. Pass the CSV that comes with Charades, or a JSON file of id -> seconds."
            )
        return {row["id"]: float(row["length"]) for row in rows}


def charades_sta_records(path: str | os.PathLike, wording: Wording, durations: Mapping[str, float]) -> Iterator[Record]:
    """Columns of one row per line `ID start end##sentence`; the file does not tell durations."""
    with open_text(path) as file:
        for number, line in enumerate(file):
            match = _CHARADES_LINE.match(line)
            if match is None:
                if line.strip():
                    yield Dropped("line is malformed")
                continue
            video, start, end, query = match.groups()
            yield {
                "id": f"charades_sta-{number}",
                "video": wording.video_name.format(id=video),
                "duration": durations.get(video),
                "task": "tvg",
                "source": "charades_sta",
                "spans": [[float(start), float(end)]],
                **_moments(query, 1, wording),
            }


def qvhighlights_records(path: str | os.PathLike, wording: Wording) -> Iterator[Record]:
    """Columns of one row per JSON line with a query and its windows."""
    with open_text(path) as file:
        for line in filter(str.strip, file):
            try:
                sample = json.loads(line)
            except json.JSONDecodeError:
                sample = None
            if not is_mapping_of(sample, "qid", "query", "vid", "duration"):
                yield Dropped("line is malformed")
            elif not sample.get("relevant_windows"):
                yield Dropped("record has no window")
            elif not is_pairs(sample["relevant_windows"]):
                yield Dropped("record is malformed")
            else:
                windows = sorted(sample["relevant_windows"])
                yield {
                    "id": f"qvhighlights-{sample['qid']}",
                    "video": wording.video_name.format(id=sample["vid"]),
                    "duration": sample["duration"],
                    "task": "tvg",
                    "source": "qvhighlights",
                    "spans": windows,
                    **_moments(sample["query"], len(windows), wording),
                }


def _captioned(path: str | os.PathLike) -> Iterator[tuple[str, float | None, list, list[str]] | Dropped]:
    """Video id, duration, spans in seconds and sentences of each video of a captioning file.

    Knows `{id: {"duration", "timestamps", "sentences"}}`, the same with times in frames and "fps" and "num_frames",
    and YouCook2's own `{"database": {id: {"duration", "annotations": [{"segment", "sentence"}]}}}`.
    """
    for key, value in stream_json(path):
        for video, sample in value.items() if key == "database" and isinstance(value, Mapping) else [(key, value)]:
            if is_mapping_of(sample, "annotations"):
                events = [event for event in sample["annotations"] if isinstance(event, Mapping)]
                spans, sentences = ([event.get(name) for event in events] for name in ("segment", "sentence"))
            elif is_mapping_of(sample, "timestamps", "sentences"):
                spans, sentences = sample["timestamps"], sample["sentences"]
            else:
                yield Dropped("record is malformed")
                continue
            if not is_pairs(spans) or len(spans) != len(sentences) or not all(isinstance(s, str) for s in sentences):
                yield Dropped("record is malformed")
                continue
            duration, fps = sample.get("duration"), sample.get("fps")
            if "num_frames" in sample:
                if not fps or fps <= 0:
                    yield Dropped("frame rate is unknown")
                    continue
                duration = sample["num_frames"] / fps
                spans = [[start / fps, end / fps] for start, end in spans]
            yield str(video), duration, spans, [" ".join(sentence.split()) for sentence in sentences]


def _events_of(path: str | os.PathLike) -> dict[str, list]:
    """Spans by video of a further annotator's file."""
    return {item[0]: item[2] for item in _captioned(path) if not isinstance(item, Dropped)}


def caption_records(
    path: str | os.PathLike, name: str, task: str, wording: Wording, others: Sequence[str | os.PathLike] = ()
) -> Iterator[Record]:
    """Columns of one row per video ("dvc", "slc"), or of one per sentence ("tvg").

    Args:
        path (`str` or `PathLike`): The JSON file.
        name (`str`): Of the data set.
        task (`str`): "dvc", "slc" or "tvg".
        wording (`Wording`): Templates; of a dense caption only the question is used.
        others (`Sequence[str | PathLike]`): Files of further annotators of the same videos.
    """
    annotators = [_events_of(other) for other in others]
    for item in _captioned(path):
        if isinstance(item, Dropped):
            yield item
            continue
        video, duration, spans, sentences = item
        common = {"video": wording.video_name.format(id=video), "duration": duration, "task": task, "source": name}
        if task == "tvg":
            for number, (span, sentence) in enumerate(zip(spans, sentences, strict=True)):
                if not sentence:
                    yield Dropped("caption is empty")
                    continue
                columns = {"id": f"{name}-{video}-{number}", "spans": [span], "captions": [sentence]}
                yield common | columns | _moments(sentence, 1, wording)
            continue
        events = sorted((span, sentence) for span, sentence in zip(spans, sentences, strict=True) if sentence)
        if not events:
            yield Dropped("caption is empty")
            continue
        texts = [f"{EVIDENCE}, {sentence.rstrip(' .')}." for _, sentence in events]
        yield common | {
            "id": f"{name}-{video}",
            "question": wording.question,
            "answer": " ".join(texts),
            "spans": [span for span, _ in events],
            "captions": [sentence for _, sentence in events],
            "annotations": [annotator[video] for annotator in annotators if video in annotator],
        }


__all__ = ["Record", "Wording", "caption_records", "charades_sta_records", "qvhighlights_records", "read_durations"]
