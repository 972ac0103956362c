# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""Factorized perturbations (paper, factorized preference data): a good answer broken in one known factor.

Grounding: `shift` a span, `add`, `drop` or `merge` events. Text: `tamper` with key information, `repeat`. Each is a
pure, seeded function of a row and gives a preference row, or an [`Impossible`] that says why there is none: never an
invalid row, an empty answer, or a rejected side that is as good as the chosen one for any annotator.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np

from ..model.spans_d2vlm import temporal_iou
from .clauses import EVIDENCE, join_clauses, text_factor
from .edits import EDITS, Case, Impossible, PerturbConfig
from .rewriting import Rewriter, rewriting_fault
from .schema import PERTURBATIONS, make_row, validate_row
from .vocabulary import Vocabulary


KINDS = tuple(kind for kinds in PERTURBATIONS.values() for kind in kinds)
FACTOR_OF = {kind: factor for factor, kinds in PERTURBATIONS.items() for kind in kinds}
_MAX_EDITS = 16  # candidate edits of one kind that are tried on a row


def _agreement(spans: np.ndarray, truth: np.ndarray) -> float:
    """Soft F1 of two sets of spans: the mean of best IoUs from either side, 1 for equal sets."""
    if not len(spans) or not len(truth):
        return float(len(spans) == len(truth))
    iou = temporal_iou(spans, truth)
    return float(iou.max(axis=1).sum() + iou.max(axis=0).sum()) / sum(iou.shape)


def _fault(case: Case, kind: str, answer: str, events: list[int], spans: list[list[float]]) -> str | None:
    """Checks the finished rejected side by its text alone: why it cannot be used, or `None`."""
    chosen, old = case.row["answer"], [list(span) for span in case.spans.values()]
    if answer.count(EVIDENCE) != len(spans) or not answer.strip():
        return "the clauses cannot be told apart"
    if FACTOR_OF[kind] == "text":
        if spans != old or text_factor(answer) == text_factor(chosen):
            return "the clauses cannot be told apart"
        return None
    common = [event for event in events if event in case.spans]
    places = [place for place, event in enumerate(events) if event in case.spans]
    if case.spans and text_factor(answer, places) != text_factor(chosen, common):
        return "the clauses cannot be told apart"
    truths, made = case.truths, np.array(spans).reshape(-1, 2)
    for truth in truths:
        score, best = _agreement(made, truth), _agreement(truths[0], truth)
        if score >= best - 1e-6 and (truth is truths[0] or score > case.config.shift_iou[1]):
            return "the rejected spans would be as good as the chosen ones"
    return None


def _preference_row(case: Case, kind: str, answer: str, spans: list, note: str, seed: int) -> dict[str, Any]:
    """The columns of DESIGN section 5 for a rejected answer."""
    row = {name: value for name, value in case.row.items() if name != "id"}
    sides = {
        "prompt": [{"role": "user", "content": row["question"]}],
        "chosen": [{"role": "assistant", "content": row["answer"]}],
        "rejected": [{"role": "assistant", "content": answer}],
    }
    sides |= {"chosen_spans": row["spans"], "rejected_spans": spans, "factor": FACTOR_OF[kind]}
    sides |= {"perturbation": kind, "edit": note, "seed": seed}
    return make_row(preference=True, id=f"{case.row['id']}/{kind}", **(row | sides))


def _rewritten(case: Case, seed: int, rewriter: Rewriter) -> dict[str, Any] | Impossible:
    """Tampering by a text-generation model."""
    answer = rewriter(case.row["answer"], case.row["question"], seed)
    spans = [list(span) for span in case.spans.values()]
    fault = rewriting_fault(case.row["answer"], answer)
    fault = fault or _fault(case, "tamper", answer, list(case.spans), spans)
    if fault:
        return Impossible(fault)
    return _preference_row(case, "tamper", answer, spans, "rewritten by a text-generation model", seed)


def perturb(
    row: Mapping[str, Any],
    kind: str,
    seed: int = 0,
    vocabulary: Vocabulary | None = None,
    config: PerturbConfig | None = None,
    rewriter: Rewriter | None = None,
) -> dict[str, Any] | Impossible:
    """Breaks one factor of a good answer and returns the preference row (paper, factorized preference data).

    For `shift`, `add`, `drop` and `merge` the text factor stays: the clauses of the events present on both sides, and
    of no event, are the same, in order ([`clauses.text_factor`]); an added, dropped or merged event brings or takes
    its own clause. An answer without events, broken by `add`, loses the words that deny the event. For `tamper` and
    `repeat` the spans stay.

    Args:
        row (`Mapping`):
            A valid SFT row.
        kind (`str`):
            One of `KINDS`.
        seed (`int`, *optional*, defaults to 0):
            Same row, kind, seed, vocabulary and config: same result.
        vocabulary (`Vocabulary`, *optional*):
            Mined from the data set. Without it nothing can be borrowed from other rows.
        config (`PerturbConfig`, *optional*):
            IoU bands and limits.
        rewriter (`Rewriter`, *optional*):
            A text-generation model that does the tampering.

    Returns:
        `dict` or `Impossible`: a preference row with the id `"{id}/{kind}"`, or why there is none.

    Raises:
        ValueError: If the row is not valid or the kind is unknown.
    """
    if kind not in EDITS:
        raise ValueError(f"kind is {kind!r}, which is no perturbation. Use one of {list(KINDS)}.")
    validate_row(row)
    case = Case(row, seed, vocabulary or Vocabulary(), config or PerturbConfig())
    if kind == "tamper" and rewriter is not None:
        return _rewritten(case, seed, rewriter)
    reason = None
    for edit in islice(EDITS[kind](case), _MAX_EDITS):
        if isinstance(edit, Impossible):
            reason = edit if reason is None else reason
            continue
        answer = join_clauses(edit.clauses)
        events = [event for clause in edit.clauses for event in clause.events]
        spans = [list(edit.spans[event]) for event in events]
        fault = _fault(case, kind, answer, events, spans)
        if fault is None:
            return _preference_row(case, kind, answer, spans, edit.note, seed)
        reason = Impossible(fault) if reason is None else reason
    return Impossible("nothing in the answer can be changed") if reason is None else reason


def shift(row: Mapping[str, Any], seed: int = 0, **options: Any) -> dict[str, Any] | Impossible:
    """Moves one span within the video, out of the IoU band of the truth; see [`perturb`]."""
    return perturb(row, "shift", seed, **options)


def add(row: Mapping[str, Any], seed: int = 0, **options: Any) -> dict[str, Any] | Impossible:
    """Adds an event that does not happen, with its clause; see [`perturb`]."""
    return perturb(row, "add", seed, **options)


def drop(row: Mapping[str, Any], seed: int = 0, **options: Any) -> dict[str, Any] | Impossible:
    """Leaves one of several events out, with its clause; see [`perturb`]."""
    return perturb(row, "drop", seed, **options)


def merge(row: Mapping[str, Any], seed: int = 0, **options: Any) -> dict[str, Any] | Impossible:
    """Makes one event of two that follow each other; see [`perturb`]."""
    return perturb(row, "merge", seed, **options)


def tamper(row: Mapping[str, Any], seed: int = 0, **options: Any) -> dict[str, Any] | Impossible:
    """Changes key information in the words of an answer; see [`perturb`]."""
    return perturb(row, "tamper", seed, **options)


def repeat(row: Mapping[str, Any], seed: int = 0, **options: Any) -> dict[str, Any] | Impossible:
    """Repeats a clause or a phrase of an answer; see [`perturb`]."""
    return perturb(row, "repeat", seed, **options)


def as_seconds(answer: str, spans: Sequence[Sequence[float]]) -> str:
    """Writes the times of an answer out.

    Args:
        answer (`str`): An answer with one `<evi>` per span.
        spans (`(K, 2)` floats): Seconds.

    Returns:
        `str`: e.g. `"The door opens at 12.0s - 15.0s."`.
    """
    parts = answer.split(EVIDENCE)
    times = [f"{start:.1f}s - {end:.1f}s" for start, end in spans]
    return "".join(part + time for part, time in zip(parts, [*times, ""], strict=True))


def multiple_choice(
    row: Mapping[str, Any], rejected: Sequence[Mapping[str, Any]], seed: int = 0
) -> dict[str, Any] | Impossible:
    """Makes a multiple-choice row of a good answer and its perturbed versions (the paper's "mcqa" variant).

    Args:
        row (`Mapping`):
            A valid SFT row.
        rejected (`Sequence[Mapping]`):
            Preference rows made from it; their rejected answers become the wrong options, times written out.
        seed (`int`, *optional*, defaults to 0):
            Of the order of the options.

    Returns:
        `dict` or `Impossible`: an SFT row with the id `"{id}/mcqa"` that asks which answer is right; or why there is
        none. Its answer names the option and, as evidence, the true spans.
    """
    if row["options"]:
        return Impossible("the row has options already")
    texts = [as_seconds(row["answer"], row["spans"])]
    texts += [as_seconds(side["rejected"][0]["content"], side["rejected_spans"]) for side in rejected]
    options = list(dict.fromkeys(texts))
    if len(options) < 2:
        return Impossible("there is no wrong option")
    if len(options) > 26:
        return Impossible("there are more options than letters")
    random.Random(seed).shuffle(options)
    letters = [f"({chr(65 + place)})" for place in range(len(options))]
    listed = "\n".join(f"{letter} {option}" for letter, option in zip(letters, options, strict=True))
    right = options.index(texts[0])
    answer = f"Best option: {letters[right]}" + (f" {row['answer']}" if row["spans"] else "")
    columns = {name: row[name] for name in ("video", "duration", "task", "source", "question_spans", "spans")}
    question = f"{row['question']}\nWhich answer is right?\n{listed}"
    columns |= {"question": question, "answer": answer, "options": options, "correct_option": right}
    return make_row(id=f"{row['id']}/mcqa", **columns, captions=row["captions"], annotations=row["annotations"])


def choice_preference(
    row: Mapping[str, Any], rejected: Sequence[Mapping[str, Any]], seed: int = 0
) -> dict[str, Any] | Impossible:
    """Makes a preference row that asks which answer is right; its rejected side names a perturbed one.

    Args:
        row, rejected, seed:
            As in [`multiple_choice`].

    Returns:
        `dict` or `Impossible`: a preference row with the id `"{id}/mcqa/tamper"`, or why there is none. The spans are
        the same on both sides; `edit` tells which perturbed answer was named.
    """
    choice = multiple_choice(row, rejected, seed)
    return choice if isinstance(choice, Impossible) else perturb(choice, "tamper", seed)


__all__ = [
    "FACTOR_OF",
    "KINDS",
    "Impossible",
    "PerturbConfig",
    "add",
    "as_seconds",
    "choice_preference",
    "drop",
    "merge",
    "multiple_choice",
    "perturb",
    "repeat",
    "shift",
    "tamper",
]
