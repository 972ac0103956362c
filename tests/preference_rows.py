# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""Random SFT rows whose clauses are known, so that a test can tell what a perturbation did without the package.

Every statement ends in a word of its own ("zqabc"), by which it is found again in any text.
"""

import re

from d2vlm_hf.data.schema import make_row


COLOURS = ("red", "green", "blue", "yellow", "orange")
SHAPES = ("circle", "square", "triangle", "star")
VERBS = ("flashes", "jumps", "sings", "waits", "turns")
STYLES = ("plain", "then", "first", "leading", "lines", "and", "list", "leading list", "choice", "framed")
ONE_CLAUSE = ("list", "leading list", "choice")
STATEMENT = re.compile(r"(?:the|an?) \w+ \w+ \w+ zq[a-z]+", re.I)
EVIDENCE = "<evi>"


def statements(text):
    """The statements of an answer, in order, in small letters."""
    return [found.lower() for found in STATEMENT.findall(text)]


def enumerated(count, token=EVIDENCE):
    return token if count == 1 else ", ".join([token] * (count - 1)) + f" and {token}"


def capital(text):
    return text[:1].upper() + text[1:]


def statement(rng, number):
    letters = "".join(chr(97 + number // 26**k % 26) for k in range(4))
    return f"the {rng.choice(COLOURS)} {rng.choice(SHAPES)} {rng.choice(VERBS)} zq{letters}"


def write_answer(style, said, count):
    """An answer of `count` events in a style; `said` holds a statement per event, or one for all."""
    at = [f"{text} at {EVIDENCE}" for text in said]
    if style == "plain":
        return " ".join(f"{capital(text)}." for text in at)
    if style == "then":
        return capital(", then ".join(at)) + "."
    if style == "first":
        leads = ["First, ", *["Then "] * (count - 2), "Finally, "][:count]
        return " ".join(f"{lead}{text}." for lead, text in zip(leads, at, strict=True))
    if style == "leading":
        return " ".join(f"{EVIDENCE}, {text}." for text in said)
    if style == "lines":
        return "\n".join(f"{k + 1}. {EVIDENCE}: {text}." for k, text in enumerate(said))
    if style == "and":
        return capital(enumerated(count, "{}").format(*at)) + "."
    if style == "list":
        return f"{capital(said[0])} at {enumerated(count)}."
    if style == "leading list":
        return f"At {enumerated(count)}, {said[0]}."
    if style == "choice":
        return f"(B) {said[0]}, at {enumerated(count)}."
    return f"Several things happen here. {' '.join(f'{capital(text)}.' for text in at)} That is all."


def random_row(rng, index):
    """A valid row with 0 to 5 events in a random style; a quarter of the rows have further annotators."""
    duration = round(float(rng.uniform(8, 300)), 2)
    count = int(rng.integers(0, 6))
    lengths = rng.uniform(0.5, max(duration / 5, 1.0), count)
    starts = rng.uniform(0, 1, count) * (duration - lengths)
    spans = sorted([round(float(s), 2), round(float(s + n), 2)] for s, n in zip(starts, lengths, strict=True))
    style = str(rng.choice(STYLES))
    said = [statement(rng, 8 * index + k) for k in range(1 if style in ONE_CLAUSE else max(count, 1))]
    options = [statement(rng, 8 * index + 6), said[0], statement(rng, 8 * index + 7)] if style == "choice" else []
    if count:
        answer = write_answer(style, said, count)
    else:
        answer = f"(B) {said[0]}." if options else f"There is no moment when {said[0]}."
    annotations = []
    if count and rng.random() < 0.25:
        moved = [[max(s - 0.3, 0.0), min(e + 0.3, duration)] for s, e in spans]
        annotations = [moved, [[0.0, round(duration / 10, 2)]]][: int(rng.integers(1, 3))]
    return make_row(
        id=f"row-{index}",
        video=f"video-{index // 2}.mp4",
        duration=duration,
        task="tal" if len(said) == 1 else "dvc",
        question="What happens in the video?",
        answer=answer,
        spans=spans,
        options=options,
        correct_option=1 if options else -1,
        annotations=annotations,
    ), style
