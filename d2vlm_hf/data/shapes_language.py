# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""The language of the shapes world: verbs, subjects, and the templates of questions and answers.

Wording is always drawn apart from what is true, so that no turn of phrase gives an answer away.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


# event kind or verb -> phrasings as (third person, infinitive); the first is the plain one
VERBS: dict[str, tuple[tuple[str, str], ...]] = {
    "appear": (("appears", "appear"), ("shows up", "show up"), ("becomes visible", "become visible")),
    "flash": (("flashes", "flash"), ("blinks", "blink")),
    # not "grows": at the end of its span a big shape shrinks again, and "when does it shrink?" would have two answers
    "grow": (("becomes big", "become big"), ("turns big", "turn big")),
    "shrink": (("becomes small", "become small"), ("turns small", "turn small")),
    "move": (("moves", "move"), ("changes its place", "change its place")),
    "move_left": (("moves left", "move left"), ("goes left", "go left"), ("moves to the left", "move to the left")),
    "move_right": (
        ("moves right", "move right"),
        ("goes right", "go right"),
        ("moves to the right", "move to the right"),
    ),
    "move_up": (("moves up", "move up"), ("goes up", "go up"), ("moves upwards", "move upwards")),
    "move_down": (("moves down", "move down"), ("goes down", "go down"), ("moves downwards", "move downwards")),
}
DIRECTIONS = {"move_left": "left", "move_right": "right", "move_up": "up", "move_down": "down"}
POSITIONS = ("left", "right", "top", "bottom")
COUNTS = ("never", "once", "twice", "three times")
LETTERS = "ABCD"

QUESTIONS: dict[str, tuple[str, ...]] = {
    "tvg": (
        "When does {subject} {bare}?",
        "At what time does {subject} {bare}?",
        "Find the moment when {subject} {third}.",
        "In which part of the video does {subject} {bare}?",
        "Show me when {subject} {third}.",
        "Tell me when {subject} {third}.",
    ),
    "tal": (
        "Find every time {subject} {third}.",
        "List all moments when {subject} {third}.",
        "When does {subject} {bare}? Name every time.",
        "Show me all parts of the video where {subject} {third}.",
        "At which times does {subject} {bare}?",
    ),
    "dvc": (
        "Describe everything that happens in the video.",
        "What happens in the video, and when?",
        "List all events in order.",
        "Tell me what happens, one event after the other.",
        "Name every event and its time.",
    ),
    "gvq/colour": (
        "What colour is the shape that {third}?",
        "Which colour has the shape that {third}?",
        "Name the colour of the shape that {third}.",
    ),
    "gvq/shape": (
        "Which shape {third}?",
        "What is the shape of the object that {third}?",
        "Name the shape of what {third}.",
    ),
    "gvq/motion": (
        "In which direction does {subject} move?",
        "Which way does {subject} go?",
        "Name the direction in which {subject} moves.",
    ),
    "gvq/order": (
        "Which of these happens first?",
        "Which of these events comes before the others?",
        "Which of these events is the first one?",
    ),
    "gvq/count": (
        "How many times does {subject} {bare}?",
        "How often does {subject} {bare}?",
        "Count how often {subject} {third}.",
    ),
    "rar/motion": (
        "In which direction does {subject} move at <evi>?",
        "Which way does {subject} go during <evi>?",
        "Look at <evi>: which way does {subject} move?",
    ),
    "rar/colour": (
        "What colour is the shape that {third} at <evi>?",
        "Which colour has the shape that {third} during <evi>?",
        "Look at <evi>: what colour is the shape that {third}?",
    ),
    "rar/shape": (
        "Which shape {third} at <evi>?",
        "What is the shape of the object that {third} during <evi>?",
        "Look at <evi>: which shape {third}?",
    ),
    "rar/object": (
        "Which object {third} at <evi>?",
        "What {third} during <evi>?",
        "Look at <evi>: which object {third}?",
    ),
    "rar/position": (
        "Where is {subject} at <evi>?",
        "In which part of the picture is {subject} during <evi>?",
        "Look at <evi>: where is {subject}?",
    ),
}
ANSWERS: dict[str, tuple[str, ...]] = {
    "found": (
        "{Subject} {third} at {evidence}.",
        "At {evidence}, {subject} {third}.",
        "{Subject} {third} during {evidence}.",
        "This happens at {evidence}.",
    ),
    "absent": (
        "{Subject} never {third}.",
        "This does not happen in the video.",
        "There is no moment when {subject} {third}.",
    ),
    # the letter right after the content: all that is left to do is to find these words among the options
    "gvq": ("{Option} ({letter}) at {evidence}.", "At {evidence}: {option} ({letter})."),
    "choice": ("{Option} ({letter}).", "It is {option} ({letter})."),
}
SEQUENCES = ("plain", "then", "first")  # how the clauses of a dense caption are joined


def subject(colour: str | None, shape: str | None) -> str:
    """Name an object: "the red circle", "a red shape", "a circle" or "a shape"."""
    if colour and shape:
        return f"the {colour} {shape}"
    return f"a {colour} {shape or 'shape'}" if colour else f"a {shape or 'shape'}"


def clause(name: str, kind: str, phrasing: int = 0) -> str:
    """Say that a subject does something: "the red circle moves left"."""
    forms = VERBS[kind]
    return f"{name} {forms[phrasing % len(forms)][0]}"


def enumerate_evidence(count: int) -> str:
    """Return `count` evidence tokens as a list: "<evi>, <evi> and <evi>"."""
    tokens = ["<evi>"] * count
    return tokens[0] if count == 1 else f"{', '.join(tokens[:-1])} and {tokens[-1]}"


def fill(rng: np.random.Generator, templates: Sequence[str], kind: str = "move", name: str = "", **values: str) -> str:
    """Draw a template and a phrasing of the verb, and fill them in.

    Args:
        rng (`np.random.Generator`):
            Where the choice comes from.
        templates (`Sequence[str]`):
            Templates with `{subject}`, `{third}`, `{bare}` and further names.
        kind (`str`, *optional*):
            Event kind or verb.
        name (`str`, *optional*):
            The subject.
        **values (`str`):
            Further names of the templates.

    Returns:
        `str`: A sentence that starts with a capital letter, unless it starts with a token or bracket.
    """
    template = templates[rng.integers(len(templates))]
    third, bare = VERBS[kind][rng.integers(len(VERBS[kind]))]
    return template.format(subject=name, Subject=capital(name), third=third, bare=bare, **values)


def capital(text: str) -> str:
    """Return the text with its first letter as a capital."""
    return text[:1].upper() + text[1:]


def with_options(question: str, options: Sequence[str]) -> str:
    """Put lettered options after a question, as the model reads them."""
    listed = " ".join(f"({letter}) {option}" for letter, option in zip(LETTERS, options, strict=False))
    return f"{question} Options: {listed}"


def dense_caption(rng: np.random.Generator, clauses: Sequence[str]) -> str:
    """Join clauses, in the order of their events, into a text with one evidence token each."""
    style = SEQUENCES[rng.integers(len(SEQUENCES))]
    parts = [f"{text} at <evi>" for text in clauses]
    if style == "plain":
        return " ".join(f"{capital(part)}." for part in parts)
    if style == "then":
        return f"{capital(', then '.join(parts))}."
    leads = ["First, ", *["Then "] * (len(parts) - 2), "Finally, "] if len(parts) > 1 else [""]
    return " ".join(capital(f"{lead}{part}.") for lead, part in zip(leads, parts, strict=True))


__all__ = [
    "ANSWERS",
    "COUNTS",
    "DIRECTIONS",
    "LETTERS",
    "POSITIONS",
    "QUESTIONS",
    "VERBS",
    "capital",
    "clause",
    "dense_caption",
    "enumerate_evidence",
    "fill",
    "subject",
    "with_options",
]
