# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""What the pipeline is asked: from whatever it was called with to one checked request per video."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .video_sources_d2vlm import flatten_videos, is_decoder


@dataclass(frozen=True)
class Request:
    """One video and what is asked about it; opaque to transformers, which would move and pad its parts.

    Args:
        video (`Any`): As the video processor takes it.
        questions (`list[str]`): At least one.
        spans (`list[list]`): Given moments of each question, in seconds.
        listed (`bool`): Whether the questions came as a list, and the answers go out as one.
        times (`dict`): `video_fps` and `timestamps` of this video, `None` for a file.
        position (`int`, *optional*): Which of many inputs it is.
    """

    video: Any
    questions: list[str]
    spans: list[Sequence]
    listed: bool
    times: dict[str, Any]
    position: int | None


@contextmanager
def naming(position: int | None) -> Iterator[None]:
    """Says in an error which of many inputs it is about."""
    try:
        yield
    except ValueError as error:
        if position is None:
            raise
        raise ValueError(f"input {position}: {error}") from error


def join_inputs(
    video: Any, question: Any, spans: Any
) -> dict[str, Any] | list[dict[str, Any]] | Iterator[dict[str, Any]]:
    """Put videos, questions and given moments together.

    Args:
        video (`Any`): One video, a dict with `video` and `question`, or a list, a data set or a generator of those.
        question (`str` or `list[str]`, *optional*): For the inputs that have none: one for all, or one for each of a
            list of videos; of a single video, all that is asked.
        spans (`list`, *optional*): Given moments of the question, or of each question.

    Returns:
        One `dict`, a list of them, or an iterator over them, with `video`, `question`, `question_spans` and what else
        the inputs had.

    Raises:
        ValueError: If it is not clear which question belongs to which video.
    """
    listed = isinstance(question, list | tuple)
    videos = _as_list(video)
    if videos is not None:
        if not listed:
            question, spans = [question] * len(videos), [spans] * len(videos)
        spans = [None] * len(videos) if spans is None else spans
        for name, values in (("questions", question), ("lists of question_spans", spans)):
            if len(values) != len(videos):
                raise ValueError(
                    f"{len(values)} {name} for a list of {len(videos)} videos: in a list each video has its own. Pass "
                    'the video itself to ask several questions about it, or dicts {"video": ..., "question": [...]}.'
                )
        return [_as_item(*parts) for parts in zip(videos, question, spans, strict=True)]
    if not _is_stream(video):
        return _as_item(video, question, spans)
    if listed:
        raise ValueError(
            f"{len(question)} questions beside a stream of videos: nothing says which belongs to which. Let the stream "
            'yield dicts {"video": ..., "question": ...}.'
        )
    # What can be indexed need not say when it ends
    indexed = hasattr(video, "__getitem__") and hasattr(video, "__len__")
    source = (video[i] for i in range(len(video))) if indexed else video
    return (_as_item(entry, question, spans) for entry in source)


def _as_item(video: Any, question: Any, spans: Any) -> dict[str, Any]:
    """An input with a question of its own keeps it and its spans."""
    is_item = isinstance(video, Mapping) and ("video" in video or not {"bytes", "path"} & set(video))
    item = dict(video) if is_item else {"video": video}
    if item.get("question") is None:
        item["question"] = question
        item["question_spans"] = spans if item.get("question_spans") is None else item["question_spans"]
    return item


def _as_list(video: Any) -> list[Any] | None:
    """The videos of a list or of a batch of frames; `None` if this is one video (a list of pictures is) or a stream."""
    many = isinstance(video, list | tuple) or (isinstance(video, np.ndarray | torch.Tensor) and video.ndim == 5)
    videos = flatten_videos(video) if many else []
    return videos if many and not (len(videos) == 1 and videos[0] is video) else None


def _is_stream(video: Any) -> bool:
    """Whether this is a data set or a generator of videos, rather than a video."""
    one = isinstance(video, str | bytes | bytearray | memoryview | os.PathLike | Mapping | np.ndarray | torch.Tensor)
    if one or isinstance(video, list | tuple) or hasattr(video, "read") or is_decoder(video):
        return False
    return isinstance(video, Iterable) or (hasattr(video, "__getitem__") and hasattr(video, "__len__"))


def make_request(item: Mapping[str, Any], times: Mapping[str, Any], position: int | None = None) -> Request:
    """Check one input.

    Args:
        item (`dict`): See `join_inputs`; it may have `video_fps` or `timestamps` of its own.
        times (`dict`): `video_fps` and `timestamps` of inputs that have none.
        position (`int`, *optional*): Which of many inputs it is.

    Raises:
        ValueError: If there is no video or no question, or the given moments and `<evi>` do not match.
    """
    if item.get("video") is None:
        raise ValueError(f"the input has the keys {sorted(item)} but no 'video': answers are found in one. Add it.")
    if (videos := _as_list(item["video"])) is not None:
        raise ValueError(
            f"'video' holds {len(videos)} videos: a question is about one. Make an input of each, or pass the pictures "
            "of one video as a list."
        )
    question, spans = item.get("question"), item.get("question_spans")
    listed = isinstance(question, list | tuple)
    questions = list(question) if listed else [question]
    if not questions or not all(isinstance(asked, str) for asked in questions):
        raise ValueError(
            f"question={question!r} asks nothing: it must be words, or a list of such. Pass question='When ...?', or a "
            "dict with the keys 'video' and 'question'."
        )
    spans = [[]] * len(questions) if spans is None else list(spans) if listed else [spans]
    if len(spans) != len(questions):
        raise ValueError(
            f"{len(spans)} lists of question_spans for {len(questions)} questions: each question has its own. Pass one "
            "list a question, [] where no moment is given."
        )
    spans = [[] if given is None else given for given in spans]
    for asked, given in zip(questions, spans, strict=True):
        _check_tokens(asked, given)
    own = {name: item.get(name) if item.get(name) is not None else value for name, value in times.items()}
    return Request(item["video"], questions, spans, listed, own, position)


def _check_tokens(question: str, spans: Sequence) -> None:
    """The two tokens that somebody may write in the belief that they do something."""
    if "<video>" in question:
        raise ValueError(
            f"the question {question!r} holds <video>, the token that frames stand in for: the video is put in by "
            "itself. Leave it out."
        )
    if "<evi>" in question and not len(spans):
        raise ValueError(
            f"the question {question!r} holds <evi> without a span: it stands for a moment of the video. Pass "
            "question_spans=[[start, end]] in seconds, one for each <evi>, or write something else."
        )


__all__ = ["Request", "join_inputs", "make_request", "naming"]
