# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""Rows of shapes for any model that reads and writes text: given moments as times, answers read back into spans.

Every model is scored from its text by the same rules, so that their figures compare. A time is a number, with or
without an `s` behind it; a moment is two of them with `-` or `to` between. What stands before `</evi>` is evidence,
and without that token the answer's own moments are.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..data.schema import EVIDENCE_TOKEN
from ..evaluation.parsing import DELIMITER, prediction_text
from ..evaluation.shapes_benchmark import score


_TIME = r"(\d+(?:\.\d+)?)\s*(?:s(?:ec(?:onds?)?)?\b)?"
_MOMENT = re.compile(rf"{_TIME}\s*(?:-|–|to)\s*{_TIME}", re.I)


def question_text(doc: Mapping[str, Any], lmms_eval_specific_kwargs: Mapping[str, Any] | None = None) -> str:
    """The question with its given moments as times, the options included.

    Args:
        doc (`Mapping`): A row of shapes.
        lmms_eval_specific_kwargs (`Mapping`, *optional*): `post_prompt` is put behind the question.

    Returns:
        `str`: What a model is asked.
    """
    text = doc["question"]
    for start, end in doc.get("question_spans") or []:
        text = text.replace(EVIDENCE_TOKEN, f"{start:.1f}s - {end:.1f}s", 1)
    return text + (lmms_eval_specific_kwargs or {}).get("post_prompt", "")


def video_path(doc: Mapping[str, Any], lmms_eval_specific_kwargs: Mapping[str, Any] | None = None) -> list[str]:
    """The file of a row's video.

    Args:
        doc (`Mapping`): A row of shapes.
        lmms_eval_specific_kwargs (`Mapping`, *optional*): `root`, the folder that relative paths start from.

    Returns:
        `list[str]`: One path.
    """
    return [str(Path((lmms_eval_specific_kwargs or {}).get("root", "."), doc["video"]))]


def target_text(doc: Mapping[str, Any]) -> str:
    """The right answer with its moments as times, for the log.

    Args:
        doc (`Mapping`): A row of shapes.

    Returns:
        `str`: The answer.
    """
    return question_text({"question": doc["answer"], "question_spans": doc["spans"]})


def read_answer(text: str) -> dict[str, Any]:
    """Read a model's text into what the pipeline returns.

    Args:
        text (`str`): Evidence, `</evi>` and an answer; or an answer alone.

    Returns:
        `dict`: `answer`, `evidence` and `references` with their places in the answer, in seconds.
    """
    before, found, answer = text.rpartition(DELIMITER)

    def moments(part: str) -> list[dict[str, Any]]:
        return [
            {"start": start, "end": end, "char_start": match.start(), "char_end": match.end()}
            for match in _MOMENT.finditer(part)
            for start, end in [sorted(map(float, match.groups()))]
        ]

    references = moments(answer)
    evidence = moments(before) if found else references
    return {
        "answer": answer,
        "evidence": [{"start": moment["start"], "end": moment["end"]} for moment in evidence],
        "references": references,
    }


def write_answer(result: Mapping[str, Any], evidence: bool) -> str:
    """Write a result of the pipeline as text.

    Args:
        result (`Mapping`): One result.
        evidence (`bool`): Whether the evidence and `</evi>` stand before the answer.

    Returns:
        `str`: What [`read_answer`] reads.
    """
    return prediction_text(result) if evidence else str(result["answer"])


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """Score one answer.

    Args:
        doc (`Mapping`): A row of shapes.
        results (`Sequence[str]`): The model's text.

    Returns:
        `dict`: The row's score under the name of its task, and with its task and video under `shapes_mean`.
    """
    _, (row,) = score([doc], [read_answer(results[0])])
    known = {"task": doc["task"], "video": doc["video"], "score": row["score"]}
    return {f"shapes_{doc['task']}": row["score"], "shapes_mean": known}


def mean_of_tasks(items: Sequence[Mapping[str, Any]]) -> float:
    """Mean over the tasks of the mean score of each.

    Args:
        items (`Sequence[Mapping]`): `task` and `score` of each row.

    Returns:
        `float`: Between 0 and 1.
    """
    scores: dict[str, list[float]] = {}
    for item in items:
        scores.setdefault(item["task"], []).append(item["score"])
    return float(np.mean([np.mean(values) for values in scores.values()]))


__all__ = [
    "mean_of_tasks",
    "process_results",
    "question_text",
    "read_answer",
    "target_text",
    "video_path",
    "write_answer",
]
