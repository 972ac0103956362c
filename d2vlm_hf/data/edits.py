# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""The six ways to break an answer: each yields candidate edits of its clauses and spans, in a random, seeded order.

[`perturb.perturb`] takes the first candidate that stands up to its checks.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import combinations, islice, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from ..model.spans_d2vlm import temporal_iou
from .clauses import (
    EVIDENCE,
    WORD,
    Clause,
    canonical,
    extend_list,
    insert_clause,
    remove_event,
    restate,
    split_clauses,
    without_evidence,
    words,
)


if TYPE_CHECKING:
    from .vocabulary import Entry, Vocabulary

# Tasks whose answers list different events, each in its own words.
DESCRIBING_TASKS = ("dvc", "slc")
# Tasks that ask for events: an answer without any says that there is none.
GROUNDING_TASKS = ("tvg", "epm", "tal", "evs", "vhd", "tem", "gvq", *DESCRIBING_TASKS)


@dataclass(frozen=True)
class Impossible:
    """Why a kind of perturbation cannot be had from a row; false in a condition.

    Args:
        reason (`str`): One of a small number of texts, fit for counting.
    """

    reason: str

    def __bool__(self) -> bool:
        return False


@dataclass(frozen=True)
class PerturbConfig:
    """How strong a perturbation is.

    Args:
        shift_iou (`tuple[float, float]`, *optional*, defaults to `(0.0, 0.3)`):
            Lowest and highest IoU of a shifted span with the true one. The highest also holds for every other span of
            every annotator.
        merge_iou (`tuple[float, float]`, *optional*, defaults to `(0.0, 0.7)`):
            Lowest and highest IoU of a merged span with each of the two it covers.
        add_overlap (`float`, *optional*, defaults to 0.1):
            Highest share of an added span, or of a true one, that the two have in common.
        tolerance (`float`, *optional*, defaults to 1.0):
            Seconds by which a boundary must move at least; nearer than that is as good as the truth.
        repeats (`tuple[int, int]`, *optional*, defaults to `(2, 4)`):
            Fewest and most repetitions of `repeat`.
        candidates (`int`, *optional*, defaults to 64):
            Random spans among which one that satisfies all limits is looked for.
    """

    shift_iou: tuple[float, float] = (0.0, 0.3)
    merge_iou: tuple[float, float] = (0.0, 0.7)
    add_overlap: float = 0.1
    tolerance: float = 1.0
    repeats: tuple[int, int] = (2, 4)
    candidates: int = 64

    def __post_init__(self) -> None:
        for name in ("shift_iou", "merge_iou"):
            low, high = getattr(self, name)
            if not 0.0 <= low <= high < 1.0:
                raise ValueError(
                    f"{name} is {(low, high)}: a band of IoU runs from 0 to below 1, and at 1 the rejected side would "
                    "be the truth. Pass (lowest, highest)."
                )
        if not 0.0 <= self.add_overlap < 1.0:
            raise ValueError(f"add_overlap is {self.add_overlap}: it is a share of a span. Pass a number in [0, 1).")
        if self.tolerance < 0.0:
            raise ValueError(
                f"tolerance is {self.tolerance}: a distance in seconds cannot be negative. Pass 0 or more."
            )
        if not 1 <= self.repeats[0] <= self.repeats[1]:
            raise ValueError(f"repeats is {self.repeats}: something must be repeated. Pass (fewest, most), from 1 on.")
        if self.candidates < 1:
            raise ValueError(f"candidates is {self.candidates}: at least one span must be tried. Pass 1 or more.")


@dataclass(frozen=True)
class Edit:
    """A rejected answer in the making: events 0..K-1 are the row's, higher ones are new."""

    clauses: list[Clause]
    spans: Mapping[int, tuple[float, float]]
    note: str


class Case:
    """One row taken apart, with its own source of chance."""

    def __init__(self, row: Mapping[str, Any], seed: int, vocabulary: Vocabulary, config: PerturbConfig):
        self.row, self.config, self.vocabulary = row, config, vocabulary
        self.random = random.Random(seed)
        self.clauses = split_clauses(row["answer"])
        self.spans = {k: (float(start), float(end)) for k, (start, end) in enumerate(row["spans"])}
        self.duration = float(row["duration"])
        # The row's own spans first, then those of each further annotator.
        self.truths = [np.array(list(self.spans.values())).reshape(-1, 2)]
        self.truths += [np.asarray(spans, np.float64).reshape(-1, 2) for spans in row["annotations"] if len(spans)]
        self.all_spans = np.concatenate(self.truths)

    @property
    def denies(self) -> bool:
        """Whether the answer says that what is asked for does not happen."""
        task = self.row["task"]
        asked = task in GROUNDING_TASKS or bool(self.vocabulary.entries.get(task))
        return asked and not self.spans and not self.row["options"]

    def shuffled(self, items: Any) -> list:
        items = list(items)
        self.random.shuffle(items)
        return items

    def starts(self, room: float) -> np.ndarray:
        """Random start times between 0 and `room` seconds, to the hundredth, `(candidates,)`."""
        times = [self.random.uniform(0.0, room) for _ in range(self.config.candidates)]
        return np.floor(np.array(times) * 100) / 100


def _seconds(span: Any) -> str:
    return f"{span[0]:.1f}-{span[1]:.1f} s"


# --- grounding -------------------------------------------------------------------------------------------------------


def shift_edits(case: Case) -> Iterator[Edit | Impossible]:
    """One span moves elsewhere in the video, its length kept; half of the candidates stay within reach of the truth."""
    low, high = case.config.shift_iou
    if not case.spans:
        yield Impossible("the answer has no event")
    for event in case.shuffled(case.spans):
        start, end = case.spans[event]
        length = end - start
        starts = case.starts(max(case.duration - length, 0.0))
        iou = np.array([case.random.uniform(low, high) for _ in starts])
        near = start + np.where(starts > start, 1, -1) * length * (1 - iou) / (1 + iou)
        starts = np.where(np.arange(len(starts)) % 2 == 0, np.round(near, 2), starts) + 0.0  # no -0.0
        moved = np.stack([starts, np.round(starts + length, 3)], axis=1)  # (candidates, 2)
        overlap = temporal_iou(moved, [case.spans[event]])[:, 0]
        fits = (starts >= 0) & (moved[:, 1] <= case.duration) & (np.abs(starts - start) >= case.config.tolerance)
        fits &= (overlap >= low) & (overlap <= high) & (temporal_iou(moved, case.all_spans).max(axis=1) <= high)
        if not fits.any():
            yield Impossible("no room to shift a span to")
            continue
        best = case.random.choice(np.flatnonzero(fits).tolist())
        new = (float(moved[best, 0]), float(moved[best, 1]))
        note = f"span {event + 1} shifted {_seconds((start, end))} -> {_seconds(new)} (IoU {overlap[best]:.2f})"
        yield Edit(case.clauses, {**case.spans, event: new}, note)


def drop_edits(case: Case) -> Iterator[Edit | Impossible]:
    """One event is missing, with its clause."""
    if len(case.spans) < 2:
        yield Impossible("there is only one event to drop" if case.spans else "the answer has no event")
        return
    for event in case.shuffled(case.spans):
        clauses = remove_event(case.clauses, event)
        if clauses is None:
            yield Impossible("the events share one clause")
        else:
            yield Edit(clauses, case.spans, f"span {event + 1} dropped ({_seconds(case.spans[event])})")


def merge_edits(case: Case) -> Iterator[Edit | Impossible]:
    """Two events that follow each other become one that lasts from the first to the second; one clause is lost."""
    if len(case.spans) < 2:
        yield Impossible("there is only one event to merge" if case.spans else "the answer has no event")
        return
    low, high = case.config.merge_iou
    order = sorted(case.spans, key=lambda event: case.spans[event])
    for pair in case.shuffled(pairwise(order)):
        kept, lost = case.shuffled(pair)
        both = np.array([case.spans[kept], case.spans[lost]])
        hull = (float(both[:, 0].min()), float(both[:, 1].max()))
        overlap = temporal_iou([hull], both)[0]
        change = np.abs(both - np.array(hull)).max(axis=1).min()
        elsewhere = temporal_iou([hull], case.all_spans).max()
        if overlap.min() < low or max(overlap.max(), elsewhere) > high or change < case.config.tolerance:
            yield Impossible("the merged span would lie outside its IoU band")
            continue
        clauses = remove_event(case.clauses, lost)
        if clauses is None:
            yield Impossible("the events share one clause")
            continue
        spans, ious = (f"{_seconds(case.spans[k])}" for k in sorted(pair)), sorted(overlap.tolist())
        note = f"spans {min(pair) + 1} and {max(pair) + 1} merged {' + '.join(spans)} -> {_seconds(hull)} "
        yield Edit(clauses, {**case.spans, kept: hull}, note + f"(IoU {ious[0]:.2f} and {ious[1]:.2f})")


def _free_span(case: Case, length: float) -> tuple[float, float] | None:
    """A span that has next to nothing in common with any true one; shorter than asked for where there is no room."""
    for part in (1.0, 0.5, 0.25):
        size = round(min(length * part, case.duration / 2), 2)
        if size < case.config.tolerance:
            return None
        starts = case.starts(case.duration - size)
        spans = np.stack([starts, np.round(starts + size, 3)], axis=1)  # (candidates, 2)
        true = case.all_spans[None]  # (1, K, 2)
        shared = np.minimum(spans[:, None, 1], true[..., 1]) - np.maximum(spans[:, None, 0], true[..., 0])
        shorter = np.minimum(size, true[..., 1] - true[..., 0])  # (1, K)
        # An instant has no length to share; it must lie outside.
        limit = np.where(shorter > 0, shorter * case.config.add_overlap, -1e-9)
        fits = (shared <= limit).all(axis=1) & (spans[:, 1] <= case.duration)
        if fits.any():
            best = spans[int(np.argmax(fits))]
            return float(best[0]), float(best[1])
    return None


def add_edits(case: Case) -> Iterator[Edit | Impossible]:
    """One event more than there are: in the list of a clause, or with a clause of another event of the data set."""
    stated = [clause for clause in case.clauses if clause.events]
    if not case.spans and not case.denies:
        yield Impossible("the answer has no event")
        return
    several = len({canonical(clause.body) for clause in stated}) > 1 or case.row["task"] in DESCRIBING_TASKS
    entries = _foreign(case) if several or not stated else [None]
    if not entries:
        yield Impossible("no clause of another event fits")
    listed = case.shuffled(at for at, clause in enumerate(case.clauses) if clause.listed)
    if entries == [None] and not listed:
        yield Impossible("the events share one clause")
        return
    new = len(case.spans)
    for entry in entries[:4]:
        if case.spans:
            start, end = case.spans[case.random.randrange(new)]
        else:
            start, end = entry.start, entry.end
        length = max((end - start) * case.random.uniform(0.6, 1.4), 2 * case.config.tolerance)
        span = _free_span(case, length)
        if span is None:
            yield Impossible("no room for another span")
            continue
        if entry is None:
            at = listed[0]
            place = sum(case.spans[event][0] <= span[0] for event in case.clauses[at].events)
            clauses = extend_list(case.clauses, at, place, new)
        elif not stated:  # what denies the event gives way to what claims it
            clauses = [restate(Clause("", case.row["answer"], ".", (0,), True), entry.body)]
        else:
            later = (at for at, c in enumerate(case.clauses) if c.events and case.spans[c.events[0]][0] > span[0])
            clauses = insert_clause(case.clauses, next(later, len(case.clauses)), entry.body, new)
        yield Edit(clauses, {**case.spans, new: span}, f"span added at {_seconds(span)}" + _quoted(entry))


def _quoted(entry: Entry | None) -> str:
    return f" ('{without_evidence(entry.body)}')" if entry else ""


def _foreign(case: Case) -> list[Entry]:
    """Clauses of events of other videos that this answer does not have; for a denial, the nearest to its question."""
    stated = [clause for clause in case.clauses if clause.events]
    leading = stated[0].leading if stated else None
    about = None if stated else case.row["question"]
    said = {canonical(clause.body) for clause in stated}
    found = case.vocabulary.borrow(case.random, case.row, leading, about=about)
    return [entry for entry in found if entry.body not in said and without_evidence(entry.body)]


# --- text ------------------------------------------------------------------------------------------------------------


def tamper_edits(case: Case) -> Iterator[Edit | Impossible]:
    """Key information is wrong: another option, events that swap their words, a swapped attribute, a foreign clause."""
    if case.row["options"] and case.row["correct_option"] >= 0:
        yield from _other_option(case)
    if case.denies:  # no other denial is known to be wrong
        yield Impossible("the answer has no event")
        return
    for strategy in case.shuffled((_exchange, _attribute, _foreign_clause)):
        yield from islice(strategy(case), 4)
    yield Impossible("nothing in the answer can be tampered with")


def _other_option(case: Case) -> Iterator[Edit]:
    options, right = list(case.row["options"]), case.row["correct_option"]
    own, text = chr(65 + right), options[right].strip(" .")
    letter = re.compile(rf"\({own}\)|(?<![\w(]){own}(?=[.):]|\s*$)")
    stated = re.compile(rf"(?<!\w){re.escape(text)}(?!\w)", re.I)
    for wrong in case.shuffled(j for j in range(len(options)) if j != right):
        swap = {own: chr(65 + wrong), text: options[wrong].strip(" .")}
        clauses, count = [], 0
        for clause in case.clauses:
            body, named = letter.subn(lambda match, new=swap[own]: match.group().replace(own, new), clause.body)
            body, said = stated.subn(
                lambda match, new=swap[text]: new[:1].upper() + new[1:] if match.group()[:1].isupper() else new, body
            )
            clauses.append(replace(clause, body=body))
            count += named + said
        if count:
            yield Edit(clauses, case.spans, f"option '{options[right]}' -> '{options[wrong]}'")


def _exchange(case: Case) -> Iterator[Edit]:
    """Two events that do not overlap swap their words."""
    stated = [at for at, clause in enumerate(case.clauses) if clause.listed]
    for i, j in case.shuffled(combinations(stated, 2)):
        a, b = case.clauses[i], case.clauses[j]
        spans = [[case.spans[event] for event in clause.events] for clause in (a, b)]
        if a.leading != b.leading or not case.vocabulary.contradicts(a.body, b.body):
            continue
        if temporal_iou(*spans).max() > case.config.shift_iou[1]:
            continue
        clauses = list(case.clauses)
        clauses[i], clauses[j] = restate(a, b.body), restate(b, a.body)
        yield Edit(clauses, case.spans, f"words of spans {a.events[0] + 1} and {b.events[0] + 1} exchanged")


def _attribute(case: Case) -> Iterator[Edit]:
    """One word becomes another that excludes it: a colour, a direction, a number."""
    stated = {canonical(clause.body) for clause in case.clauses}
    places = [(at, match) for at, clause in enumerate(case.clauses) for match in WORD.finditer(clause.body)]
    for at, match in case.shuffled(places):
        clause, word = case.clauses[at], match.group()
        before, after = clause.body[: match.start()], clause.body[match.end() :]
        others = case.vocabulary.alternatives(word.lower())
        if before.endswith("<") or not others:  # inside `<evi>`
            continue
        last, first = ([None, *words(before)][-1], [*words(after), None][0])
        others = [other for other in others if case.vocabulary.fluent(last, other, first)]
        if not others:
            continue
        new = others[case.random.randrange(len(others))]
        new = new.capitalize() if word[:1].isupper() else new
        article = "an" if new[:1].lower() in "aeiou" else "a"
        before = re.sub(r"\b([Aa])n?(\s+)$", lambda match, article=article: match[1] + article[1:] + match[2], before)
        clauses = list(case.clauses)
        clauses[at] = replace(clause, body=before + new + after)
        if canonical(clauses[at].body) not in stated:
            yield Edit(clauses, case.spans, f"'{word}' -> '{new}'" + _of_events(clause))


def _of_events(clause: Clause) -> str:
    return f" at span {clause.events[0] + 1}" if clause.events else ""


def _foreign_clause(case: Case) -> Iterator[Edit]:
    """An event gets the words of an event of another video."""
    for at in case.shuffled(at for at, clause in enumerate(case.clauses) if clause.listed):
        for entry in _foreign(case):
            # Where the event is, the words must be wrong: for every event of the answer, as they may overlap in time.
            if not all(case.vocabulary.contradicts(c.body, entry.body) for c in case.clauses if c.events):
                continue
            clauses = list(case.clauses)
            clauses[at] = restate(case.clauses[at], entry.body)
            old, new = without_evidence(case.clauses[at].body), without_evidence(entry.body)
            yield Edit(clauses, case.spans, f"'{old}' -> '{new}'" + _of_events(case.clauses[at]))


def repeat_edits(case: Case) -> Iterator[Edit | Impossible]:
    """A clause or a phrase comes again and again, without its evidence, so that the spans stay as they are."""
    said = [at for at, clause in enumerate(case.clauses) if words(clause.body)]
    if not said:
        yield Impossible("the answer has no words to repeat")
    for at in case.shuffled(said):
        times = case.random.randint(*case.config.repeats)
        ways = case.shuffled((_stutter, _loop))
        yield from (edit for edit in (way(case, at, times) for way in ways) if edit is not None)


def _stutter(case: Case, at: int, times: int) -> Edit | None:
    """Repeats two to four words in the middle of a clause."""
    clause = case.clauses[at]
    runs = re.finditer(r"[^<>()]+", clause.body.replace(EVIDENCE, "<" * len(EVIDENCE)))
    runs = [(run.start(), list(WORD.finditer(run.group()))) for run in runs]
    runs = [(offset, found) for offset, found in runs if len(found) >= 2]
    if not runs:
        return None
    offset, found = runs[case.random.randrange(len(runs))]
    size = case.random.randint(2, min(4, len(found)))
    first = case.random.randrange(len(found) - size + 1)
    start, end = offset + found[first].start(), offset + found[first + size - 1].end()
    phrase = clause.body[start:end]
    clauses = list(case.clauses)
    clauses[at] = replace(clause, body=clause.body[:end] + f" {phrase}" * times + clause.body[end:])
    return Edit(clauses, case.spans, f"'{phrase}' repeated {times} times")


def _loop(case: Case, at: int, times: int) -> Edit | None:
    """Repeats the words of a clause as sentences of their own."""
    text = without_evidence(case.clauses[at].body)
    if not text:
        return None
    last = at
    while last + 1 < len(case.clauses) and not case.clauses[last + 1].opens:
        last += 1
    clauses = list(case.clauses)
    if not clauses[last].suffix.strip():
        clauses[last] = replace(clauses[last], suffix=".")
    sentence = Clause(" ", text[:1].upper() + text[1:], ".", (), True)
    clauses[last + 1 : last + 1] = [sentence] * times
    return Edit(clauses, case.spans, f"'{text}' repeated {times} times")


EDITS = {
    "shift": shift_edits,
    "add": add_edits,
    "drop": drop_edits,
    "merge": merge_edits,
    "tamper": tamper_edits,
    "repeat": repeat_edits,
}


__all__ = ["DESCRIBING_TASKS", "EDITS", "Case", "Edit", "Impossible", "PerturbConfig"]
