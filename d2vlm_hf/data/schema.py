# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""The one documented row of this package, for training, evaluation and preferences. All times are seconds (float).

A row is a plain dict. [`features`] gives its `datasets` types, [`make_row`] fills in the defaults, [`validate_row`]
raises on the first fault and [`validate_rows`] lists every fault of a whole file.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, NamedTuple


if TYPE_CHECKING:
    import datasets

EVIDENCE_TOKEN = "<evi>"
EVIDENCE_END_TOKEN = "</evi>"
VIDEO_TOKEN = "<video>"

# E.T. Bench names of tasks; `task` may also be any other non-empty name
TASKS = ("rar", "eca", "rvq", "tvg", "epm", "tal", "evs", "vhd", "dvc", "slc", "tem", "gvq")
FACTORS = ("grounding", "text")
PERTURBATIONS = {"grounding": ("shift", "add", "drop", "merge"), "text": ("tamper", "repeat")}

# column -> kind of value; "spans" is list[[start, end]] in seconds
COLUMNS = {
    "id": "string",
    "video": "video",
    "duration": "seconds",
    "task": "string",
    "source": "string",
    "question": "string",
    "question_spans": "spans",
    "answer": "string",
    "spans": "spans",
    "options": "strings",
    "correct_option": "integer",
    "captions": "strings",
    "annotations": "span lists",
}
PREFERENCE_COLUMNS = {
    "prompt": "messages",
    "chosen": "messages",
    "rejected": "messages",
    "chosen_spans": "spans",
    "rejected_spans": "spans",
    "factor": "string",
    "perturbation": "string",
    "edit": "string",
    "seed": "integer",
}
NO_OPTION = -1
# a span may end this far past `duration`: containers round their duration to their own clock
DURATION_SLACK = 0.05

_DEFAULTS = {"task": "tvg", "source": "", "correct_option": NO_OPTION, "seed": 0}


class RowFault(NamedTuple):
    """One fault of one row, as `d2vlm check-data` prints it."""

    row: str
    column: str
    value: str
    message: str


def features(preference: bool = False) -> datasets.Features:
    """Return the `datasets` types of a row.

    Args:
        preference (`bool`, *optional*, defaults to `False`):
            Whether to add the columns of a preference row (prompt, chosen, rejected and how they differ).

    Returns:
        `datasets.Features`: One entry per column, the video as `datasets.Video()`.
    """
    from datasets import Features, List, Value, Video

    _leave_out_broken_torchcodec()
    span = List(Value("float64"))
    types = {
        "string": Value("string"),
        "video": Video(),
        "seconds": Value("float64"),
        "integer": Value("int64"),
        "strings": List(Value("string")),
        "spans": List(span),
        "span lists": List(List(span)),
        "messages": List({"role": Value("string"), "content": Value("string")}),
    }
    columns = COLUMNS | PREFERENCE_COLUMNS if preference else COLUMNS
    return Features({name: types[kind] for name, kind in columns.items()})


def _leave_out_broken_torchcodec() -> None:
    """`datasets` imports torchcodec for every video that it writes, also where it has no FFmpeg and cannot load."""
    from datasets import config

    if config.TORCHCODEC_AVAILABLE:
        try:
            import torchcodec.decoders  # noqa: F401
        except (ImportError, OSError, RuntimeError):
            config.TORCHCODEC_AVAILABLE = False


def make_row(preference: bool = False, **columns: Any) -> dict[str, Any]:
    """Return a row that has every column: the given ones, and defaults for the others.

    Args:
        preference (`bool`, *optional*, defaults to `False`):
            Whether the row also has the preference columns.
        **columns:
            Values by column name; spans as any sequence of (start, end) in seconds.

    Returns:
        `dict`: The row, in the order of the schema. It is not validated.

    Raises:
        ValueError: If a name is not a column of the schema.
    """
    known = COLUMNS | PREFERENCE_COLUMNS if preference else COLUMNS
    unknown = sorted(set(columns) - set(known))
    if unknown:
        raise ValueError(
            f"Unknown columns {unknown}: a row has only the columns of the schema. Use some of {list(known)}"
            f"{'' if preference else ' (or `preference=True` for the preference columns)'}."
        )
    row = {}
    for name, kind in known.items():
        value = columns.get(name)
        if value is None:
            value = _DEFAULTS.get(name, {"string": "", "video": None, "seconds": 0.0}.get(kind, []))
        elif kind == "spans":
            value = [[float(start), float(end)] for start, end in value]
        row[name] = value
    return row


def validate_row(
    row: Mapping[str, Any], index: int | None = None, source: str | None = None, check_file: bool = False
) -> None:
    """Check one row against the schema and raise on its first fault.

    A row is a preference row if it has a `rejected` column. An event that does not occur is an answer without
    `<evi>` and `spans: []`, which is valid.

    Args:
        row (`Mapping`):
            The row.
        index (`int`, *optional*):
            Its number in the file, for the message.
        source (`str`, *optional*):
            The file it comes from, for the message.
        check_file (`bool`, *optional*, defaults to `False`):
            Whether a video given by path must exist.

    Raises:
        ValueError: With the row, the column, the value and what to do about it.
    """
    for fault in _faults(row, index, source, check_file):
        raise ValueError(f"{fault.row}, column '{fault.column}', value {fault.value}: {fault.message}")


def validate_rows(
    rows: Iterable[Mapping[str, Any]], source: str | None = None, check_file: bool = False
) -> list[RowFault]:
    """List every fault of many rows, ids that occur twice included.

    Args:
        rows (iterable of `Mapping`):
            The rows.
        source (`str`, *optional*):
            The file they come from, for the messages.
        check_file (`bool`, *optional*, defaults to `False`):
            Whether videos given by path must exist.

    Returns:
        `list[RowFault]`: (row, column, value, message) of each fault in order; empty if all is well.
    """
    faults, first_seen = [], {}
    for index, row in enumerate(rows):
        faults.extend(_faults(row, index, source, check_file))
        identity = row.get("id") if isinstance(row, Mapping) else None
        if isinstance(identity, str) and identity:
            if identity in first_seen:
                message = f"row {first_seen[identity]} has the same id. Give every row its own id."
                faults.append(RowFault(_label(row, index, source), "id", repr(identity), message))
            first_seen.setdefault(identity, index)
    return faults


def _label(row: Any, index: int | None, source: str | None) -> str:
    """Name a row in a message: its number, its id and its file, as far as they are known."""
    identity = row.get("id") if isinstance(row, Mapping) else None
    name = "Row" if index is None else f"Row {index}"
    name += f" (id '{identity}')" if isinstance(identity, str) and identity else ""
    return name + (f" of {source}" if source else "")


def _faults(row: Any, index: int | None, source: str | None, check_file: bool) -> Iterable[RowFault]:
    """Yield the faults of one row; the finer checks of a column are made only where its type is right."""
    label = _label(row, index, source)
    if not isinstance(row, Mapping):
        yield RowFault(label, "*", _short(row), "a row must be a mapping of column names to values. Load it as a dict.")
        return
    preference = "rejected" in row
    columns = COLUMNS | PREFERENCE_COLUMNS if preference else COLUMNS
    missing = [name for name in columns if name not in row]
    for name in missing:
        yield RowFault(
            label, name, "missing", f"the column is missing. Add it, or build rows with make_row({name}=...)."
        )
    wrong = set(missing)
    for name, kind in columns.items():
        message = None if name in wrong else _type_fault(row[name], kind)
        if message:
            wrong.add(name)
            yield RowFault(label, name, _short(row[name]), message)
    checks = [_video_faults(row, wrong, check_file), _text_faults(row, wrong), _span_faults(row, wrong)]
    checks += [_choice_faults(row, wrong)] + ([_preference_faults(row, wrong)] if preference else [])
    for check in checks:
        for name, message in check:
            yield RowFault(label, name, _short(row[name]), message)


def _short(value: Any, limit: int = 120) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple)) or (hasattr(value, "tolist") and getattr(value, "ndim", 0) > 0)


def _is_span(value: Any) -> bool:
    return _is_list(value) and len(value) == 2 and all(_is_number(time) for time in value)


def _type_fault(value: Any, kind: str) -> str | None:
    """Say what is wrong with the type of a value, or return None."""
    if kind == "string" and not isinstance(value, str):
        return f"must be a string, not {type(value).__name__}. Write it as text ('' if there is none)."
    if kind == "integer" and (not isinstance(value, Integral) or isinstance(value, bool)):
        return f"must be an integer, not {type(value).__name__}. Use a whole number (-1 for no option)."
    if kind == "seconds" and not (_is_number(value) and math.isfinite(value) and value > 0):
        return "must be a finite number of seconds above 0. Give the length of the video in seconds."
    if kind == "strings" and not (_is_list(value) and all(isinstance(item, str) for item in value)):
        return "must be a list of strings. Use [] if there are none."
    if kind == "spans" and not (_is_list(value) and all(_is_span(span) for span in value)):
        return "must be a list of [start, end] in seconds. Use [] if there are none."
    if kind == "span lists" and not (
        _is_list(value) and all(_is_list(spans) and all(_is_span(span) for span in spans) for spans in value)
    ):
        return "must be a list of lists of [start, end] in seconds, one list per annotator. Use [] if there are none."
    if kind == "messages":
        fits = _is_list(value) and len(value) > 0
        fits = fits and all(
            isinstance(turn, Mapping) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
            for turn in value
        )
        if not fits:
            return (
                "must be a list of {'role': str, 'content': str} with at least one turn. Keep contents plain strings."
            )
    return None


def _video_faults(row: Mapping[str, Any], wrong: set[str], check_file: bool) -> Iterable[tuple[str, str]]:
    if "video" in wrong:
        return
    video = row["video"]
    if isinstance(video, Mapping):  # how `Video(decode=False)` hands a file over
        if not video.get("path") and not video.get("bytes"):
            yield "video", "has neither a path nor bytes. Give one of them."
            return
        video = video["path"] if not video.get("bytes") else None
    if (isinstance(video, str) and not video.strip()) or (video is None and row["video"] is None):
        yield "video", "is empty. Give the path of the video file, its bytes or a decoder."
    elif check_file and isinstance(video, (str, os.PathLike)) and "://" not in str(video) and not os.path.isfile(video):
        yield "video", "is not a file. Correct the path, or give it relative to the working directory."


def _text_faults(row: Mapping[str, Any], wrong: set[str]) -> Iterable[tuple[str, str]]:
    for name in ("id", "task", "question", "answer"):
        if name not in wrong and not row[name].strip():
            yield name, "is empty. Every row needs one."
    for name in ("question", "answer"):
        if name in wrong:
            continue
        for token in (VIDEO_TOKEN, EVIDENCE_END_TOKEN):
            if token in row[name]:
                yield name, f"holds '{token}', which only the processor may write. Remove it from the text."
    counted = [("question", "question_spans"), ("answer", "spans")]
    for text, spans in counted:
        if text not in wrong and spans not in wrong:
            yield from _count_fault(row[text].count(EVIDENCE_TOKEN), row[spans], text, spans)
    if not {"captions", "spans"} & wrong and len(row["captions"]) not in (0, len(row["spans"])):
        yield (
            "captions",
            f"there are {len(row['captions'])} captions and {len(row['spans'])} spans. "
            "Give one caption per span, or [] for none.",
        )


def _count_fault(tokens: int, spans: Any, text: str, column: str) -> Iterable[tuple[str, str]]:
    if tokens != len(spans):
        yield (
            column,
            f"there are {len(spans)} spans and {tokens} '{EVIDENCE_TOKEN}' in '{text}'. "
            f"Write one '{EVIDENCE_TOKEN}' per span, in order.",
        )


def _span_faults(row: Mapping[str, Any], wrong: set[str]) -> Iterable[tuple[str, str]]:
    duration = math.inf if "duration" in wrong else row["duration"]
    for name in ("question_spans", "spans", "chosen_spans", "rejected_spans", "annotations"):
        if name in wrong or name not in row:
            continue
        spans = row[name] if name != "annotations" else [span for spans in row[name] for span in spans]
        for position, (start, end) in enumerate(spans):
            fault = _one_span_fault(float(start), float(end), float(duration))
            if fault:
                yield name, f"span {position} [{start}, {end}] {fault}"


def _one_span_fault(start: float, end: float, duration: float) -> str | None:
    if not (math.isfinite(start) and math.isfinite(end)):
        return "is not finite. Give both times in seconds."
    if start < 0:
        return "starts before the video. Times are seconds from the first frame, 0 or more."
    if end < start:
        return "ends before it starts. Write [start, end]."
    if end > duration + DURATION_SLACK:
        return f"ends after the video ({duration} s). Correct the span or 'duration'; both are seconds, not frames."
    return None


def _choice_faults(row: Mapping[str, Any], wrong: set[str]) -> Iterable[tuple[str, str]]:
    if {"options", "correct_option"} & wrong:
        return
    options, right = row["options"], row["correct_option"]
    if right != NO_OPTION and not 0 <= right < len(options):
        yield "correct_option", f"is not among the {len(options)} options. Use 0..{len(options) - 1}, or -1 for none."
    if len(set(options)) != len(options):
        yield "options", "holds the same option twice. Make every option different."


def _preference_faults(row: Mapping[str, Any], wrong: set[str]) -> Iterable[tuple[str, str]]:
    for name, spans in (("prompt", "question_spans"), ("chosen", "chosen_spans"), ("rejected", "rejected_spans")):
        if name in wrong:
            continue
        text = "\n".join(turn["content"] for turn in row[name])
        if not text.strip():
            yield name, "is empty. Every preference row needs one."
        for token in (VIDEO_TOKEN, EVIDENCE_END_TOKEN):
            if token in text:
                yield name, f"holds '{token}', which only the processor may write. Remove it from the text."
        if spans not in wrong:
            yield from _count_fault(text.count(EVIDENCE_TOKEN), row[spans], name, spans)
    if not {"chosen", "rejected", "chosen_spans", "rejected_spans"} & wrong:
        sides = [
            ([turn["content"] for turn in row[n]], [list(s) for s in row[f"{n}_spans"]]) for n in ("chosen", "rejected")
        ]
        if sides[0] == sides[1]:
            yield "rejected", "is the same as 'chosen', text and spans. Change one of them or leave the row out."
    if "factor" in wrong:
        return
    if row["factor"] not in FACTORS:
        yield "factor", f"is unknown. Use one of {list(FACTORS)}."
    elif "perturbation" not in wrong and row["perturbation"] not in PERTURBATIONS[row["factor"]]:
        allowed = list(PERTURBATIONS[row["factor"]])
        yield "perturbation", f"is not a perturbation of the factor '{row['factor']}'. Use one of {allowed}."


__all__ = [
    "COLUMNS",
    "EVIDENCE_END_TOKEN",
    "EVIDENCE_TOKEN",
    "FACTORS",
    "NO_OPTION",
    "PERTURBATIONS",
    "PREFERENCE_COLUMNS",
    "TASKS",
    "VIDEO_TOKEN",
    "RowFault",
    "features",
    "make_row",
    "validate_row",
    "validate_rows",
]
