# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""Text broken into lines for a picture, with pieces of it marked by the event that they refer to."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from matplotlib.font_manager import FontProperties

# A piece of text and the event it refers to: its number, -1 for one that is not shown, None for plain text.
Piece = tuple[str, int | None]


@dataclass(frozen=True)
class Run:
    """Characters that stand together in a line: `x` and `width` in inches, `event` the colour (-1 grey, None ink)."""

    text: str
    x: float
    width: float
    event: int | None


def font_of(size: float, weight: str = "normal") -> "FontProperties":
    """The font of a size in points."""
    from matplotlib.font_manager import FontProperties

    return FontProperties(size=size, weight=weight)


def measure(text: str, font: "FontProperties") -> float:
    """Width of a text in inches."""
    from matplotlib.textpath import text_to_path

    return text_to_path.get_text_width_height_descent(text, font, ismath=False)[0] / 72


def _words(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """Words as lists of fragments; a coloured piece is kept whole, and `"\\n"` is a word of its own."""
    words: list[list[Piece]] = [[]]
    for text, event in pieces:
        if event is not None:
            words[-1].append((text, event))
            continue
        for part in re.split(r"(\s+)", text):
            if not part.strip():
                words += [[("\n", None)], []] if "\n" in part else [[]] if part else []
            else:
                words[-1].append((part, None))
    return [word for word in words if word]


def _cut(word: list[Piece], room: float, font: "FontProperties") -> list[list[Piece]]:
    """A word in pieces that fit into a line: itself, if it does."""
    if sum(measure(text, font) for text, _ in word) <= room:
        return [word]
    parts: list[list[Piece]] = [[]]
    used = 0.0
    for text, event in word:
        for character in text:
            advance = measure(character, font)
            if used + advance > room and parts[-1]:
                parts.append([])
                used = 0.0
            used += advance
            if parts[-1] and parts[-1][-1][1] == event:
                parts[-1][-1] = (parts[-1][-1][0] + character, event)
            else:
                parts[-1].append((character, event))
    return parts


def wrap(pieces: Sequence[Piece], room: float, font: "FontProperties", space: str = " ") -> list[list[Run]]:
    """Break a text into lines.

    Args:
        pieces (sequence of `(str, int or None)`): The text in order; a piece with an event is not broken if it fits.
        room (`float`): Width of a line in inches.
        font (`FontProperties`): What it is written in.
        space (`str`, *optional*, defaults to one space): What stands between words.

    Returns:
        `list[list[Run]]`: The lines, each from left to right; one empty line for an empty text.
    """
    lines: list[list[Run]] = [[]]
    distance, x = measure(f"n{space}n", font) - measure("nn", font), 0.0  # x: where the line ends so far
    for word in _words(pieces):
        if word == [("\n", None)]:
            lines, x = ([*lines, []], 0.0) if lines[-1] else (lines, x)
            continue
        for part in _cut(word, room, font):
            widths = [measure(text, font) for text, _ in part]
            if x and x + distance + sum(widths) > room:
                lines.append([])
                x = 0.0
            gap = space if x else ""
            for (text, event), width in zip(part, widths, strict=True):
                if lines[-1] and event is None and lines[-1][-1].event is None:
                    begun = lines[-1].pop()  # goes on in one piece, with the font's own spacing
                    run = Run(begun.text + gap + text, begun.x, measure(begun.text + gap + text, font), None)
                else:
                    run = Run(text, x + (distance if gap else 0.0), width, event)
                lines[-1].append(run)
                x, gap = run.x + run.width, ""
    return lines if lines[-1] or len(lines) == 1 else lines[:-1]


__all__ = ["Piece", "Run", "font_of", "measure", "wrap"]
