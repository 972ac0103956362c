# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""Annotation files of the benchmarks, as published, read into rows; and the prompts.

Nothing is dropped, since a benchmark's denominator is part of its definition. The rows have the columns of the schema
(`data/schema.py`), and what a benchmark needs beside them: `saliency_scores` and `relevant_clip_ids` (QVHighlights),
`annotation_captions` (several annotators), `published_spans` (where a published span ends before it starts).
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data.schema import EVIDENCE_TOKEN, make_row
from .parsing import LETTERS


logger = logging.getLogger(__name__)

Row = dict[str, Any]

_STEPS = (
    " Watch the video carefully and {manner} describe all the cooking steps. For each step, you need to determine the "
    "start and ends times and provide a concise description. The format of your response should be: "
    "'<start time> - <end time>, <description>'."
)
_FIND = (
    " Watch the video carefully and find a visual event described by the sentence: '{query}'. The format of your "
    "response should be: 'The event happens in <start time> - <end time>'."
)
# benchmark -> name -> prompt. Those named `paper`, and the `default` of Charades-STA, MVBench and Video-MME, are the
# authors'; E.T. Bench's prompts come with its annotations. The paper's YouCook2 prompt names one dish for every video.
PROMPTS: dict[str, dict[str, str]] = {
    "charades_sta": {"default": "You are given a video about indoor activities." + _FIND},
    "tacos": {"default": "You are given a video about cooking." + _FIND},
    "qvhighlights": {"default": "You are given a video." + _FIND},
    "youcook2": {
        "default": "You are given a video about cooking." + _STEPS.replace("{manner}", "densely"),
        "paper": "You are given a video about 'making fattoush'." + _STEPS.replace("{manner}", "densly"),
    },
    "activitynet_captions": {
        "default": "You are given a video. Watch the video carefully and densely describe all the events. For each "
        "event, you need to determine the start and end times and provide a concise description. The format of your "
        "response should be: '<start time> - <end time>, <description>'."
    },
    "mvbench": {
        "default": "Carefully watch the video and pay attention to the cause and sequence of events, the detail and "
        "movement of objects and the action and pose of persons. Based on your observations, select the best option "
        "that accurately addresses the question.\nQuestion: {question}\nOptions:\n{options}"
    },
    "video_mme": {
        "default": "Select the best answer to the following multiple-choice question based on the video. Respond with "
        "only the letter (A, B, C, or D) of the correct option.\n{question}\n{options}\nThe best answer is:"
    },
}
_CHARADES_LINE = re.compile(r"^(\S+) (\d+(?:\.\d+)?) (\d+(?:\.\d+)?)##(.*)$")
_MOMENT = re.compile(r"<vid>(?:\s*-\s*<vid>)?")


def _fill(prompt: str, **values: str) -> str:
    """Fills a prompt in; the values may hold braces."""
    return re.sub(r"\{(\w+)\}", lambda found: values[found[1]], prompt)


def _prompt(benchmark: str, name: str) -> str:
    known = PROMPTS[benchmark]
    if name not in known:
        raise ValueError(f"prompt is {name!r}, which {benchmark} does not have; use one of {list(known)}.")
    return known[name]


def _row(benchmark: str, key: Any, spans: Iterable[Sequence[float]] = (), **columns: Any) -> Row:
    """A row of a benchmark; spans that end before they start are turned round, the published ones kept beside."""
    published = [[float(start), float(end)] for start, end in spans]
    ordered = [sorted(span) for span in published]
    row = make_row(id=str(key), spans=ordered, **{"source": benchmark, **columns})
    if ordered != published:
        row["published_spans"] = published
    return row


def _read_json(path: Path) -> Any:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    return json.loads(text)


def _records(path: Path) -> list[Mapping[str, Any]]:
    """A list of records from a .json, .jsonl or .parquet file."""
    if path.suffix == ".parquet":
        from datasets import Dataset

        return Dataset.from_parquet(str(path)).to_list()
    return _read_json(path)


def etbench_row(sample: Mapping[str, Any]) -> Row:
    """A row from one sample of E.T. Bench's annotation file.

    Args:
        sample (`Mapping`):
            `{"version", "idx", "task", "source", "video", "duration", "src"?, "tgt"?, "p"?, "o"?, "g"?, "q"}`.

    Returns:
        `dict`: the row. Given moments (`<vid>`, or two of them joined by a hyphen) become `<evi>` with
        `question_spans`; vhd's windows of several annotators stand in `annotations`; options that are pairs become
        `s - e`.
    """
    target = sample.get("tgt") or []
    if target and not isinstance(target[0], Sequence):
        target = [target]
    annotations = target if target and isinstance(target[0][0], Sequence) else []
    given, moments = list(sample.get("src") or []), []
    flat = [float(time) for entry in given for time in (entry if isinstance(entry, Sequence) else [entry])]

    def moment(found: re.Match) -> str:
        taken = [flat.pop(0) for _ in range(min(len(flat), found.group().count("<vid>")))]
        if not taken:
            return found.group()
        moments.append([taken[0], taken[-1]])
        return EVIDENCE_TOKEN

    question = _MOMENT.sub(moment, sample["q"])
    options = [o if isinstance(o, str) else " - ".join(str(time) for time in o) for o in sample.get("o", [])]
    return _row(
        sample["source"],
        sample["idx"],
        annotations[0] if annotations else target,
        video=sample["video"],
        duration=float(sample.get("duration") or 0.0),
        task=sample["task"],
        question=question,
        question_spans=moments,
        annotations=annotations,
        options=options,
        correct_option=sample.get("p", -1),
        captions=list(sample.get("g", [])),
    )


def _etbench(paths: Sequence[Path], prompt: str) -> list[Row]:
    return [etbench_row(sample) for path in paths for sample in _records(path)]


def _charades(paths: Sequence[Path], prompt: str) -> list[Row]:
    rows: list[Row] = []
    for path in paths:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if not line.strip():
                continue
            found = _CHARADES_LINE.match(line)
            if found is None:
                raise ValueError(
                    f"{path}, line {number} is {line!r}, which is no Charades-STA line; "
                    "each must be '<video> <start> <end>##<sentence>'."
                )
            video, start, end, sentence = found.groups()
            question = _fill(prompt, query=sentence.strip().removesuffix("."))
            span = [(float(start), float(end))]
            rows.append(_row("charades_sta", len(rows), span, video=f"{video}.mp4", task="tvg", question=question))
    return rows


def _qvhighlights(paths: Sequence[Path], prompt: str) -> list[Row]:
    rows = []
    for sample in (sample for path in paths for sample in _records(path)):
        row = _row(
            "qvhighlights",
            sample["qid"],
            sample.get("relevant_windows") or [],
            video=f"{sample['vid']}.mp4",
            duration=float(sample["duration"]),
            task="tvg",
            question=_fill(prompt, query=sample["query"].strip().removesuffix(".")),
        )
        rows.append(row | {key: sample[key] for key in ("relevant_clip_ids", "saliency_scores") if key in sample})
    return rows


def _tacos(paths: Sequence[Path], prompt: str) -> list[Row]:
    rows: list[Row] = []
    for path in paths:
        for video, entry in _read_json(path).items():
            fps = float(entry["fps"])
            for frames, sentence in zip(entry["timestamps"], entry["sentences"], strict=True):
                row = _row(
                    "tacos",
                    len(rows),
                    [[frame / fps for frame in frames]],
                    video=video,
                    duration=entry["num_frames"] / fps,
                    task="tvg",
                    question=_fill(prompt, query=sentence.strip().removesuffix(".")),
                )
                rows.append(row)
    return rows


def _dense(benchmark: str) -> Callable[[Sequence[Path], str], list[Row]]:
    """YouCook2 and ActivityNet Captions: one file per annotator, a video once."""

    def read(paths: Sequence[Path], prompt: str) -> list[Row]:
        files = [_read_json(path) for path in paths]
        rows = []
        for video in dict.fromkeys(video for file in files for video in file):
            entries = [file[video] for file in files if video in file]
            captions = [[sentence.strip() for sentence in entry["sentences"]] for entry in entries]
            first = entries[0]
            row = _row(
                benchmark,
                video,
                first["timestamps"],
                video=f"{video}.mp4",
                duration=float(first["duration"]),
                task="dvc",
                question=prompt,
                captions=captions[0],
            )
            if len(entries) > 1:
                row["annotations"] = [[sorted(map(float, span)) for span in entry["timestamps"]] for entry in entries]
                row["annotation_captions"] = captions
            rows.append(row)
        return rows

    return read


def _lettered(options: Sequence[str], ending: str) -> str:
    return "\n".join(
        f"({letter}) {option.removesuffix('.')}{ending}" for letter, option in zip(LETTERS, options, strict=False)
    )


def _mvbench(paths: Sequence[Path], prompt: str) -> list[Row]:
    """MVBench: one file per task, named after it."""
    rows: list[Row] = []
    for path in paths:
        for sample in _records(path):
            options = [str(option) for option in sample["candidates"]]
            row = _row(
                f"mvbench/{path.stem}",
                len(rows),
                video=sample["video"],
                task="rvq",
                question=_fill(prompt, question=sample["question"], options=_lettered(options, ".")),
                options=options,
                correct_option=dict(zip(options, range(len(options)), strict=True))[str(sample["answer"])],
            )
            rows.append(row)
    return rows


def _video_mme(paths: Sequence[Path], prompt: str) -> list[Row]:
    rows = []
    for sample in (sample for path in paths for sample in _records(path)):
        rows.append(
            _row(
                f"video_mme/{sample['duration']}",
                sample["question_id"],
                video=f"{sample['videoID']}.mp4",
                task="rvq",
                question=_fill(prompt, question=sample["question"], options="\n".join(sample["options"])),
                options=[re.sub(r"^[A-Z]\.\s*", "", option) for option in sample["options"]],
                correct_option=LETTERS.index(sample["answer"]),
            )
        )
    return rows


_READERS: dict[str, Callable[[Sequence[Path], str], list[Row]]] = {
    "etbench": _etbench,
    "charades_sta": _charades,
    "qvhighlights": _qvhighlights,
    "tacos": _tacos,
    "youcook2": _dense("youcook2"),
    "activitynet_captions": _dense("activitynet_captions"),
    "mvbench": _mvbench,
    "video_mme": _video_mme,
}
BENCHMARKS = tuple(_READERS)


def load_annotations(
    benchmark: str, path: str | os.PathLike | Sequence[str | os.PathLike], prompt: str = "default"
) -> list[Row]:
    """Reads the annotation files of a benchmark.

    Args:
        benchmark (`str`):
            One of `BENCHMARKS`.
        path (`str` or a sequence of them):
            The published file. Several for ActivityNet Captions (one per annotator) and MVBench (one per task).
        prompt (`str`, *optional*, defaults to `"default"`):
            Name of the prompt in `PROMPTS`; E.T. Bench has its own in the file.

    Returns:
        `list[dict]`: one row per question, or per video for dense captioning, in the order of the file.

    Raises:
        ValueError: If the benchmark or the prompt is unknown, a file is missing, or it is not in the published format.
    """
    if benchmark not in _READERS:
        raise ValueError(f"benchmark is {benchmark!r}, which is not known; use one of {list(BENCHMARKS)}.")
    paths = [Path(path)] if isinstance(path, str | os.PathLike) else [Path(part) for part in path]
    missing = [str(part) for part in paths if not part.is_file()]
    if missing:
        raise ValueError(f"path names {missing}, where no file is; give the annotation file of {benchmark}.")
    text = "" if benchmark == "etbench" else _prompt(benchmark, prompt)
    try:
        rows = _READERS[benchmark](paths, text)
    except (LookupError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{[str(part) for part in paths]} is not in the published format of {benchmark} ({error!r}); "
            "check that it is the benchmark's own annotation file."
        ) from error
    turned = sum("published_spans" in row for row in rows)
    if turned:
        logger.warning("%d of %d rows of %s have a span that ends before it starts.", turned, len(rows), benchmark)
    return rows


__all__ = ["BENCHMARKS", "PROMPTS", "etbench_row", "load_annotations"]
