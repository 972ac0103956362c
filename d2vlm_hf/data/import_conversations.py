# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""Records of conversation files: E.T. Instruct, the authors' SFT file and their preference file.

Each reader yields the columns of a row, or [`Dropped`] with the reason; `importers.py` turns them into rows.
"""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from .clauses import EVIDENCE
from .import_formats import Dropped, is_mapping_of, stream_json


Record = dict[str, Any] | Dropped

TIME_TOKEN = "<vid>"
_UNIT = r"(?:\s*(?:seconds?|secs?|s)\b)?"
# A range is two tokens with a dash or "to" between them, or "between <vid> and <vid>"; any other token is one time.
_RANGE = re.compile(
    rf"<vid>{_UNIT}\s*(?:[-–—~]|to|until|till)\s*<vid>{_UNIT}"
    rf"|(?<=\b[Bb]etween )<vid>{_UNIT}\s+and\s+<vid>{_UNIT}"
    rf"|<vid>{_UNIT}"
)
_PLACEHOLDER = re.compile(r"^\s*(?:<(?:image|video)>\s*)+|\s*<(?:image|video)>\s*$")
_GROUNDING_PART = re.compile(rf"^\s*((?:{EVIDENCE}\s*)*)</evi>\s*")
_OPTION = re.compile(r"^\s*\(([A-Z])\)\s*(.+?)\s*$", re.M)
_LETTER = re.compile(r"\(([A-Z])\)")


def times_to_evidence(text: str, times: Sequence[float]) -> tuple[str, list[list[float]], int] | Dropped:
    """Turns `<vid>` tokens into one `<evi>` per range or single time, and their values into spans.

    Args:
        text (`str`):
            A text in which every time is a `<vid>` token.
        times (`Sequence[float]`):
            Values of the tokens in seconds, in order; there may be more for texts that follow.

    Returns:
        `tuple` of the new text, its spans and how many times it used; `Dropped` if there are too few. A single time
        gives a span without length, which the filter widens.
    """
    if text.count(TIME_TOKEN) > len(times):
        return Dropped("times and tokens differ in number")
    spans, rest = [], iter(times)

    def replace(match: re.Match) -> str:
        start = next(rest)
        spans.append([start, next(rest) if match.group().count(TIME_TOKEN) == 2 else start])
        return EVIDENCE

    return _RANGE.sub(replace, text), spans, text.count(TIME_TOKEN)


def _pairs_to_evidence(text: str, times: Sequence[float]) -> tuple[str, list[list[float]], int] | Dropped:
    """Spans of a text that holds `<evi>` tokens: two times each, or a single one for a single moment."""
    count = text.count(EVIDENCE)
    if len(times) >= 2 * count:
        return text, [list(times[k : k + 2]) for k in range(0, 2 * count, 2)], 2 * count
    if len(times) == count == 1:
        return text, [[times[0], times[0]]], 1
    return Dropped("times and tokens differ in number")


def _grounded_answer(text: str, times: Sequence[float]) -> tuple[str, list[list[float]], int] | Dropped:
    """Takes the `<evi>` x K + `</evi>` part off an answer, which must name the same K events again."""
    match = _GROUNDING_PART.match(text)
    if match is None:
        return Dropped("answer has no </evi>")
    answer = text[match.end() :].strip()
    if answer.count(EVIDENCE) != match.group(1).count(EVIDENCE):
        return Dropped("grounding part and answer name different numbers of events")
    return _pairs_to_evidence(answer, times)


def _choices(question: str, answer: str) -> dict[str, Any]:
    """Options that a question lists as "(A) ..." lines, and the one that the answer names first."""
    found = _OPTION.findall(question)
    letters, options = [letter for letter, _ in found], [option for _, option in found]
    named = _LETTER.search(answer)
    if letters != [chr(65 + k) for k in range(len(letters))] or len(set(options)) != len(options) or len(options) < 2:
        return {}
    right = ord(named[1]) - 65 if named else -1
    return {"options": options, "correct_option": right if right < len(options) else -1}


_Reader = Callable[[str, Sequence[float]], tuple[str, list[list[float]], int] | Dropped]


def _flat(times: Any) -> list[float]:
    """A list of times, whether the file holds them flat or as pairs."""
    return [float(time) for item in times or [] for time in (item if isinstance(item, (list, tuple)) else [item])]


def _turns(turns: Any, src: Any, tgt: Any, readers: tuple[_Reader, _Reader]) -> list[dict[str, Any]] | Dropped:
    """Question and answer of each pair of turns; the times of a conversation run on over its turns."""
    if not isinstance(turns, list) or not turns or not all(is_mapping_of(turn, "from", "value") for turn in turns):
        return Dropped("conversation is malformed")
    if [turn["from"] for turn in turns] != ["human", "gpt"] * (len(turns) // 2):
        return Dropped("conversation is malformed")
    records, left = [], [_flat(src), _flat(tgt)]
    for pair in zip(turns[::2], turns[1::2], strict=True):
        texts, spans = [], []
        for side, (turn, read) in enumerate(zip(pair, readers, strict=True)):
            result = read(_PLACEHOLDER.sub("", turn["value"]).strip(), left[side])
            if isinstance(result, Dropped):
                return result
            texts.append(result[0])
            spans.append(result[1])
            left[side] = left[side][result[2] :]
        if not all(texts):
            return Dropped("question or answer is empty")
        record = {"question": texts[0], "question_spans": spans[0], "answer": texts[1], "spans": spans[1]}
        records.append(record | _choices(*texts))
    return Dropped("times and tokens differ in number") if any(left) else records


def _common(sample: Mapping[str, Any], name: str) -> dict[str, Any]:
    columns = {"video": sample["video"], "duration": sample.get("duration")}
    return columns | {"task": sample.get("task") or "unknown", "source": sample.get("source") or name}


def _conversations(path: Any, name: str, readers: tuple[_Reader, _Reader]) -> Iterator[Record]:
    for index, sample in stream_json(path):
        if not is_mapping_of(sample, "video", "conversations"):
            yield Dropped("record is malformed")
            continue
        records = _turns(sample["conversations"], sample.get("src"), sample.get("tgt"), readers)
        if isinstance(records, Dropped):
            yield records
            continue
        for number, record in enumerate(records):
            yield {"id": f"{name}-{index}" + (f"-{number}" if number else ""), **_common(sample, name), **record}


def et_instruct_records(path: str | os.PathLike) -> Iterator[Record]:
    """Columns of the rows of E.T. Instruct 164K, in which every time is a `<vid>` token.

    Args:
        path (`str` or `PathLike`): The JSON file.
    """
    return _conversations(path, "et_instruct", (times_to_evidence, times_to_evidence))


def d2vlm_sft_records(path: str | os.PathLike) -> Iterator[Record]:
    """Columns of the rows of the authors' SFT file, in which every range is an `<evi>` token.

    Args:
        path (`str` or `PathLike`): The JSON file.
    """
    return _conversations(path, "d2vlm_sft", (_pairs_to_evidence, _grounded_answer))


# The third "_"-separated field of a reject key, as far as the authors' code names it; other names say what they do.
_TEXT_KINDS = {"f": "tamper", "qwen": "tamper", "repeat": "repeat"}
_GROUNDING_KINDS = {"shift": "shift", "mov": "shift", "add": "add", "insert": "add", "drop": "drop", "del": "drop"}
_GROUNDING_KINDS |= {"remov": "drop", "miss": "drop", "merg": "merge"}


def _field(key: str) -> str:
    fields = key.lower().split("_")
    return fields[2] if len(fields) > 2 else fields[-1]


def _kind(key: str, chosen: list, rejected: list) -> str:
    """Which perturbation a reject key stands for; where its name does not tell, the spans do."""
    name = _field(key)
    if name in _TEXT_KINDS:
        return _TEXT_KINDS[name]
    for start, kind in _GROUNDING_KINDS.items():
        if name.startswith(start):
            return kind
    if chosen == rejected:
        return "tamper"
    if len(rejected) == len(chosen):
        return "shift"
    if len(rejected) > len(chosen):
        return "add"
    new = [span for span in rejected if span not in chosen]
    covers = any(sum(start <= s and e <= end for s, e in chosen) > 1 for start, end in new)
    return "merge" if covers else "drop"


def _side(value: Any, key: str) -> Any:
    """Times of one side: the file holds them by side, or once for all sides."""
    return value.get(key) if isinstance(value, Mapping) else value


def d2vlm_fpo_records(path: str | os.PathLike, kinds: Mapping[str, str], tokenizer: Any = None) -> Iterator[Record]:
    """Columns of the rows of the authors' preference file; the factor is left to the caller.

    Args:
        path (`str` or `PathLike`): The JSON file, or a `torch.save`d one.
        kinds (`Mapping[str, str]`): Reject key, or its third field -> perturbation, where it is not to be found out.
        tokenizer (*optional*): Decodes token ids.

    Raises:
        ValueError: If a `torch.save`d file cannot be read safely, or holds token ids and there is no tokenizer.
    """
    readers = (_pairs_to_evidence, _grounded_answer)
    for index, sample in _token_samples(path, tokenizer) if _is_torch_file(path) else stream_json(path):
        if not is_mapping_of(sample, "video", "conversations") or not is_mapping_of(sample["conversations"], "chosen"):
            yield Dropped("record is malformed")
            continue
        sides = {}
        for key, turns in sample["conversations"].items():
            records = _turns(turns, _side(sample.get("src"), key), _side(sample.get("tgt"), key), readers)
            single = isinstance(records, Dropped) or len(records) == 1
            sides[key] = records if single else Dropped("preference conversation has several turns")
        chosen = sides.pop("chosen")
        for key, rejected in sides.items():
            fault = next((side for side in (chosen, rejected) if isinstance(side, Dropped)), None)
            yield fault or _pair(sample, f"d2vlm_fpo-{index}-{key}", key, chosen[0], rejected[0], kinds)
        if not sides:
            yield Dropped("record has no rejected side")


def _pair(
    sample: Mapping[str, Any], name: str, key: str, chosen: Mapping, rejected: Mapping, kinds: Mapping[str, str]
) -> Record:
    """Columns of a preference row from the two sides."""
    if (chosen["answer"], chosen["spans"]) == (rejected["answer"], rejected["spans"]):
        return Dropped("rejected side equals the chosen one")
    kind = kinds.get(key) or kinds.get(_field(key)) or _kind(key, chosen["spans"], rejected["spans"])
    return {
        "id": name,
        **_common(sample, "d2vlm_fpo"),
        **chosen,
        "prompt": [{"role": "user", "content": chosen["question"]}],
        "chosen": [{"role": "assistant", "content": chosen["answer"]}],
        "rejected": [{"role": "assistant", "content": rejected["answer"]}],
        "chosen_spans": chosen["spans"],
        "rejected_spans": rejected["spans"],
        "perturbation": kind,
        "edit": f"by the authors ({key})",
    }


def _is_torch_file(path: str | os.PathLike) -> bool:
    return os.path.splitext(path)[1] in (".pt", ".pth", ".bin", ".pkl")


def _token_samples(path: str | os.PathLike, tokenizer: Any) -> Iterator[tuple[int, Any]]:
    """Samples of a `torch.save`d file, their token ids decoded; only what `weights_only=True` lets through."""
    import torch

    try:
        samples = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{os.fspath(path)!r} holds pickled objects other than tensors, numbers, texts and lists: loading it "
            "could run foreign code. Import the JSON file it was made from."
        ) from error
    if not isinstance(samples, list):
        raise ValueError(
            f"{os.fspath(path)!r} holds a {type(samples).__name__} where a list of samples is needed: it is no "
            "annotation file. Import the JSON file it was made from."
        )
    for index, sample in enumerate(samples):
        yield index, _decoded(sample, tokenizer, path)


def _decoded(value: Any, tokenizer: Any, path: Any) -> Any:
    """The same value with token ids as text; negative ids are placeholders of the video."""
    if isinstance(value, Mapping):
        return {
            key: _decoded_text(item, tokenizer, path) if key == "value" else _decoded(item, tokenizer, path)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_decoded(item, tokenizer, path) for item in value]
    return value.tolist() if hasattr(value, "tolist") else value


def _decoded_text(value: Any, tokenizer: Any, path: Any) -> str:
    if isinstance(value, str):
        return value
    if tokenizer is None:
        raise ValueError(
            f"{os.fspath(path)!r} holds token ids: they mean nothing without their tokenizer. Pass tokenizer=..., the "
            "one the file was made with."
        )
    ids = value.tolist() if hasattr(value, "tolist") else list(value)
    return tokenizer.decode([token for token in ids if token >= 0])


__all__ = ["TIME_TOKEN", "Record", "d2vlm_fpo_records", "d2vlm_sft_records", "et_instruct_records", "times_to_evidence"]
