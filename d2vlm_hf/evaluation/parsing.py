# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""What a prediction says, read as each protocol reads it, with the reason whenever it cannot be read.

Under the published protocols a prediction is a text, `<evidence> </evi> <answer>`, read by their rules, odd ones
included. Under `clean` it is the pipeline's dict, whose text is searched for nothing but the letter of an option.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..model.spans_d2vlm import validate_spans


DELIMITER = "</evi>"
_NO_DELIMITER = f"no {DELIMITER}"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
CHOICE_TASKS = ("rar", "eca", "rvq", "gvq")
CAPTION_TASKS = ("dvc", "slc")
WINDOW_TASKS = ("tvg", "epm", "tem", "tal", "evs", "gvq")

Window = tuple[float, float]


@dataclass(frozen=True)
class Rules:
    """How a published scorer reads a text.

    Args:
        evidence (`bool`): Whether the part before the first `</evi>` is read as evidence, and `</evi>` is required.
        whole_text (`bool`): Whether `</evi>` means nothing, as for answers of other models.
        second_chance (`bool`): Whether a wrong letter falls through to the similarity of the options.
    """

    evidence: bool = False
    whole_text: bool = False
    second_chance: bool = False


PROTOCOLS = ("clean", "etbench", "d2vlm")
RULES: dict[str, Rules] = {
    "etbench": Rules(second_chance=True),
    "d2vlm": Rules(evidence=True),
    # Variants of the two, for figures that were computed with them.
    "etbench_whole": Rules(whole_text=True, second_chance=True),
    "etbench_strict": Rules(whole_text=True),
    "d2vlm_looser": Rules(evidence=True, second_chance=True),
}


@dataclass(frozen=True)
class Parsed:
    """What a prediction says.

    Args:
        windows (`tuple[Window, ...]`): Windows of the answer, in seconds.
        evidence (`tuple[Window, ...]`): Windows of the evidence, in seconds; under `clean` the surest first.
        scores (`tuple[float, ...]`): Score of each evidence window (`clean`).
        captions (`tuple[str, ...]`): One caption per window of `windows`, or under `clean` per window of `evidence`.
        options (`tuple[int, ...]`): Options named by a letter, in the order in which they count.
        lettered (`bool`): Whether the answer has the form of a letter, valid or not.
        text (`str`): What is compared with the options if no letter decides.
        references (`bool`): Whether the answer's own windows are known (`clean`).
        reason (`str`, *optional*): Why the prediction counts as failed.
        window_reason (`str`, *optional*): Why a choice with a window (gvq) has no window.
    """

    windows: tuple[Window, ...] = ()
    evidence: tuple[Window, ...] = ()
    scores: tuple[float, ...] = ()
    captions: tuple[str, ...] = ()
    options: tuple[int, ...] = ()
    lettered: bool = False
    text: str = ""
    references: bool = False
    reason: str | None = None
    window_reason: str | None = None


# A number as the scorers see it: digits, a run of dots, digits. Possessive, so that long runs of digits cost no time.
_NUMBER = r"(?<!\d)\d++(?:\.++\d*+)?"
_DASHED = re.compile(rf"({_NUMBER})\s*-\s*({_NUMBER})")
_WORDED = re.compile(rf"({_NUMBER})\s* to \s*({_NUMBER})")
_PLAIN_NUMBER = re.compile(r"\b(?:\d+\.\d+|\d+)\b")
_SIGNED_DECIMAL = re.compile(r"[-+]?\d*\.\d+|\d+")
_TIME_WORDS = ("start", "end", "happen")
_SENTENCE_END = re.compile(r"[!?\n]")
_BRACKETED_LETTER = re.compile(r"\(([A-Z])\)")
_BEST_OPTION = "best option:"

_DOTS = re.compile(r"\.{2,}")
_STARTS = re.compile(rf"start(?:ing)? time: ({_NUMBER})")
_ENDS = re.compile(rf"end(?:ing)? time: ({_NUMBER})")
_BROKEN_FORM = re.compile(rf"start time {_NUMBER}, end time {_NUMBER}")
_DESCRIPTION = re.compile(r"description: (.*)")
_BULLET = re.compile(r"\*\s*(.*)")
_CLOCK = re.compile(r"(\d+):(\d+)")
_MIN_CAPTION, _MIN_PIECE = 5, 7  # a caption or piece of text must be longer than this many characters
_RADIUS = 20.0  # seconds around a single time


def _numbers(pairs: Sequence[tuple[str, str]], cut_dots: bool) -> list[Window]:
    dots = "." if cut_dots else ""
    return [(float(a.rstrip(dots)), float(b.rstrip(dots))) for a, b in pairs]


def dashed_windows(text: str, cut_dots: bool = False) -> list[Window]:
    """All `number - number` of a text, in order, as written.

    Args:
        text (`str`):
            Any text.
        cut_dots (`bool`, *optional*, defaults to `False`):
            Whether dots after a number are cut off.

    Returns:
        `list[Window]`: windows in seconds.

    Raises:
        ValueError: If a match is no number (`1..5`, and `12...` unless dots are cut), as the published scorers crash.
    """
    return _numbers(_DASHED.findall(text), cut_dots)


def answer_windows(text: str, cut_dots: bool = False) -> list[Window]:
    """Windows of an answer: `a - b`, else `a to b`, else pairs of the first numbers of sentences that speak of a time.

    Args:
        text (`str`):
            The answer in lower case.
        cut_dots (`bool`, *optional*, defaults to `False`):
            As in [`dashed_windows`], which also says what raises a `ValueError`.

    Returns:
        `list[Window]`: windows in seconds, none of them reversed.
    """
    windows = dashed_windows(text, cut_dots)
    if not windows:
        windows = _numbers(_WORDED.findall(text), cut_dots)
    if not windows:
        timed = (part for part in _SENTENCE_END.split(text) if any(word in part for word in _TIME_WORDS))
        numbers = [float(found.group()) for part in timed if (found := _PLAIN_NUMBER.search(part))]
        windows = list(zip(numbers[::2], numbers[1::2], strict=False))
    return [(end, start) if end <= start else (start, end) for start, end in windows]


def _answer_part(text: str, rules: Rules) -> str:
    return text if rules.whole_text else text.rpartition(DELIMITER)[2]


def _read_windows(text: str, rules: Rules) -> Parsed:
    """Windows of tvg, epm, tem, tal, evs and gvq."""
    if not rules.evidence:
        windows = answer_windows(_answer_part(text, rules).lower())
        return Parsed(windows=tuple(windows), reason=None if windows else "no window in the answer")
    if DELIMITER not in text.lower():
        return Parsed(reason=_NO_DELIMITER)
    parts = text.lower().split(DELIMITER)
    evidence, windows = dashed_windows(parts[0]), answer_windows(parts[-1], cut_dots=True)
    return Parsed(tuple(windows), tuple(evidence), reason=None if windows else "no window in the answer")


def _read_highlight(text: str, rules: Rules) -> Parsed:
    """The moment of vhd; without evidence rules a single number, given as a window without length."""
    if not rules.evidence:
        found = _SIGNED_DECIMAL.search(_answer_part(text, rules))
        if found is None:
            return Parsed(reason="no number in the answer")
        return Parsed(windows=((float(found.group()),) * 2,))
    if DELIMITER not in text:
        return Parsed(reason=_NO_DELIMITER)
    windows = answer_windows(_answer_part(text, rules).lower())
    if not windows:
        return Parsed(reason="no window in the answer")
    evidence = answer_windows(text.partition(DELIMITER)[0].lower())
    return Parsed(tuple(windows), tuple(evidence))


def _read_choice(text: str, rules: Rules, task: str, count: int) -> Parsed:
    """The chosen option of rar, eca, rvq and gvq, and gvq's windows."""
    answer = _answer_part(text, rules)
    bracketed = None if rules.evidence or task == "gvq" else _BRACKETED_LETTER.search(answer)
    stripped = answer.lower().removeprefix(_BEST_OPTION).lstrip().lstrip("(").lstrip()
    lettered = len(stripped) == 1 or stripped[1:2] in (".", ",", " ", ")")
    named = [bracketed[1]] if bracketed else []
    named += [stripped[0].upper()] if lettered else []
    options = tuple(LETTERS.index(letter) for letter in named if letter in LETTERS[:count])
    parsed = Parsed(options=options, lettered=lettered or bracketed is not None, text=stripped)
    if not stripped:
        return replace(parsed, reason="no answer")
    if task != "gvq":
        return parsed
    try:
        windows = _read_windows(text, rules)
    except ValueError as error:
        return replace(parsed, window_reason=f"crash of the published script: {error}")
    return replace(parsed, windows=windows.windows, evidence=windows.evidence, window_reason=windows.reason)


def _timed_piece(text: str) -> tuple[list[Window], list[str]]:
    """The first line (or piece between full stops) that has a time, where no other form was found."""
    pieces = text.split("\n") if "\n" in text else [piece + "." for piece in text.split(".") if len(piece) > _MIN_PIECE]
    for piece in pieces:
        if len(piece) > _MIN_PIECE and (window := _time_of(piece)) is not None:
            return [window], [piece.strip()]
    return [], []


def _time_of(piece: str) -> Window | None:
    """The time of a piece of text: a range, m:ss, two numbers, or one number with 20 seconds around it."""
    try:
        if ranges := dashed_windows(piece):
            return ranges[0]
        if clock := _CLOCK.search(piece):
            numbers = [60.0 * int(clock[1]) + int(clock[2])]
        else:
            numbers = [float(number) for number in re.findall(_NUMBER, piece)]
    except ValueError:  # dots inside a number: the published scorers go on to the next piece
        return None
    if len(numbers) == 2:
        return numbers[0], numbers[1]
    if len(numbers) != 1:
        return None
    time = numbers[0]
    return (time - _RADIUS, time + _RADIUS) if time > _RADIUS else (time, time + 2 * _RADIUS)


def _timed_captions(answer: str) -> tuple[list[Window], list[str]]:
    """Windows and captions of a dense-captioning answer in lower case, where it has one of two known forms."""
    answer = _DOTS.sub(" ", answer)
    windows = dashed_windows(answer)
    if windows:
        rest = answer
        for match in _DASHED.finditer(answer):
            rest = rest.replace(match.group(), "\n")
        captions = rest.replace("seconds", "").split("\n")
    else:
        starts, ends = _STARTS.findall(answer), _ENDS.findall(answer)
        windows = [(float(a), float(b)) for a, b in zip(starts, ends, strict=False)]
        captions = _DESCRIPTION.findall(answer) or _BULLET.findall(answer) if windows else []
        if not windows and _BROKEN_FORM.search(answer):
            raise ValueError("a 'start time x, end time y' form, which its reader rejects")
    captions = [caption.strip().strip(", ") for caption in captions if len(caption) > _MIN_CAPTION]
    count = min(len(windows), len(captions))
    return windows[:count], captions[:count]


def _read_captions(text: str, rules: Rules) -> Parsed:
    """Windows and captions of dvc and slc."""
    evidence: list[Window] = []
    answer = whole = _answer_part(text, rules)
    if rules.evidence:
        if DELIMITER not in text:
            return Parsed(reason=_NO_DELIMITER)
        evidence, answer, whole = dashed_windows(text.split(DELIMITER)[0]), text.split(DELIMITER)[1], text
    windows, captions = _timed_captions(answer.lower())
    windows, captions = (windows, captions) if windows else _timed_piece(whole)
    if not windows:
        return Parsed(evidence=tuple(evidence), reason="no timed caption in the answer")
    ordered = tuple((min(window), max(window)) for window in windows)
    return Parsed(ordered, tuple(evidence), captions=tuple(captions))


def parse_text(task: str, text: str, protocol: str, option_count: int = 4) -> Parsed:
    """Reads a predicted text under a published protocol.

    Args:
        task (`str`):
            E.T. Bench task name: rar eca rvq | tvg epm tal evs vhd | dvc slc | tem gvq.
        text (`str`):
            The model's whole output, evidence and `</evi>` included.
        protocol (`str`):
            `"etbench"`, `"d2vlm"` or one of their variants in `RULES`.
        option_count (`int`, *optional*, defaults to 4):
            Number of options of a choice.

    Returns:
        `Parsed`: with a `reason` if the prediction counts as failed, also where the published script would crash.

    Raises:
        ValueError: If the task or the protocol is unknown.
    """
    rules = RULES.get(protocol)
    if rules is None:
        raise ValueError(f"protocol is {protocol!r}, under which no text is read; use one of {list(RULES)}.")
    try:
        if task in CHOICE_TASKS:
            return _read_choice(text, rules, task, option_count)
        if task in CAPTION_TASKS:
            return _read_captions(text, rules)
        if task == "vhd":
            return _read_highlight(text, rules)
        if task in WINDOW_TASKS:
            return _read_windows(text, rules)
    except ValueError as error:
        return Parsed(reason=f"crash of the published script: {error}")
    known = sorted({*CHOICE_TASKS, *CAPTION_TASKS, *WINDOW_TASKS, "vhd"})
    raise ValueError(f"task is {task!r}, for which no reading is defined; use one of {known}.")


def option_letter(answer: str, options: Sequence[str]) -> int | None:
    """The option that an answer names, for the `clean` protocol.

    A letter counts if it stands alone, in brackets, or at the start before `.`, `)`, `:` or `,` (so not the article
    of "A man"); else an answer that is the text of exactly one option names that one.

    Args:
        answer (`str`):
            The answer.
        options (`Sequence[str]`):
            The options' texts.

    Returns:
        `int` index of the option, or `None` if none is named.
    """
    letters = LETTERS[: len(options)]
    text = re.sub(r"^\s*(?:(?:the )?(?:best |correct )?(?:answer|option)(?: is)?\s*:?\s*)?", "", answer, flags=re.I)
    found = re.match(r"\(?([A-Z])(?:[.):,]|\s*$)", text, re.I) or re.search(r"\(([A-Z])\)", text)
    if found and found[1].upper() in letters:
        return letters.index(found[1].upper())
    plain = " ".join(text.casefold().split()).strip(" .")
    same = [n for n, option in enumerate(options) if " ".join(str(option).casefold().split()).strip(" .") == plain]
    return same[0] if len(same) == 1 else None


def _structured_spans(items: Sequence[Mapping[str, float]], name: str) -> tuple[Window, ...]:
    try:
        pairs = [(float(item["start"]), float(item["end"])) for item in items]
    except (TypeError, KeyError) as error:
        raise ValueError(
            f"{name} is {items!r}, which is not a list of spans; pass [{{'start': s, 'end': e}}, ...] in seconds."
        ) from error
    validate_spans(pairs)
    return tuple(pairs)


def _trust(items: Sequence[Mapping[str, float]]) -> list[float]:
    return [1.0 if item.get("score") is None else float(item["score"]) for item in items]


def parse_structured(prediction: Mapping[str, Any] | None, options: Sequence[str] = ()) -> Parsed:
    """Reads a prediction as the pipeline returns it, for the `clean` protocol.

    Args:
        prediction (`Mapping`, *optional*):
            `{"answer": str, "evidence": [{"start", "end", "score"}], "references": [{"start", "end", "char_start",
            "char_end"}]}` in seconds. `score` is 1 where it is missing. `option` (an index) and `captions` (one per
            evidence span) may be given; `None` stands for a prediction that is missing.
        options (`Sequence[str]`, *optional*):
            Options of a choice.

    Returns:
        `Parsed`: evidence and the answer's windows by falling score, then by time; `reason` if there is no prediction.

    Raises:
        ValueError: If the prediction is a text or malformed.
    """
    if prediction is None:
        return Parsed(reason="no prediction")
    if not isinstance(prediction, Mapping):
        raise ValueError(
            f"A prediction is {prediction!r}: the protocol 'clean' reads no text; "
            "pass the pipeline's dict with 'answer' and 'evidence', or use the protocol 'etbench' or 'd2vlm'."
        )
    evidence = prediction.get("evidence") or []
    spans = _structured_spans(evidence, "evidence")
    scores = _trust(evidence)
    captions = list(prediction.get("captions") or [])
    if captions and len(captions) != len(spans):
        raise ValueError(f"captions has {len(captions)} entries for {len(spans)} evidence spans; pass one per span.")
    order = sorted(range(len(spans)), key=lambda n: (-scores[n], spans[n]))
    references = prediction.get("references") or []
    windows = _structured_spans(references, "references")
    trust = _trust(references)
    answer, option = str(prediction.get("answer") or ""), prediction.get("option")
    if option is None and options:
        option = option_letter(answer, options)
    return Parsed(
        windows=tuple(windows[n] for n in sorted(range(len(windows)), key=lambda n: (-trust[n], windows[n]))),
        evidence=tuple(spans[n] for n in order),
        scores=tuple(scores[n] for n in order),
        captions=tuple(captions[n] for n in order) if captions else (),
        options=() if option is None else (int(option),),
        text=answer,
        references="references" in prediction,
    )


def prediction_text(prediction: str | Mapping[str, Any] | None) -> str | None:
    """A prediction as the text that the published protocols read.

    Args:
        prediction (`str` or `Mapping`, *optional*):
            A model's whole output, or the pipeline's dict.

    Returns:
        `str`: the text itself, the dict's `text`, or its evidence written as `s - e`, then `</evi>` and the answer with
        its references written alike (where their places are known); `None` if there is no prediction.
    """
    if prediction is None or isinstance(prediction, str):
        return prediction
    if isinstance(prediction.get("text"), str):
        return prediction["text"]
    spans = _structured_spans(prediction.get("evidence") or [], "evidence")
    answer = str(prediction.get("answer") or "")
    places = [item for item in prediction.get("references") or [] if "char_start" in item]
    for item in sorted(places, key=lambda item: -item["char_start"]):
        window = f"{item['start']:.2f} - {item['end']:.2f}"
        answer = answer[: item["char_start"]] + window + answer[item["char_end"] :]
    written = " ".join(f"{start:.2f} - {end:.2f}" for start, end in spans)
    return f"{written} {DELIMITER}{answer}".lstrip()


__all__ = [
    "CAPTION_TASKS",
    "CHOICE_TASKS",
    "DELIMITER",
    "LETTERS",
    "PROTOCOLS",
    "RULES",
    "Parsed",
    "Rules",
    "answer_windows",
    "dashed_windows",
    "option_letter",
    "parse_structured",
    "parse_text",
    "prediction_text",
]
