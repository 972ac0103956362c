# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""What a data set itself offers for wrong answers: clauses of other events, and words that exclude one another."""

from __future__ import annotations

import random
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable, Mapping
from itertools import combinations, pairwise
from typing import Any, NamedTuple

from ..model.spans_d2vlm import temporal_iou
from .clauses import STOP_WORDS, canonical, content_words, split_clauses, words


# Words of one family exclude one another. The families only say that two words contradict; which of them are used is
# decided by the words that occur in the data set.
FAMILIES = tuple(
    tuple(words.split())
    for words in (
        "red green blue yellow purple orange cyan pink brown black white grey gray",
        "circle square triangle star cross ring rectangle hexagon",
        "left right",
        "up down",
        "upwards downwards",
        "leftwards rightwards",
        "top bottom",
        "inside outside",
        "grows shrinks",
        "bigger smaller",
        "larger smaller",
        "large small",
        "big small",
        "tall short",
        "opens closes",
        "open close",
        "opening closing",
        "enters leaves",
        "man woman boy girl dog cat",
        "men women",
        "he she",
        "one two three four five six",
        "once twice",
        "first second third fourth",
        "quickly slowly",
        "before after",
        "morning evening",
        "indoors outdoors",
    )
)

_SAME_TIME = 0.3  # events that overlap by a higher IoU may be one event in other words
_CLOSED_WORLD = 300  # with fewer words than this, clauses that share none may still describe one event
_MAX_CLAUSES = 12  # of one answer that are compared with each other
# A pair of words counts as exclusive after so many pairs of options, or of events. On the shapes data sets true pairs
# tell one event twice in at most 0.7 % of the cases (other objects at the same time), synonyms in 13 % and more.
_MIN_OPTIONS, _MIN_EVENTS, _MAX_SAME = 2, 25, 0.02
_MAX_PAIRS = 100_000  # pairs of neighbouring words that are remembered
_RECENT_VIDEOS = 512  # whose clauses are remembered, to find one event told in two ways


class Entry(NamedTuple):
    """A clause of one event that other answers may borrow."""

    body: str
    leading: bool
    video: str
    start: float
    end: float


class Vocabulary:
    """Clauses of events by task, and words that exclude each other, mined from the rows of a data set.

    Two words exclude each other if two events of one video are told in the same words but for these two ("a red
    circle appears", "a blue circle appears"), or if they are what distinguishes two options of a choice. Words that
    tell the *same* event in two rows ("appears", "shows up") are taken for synonyms and never swapped.
    """

    def __init__(
        self,
        entries: Mapping[str, Iterable[Entry]] | None = None,
        exclusive: Mapping[str, Iterable[str]] | None = None,
        known: Collection[str] = (),
        pairs: Collection[str] = (),
    ):
        self.entries = {task: list(values) for task, values in (entries or {}).items()}
        self.exclusive = {word: tuple(others) for word, others in (exclusive or {}).items()}
        self.known, self.pairs = frozenset(known), frozenset(pairs)
        self._content: dict[str, list[set[str]]] = {}
        self._alternatives: dict[str, tuple[str, ...]] = {}

    @classmethod
    def from_rows(cls, rows: Iterable[Mapping[str, Any]], limit: int = 2000, seed: int = 0) -> Vocabulary:
        """Reads a data set once and keeps a bounded sample of it.

        Args:
            rows (iterable of rows):
                SFT rows in the schema of this package.
            limit (`int`, *optional*, defaults to 2000):
                Clauses kept per task, drawn evenly from all rows.
            seed (`int`, *optional*, defaults to 0):
                Of the draw.

        Returns:
            `Vocabulary`: the same for the same rows in the same order.
        """
        miner = _Miner(limit, seed)
        for row in rows:
            miner.read(row)
        return cls(miner.entries, miner.exclusive(), miner.known, miner.pairs)

    def alternatives(self, word: str) -> tuple[str, ...]:
        """Words that cannot be true where `word` is, those that the data set uses if there are any.

        Args:
            word (`str`): A word in small letters.

        Returns:
            `tuple[str, ...]`: in a fixed order; empty if none is known.
        """
        if word not in self._alternatives:
            kin = [other for family in FAMILIES if word in family for other in family if other != word]
            used = [other for other in kin if other in self.known] or kin
            if word in ("grey", "gray"):
                used = [other for other in used if other not in ("grey", "gray")]
            self._alternatives[word] = tuple(dict.fromkeys([*self.exclusive.get(word, ()), *used]))
        return self._alternatives[word]

    def _contents(self, task: str) -> list[set[str]]:
        if task not in self._content:
            self._content[task] = [content_words(entry.body) for entry in self.entries[task]]
        return self._content[task]

    def fluent(self, before: str | None, word: str, after: str | None) -> bool:
        """Whether the data set has a word in such company, so that "shows up" is not turned into "shows down".

        Args:
            before (`str`, *optional*): The word before it, in small letters.
            word (`str`): The word.
            after (`str`, *optional*): The word after it.

        Returns:
            `bool`: true too if nothing is known about the data set.
        """
        company = [f"{before} {word}"] if before else []
        company += [f"{word} {after}"] if after else []
        return not self.pairs or all(pair in self.pairs for pair in company)

    def contradicts(self, a: str, b: str) -> bool:
        """Whether a clause differs from another in key information, so that it cannot pass for it.

        Args:
            a (`str`): Body of a clause.
            b (`str`): Body of another clause.

        Returns:
            `bool`: true if each has a word that excludes one of the other, or if they have next to nothing in common
            (which says little in a world of few words, and does not count there).
        """
        mine, other = set(words(a)), set(words(b))
        for word in mine - other - STOP_WORDS:
            if any(alternative in other and alternative not in mine for alternative in self.alternatives(word)):
                return True
        if 0 < len(self.known) < _CLOSED_WORLD:
            return False
        left, right = content_words(a), content_words(b)
        return min(len(left), len(right)) >= 2 and len(left & right) * 5 <= len(left | right)

    def borrow(
        self,
        rng: random.Random,
        row: Mapping[str, Any],
        leading: bool | None = None,
        tries: int = 32,
        about: str | None = None,
    ) -> list[Entry]:
        """Draws clauses of events of other videos, from answers to the same task.

        Args:
            rng (`random.Random`): Source of chance.
            row (`Mapping`): The row to borrow for: its task, and the video that is left out.
            leading (`bool`, *optional*): Whether the clauses begin with their evidence; both kinds by default.
            tries (`int`, *optional*, defaults to 32): How many to draw.
            about (`str`, *optional*): A text; the clauses nearest to it are taken, the nearest first.

        Returns:
            `list[Entry]`: candidates, in the order in which to try them; may be empty.
        """
        pool, video = self.entries.get(row["task"], []), video_name(row["video"])
        if about is None:
            drawn = [pool[rng.randrange(len(pool))] for _ in range(tries)] if pool else []
        else:
            topic, known = content_words(about), self._contents(row["task"]) if pool else []
            nearness = [(len(topic & said) - 0.5 * len(said - topic), rng.random()) for said in known]
            best = sorted(range(len(pool)), key=nearness.__getitem__, reverse=True)
            drawn = [pool[place] for place in best[:tries]]
        drawn = [entry for entry in dict.fromkeys(drawn) if not (video and entry.video == video)]
        drawn = [entry for entry in drawn if leading is None or entry.leading == leading]
        return drawn


class _Miner:
    """One pass over the rows, with memory that does not grow with their number."""

    def __init__(self, limit: int, seed: int):
        self.entries: dict[str, list[Entry]] = {}
        self.known: set[str] = set()
        self.pairs: set[str] = set()
        self._limit, self._random = limit, random.Random(seed)
        self._seen: Counter = Counter()
        self._options: Counter = Counter()  # pairs of words that tell two options apart
        self._apart: Counter = Counter()  # pairs of words that tell two events apart
        self._same: Counter = Counter()  # pairs of words that tell one event twice
        self._recent: OrderedDict[str, list] = OrderedDict()

    def read(self, row: Mapping[str, Any]) -> None:
        video, clauses = video_name(row["video"]), []
        for clause in split_clauses(row["answer"]):
            said = words(clause.body)
            if len(self.pairs) < _MAX_PAIRS:
                self.known.update(said)
                self.pairs.update(f"{a} {b}" for a, b in pairwise(said))
            if not clause.listed:
                continue
            body = canonical(clause.body)
            for event in clause.events:
                start, end = row["spans"][event]
                clauses.append((tuple(words(body)), start, end))
                self._keep(row["task"], Entry(body, clause.leading, video, float(start), float(end)))
        for option in row["options"]:
            self.known.update(words(option))
        for a, b in combinations(row["options"][:_MAX_CLAUSES], 2):
            self._options[_contrast(tuple(words(a)), tuple(words(b)))] += 1
        self._compare(video, clauses)

    def _keep(self, task: str, entry: Entry) -> None:
        """Reservoir sampling: every clause of a task has the same chance to be among the `limit` kept ones."""
        pool = self.entries.setdefault(task, [])
        self._seen[task] += 1
        if len(pool) < self._limit:
            pool.append(entry)
            return
        place = self._random.randrange(self._seen[task])
        if place < self._limit:
            pool[place] = entry

    def _compare(self, video: str, clauses: list) -> None:
        known = self._recent.setdefault(video, [])
        self._recent.move_to_end(video)
        new = clauses[:_MAX_CLAUSES]
        for a, b in [*combinations(new, 2), *((a, b) for a in new for b in known)]:
            pair = _contrast(a[0], b[0])
            if pair is not None:
                overlap = temporal_iou([a[1:]], [b[1:]])[0, 0]
                (self._apart if overlap <= _SAME_TIME else self._same)[pair] += 1
        self._recent[video] = (known + new)[: 2 * _MAX_CLAUSES]
        if len(self._recent) > _RECENT_VIDEOS:
            self._recent.popitem(last=False)

    def exclusive(self) -> dict[str, list[str]]:
        """Pairs of options, and pairs that tell events apart and hardly ever one event twice; most frequent first."""
        sure = {pair: count for pair, count in self._options.items() if pair and count >= _MIN_OPTIONS}
        for pair, count in self._apart.items():
            if count >= _MIN_EVENTS and self._same[pair] <= _MAX_SAME * count:
                sure[pair] = sure.get(pair, 0) + count
        found: dict[str, list[str]] = {}
        for pair in sorted(sure, key=lambda pair: (-sure[pair], pair)):
            for word, other in (pair, pair[::-1]):
                found.setdefault(word, []).append(other)
        return found


def _contrast(a: tuple[str, ...], b: tuple[str, ...]) -> tuple[str, str] | None:
    """The two words in which two clauses differ, if they differ in one place only and both words say something."""
    if len(a) != len(b):
        return None
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if x != y]
    if len(pairs) != 1 or not STOP_WORDS.isdisjoint(pairs[0]) or len(content_words(" ".join(pairs[0]))) < 2:
        return None
    return min(pairs[0]), max(pairs[0])


def video_name(video: Any) -> str:
    """A name by which two rows of one video can be told, whatever holds the video.

    Args:
        video: A path, or a `{"path", "bytes"}` mapping as `Video(decode=False)` gives it.

    Returns:
        `str`: the path; empty if there is none.
    """
    if isinstance(video, Mapping):
        video = video.get("path") or ""
    return str(video) if isinstance(video, str) or hasattr(video, "__fspath__") else ""


__all__ = ["FAMILIES", "Entry", "Vocabulary", "video_name"]
