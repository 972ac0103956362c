# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""Answers taken apart into clauses, each owning its `<evi>` tokens, and put together again.

`"A man enters at <evi>, then he sits at <evi> and <evi>."` has two clauses: `A man enters at <evi>` with event 0 and
`he sits at <evi> and <evi>` with events 1 and 2. `join_clauses(split_clauses(text)) == text` always holds. The *text
factor* of an answer (DESIGN section 5) is the list of its clauses in a form that does not depend on how many events a
clause lists, on connectives, or on which clause opens a sentence.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise


EVIDENCE = "<evi>"

# Words that carry no key information: a swap of these changes nothing.
_STOP_TEXT = """
a an the this that these those it its is are was were be been being has have had does do did and or but then so at in on
of to by for from with as into onto there here some any his her their they them who which event happens occurs takes
place relevant video moment time times during between while when again also next finally
"""
STOP_WORDS = frozenset(_STOP_TEXT.split())
WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*|\d+")
_ENDINGS = re.compile(r"(?<=\w{3})(?:ing|ed|es|s)$")
_EVIDENCE = re.compile(re.escape(EVIDENCE))
_WHEN = r"(?:(?:once\s+)?(?:at|in|from|during|between|around|within|for|on)\b)"
_ENUMERATION = re.compile(r"(\d+)([.)]\s+)$")
# White space, a bullet or a number, and a word of order before a sentence.
_ORDER = r"(?:(?:first|firstly|then|next|finally|lastly|later|afterwards|after that)\b,?\s+)?"
_OPENING = re.compile(rf"\s*(?:(?:\d+[.)]|[-*•])\s+)?{_ORDER}", re.I)
# What ties a clause to the one before it in the same sentence.
_TIE = re.compile(
    r"[\s,:.!?–—-]*"
    r"(?:\b(?:and|then|next|finally|later|afterwards|while|but|before|after(?: that)?|followed by)\b[\s,]*)*",
    re.I,
)
_OPENS_LIST = re.compile(r"\s*(?:\d+[.)]|[-*•])\s+$")
_LAST = re.compile(r"\b(?:finally|lastly)\b", re.I)
# Between two `<evi>` of one list: "<evi>, <evi> and again at <evi>".
_LIST_GAP = re.compile(
    rf"\s*[,&/]?\s*(?:\b(?:and|or|then|again|also|later|finally|once more)\b[\s,]*)*{_WHEN}?\s*", re.I
)
# Where a clause that ends after its evidence can end.
_CUT = re.compile(r"\s*[,;:.!?]|\s+(?=(?:and|then|while|but|before|after|followed by)\b)", re.I)
# In a sentence whose clauses begin with their evidence: what belongs to the next evidence.
_NEXT_LEAD = re.compile(rf"\s*[,;:.!?]?\s*(?:\b(?:and|then|next|finally|later)\b[\s,]*)*{_WHEN}?\s*$", re.I)
_BETWEEN = re.compile(r"\bbetween\s*$", re.I)
_LEADS = re.compile(rf"\s*(?:(?:\d+[.)]|[-*•])\s+)?{_ORDER}{_WHEN}?\s*$", re.I)
_CLOSING = re.compile(r"\s*[.!?,;:]*[\"')\]]*\s*$")
_SENTENCE_END = re.compile(r"[.!?]+[\"')\]]*(?=\s)|;(?=\s)|(?=\n)")
_NO_END = re.compile(r"(?:^|\s)(?:\d+|Mr|Mrs|Ms|Dr|St|vs|e\.g|i\.e|etc)\.$")
_DANGLING = re.compile(rf"(?:\s*\b(?:{_WHEN}|is|are|was|were|and|or)\s*)+$|[\s,;:.!?–—-]+$", re.I)


@dataclass(frozen=True)
class Clause:
    """One statement of an answer.

    Args:
        prefix (`str`): What ties it to the text before: white space, a number of a list, `", then "`.
        body (`str`): The statement, its `<evi>` included.
        suffix (`str`): Its closing punctuation, where it ends a sentence.
        events (`tuple[int, ...]`): Which `<evi>` it holds, counted from 0 over the whole answer; may be empty.
        opens (`bool`): Whether it is the first of its sentence.
    """

    prefix: str
    body: str
    suffix: str
    events: tuple[int, ...]
    opens: bool

    @property
    def leading(self) -> bool:
        """Whether the evidence comes first, as in `"<evi>, a man sits down"`."""
        first = self.body.find(EVIDENCE)
        return first >= 0 and _LEADS.match(self.body[:first]) is not None

    @property
    def listed(self) -> bool:
        """Whether all its `<evi>` stand in one list, so that one can be added or taken away."""
        groups = _groups(self.body)
        return len(groups) == 1 and not (len(self.events) > 1 and _BETWEEN.search(self.body[: groups[0][0]]))


def _groups(text: str) -> list[tuple[int, int]]:
    """Start and end of each list of `<evi>` tokens of a text."""
    groups: list[tuple[int, int]] = []
    for match in _EVIDENCE.finditer(text):
        if (
            groups
            and _LIST_GAP.fullmatch(text, groups[-1][1], match.start())
            and "\n" not in text[groups[-1][1] : match.start()]
        ):
            groups[-1] = (groups[-1][0], match.end())
        else:
            groups.append(match.span())
    return groups


def _sentences(text: str) -> list[str]:
    """Cuts a text after sentence ends, semicolons and before line breaks; nothing is lost."""
    cuts, start = [0], 0
    for match in _SENTENCE_END.finditer(text):
        following = text[match.end() :].lstrip()
        soft = match.group().startswith((".", "!", "?")) and "\n" not in text[match.end() : len(text) - len(following)]
        if not text[start : match.end()].strip() or (soft and following[:1].islower()):
            continue
        if soft and _NO_END.search(text[start : match.end()]):
            continue
        start = match.end()
        cuts.append(start)
    return [text[a:b] for a, b in zip(cuts, [*cuts[1:], len(text)], strict=True) if a < b]


def _pieces(sentence: str) -> list[str]:
    """Cuts a sentence so that each piece holds one list of `<evi>`, as far as there is a place to cut."""
    groups = _groups(sentence)
    if len(groups) < 2:
        return [sentence]
    leads, cuts = _LEADS.match(sentence[: groups[0][0]]) is not None, [0]
    for (_, end), (start, _) in pairwise(groups):
        gap = sentence[end:start]
        match = _NEXT_LEAD.search(gap) if leads else _CUT.search(gap)
        if match is not None:
            cuts.append(end + match.start())
    return [sentence[a:b] for a, b in zip(cuts, [*cuts[1:], len(sentence)], strict=True)]


def split_clauses(answer: str) -> list[Clause]:
    """Splits an answer into clauses: sentences, and within a sentence one clause per list of `<evi>`.

    A sentence without evidence is a clause of no event, except after a clause that begins with its evidence
    (`"<evi>, a man enters. He sits down."`), where it goes on describing that event.

    Args:
        answer (`str`):
            An answer with one `<evi>` per event reference.

    Returns:
        `list[Clause]`: the clauses in order; `join_clauses` of them is the answer, character for character.
    """
    clauses: list[Clause] = []
    for sentence in _sentences(answer):
        for position, piece in enumerate(_pieces(sentence)):
            count, seen = piece.count(EVIDENCE), sum(len(clause.events) for clause in clauses)
            if clauses and count == 0 and (clauses[-1].leading or not piece.strip()):
                last = clauses[-1]
                clauses[-1] = _clause(last.prefix + last.body + last.suffix + piece, last.events, last.opens)
                continue
            clauses.append(_clause(piece, tuple(range(seen, seen + count)), position == 0))
    return clauses


def _clause(piece: str, events: tuple[int, ...], opens: bool) -> Clause:
    """Takes the connective and the closing punctuation off a piece of text."""
    start = (_OPENING if opens else _TIE).match(piece).end()
    if start == len(piece):  # nothing but punctuation: it is its own statement
        start = len(piece) - len(piece.lstrip())
    end = _CLOSING.search(piece, start).start()
    end = len(piece) if end <= start else end
    return Clause(piece[:start], piece[start:end], piece[end:], events, opens)


def join_clauses(clauses: Sequence[Clause]) -> str:
    """Joins clauses to a text.

    Args:
        clauses (`Sequence[Clause]`):
            Clauses, in order.

    Returns:
        `str`: the text.
    """
    return "".join(clause.prefix + clause.body + clause.suffix for clause in clauses)


def _renumbered(clauses: Sequence[Clause]) -> list[Clause]:
    """Lets the numbers of a numbered answer count on from the first one."""
    result, count = [], None
    for clause in clauses:
        number = _ENUMERATION.search(clause.prefix)
        if number:
            count = int(number[1]) if count is None else count + 1
            clause = replace(clause, prefix=f"{clause.prefix[: number.start()]}{count}{number[2]}")
        result.append(clause)
    return result


def canonical(body: str) -> str:
    """A clause in the form in which two sides are compared: lists of `<evi>` as one, first letter small.

    Args:
        body (`str`):
            Body of a clause.

    Returns:
        `str`: the same statement whatever its number of events and its place in a sentence.
    """
    for start, end in reversed(_groups(body)):
        body = body[:start] + EVIDENCE + body[end:]
    body = " ".join(body.split())
    return body[:1].lower() + body[1:]


def text_factor(answer: str, events: Collection[int] | None = None) -> list[str]:
    """The text of an answer as FPO sees it: the clause of each event, and the clauses of no event, in order.

    Args:
        answer (`str`):
            An answer with one `<evi>` per event reference.
        events (`Collection[int]`, *optional*):
            Indices of the `<evi>` tokens to keep (those of events present on both sides); all by default.

    Returns:
        `list[str]`: canonical clauses. A clause of several events stands there once for each.
    """
    factor = []
    for clause in split_clauses(answer):
        kept = sum(events is None or event in events for event in clause.events)
        factor += [canonical(clause.body)] * (kept if clause.events else 1)
    return factor


def _capital(body: str, like: str) -> str:
    """Gives the first letter of a body the case that it has in another text."""
    first = re.search(r"[^\W\d_]", like)
    if not first or not body[:1].isalpha():
        return body
    upper = first.group().isupper()
    return (body[:1].upper() if upper else body[:1].lower()) + body[1:]


def remove_event(clauses: Sequence[Clause], event: int) -> list[Clause] | None:
    """Takes one event out of an answer, and its clause with it where no other event shares it.

    Args:
        clauses (`Sequence[Clause]`):
            The clauses of the answer.
        event (`int`):
            Index of the `<evi>` to take out.

    Returns:
        `list[Clause]`, whose `events` still count as in the given clauses; `None` if the event cannot be told from
        another one in its clause.
    """
    at = next(i for i, clause in enumerate(clauses) if event in clause.events)
    clause, result = clauses[at], list(clauses)
    if len(clause.events) > 1:
        if not clause.listed:
            return None
        kept = tuple(e for e in clause.events if e != event)
        result[at] = replace(clause, body=_relist(clause.body, len(kept)), events=kept)
        return result
    del result[at]
    following = result[at] if at < len(result) else None
    if clause.opens and following is not None and not following.opens:
        result[at] = replace(following, prefix=clause.prefix, body=_capital(following.body, clause.body), opens=True)
    elif clause.opens and at == 0 and following is not None:
        result[at] = replace(following, prefix=clause.prefix, body=_capital(following.body, clause.body))
    elif not clause.opens and (following is None or following.opens):
        result[at - 1] = replace(result[at - 1], suffix=clause.suffix)
    return _renumbered(result)


def _relist(body: str, count: int) -> str:
    """Writes the only list of `<evi>` of a body anew with `count` tokens, in its own style ("a, b and c")."""
    start, end = _groups(body)[0]
    gaps = body[start:end].split(EVIDENCE)[1:-1] or [" and "]
    gaps = [", "] * (count - 1 - len(gaps)) + gaps[max(len(gaps) - (count - 1), 0) :]
    if count == 2:  # "a, b, and c" becomes "a and b"
        gaps[-1] = re.sub(r"^,(?=\s+(?:and|or)\b)", "", gaps[-1])
    return body[:start] + EVIDENCE + "".join(gap + EVIDENCE for gap in gaps[: count - 1]) + body[end:]


def restate(clause: Clause, body: str) -> Clause:
    """Gives a clause other words, while it keeps its events and its place in the sentence.

    Args:
        clause (`Clause`):
            A clause whose `listed` is true.
        body (`str`):
            The words, with one list of `<evi>`.

    Returns:
        `Clause`: with as many `<evi>` as before.
    """
    return replace(clause, body=_capital(_relist(body, len(clause.events)), clause.body))


def extend_list(clauses: Sequence[Clause], at: int, place: int, event: int) -> list[Clause]:
    """Adds an event to the list of a clause.

    Args:
        clauses (`Sequence[Clause]`):
            The clauses of the answer.
        at (`int`):
            Index of a clause whose `listed` is true.
        place (`int`):
            Where in its list the new event goes.
        event (`int`):
            The new event's index.

    Returns:
        `list[Clause]`: the new answer.
    """
    clause, result = clauses[at], list(clauses)
    events = (*clause.events[:place], event, *clause.events[place:])
    result[at] = replace(clause, body=_relist(clause.body, len(events)), events=events)
    return result


def insert_clause(clauses: Sequence[Clause], at: int, body: str, event: int) -> list[Clause]:
    """Puts a new clause of one event before clause `at` (at the end if there is none), in the style of its neighbours.

    Args:
        clauses (`Sequence[Clause]`):
            The clauses of the answer, at least one.
        at (`int`):
            Index of the clause that comes after the new one.
        body (`str`):
            The new clause, with one `<evi>`.
        event (`int`):
            The new event's index.

    Returns:
        `list[Clause]`: the new answer.
    """
    result = list(clauses)
    opener = clauses[0].body
    if at < len(clauses) and not clauses[at].opens:  # within a sentence
        body = body if body.startswith(EVIDENCE) else _capital(body, "a")
        result.insert(at, Clause(", ", body, "", (event,), False))
        return result
    opening = [clause for clause in clauses[1:] if clause.opens and not _LAST.search(clause.prefix)]
    if opening:
        prefix, opener = opening[0].prefix, opening[0].body
    else:
        prefix = "\n" + clauses[0].prefix if _OPENS_LIST.match(clauses[0].prefix) else " "
        opener = clauses[0].prefix + opener
    closing = "" if "\n" in prefix and not clauses[0].suffix else "."
    new = Clause(prefix, _capital(body, opener), closing, (event,), True)
    if at == 0:
        new = replace(new, prefix=clauses[0].prefix, body=_capital(body, clauses[0].body))
        result[0] = replace(clauses[0], prefix=prefix, body=_capital(clauses[0].body, opener))
    elif closing and not result[at - 1].suffix.strip():
        result[at - 1] = replace(result[at - 1], suffix=".")
    result.insert(at, new)
    return _renumbered(result)


def without_evidence(body: str) -> str:
    """The words of a clause without its `<evi>` and without what only led up to it.

    Args:
        body (`str`):
            Body of a clause, e.g. `"The event happens in <evi>"`.

    Returns:
        `str`: e.g. `"The event happens"`; empty if there are no words.
    """
    pieces, last = [], 0
    for start, end in _groups(body):
        pieces.append(_DANGLING.sub("", body[last:start]))
        last = end
    pieces.append(body[last:])
    text = re.sub(r"\(\s*\)|\s+", " ", " ".join(piece.strip(" ,:;–—-") for piece in pieces))
    text = " ".join(text.split())
    return text if re.search(r"\w", text) else ""


def words(text: str) -> list[str]:
    """Words and numbers of a text in small letters, without `<evi>`.

    Args:
        text (`str`): Any text.

    Returns:
        `list[str]`: its words, in order.
    """
    return WORD.findall(text.replace(EVIDENCE, " ").lower())


def content_words(text: str) -> set[str]:
    """Stems of the words of a text that carry key information.

    Args:
        text (`str`): Any text.

    Returns:
        `set[str]`: small letters, without endings such as -s, -ed and -ing.
    """
    kept = {word for word in words(text) if word not in STOP_WORDS}
    return {_ENDINGS.sub("", word).rstrip("e") for word in kept}


__all__ = [
    "EVIDENCE",
    "STOP_WORDS",
    "WORD",
    "Clause",
    "canonical",
    "content_words",
    "extend_list",
    "insert_clause",
    "join_clauses",
    "remove_event",
    "restate",
    "split_clauses",
    "text_factor",
    "without_evidence",
    "words",
]
